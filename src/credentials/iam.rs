//! A token from the identity service, for user and password.
//!
//! Source: IAM API reference, "Obtaining a User Token Through Password Authentication" (`POST /v3/auth/tokens`).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ::http::{HeaderValue, header};
use aws_lc_rs::digest;
use serde::Deserialize;
use serde_json::json;
use zeroize::Zeroizing;

use super::{
    cache::{Fetched, Refresh},
    fetch::{self, Answer, FetchError},
    file, secret, server_time,
};

/// After a 401 or 403 the same user and password rest for this long: the vendor locks an account after few failures.
const REST_AFTER_REJECTION: Duration = Duration::from_secs(15 * 60);

/// Who asks for a token, and where.
#[derive(Debug, Clone)]
pub struct Config {
    /// The identity service with its scheme, for example `https://iam.cn-north-4.myhuaweicloud.com`.
    pub endpoint: String,
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

/// The source behind the cache.
pub(super) struct Source {
    client: reqwest::Client,
    config: Config,
    password_file: Arc<Path>,
    /// Of the password that was sent last.
    tried: Option<[u8; 32]>,
}

impl Source {
    pub(super) fn new(client: reqwest::Client, config: Config) -> Self {
        Self {
            client,
            password_file: config.password_file.as_path().into(),
            config,
            tried: None,
        }
    }

    async fn password(&self) -> Result<Zeroizing<String>, file::Fault> {
        let text = file::read_off_thread(self.password_file.clone()).await?;
        Ok(secret::parse_password(&text)?)
    }
}

impl Refresh for Source {
    type Value = HeaderValue;

    async fn refresh(&mut self) -> Result<Fetched<HeaderValue>, FetchError> {
        let password = self.password().await.map_err(|fault| {
            let path = self.password_file.display();
            FetchError::unavailable(format!("password file {path}: {fault}"))
        })?;
        self.tried = Some(fingerprint(&password));
        let url = format!(
            "{}/v3/auth/tokens?nocatalog=true",
            self.config.endpoint.trim_end_matches('/')
        );
        let request = self
            .client
            .post(url)
            .header(header::CONTENT_TYPE, "application/json;charset=utf8")
            .body(body(&self.config, &password));
        let answer = fetch::send(request).await?;
        if !answer.status.is_success() {
            return Err(FetchError::from_answer(&answer, REST_AFTER_REJECTION));
        }
        token(&answer)
    }

    async fn changed(&mut self) {
        loop {
            tokio::time::sleep(file::REREAD_INTERVAL).await;
            if let Ok(password) = self.password().await
                && self.tried != Some(fingerprint(&password))
            {
                return;
            }
        }
    }
}

fn fingerprint(password: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, password.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn body(config: &Config, password: &str) -> Vec<u8> {
    let is_id =
        config.project.len() == 32 && config.project.bytes().all(|byte| byte.is_ascii_hexdigit());
    let project = if is_id {
        json!({ "id": config.project })
    } else {
        json!({ "name": config.project })
    };
    let user =
        json!({ "name": config.user, "password": password, "domain": { "name": config.domain } });
    json!({ "auth": {
        "identity": { "methods": ["password"], "password": { "user": user } },
        "scope": { "project": project },
    } })
    .to_string()
    .into_bytes()
}

#[derive(Deserialize)]
struct Body {
    token: Description,
}

#[derive(Deserialize)]
struct Description {
    expires_at: Option<String>,
    issued_at: Option<String>,
}

/// The token is in a header; the body only says how long it lives, so one that cannot be read is as good as one without
/// an end.
fn token(answer: &Answer) -> Result<Fetched<HeaderValue>, FetchError> {
    let value = answer
        .headers
        .get("x-subject-token")
        .ok_or_else(|| FetchError::unavailable("its answer has no X-Subject-Token"))?;
    let value = value
        .to_str()
        .ok()
        .and_then(|text| secret::parse_token(text).ok())
        .ok_or_else(|| FetchError::unavailable("its X-Subject-Token is malformed"))?;
    let described: Option<Body> = serde_json::from_slice(&answer.body).ok();
    let time = |text: Option<&String>| server_time::parse(text?);
    let (expires_at, issued_at) = described.as_ref().map_or((None, None), |body| {
        (
            time(body.token.expires_at.as_ref()),
            time(body.token.issued_at.as_ref()),
        )
    });
    let now = server_time::date(&answer.headers)
        .or(issued_at)
        .unwrap_or_else(server_time::our_clock);
    let lifetime = server_time::lifetime(expires_at, now)
        .ok_or_else(|| FetchError::unavailable("the token it gives has expired already"))?;
    Ok(Fetched { value, lifetime })
}
