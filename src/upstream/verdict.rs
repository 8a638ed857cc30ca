//! What an error answer of the vendor means: first the row of its error code in [`super::overrides`], then its HTTP status.
//! Knows nothing of HTTP clients or of what a status to the caller looks like: facts in, [`Verdict`] out.

use std::time::Duration;

use tonic::Code;

use super::{envelope::BodyKind, known_codes, overrides};
use crate::reason::Reason;

/// RDS counts calls per minute and user, so a throttled call that is told nothing better waits one minute.
/// Source: RDS API reference, "API Calling Restrictions".
pub const THROTTLED_WAIT: Duration = Duration::from_secs(60);

/// A busy instance is looked at again after this time, as the vendor's own infrastructure provider does.
pub const BUSY_WAIT: Duration = Duration::from_secs(10);

/// What one error answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The gRPC code.
    pub code: Code,
    /// The reason.
    pub reason: Reason,
    /// Whether the facade itself repeats the call.
    pub repeat: Repeat,
    /// Whether the answer speaks against the credential that was used.
    pub credential: Credential,
    /// Whether `RetryInfo` goes with it, and the wait when the answer names none.
    pub retry_info: Option<Duration>,
    /// What is missing, where that is known: the type for `ResourceInfo`.
    pub resource: Option<Resource>,
    /// Whether the breaker counts it.
    pub trips_breaker: bool,
}

/// Whether the facade repeats a call after an answer, within deadline, attempts and budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Never.
    Never,
    /// At most one more attempt for this kind of answer.
    Once,
    /// As long as attempts are left, with backoff.
    Backoff,
}

/// What an answer says about the credential of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    Silent,
    /// It is refused, and a new one would not help.
    Refused,
    /// It is refused; a renewed token may help, once. Never repeated with keys.
    Renewable,
}

/// The kind of thing that an answer calls missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// The task; its name is the workflow id.
    Task,
    /// The instance; its name is the instance id.
    Instance,
    /// The project; its name is the project id.
    Project,
    /// Something else (flavor, backup, parameter, ...); its name is the vendor's code.
    Other,
}

/// What an error answer with this status, error code and kind of body means. Every status has a meaning.
///
/// A 200 is expected here only with an error object in it: it takes the row of its code, whatever status that row expects.
pub fn of_answer(http_status: u16, error_code: Option<&str>, body: BodyKind) -> Verdict {
    let row_status = match (http_status, error_code) {
        (200, Some(code)) => known_codes::documented_status(code).unwrap_or(http_status),
        _ => http_status,
    };
    let verdict = error_code
        .and_then(|code| overrides::find(code, row_status))
        .unwrap_or_else(|| by_status(row_status, body));
    Verdict {
        // Transport failures are counted where they are seen; any other answer proves that the service is there.
        trips_breaker: matches!(http_status, 502..=504),
        ..verdict
    }
}

fn by_status(http_status: u16, body: BodyKind) -> Verdict {
    let verdict = Verdict::new;
    match http_status {
        400 | 422 => verdict(Code::InvalidArgument, Reason::UpstreamInvalidArgument),
        401 => verdict(Code::Unauthenticated, Reason::CredentialRejected)
            .against(Credential::Renewable),
        402 | 412 | 423 | 428 => verdict(Code::FailedPrecondition, Reason::PreconditionFailed),
        403 | 451 => verdict(Code::PermissionDenied, Reason::PermissionDenied),
        // A page of something that is not the API says nothing about the task.
        404 if body == BodyKind::Other => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        404 | 410 => verdict(Code::NotFound, Reason::ResourceNotFound).missing(Resource::Other),
        405 | 501 => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        406 | 407 | 411 | 414 | 415 | 417 | 431 | 494 | 505 => {
            verdict(Code::Internal, Reason::UpstreamRejectedRequest)
        }
        408 | 425 | 502 | 503 => {
            verdict(Code::Unavailable, Reason::UpstreamUnavailable).repeated(Repeat::Backoff)
        }
        409 => verdict(Code::Aborted, Reason::InstanceBusy).after(BUSY_WAIT),
        413 => verdict(Code::ResourceExhausted, Reason::QuotaExhausted),
        429 => verdict(Code::ResourceExhausted, Reason::Throttled).after(THROTTLED_WAIT),
        500 => verdict(Code::Internal, Reason::UpstreamInternal).repeated(Repeat::Once),
        504 => verdict(Code::DeadlineExceeded, Reason::UpstreamTimeout).repeated(Repeat::Once),
        100..=199 | 201..=299 => verdict(Code::Internal, Reason::UpstreamUnexpectedStatus),
        300..=399 => verdict(Code::Internal, Reason::UpstreamRedirect),
        _ => verdict(Code::Unknown, Reason::UpstreamUnknown),
    }
}

impl Verdict {
    /// Final, silent about the credential, without a wait and without a missing resource.
    pub(super) const fn new(code: Code, reason: Reason) -> Self {
        Self {
            code,
            reason,
            repeat: Repeat::Never,
            credential: Credential::Silent,
            retry_info: None,
            resource: None,
            trips_breaker: false,
        }
    }

    pub(super) const fn repeated(self, repeat: Repeat) -> Self {
        Self { repeat, ..self }
    }

    pub(super) const fn against(self, credential: Credential) -> Self {
        Self { credential, ..self }
    }

    pub(super) const fn after(self, wait: Duration) -> Self {
        Self {
            retry_info: Some(wait),
            ..self
        }
    }

    pub(super) const fn missing(self, resource: Resource) -> Self {
        Self {
            resource: Some(resource),
            ..self
        }
    }
}
