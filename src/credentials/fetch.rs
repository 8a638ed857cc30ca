//! One bounded HTTP request to an issuer of credentials. Response bodies hold secrets, so no error quotes them.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use reqwest::RequestBuilder;

use super::Issuer;
use crate::{
    http_client::{self, BodyError, BuildError, SystemRoots},
    wait,
};

/// Far more than any response of an issuer without its service catalog.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Connect and read timeout of the metadata service, as in the vendor's SDK. The service runs on the same host.
const METADATA_TIMEOUT: Duration = Duration::from_secs(3);

/// A failed refresh. Holds no secret and no part of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FetchError {
    /// The issuer that rejected the facade's user or agency, and the HTTP status: 401 or 403.
    pub(super) rejected_by: Option<(Issuer, u16)>,
    /// The shortest wait before the next attempt.
    pub(super) wait: Duration,
    /// For the log.
    pub(super) cause: String,
}

impl FetchError {
    /// A failure without a rejection, after which ordinary backoff is enough.
    pub(super) fn unavailable(cause: impl Into<String>) -> Self {
        Self {
            rejected_by: None,
            wait: Duration::ZERO,
            cause: cause.into(),
        }
    }

    /// The error of a response with an unexpected status. A 401 or 403 is a rejection, followed by at least
    /// `wait_if_rejected`.
    pub(super) fn from_response(
        issuer: Issuer,
        response: &Response,
        wait_if_rejected: Duration,
    ) -> Self {
        let status = response.status.as_u16();
        let headers = &response.headers;
        let requested = wait::retry_after(headers, wait::date(headers)).unwrap_or_default();
        let rejected = matches!(status, 401 | 403);
        Self {
            rejected_by: rejected.then_some((issuer, status)),
            wait: if rejected {
                requested.max(wait_if_rejected)
            } else {
                requested
            },
            cause: format!("HTTP status {status}"),
        }
    }

    fn from_transport(error: &reqwest::Error) -> Self {
        let what = if error.is_timeout() {
            "no reply in time"
        } else if error.is_connect() {
            "cannot connect"
        } else {
            "the reply is broken"
        };
        let cause = http_client::cause(error);
        Self::unavailable(format!("{what}: {cause}"))
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

/// A complete response.
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The client for the identity service.
pub(super) fn identity_client(config: &http_client::Config) -> Result<reqwest::Client, BuildError> {
    http_client::build(http_client::client_builder(config)?)
}

/// The client for the metadata service: never through a proxy.
pub(super) fn metadata_client() -> Result<reqwest::Client, BuildError> {
    let direct = http_client::Config {
        tls: http_client::tls_config(SystemRoots::Ignored, None)?,
        https_only: false,
        proxy: None,
        connect_timeout: METADATA_TIMEOUT,
    };
    http_client::build(http_client::client_builder(&direct)?.read_timeout(METADATA_TIMEOUT))
}

/// Sends a request and reads the response, up to 64 KiB.
pub(super) async fn send(request: RequestBuilder) -> Result<Response, FetchError> {
    let sent = request.send().await;
    let response = sent.map_err(|error| FetchError::from_transport(&error))?;
    let mut response = http::Response::from(response);
    let body = http_client::read_body(response.body_mut(), MAX_BODY_BYTES)
        .await
        .map_err(|error| match error {
            BodyError::TooLarge => FetchError::unavailable("the reply is longer than 64 KiB"),
            BodyError::Broken(error) => FetchError::from_transport(&error),
        })?;
    Ok(Response {
        status: response.status(),
        headers: std::mem::take(response.headers_mut()),
        body,
    })
}
