//! One bounded HTTP request to an issuer of credentials. Response bodies hold secrets, so no error quotes them.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;

use super::Issuer;
use crate::{
    http_client::{self, Client, Reuse},
    reason::Reason,
    wait,
};

/// Far more than any response of an issuer without its service catalog.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// A failed refresh. Holds no secret and no part of a body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct FetchError {
    /// The issuer that rejected the facade's user or agency, and the HTTP status: 401 or 403.
    pub rejected_by: Option<(Issuer, u16)>,
    /// The shortest wait before the next attempt.
    pub wait: Duration,
    /// For the log.
    pub cause: String,
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
        let status = response.status;
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
}

impl From<http_client::Error> for FetchError {
    fn from(error: http_client::Error) -> Self {
        let what = match error.reason {
            Reason::UpstreamResponseTooLarge => {
                return Self::unavailable("the reply is longer than 64 KiB");
            }
            _ if error.timed_out => "no reply in time",
            _ if error.is_connect() => "cannot connect",
            _ => "the reply is broken",
        };
        Self::unavailable(format!("{what}: {}", error.cause))
    }
}

/// A complete response. Headers and body may hold a secret.
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl fmt::Debug for Response {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Response");
        shown.field("status", &self.status).finish_non_exhaustive()
    }
}

/// Sends a request and reads the response, up to 64 KiB.
pub(super) async fn send(
    client: &Client,
    request: Request<Full<Bytes>>,
) -> Result<Response, FetchError> {
    let mut response = client.send(request, Reuse::Forbidden).await?;
    let body = response.body_up_to(MAX_BODY_BYTES).await?;
    Ok(Response {
        status: response.status(),
        headers: response.headers().clone(),
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_shown_without_its_headers_and_body() {
        let response = Response {
            status: 201,
            headers: HeaderMap::from_iter([(
                http::HeaderName::from_static("x-subject-token"),
                http::HeaderValue::from_static("canary"),
            )]),
            body: Bytes::from_static(b"canary"),
        };

        assert_eq!(format!("{response:?}"), "Response { status: 201, .. }");
    }
}
