//! Temporary keys from the metadata service of an ECS machine with an agency.
//!
//! Source: ECS user guide, "Obtaining Metadata" (`securitykey`), and the vendor's Python SDK 3.1.219 for the hardened mode.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde::Deserialize;
use tokio::time::{Instant, timeout};
use url::Url;

use super::{
    Issuer,
    auth::AccessKey,
    cache::{Fetched, Refresh},
    fetch::{self, FetchError, Response},
    secret, server_time,
};
use crate::{
    http_client::{self, BuildError, Client, SystemRoots},
    wait,
};

/// The time to connect to the metadata service, and the time for its reply, as in the vendor's SDK. The service runs on the same host.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The requested lifetime of a token of the hardened mode, in seconds, as in the vendor's SDK.
const TOKEN_TTL: &str = "21600";

/// A token of the hardened mode is replaced after this time, well before its six hours are over.
const TOKEN_LIFE: Duration = Duration::from_secs(5 * 60 * 60);

/// A machine without the hardened mode is probed for it again after this time.
const UNHARDENED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// In the body of a 401 on a machine without an agency, where a new token does not help.
const NO_AGENCY: &[u8] = b"Please configure Cloud Service Agency first";

/// The metadata service as a source of the cache. Its keys live 24 hours and are replaced 6 hours before their end, so a refresh
/// at 80 % of the remaining lifetime always finds new ones.
pub(super) struct MetadataKeys {
    client: Client,
    /// Begins the text of each error.
    error_prefix: String,
    hardened: Hardened,
    /// The previous key, whose guard is reused if the service returns the key again.
    previous: Option<Arc<AccessKey>>,
}

/// Whether the machine requires tokens, the hardened mode.
enum Hardened {
    Unknown,
    Token { value: HeaderValue, until: Instant },
    Absent { until: Instant },
}

impl MetadataKeys {
    pub(super) fn new(endpoint: &Url, error_prefix: String) -> Result<Self, BuildError> {
        let direct = http_client::Config {
            tls: http_client::tls_config(SystemRoots::Ignored, None)?,
            proxy: None,
            connect_timeout: TIMEOUT,
        };
        Ok(Self {
            client: Client::new(&direct, endpoint, 0)?,
            error_prefix,
            hardened: Hardened::Unknown,
            previous: None,
        })
    }

    async fn send(&self, request: http::request::Builder) -> Result<Response, FetchError> {
        let request = request.body(Full::<Bytes>::default());
        let request = request.expect("path and headers are valid");
        timeout(2 * TIMEOUT, fetch::send(&self.client, request))
            .await
            .unwrap_or_else(|_| Err(FetchError::unavailable("no reply in time")))
    }

    /// The token to send, if the machine supports them.
    async fn token(&mut self) -> Result<Option<HeaderValue>, FetchError> {
        match &self.hardened {
            Hardened::Token { value, until } if Instant::now() < *until => {
                return Ok(Some(value.clone()));
            }
            Hardened::Absent { until } if Instant::now() < *until => return Ok(None),
            _ => {}
        }
        let response = self.request_token().await?;
        if matches!(response.status, 404 | 405 | 503) {
            self.hardened = Hardened::Absent {
                until: Instant::now() + UNHARDENED_FOR,
            };
            return Ok(None);
        }
        self.store_token(&response).map(Some)
    }

    async fn request_token(&self) -> Result<Response, FetchError> {
        let request = Request::put("/meta-data/latest/api/token");
        self.send(request.header("x-metadata-token-ttl-seconds", TOKEN_TTL))
            .await
    }

    fn store_token(&mut self, response: &Response) -> Result<HeaderValue, FetchError> {
        if response.status != 200 {
            return Err(unexpected(response));
        }
        let value = str::from_utf8(&response.body)
            .ok()
            .and_then(|text| secret::parse_token(text).ok())
            .ok_or_else(|| {
                FetchError::unavailable("the metadata token in the reply is malformed")
            })?;
        self.hardened = Hardened::Token {
            value: value.clone(),
            until: Instant::now() + TOKEN_LIFE,
        };
        Ok(value)
    }

    async fn request_key(&self, token: Option<HeaderValue>) -> Result<Response, FetchError> {
        let mut request = Request::get("/openstack/latest/securitykey");
        if let Some(token) = token {
            request = request.header("x-metadata-token", token);
        }
        self.send(request).await
    }

    async fn key(&mut self) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
        let token = self.token().await?;
        let mut response = self.request_key(token).await?;
        if response.status == 401 {
            let mut parts = response.body.windows(NO_AGENCY.len());
            if parts.any(|part| part == NO_AGENCY) {
                return Err(FetchError {
                    cause: "no agency is configured for this machine".to_owned(),
                    ..unexpected(&response)
                });
            }
            // The token was rejected, or the hardened mode has just been switched on.
            self.hardened = Hardened::Unknown;
            let token = self.request_token().await?;
            let token = self.store_token(&token)?;
            response = self.request_key(Some(token)).await?;
        }
        if response.status != 200 {
            return Err(unexpected(&response));
        }
        let fetched = temporary_key(&response, self.previous.as_deref())?;
        self.previous = Some(fetched.value.clone());
        Ok(fetched)
    }
}

impl Refresh for MetadataKeys {
    type Value = Arc<AccessKey>;

    async fn refresh(&mut self) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
        self.key().await.map_err(|error| FetchError {
            cause: format!("{}{error}", self.error_prefix),
            ..error
        })
    }
}

/// The error of a response with an unexpected status.
fn unexpected(response: &Response) -> FetchError {
    FetchError::from_response(Issuer::Metadata, response, Duration::ZERO)
}

#[derive(Deserialize)]
struct SecurityKey {
    credential: TemporaryKey,
}

#[derive(Deserialize)]
struct TemporaryKey {
    access: String,
    secret: String,
    securitytoken: String,
    expires_at: Option<String>,
}

/// Reads the temporary key in a response of the metadata service.
///
/// # Errors
/// [`FetchError`]: no usable key.
pub fn temporary_key(
    response: &Response,
    previous: Option<&AccessKey>,
) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
    // The parser's own message could quote the secret.
    let SecurityKey { credential } = serde_json::from_slice(&response.body)
        .map_err(|_| FetchError::unavailable("the reply holds no temporary key"))?;
    let key = AccessKey::parse(
        &credential.access,
        &credential.secret,
        Some(&credential.securitytoken),
    )
    .map_err(|error| FetchError::unavailable(error.to_string()))?;
    let expires_at = credential
        .expires_at
        .as_deref()
        .and_then(server_time::parse);
    let now = wait::date(&response.headers).unwrap_or_else(server_time::our_clock);
    let lifetime = server_time::lifetime(expires_at, now)
        .ok_or_else(|| FetchError::unavailable("the key in the reply has already expired"))?;
    Ok(Fetched {
        value: Arc::new(key.following(previous)),
        lifetime: Some(lifetime),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::fake_issuer::{FakeIssuer, response};

    const KEY: &str = r#"{"credential":{"access":"AK","secret":"canary-sk","securitytoken":"canary-st","expires_at":"2026-10-30T20:00:00.000000Z"}}"#;
    const DATE: &str = "Date: Fri, 30 Oct 2026 08:00:00 GMT\r\n";
    const PUT: &str = "PUT /meta-data/latest/api/token";
    const GET: &str = "GET /openstack/latest/securitykey";

    fn source(issuer: &FakeIssuer) -> MetadataKeys {
        let endpoint = issuer.endpoint.parse().unwrap();
        MetadataKeys::new(&endpoint, String::new()).unwrap()
    }

    fn key() -> String {
        response("200 OK", DATE, KEY)
    }

    fn status(status: &str) -> String {
        response(status, "", "canary")
    }

    #[tokio::test]
    async fn without_the_hardened_mode_the_key_is_fetched_bare_and_the_mode_not_looked_for_again() {
        for absent in ["404 Not Found", "405 Not Allowed", "503 Unavailable"] {
            let issuer = FakeIssuer::start(move |_, request| {
                if request.starts_with("PUT") {
                    status(absent)
                } else {
                    key()
                }
            })
            .await;
            let mut source = source(&issuer);

            let fetched = source.refresh().await.unwrap();
            source.refresh().await.unwrap();

            assert_eq!(fetched.value.access_key_id, "AK");
            assert_eq!(fetched.value.security_token.as_ref().unwrap(), "canary-st");
            assert_eq!(fetched.lifetime, Some(Duration::from_secs(12 * 3600)));
            assert_eq!(issuer.request_lines(), [PUT, GET, GET], "{absent}");
            assert!(!issuer.requests()[1].contains("x-metadata-token"));
        }
    }

    #[tokio::test]
    async fn in_the_hardened_mode_one_token_serves_several_fetches() {
        let issuer = FakeIssuer::start(|_, request| {
            if request.starts_with("PUT") {
                response("200 OK", "", "metadata-token\n")
            } else if request.contains("x-metadata-token: metadata-token\r\n") {
                key()
            } else {
                status("401 Unauthorized")
            }
        })
        .await;
        let mut source = source(&issuer);

        source.refresh().await.unwrap();
        source.refresh().await.unwrap();

        assert_eq!(issuer.request_lines(), [PUT, GET, GET]);
        assert!(issuer.requests()[0].contains("x-metadata-token-ttl-seconds: 21600\r\n"));
    }

    #[tokio::test]
    async fn a_rejected_metadata_token_is_replaced_once() {
        let issuer = FakeIssuer::start(|nth, request| match (nth, request.starts_with("PUT")) {
            (_, true) => response("200 OK", "", &format!("token-{nth}")),
            (_, false) if request.contains("token-3") => key(),
            (_, false) => status("401 Unauthorized"),
        })
        .await;

        source(&issuer).refresh().await.unwrap();

        assert_eq!(issuer.request_lines(), [PUT, GET, PUT, GET]);
    }

    #[tokio::test]
    async fn after_a_401_a_machine_without_the_hardened_mode_is_an_error() {
        let issuer = FakeIssuer::start(|_, request| {
            status(if request.starts_with("PUT") {
                "404 Not Found"
            } else {
                "401 Unauthorized"
            })
        })
        .await;

        let error = source(&issuer).refresh().await.unwrap_err();

        assert_eq!(error, FetchError::unavailable("HTTP status 404"));
        assert_eq!(issuer.request_lines(), [PUT, GET, PUT]);
    }

    #[tokio::test]
    async fn a_machine_without_an_agency_is_a_rejection_that_no_new_token_is_fetched_for() {
        let issuer = FakeIssuer::start(|_, request| {
            if request.starts_with("PUT") {
                response("200 OK", "", "t")
            } else {
                let body = "{\"message\":\"Please configure Cloud Service Agency first.\"}";
                response("401 Unauthorized", "", body)
            }
        })
        .await;

        let error = source(&issuer).refresh().await.unwrap_err();

        assert_eq!(error.rejected_by, Some((Issuer::Metadata, 401)));
        assert_eq!(
            error.to_string(),
            "no agency is configured for this machine"
        );
        assert_eq!(issuer.request_lines(), [PUT, GET]);
    }

    #[tokio::test]
    async fn every_other_response_is_an_error_that_quotes_nothing_of_it() {
        let expired = KEY.replace("2026-10-30T20", "2026-10-30T07");
        let cases = [
            ("no JSON", response("200 OK", DATE, "canary")),
            ("no key", response("200 OK", DATE, "{\"credential\":{}}")),
            (
                "a number for the secret",
                response("200 OK", DATE, &KEY.replace("\"canary-sk\"", "4711")),
            ),
            (
                "a blank in the secret",
                response("200 OK", DATE, &KEY.replace("canary-sk", "canary sk")),
            ),
            ("expired", response("200 OK", DATE, &expired)),
            ("error", status("500 Internal Server Error")),
            (
                "redirect",
                response("302 Found", "Location: /canary\r\n", ""),
            ),
        ];

        for (name, response) in cases {
            let issuer = FakeIssuer::start(move |_, request| {
                if request.starts_with("PUT") {
                    status("404 Not Found")
                } else {
                    response.clone()
                }
            })
            .await;

            let error = source(&issuer).refresh().await.unwrap_err();

            let printed = format!("{error} {error:?}");
            assert!(
                !printed.contains("canary") && !printed.contains("4711"),
                "{name}: {printed}"
            );
        }
    }

    #[tokio::test]
    async fn a_key_that_the_service_repeats_keeps_its_guard() {
        let issuer = FakeIssuer::start(|nth, request| {
            if request.starts_with("PUT") {
                status("404 Not Found")
            } else if nth < 4 {
                key()
            } else {
                response("200 OK", DATE, &KEY.replace("AK", "AK2"))
            }
        })
        .await;
        let mut source = source(&issuer);

        let first = source.refresh().await.unwrap().value;
        let repeated = source.refresh().await.unwrap().value;
        let another = source.refresh().await.unwrap().value;

        assert!(Arc::ptr_eq(&first.guard, &repeated.guard));
        assert!(!Arc::ptr_eq(&first.guard, &another.guard));
    }
}
