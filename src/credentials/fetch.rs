//! One bounded HTTP exchange with an issuer of credentials. Its bodies hold secrets, so no fault ever quotes one.

use std::{error::Error as _, fmt, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use reqwest::RequestBuilder;

use crate::{
    error_chain::root_cause,
    http_client::{self, BodyError, BuildError, SystemRoots},
    wait,
};

/// Far more than any answer of an issuer without its service catalog.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Connect and read timeout of the metadata service, as in the vendor's SDK. It answers from the same host.
const METADATA_TIMEOUT: Duration = Duration::from_secs(3);

/// Why there is no new credential. Holds no secret and no part of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FetchError {
    /// The issuer refuses us: 401 or 403.
    Rejected {
        http_status: u16,
        /// Not to be tried again before.
        wait: Duration,
        fault: String,
    },
    /// Anything else.
    Unavailable {
        /// Not to be tried again before.
        wait: Duration,
        fault: String,
    },
}

impl FetchError {
    /// A failure that ordinary backoff may follow.
    pub(super) fn unavailable(fault: impl Into<String>) -> Self {
        Self::Unavailable {
            wait: Duration::ZERO,
            fault: fault.into(),
        }
    }

    /// What an answer other than the hoped-for one means. `wait_if_rejected` follows 401 and 403.
    pub(super) fn from_answer(answer: &Answer, wait_if_rejected: Duration) -> Self {
        let http_status = answer.status.as_u16();
        let fault = format!("it answers {http_status}");
        let asked =
            wait::retry_after(&answer.headers, wait::date(&answer.headers)).unwrap_or_default();
        match http_status {
            401 | 403 => Self::Rejected {
                http_status,
                wait: asked.max(wait_if_rejected),
                fault,
            },
            _ => Self::Unavailable { wait: asked, fault },
        }
    }

    /// The shortest wait before the next try.
    pub(super) fn wait(&self) -> Duration {
        match self {
            Self::Rejected { wait, .. } | Self::Unavailable { wait, .. } => *wait,
        }
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected { fault, .. } | Self::Unavailable { fault, .. } => f.write_str(fault),
        }
    }
}

/// A whole answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The client for the identity service.
pub(super) fn identity_client(config: &http_client::Config) -> Result<reqwest::Client, BuildError> {
    http_client::build(without_pool(config)?)
}

/// The client for the metadata service: never through a proxy.
pub(super) fn metadata_client() -> Result<reqwest::Client, BuildError> {
    let direct = http_client::Config {
        tls: http_client::tls_config(SystemRoots::Ignored, None)?,
        https_only: false,
        proxy: None,
        connect_timeout: METADATA_TIMEOUT,
    };
    http_client::build(without_pool(&direct)?.read_timeout(METADATA_TIMEOUT))
}

/// Fetches are hours apart: an idle connection would only be found dead.
fn without_pool(config: &http_client::Config) -> Result<reqwest::ClientBuilder, BuildError> {
    Ok(http_client::client_builder(config)?.pool_max_idle_per_host(0))
}

/// Sends a request and reads the answer, up to 64 KiB.
pub(super) async fn send(request: RequestBuilder) -> Result<Answer, FetchError> {
    let mut response = request.send().await.map_err(|error| no_answer(&error))?;
    let body = http_client::read_body(&mut response, MAX_BODY_BYTES)
        .await
        .map_err(|error| match error {
            BodyError::TooLarge => FetchError::unavailable("its answer is longer than 64 KiB"),
            BodyError::Broken(error) => no_answer(&error),
        })?;
    Ok(Answer {
        status: response.status(),
        headers: std::mem::take(response.headers_mut()),
        body,
    })
}

fn no_answer(error: &reqwest::Error) -> FetchError {
    let what = if error.is_timeout() {
        "it does not answer in time"
    } else if error.is_connect() {
        "it cannot be reached"
    } else {
        "its answer is broken"
    };
    // The message of the outermost error holds the URL, so only its sources are shown.
    let cause = error
        .source()
        .map_or_else(|| "no details".to_owned(), |e| root_cause(e).to_string());
    FetchError::unavailable(format!("{what}: {cause}"))
}
