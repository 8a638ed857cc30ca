//! Temporary keys from the metadata service of an ECS machine, whose agency stands for a user.
//!
//! Source: ECS user guide, "Obtaining Metadata" (`securitykey`), and the vendor's Python SDK 3.1.219 for the hardened mode.

use std::{sync::Arc, time::Duration};

use ::http::{HeaderValue, StatusCode};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    auth::AccessKey,
    cache::{Fetched, Refresh},
    fetch::{self, Answer, FetchError},
    secret, server_time,
};

/// Life that we ask for a token of the hardened mode, in seconds, as the vendor's SDK does.
const TOKEN_TTL: &str = "21600";

/// When such a token is replaced: well before its six hours are over.
const TOKEN_LIFE: Duration = Duration::from_secs(5 * 60 * 60);

/// How long a machine without the hardened mode is taken to stay so.
const UNHARDENED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// What a 401 says on a machine that no agency is bound to. A new token would not help.
const NO_AGENCY: &[u8] = b"Please configure Cloud Service Agency first";

/// The source behind the cache. The keys live 24 hours and are replaced 6 hours before their end, so the cache's look at
/// 80 % of what is left always finds new ones.
pub(super) struct Source {
    client: reqwest::Client,
    endpoint: String,
    hardened: Hardened,
    /// The key before, so that its guard is kept where the service repeats it.
    previous: Option<Arc<AccessKey>>,
}

/// What is known of the hardened mode.
enum Hardened {
    Unknown,
    Token { value: HeaderValue, until: Instant },
    Absent { until: Instant },
}

impl Source {
    pub(super) fn new(client: reqwest::Client, endpoint: &str) -> Self {
        Self {
            client,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            hardened: Hardened::Unknown,
            previous: None,
        }
    }

    /// The token to send now, if the machine knows such tokens.
    async fn token(&mut self) -> Result<Option<HeaderValue>, FetchError> {
        match &self.hardened {
            Hardened::Token { value, until } if Instant::now() < *until => {
                return Ok(Some(value.clone()));
            }
            Hardened::Absent { until } if Instant::now() < *until => return Ok(None),
            _ => {}
        }
        let answer = self.ask_for_token().await?;
        if matches!(answer.status.as_u16(), 404 | 405 | 503) {
            self.hardened = Hardened::Absent {
                until: Instant::now() + UNHARDENED_FOR,
            };
            return Ok(None);
        }
        self.keep_token(&answer).map(Some)
    }

    async fn ask_for_token(&self) -> Result<Answer, FetchError> {
        let url = format!("{}/meta-data/latest/api/token", self.endpoint);
        let request = self
            .client
            .put(url)
            .header("x-metadata-token-ttl-seconds", TOKEN_TTL);
        fetch::send(request).await
    }

    fn keep_token(&mut self, answer: &Answer) -> Result<HeaderValue, FetchError> {
        if answer.status != StatusCode::OK {
            return Err(FetchError::from_answer(answer, Duration::ZERO));
        }
        let value = str::from_utf8(&answer.body)
            .ok()
            .and_then(|text| secret::parse_token(text).ok())
            .ok_or_else(|| FetchError::unavailable("its metadata token is malformed"))?;
        self.hardened = Hardened::Token {
            value: value.clone(),
            until: Instant::now() + TOKEN_LIFE,
        };
        Ok(value)
    }

    async fn ask_for_key(&self, token: Option<HeaderValue>) -> Result<Answer, FetchError> {
        let url = format!("{}/openstack/latest/securitykey", self.endpoint);
        let mut request = self.client.get(url);
        if let Some(token) = token {
            request = request.header("x-metadata-token", token);
        }
        fetch::send(request).await
    }
}

impl Refresh for Source {
    type Value = Arc<AccessKey>;

    async fn refresh(&mut self) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
        let token = self.token().await?;
        let mut answer = self.ask_for_key(token).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            if answer
                .body
                .windows(NO_AGENCY.len())
                .any(|window| window == NO_AGENCY)
            {
                return Err(FetchError::Rejected {
                    http_status: 401,
                    wait: Duration::ZERO,
                    fault: "no agency is configured for this machine".to_owned(),
                });
            }
            // The token was not taken, or the hardened mode has just been switched on.
            self.hardened = Hardened::Unknown;
            let token = self.ask_for_token().await?;
            let token = self.keep_token(&token)?;
            answer = self.ask_for_key(Some(token)).await?;
        }
        if answer.status != StatusCode::OK {
            return Err(FetchError::from_answer(&answer, Duration::ZERO));
        }
        let fetched = temporary_key(&answer, self.previous.as_deref())?;
        self.previous = Some(fetched.value.clone());
        Ok(fetched)
    }
}

#[derive(Deserialize)]
struct Body {
    credential: Temporary,
}

#[derive(Deserialize)]
struct Temporary {
    access: String,
    secret: String,
    securitytoken: String,
    expires_at: Option<String>,
}

fn temporary_key(
    answer: &Answer,
    previous: Option<&AccessKey>,
) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
    // The parser's own message could quote the secret.
    let Body { credential } = serde_json::from_slice(&answer.body)
        .map_err(|_| FetchError::unavailable("its answer holds no temporary key"))?;
    let key = AccessKey::parse(
        &credential.access,
        &credential.secret,
        Some(&credential.securitytoken),
    )
    .map_err(|fault| FetchError::unavailable(fault.to_string()))?;
    let expires_at = credential
        .expires_at
        .as_deref()
        .and_then(server_time::parse);
    let now = server_time::date(&answer.headers).unwrap_or_else(server_time::our_clock);
    let lifetime = server_time::lifetime(expires_at, now)
        .ok_or_else(|| FetchError::unavailable("the keys it gives have expired already"))?;
    Ok(Fetched {
        value: Arc::new(key.following(previous)),
        lifetime,
    })
}
