//! Tokens from the identity service, for user and password.
//!
//! Source: IAM API reference, "Obtaining a User Token Through Password Authentication" (`POST /v3/auth/tokens`).

use std::{path::PathBuf, time::Duration};

use http::{HeaderValue, Request, header};
use http_body_util::Full;
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;
use zeroize::Zeroizing;

use super::{
    Issuer, Token,
    cache::{Fetched, Refresh},
    fetch::{self, FetchError, Response},
    file, secret, server_time,
};
use crate::{
    files::{self, Digest, Watcher},
    http_client::{self, BuildError, Client},
    wait,
};

/// After a 401 or 403 the same user and password are not sent again for this long: the vendor locks an account after few
/// failures.
const REST_AFTER_REJECTION: Duration = Duration::from_secs(15 * 60);

/// The identity service and the user.
#[derive(Debug, Clone)]
pub struct IamConfig {
    /// The identity service with its scheme, for example `https://iam.cn-north-4.myhuaweicloud.com`.
    pub endpoint: Url,
    /// Name of the IAM user.
    pub user: String,
    /// Name of the account that the user belongs to.
    pub domain: String,
    /// File with the user's password.
    pub password_file: PathBuf,
    /// The project that the token is for. 32 hexadecimal digits are an id, anything else is a name; the name of a region's
    /// main project is the region's id.
    pub project: String,
}

impl IamConfig {
    /// The id of the project; `None` if it is a name.
    pub fn project_id(&self) -> Option<&str> {
        let id = self.project.as_str();
        let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_id.then_some(id)
    }
}

/// The identity service as a source of the cache.
pub(super) struct IamTokens {
    client: Client,
    config: IamConfig,
    password_file: Watcher,
    /// The digest of the password that the identity service rejected, if it did.
    rejected: Option<Digest>,
}

impl IamTokens {
    pub(super) fn new(http: &http_client::Config, config: IamConfig) -> Result<Self, BuildError> {
        Ok(Self {
            client: Client::new(http, &config.endpoint, 0)?,
            password_file: file::watch(config.password_file.clone(), file::INTERVAL),
            config,
            rejected: None,
        })
    }

    async fn password(&mut self) -> Result<Zeroizing<String>, file::Error> {
        let content = file::read_watched(&mut self.password_file).await?;
        parse_password(&content)
    }
}

fn parse_password(content: &[u8]) -> Result<Zeroizing<String>, file::Error> {
    Ok(secret::parse_password(file::text(content)?)?)
}

impl Refresh for IamTokens {
    type Value = Token;

    async fn refresh(&mut self) -> Result<Fetched<Token>, FetchError> {
        let password = self.password().await.map_err(|error| {
            let path = self.config.password_file.display();
            FetchError::unavailable(format!("password file {path}: {error}"))
        })?;
        let request = Request::post("/v3/auth/tokens?nocatalog=true")
            .header(header::CONTENT_TYPE, "application/json;charset=utf8")
            .body(Full::from(body(&self.config, &password)))
            .expect("path and header are valid");
        let response = fetch::send(&self.client, request).await?;
        if !(200..300).contains(&response.status) {
            let mut error =
                FetchError::from_response(Issuer::Identity, &response, REST_AFTER_REJECTION);
            let secrets = [&*password, &*self.config.user, &*self.config.domain];
            error.cause.push_str(&explanation(&response, &secrets));
            if error.rejected_by.is_some() {
                self.rejected = Some(files::digest(&[password.as_bytes()]));
            }
            return Err(error);
        }
        self.rejected = None;
        let Fetched { value, lifetime } = token(&response)?;
        Ok(Fetched {
            value: Token::for_server(value, Some(&password)),
            lifetime,
        })
    }

    /// Resolves when the password file holds another password than the rejected one.
    async fn changed(&mut self) {
        let Some(rejected) = self.rejected else {
            return std::future::pending().await;
        };
        loop {
            if let Ok(contents) = self.password_file.changed().await
                && let Ok(password) = parse_password(&contents[0])
                && files::digest(&[password.as_bytes()]) != rejected
            {
                return;
            }
        }
    }
}

fn body(config: &IamConfig, password: &str) -> String {
    let project = match config.project_id() {
        Some(id) => json!({ "id": id }),
        None => json!({ "name": config.project }),
    };
    let user =
        json!({ "name": config.user, "password": password, "domain": { "name": config.domain } });
    json!({ "auth": {
        "identity": { "methods": ["password"], "password": { "user": user } },
        "scope": { "project": project },
    } })
    .to_string()
}

/// An error response. IAM puts code and message into an object `error`, its gateway puts them at the top.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorBody {
    #[serde(alias = "error_code")]
    code: Value,
    #[serde(alias = "error_msg")]
    message: Value,
    error: Option<Box<ErrorBody>>,
}

/// Code, trace id and message of an error response, as far as they contain no secret: the rest of the cause.
pub fn explanation(response: &Response, secrets: &[&str]) -> String {
    let body: ErrorBody = serde_json::from_slice(&response.body).unwrap_or_default();
    let body = body.error.as_deref().unwrap_or(&body);
    let id = |text: &str| {
        let is_id = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_safe = (1..=64).contains(&text.len()) && text.bytes().all(is_id);
        (is_safe && !contains_any(text, secrets)).then(|| text.to_owned())
    };
    let code = match &body.code {
        Value::String(code) => id(code),
        Value::Number(code) => id(&code.to_string()),
        _ => None,
    };
    let message = body.message.as_str().map(|text| scrub(text, secrets));
    let message = message.filter(|text| !text.is_empty());
    let headers = ["x-iam-trace-id", "x-request-id"];
    let trace = headers.iter().find_map(|name| response.headers.get(*name));
    let trace = trace.and_then(|value| id(value.to_str().ok()?));
    [(", code ", code), (", trace id ", trace), (": ", message)]
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}{}", value?)))
        .collect()
}

/// The longest part of a message that is logged, in words.
const MAX_WORDS: usize = 40;

/// The message with a mark in place of each word that is, or may be, a part of a secret: only plain words and short numbers stay.
fn scrub(message: &str, secrets: &[&str]) -> String {
    let is_plain = |word: &str| {
        let word = word.trim_matches(|c: char| c.is_ascii_punctuation());
        let number = word.len() <= 4 && word.bytes().all(|byte| byte.is_ascii_digit());
        let rest = word.get(1..).unwrap_or_default();
        let letters = word.len() <= 20
            && word.bytes().all(|byte| byte.is_ascii_alphabetic())
            && rest.bytes().all(|byte| byte.is_ascii_lowercase());
        let not_ascii = word
            .chars()
            .all(|c| !c.is_ascii_alphanumeric() && !c.is_control());
        number || letters || not_ascii
    };
    let words = message.split_whitespace().take(MAX_WORDS);
    let words = words.map(
        |word| match is_plain(word) && !contains_any(word, secrets) {
            true => word,
            false => "***",
        },
    );
    words.collect::<Vec<_>>().join(" ")
}

/// Whether the text contains a word of a secret, in any case. A short word must be the whole text.
fn contains_any(text: &str, secrets: &[&str]) -> bool {
    // Each letter by itself: `str::to_lowercase` writes a sigma by its place in the word.
    let lower = |text: &str| -> String { text.chars().flat_map(char::to_lowercase).collect() };
    let text = lower(text);
    let bare = text.trim_matches(|c: char| c.is_ascii_punctuation());
    let mut words = secrets.iter().flat_map(|secret| secret.split_whitespace());
    words.any(|word| {
        let word = lower(word);
        text == word || bare == word || (word.len() > 5 && text.contains(&word))
    })
}

/// The token is in a header. The body holds only its times, so a body that cannot be parsed counts as one without times.
///
/// # Errors
/// [`FetchError`]: no usable token.
pub fn token(response: &Response) -> Result<Fetched<HeaderValue>, FetchError> {
    let value = response
        .headers
        .get("x-subject-token")
        .ok_or_else(|| FetchError::unavailable("the reply has no X-Subject-Token"))?;
    let value = value
        .to_str()
        .ok()
        .and_then(|text| secret::parse_token(text).ok())
        .ok_or_else(|| FetchError::unavailable("the X-Subject-Token in the reply is malformed"))?;
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let time = |pointer| server_time::parse(body.pointer(pointer)?.as_str()?);
    let now = wait::date(&response.headers)
        .or_else(|| time("/token/issued_at"))
        .unwrap_or_else(server_time::our_clock);
    let lifetime = server_time::lifetime(time("/token/expires_at"), now)
        .ok_or_else(|| FetchError::unavailable("the token in the reply has already expired"))?;
    Ok(Fetched {
        value,
        lifetime: Some(lifetime),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::NamedTempFile;

    use super::*;
    use crate::{
        credentials::fake_issuer::{FakeIssuer, response},
        http_client,
        options::url::Proxy,
    };

    fn http_config() -> http_client::Config {
        http_client::Config {
            tls: http_client::tls_config(http_client::SystemRoots::Ignored, None).unwrap(),
            proxy: None,
            connect_timeout: Duration::from_secs(3),
        }
    }

    fn password_file() -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(&file, "canary \"passwörd\"\n").unwrap();
        file
    }

    fn source(endpoint: &str, password_file: &NamedTempFile) -> IamTokens {
        let config = IamConfig {
            endpoint: endpoint.parse().unwrap(),
            user: "user".to_owned(),
            domain: "domain".to_owned(),
            password_file: password_file.path().to_owned(),
            project: "cn-north-4".to_owned(),
        };
        IamTokens::new(&http_config(), config).unwrap()
    }

    async fn refresh_with(response: &'static str) -> Result<Fetched<Token>, FetchError> {
        let issuer = FakeIssuer::start(move |_, _| response.to_owned()).await;
        source(&issuer.endpoint, &password_file()).refresh().await
    }

    #[tokio::test]
    async fn the_request_is_as_the_page_shows_it_and_the_token_comes_from_the_header() {
        let issuer = FakeIssuer::start(|_, _| {
            response(
                "201 Created",
                "X-Subject-Token: MIIcanary\r\nDate: Fri, 30 Oct 2026 08:00:00 GMT\r\n",
                r#"{"token":{"expires_at":"2026-10-30T20:00:00.000000Z","issued_at":"2026-10-30T07:00:00.000000Z"}}"#,
            )
        })
        .await;

        let fetched = source(&format!("{}/", issuer.endpoint), &password_file())
            .refresh()
            .await
            .unwrap();

        assert_eq!(fetched.value.value, "MIIcanary");
        assert!(fetched.value.value.is_sensitive());
        assert_eq!(
            fetched.lifetime,
            Some(Duration::from_secs(12 * 3600)),
            "by Date"
        );
        assert_eq!(
            issuer.request_lines(),
            ["POST /v3/auth/tokens?nocatalog=true"]
        );
        let request = issuer.requests().remove(0);
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("content-type: application/json;charset=utf8"));
        assert_eq!(
            serde_json::from_str::<Value>(body).unwrap(),
            json!({"auth": {
                "identity": {
                    "methods": ["password"],
                    "password": {"user": {
                        "name": "user",
                        "password": "canary \"passwörd\"",
                        "domain": {"name": "domain"},
                    }},
                },
                "scope": {"project": {"name": "cn-north-4"}},
            }})
        );
    }

    #[tokio::test]
    async fn thirty_two_hexadecimal_digits_are_a_project_id_and_anything_else_is_a_name() {
        let file = password_file();
        let mut config = source("http://127.0.0.1", &file).config;
        let scope = |config: &IamConfig| {
            let body: Value = serde_json::from_str(&body(config, "p")).unwrap();
            body["auth"]["scope"]["project"].clone()
        };

        config.project = "0483b6b16e954cb88930a360d2c4e663".to_owned();
        assert_eq!(scope(&config), json!({"id": config.project}));

        config.project = "cn-north-4_0483b6b16e954cb88930a".to_owned();
        assert_eq!(scope(&config), json!({"name": config.project}));
    }

    #[tokio::test]
    async fn the_life_comes_from_the_issuers_own_times() {
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
        let cases = [
            (
                "no Date: by issued_at",
                "HTTP/1.1 201 Created\r\nX-Subject-Token: t\r\n\r\n{\"token\":{\"expires_at\":\"2020-01-01T05:00:00Z\",\"issued_at\":\"2020-01-01T00:00:00Z\"}}",
                hours(5),
            ),
            (
                "a body that is not JSON: an hour",
                "HTTP/1.1 201 Created\r\nX-Subject-Token: t\r\n\r\n<html>",
                hours(1),
            ),
            (
                "a century: a day",
                "HTTP/1.1 201 Created\r\nX-Subject-Token: t\r\n\r\n{\"token\":{\"expires_at\":\"2126-01-01T05:00:00Z\"}}",
                hours(24),
            ),
            (
                "over already: no value",
                "HTTP/1.1 201 Created\r\nX-Subject-Token: t\r\n\r\n{\"token\":{\"expires_at\":\"2020-01-01T05:00:00Z\"}}",
                None,
            ),
        ];

        for (name, response, expected) in cases {
            let lifetime = refresh_with(response)
                .await
                .ok()
                .and_then(|fetched| fetched.lifetime);

            assert_eq!(lifetime, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn every_other_response_is_an_error_that_quotes_nothing_of_it() {
        let rest = Duration::from_secs(900);
        let none = Duration::ZERO;
        let cases = [
            ("HTTP/1.1 401 x\r\n\r\ncanary", Some(401), rest),
            ("HTTP/1.1 403 x\r\n\r\ncanary", Some(403), rest),
            ("HTTP/1.1 400 x\r\n\r\ncanary", None, none),
            (
                "HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/canary\r\n\r\n",
                None,
                none,
            ),
            (
                "HTTP/1.1 429 x\r\nRetry-After: 7\r\n\r\ncanary",
                None,
                Duration::from_secs(7),
            ),
            (
                "HTTP/1.1 503 x\r\nRetry-After: 86400\r\n\r\ncanary",
                None,
                Duration::from_secs(300),
            ),
            ("HTTP/1.1 201 x\r\n\r\ncanary", None, none),
            (
                "HTTP/1.1 201 x\r\nX-Subject-Token: can ary\r\n\r\n",
                None,
                none,
            ),
            (
                "HTTP/1.1 201 x\r\nX-Subject-Token: t\r\nContent-Length: 9\r\n\r\ncanary",
                None,
                none,
            ),
            ("canary\r\n\r\n", None, none),
        ];

        for (response, rejected, wait) in cases {
            let error = refresh_with(response).await.unwrap_err();

            assert!(!format!("{error} {error:?}").contains("can"), "{error:?}");
            assert_eq!(error.wait, wait, "{response}");
            let rejected = rejected.map(|status| (Issuer::Identity, status));
            assert_eq!(error.rejected_by, rejected, "{response}");
        }
    }

    #[tokio::test]
    async fn the_cause_has_code_message_and_trace_id_without_secrets() {
        let trace = "X-IAM-Trace-Id: trace-1\r\n";
        let cases = [
            (
                401,
                trace,
                r#"{"error":{"code":401,"message":"The username or password is wrong.","title":"Unauthorized"}}"#,
                ", code 401, trace id trace-1: The username or password is wrong.",
            ),
            (
                403,
                trace,
                r#"{"error_code":"IAM.0101","error_msg":"Locked for 15 minutes: try again later"}"#,
                ", code IAM.0101, trace id trace-1: Locked for 15 minutes: try again later",
            ),
            (
                400,
                "X-Request-Id: r-1\r\n",
                r#"{"error":{"error_code":"IAM.0001","error_msg":"\u8d26\u53f7\u4e0d\u5b58\u5728\u3002"}}"#,
                ", code IAM.0001, trace id r-1: 账号不存在。",
            ),
            (
                401,
                "X-IAM-Trace-Id: domain-4711\r\n",
                r#"{"error":{"code":"passwörd","message":"user=user, USER 'domain' passwörd \"PASSWÖRD\" canary Y2FuYXJ5 MIIabc+/== 123456 wrong\u001b[2J"}}"#,
                ": *** *** *** *** *** *** *** *** *** ***",
            ),
            (401, "", r#"{"error":"no"}"#, ""),
            (401, "", "<html>canary</html>", ""),
            (401, "X-IAM-Trace-Id: a b\r\n", "{}", ""),
        ];

        for (status, headers, body, expected) in cases {
            let reply = response(&format!("{status} x"), headers, body);
            let issuer = FakeIssuer::start(move |_, _| reply.clone()).await;
            let file = password_file();

            let error = source(&issuer.endpoint, &file).refresh().await.unwrap_err();

            let expected = format!("HTTP status {status}{expected}");
            assert_eq!(error.to_string(), expected, "{body}");
        }
    }

    #[test]
    fn a_word_with_a_secret_in_it_is_scrubbed_in_any_case() {
        let secrets = ["ΟΔΥΣΣΕΥΣ"];

        assert_eq!(
            scrub("ΟΔΥΣΣΕΥΣΑ οδυσσευσα Οδύσσεια", &secrets),
            "*** *** Οδύσσεια"
        );
    }

    #[tokio::test]
    async fn a_response_that_is_too_long_is_cut_off() {
        let issuer = FakeIssuer::start(|_, _| {
            let body = "x".repeat(1024 * 1024);
            response("201 Created", "X-Subject-Token: t\r\n", &body)
        })
        .await;

        let error = source(&issuer.endpoint, &password_file())
            .refresh()
            .await
            .unwrap_err();

        assert_eq!(error.to_string(), "the reply is longer than 64 KiB");
    }

    #[tokio::test]
    async fn the_configured_proxy_is_used_with_its_password_which_is_not_shown() {
        let proxy =
            FakeIssuer::start(|_, _| response("201 Created", "X-Subject-Token: t\r\n", "{}")).await;
        let url = proxy.endpoint.replace("http://", "http://user:canary@");
        let through = http_client::Config {
            proxy: Some(Proxy::parse(&url).unwrap()),
            ..http_config()
        };

        let file = password_file();
        let source = source("http://iam.invalid", &file);
        let mut source = IamTokens::new(&through, source.config).unwrap();
        source.refresh().await.unwrap();

        let request = &proxy.requests()[0];
        assert!(request.starts_with("POST http://iam.invalid/v3/auth/tokens?nocatalog=true "));
        assert!(request.contains("proxy-authorization: Basic dXNlcjpjYW5hcnk="));
        assert!(!format!("{through:?}").contains("canary"));
    }

    #[tokio::test]
    async fn after_a_rejection_only_another_password_counts_as_a_change() {
        let issuer = FakeIssuer::start(|_, _| response("401 Unauthorized", "", "")).await;
        let file = password_file();
        let mut source = source(&issuer.endpoint, &file);
        let interval = Duration::from_millis(5);
        source.password_file = file::watch(file.path().to_owned(), interval);
        source.refresh().await.unwrap_err();

        {
            let mut changed = std::pin::pin!(source.changed());
            for unchanged in ["canary \"passwörd\"\r\n", "", "canary \"passwörd\""] {
                fs::write(&file, unchanged).unwrap();
                let within = tokio::time::timeout(20 * interval, &mut changed).await;
                assert!(within.is_err(), "{unchanged:?}");
            }
            fs::write(&file, "another").unwrap();
            let patience = Duration::from_secs(20);
            assert!(tokio::time::timeout(patience, changed).await.is_ok());
        }
        assert_eq!(*source.password().await.unwrap(), "another");
    }

    #[tokio::test]
    async fn without_a_rejection_nothing_counts_as_a_change() {
        let issuer = FakeIssuer::start(|_, _| response("503 Unavailable", "", "")).await;
        let file = password_file();
        let mut source = source(&issuer.endpoint, &file);
        let interval = Duration::from_millis(5);
        source.password_file = file::watch(file.path().to_owned(), interval);
        source.refresh().await.unwrap_err();

        fs::write(&file, "another").unwrap();

        let changed = tokio::time::timeout(20 * interval, source.changed()).await;
        assert!(changed.is_err());
    }
}
