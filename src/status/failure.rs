//! Maps each error to the code, reason and details that the caller receives.

use std::time::Duration;

use tonic::{Code, Status};

use super::{details, sentence};
use crate::{
    credentials::{self, Issuer, Owner},
    error::{Error, FailedLookup, Violation},
    reason::Reason,
    telemetry::Facts,
    upstream::{self, Rejection, throttling_text::Subject, verdict::Resource},
};

/// The retry delay of an overloaded server: calls end within seconds.
const OVERLOADED_WAIT: Duration = Duration::from_secs(1);

/// An error as the caller sees it.
#[derive(Debug)]
pub struct Failure<'a> {
    /// The gRPC code.
    pub code: Code,
    /// The reason, for `ErrorInfo` and the access log.
    pub reason: Reason,
    /// The message, cleaned and at most 256 characters long.
    pub(super) message: String,
    /// The delay of `RetryInfo`.
    pub retry_after: Option<Duration>,
    /// The owner of the credential.
    pub(super) owner: Option<Owner>,
    /// The service that rejected the server's login, and its HTTP status.
    pub(super) rejected_by: Option<(Issuer, u16)>,
    pub(super) facts: Option<&'a Facts>,
    pub(super) violations: &'a [Violation],
    /// The subject whose calls the vendor counts, if the call was throttled.
    pub(super) throttled_subject: Option<&'static str>,
    /// The missing resource and its name.
    pub(super) resource: Option<(Resource, &'a str)>,
    pub(super) encoded_authorization_message: Option<&'a str>,
}

impl<'a> Failure<'a> {
    /// A failure with the message of its reason and no details.
    fn new(code: Code, reason: Reason) -> Self {
        Self {
            code,
            reason,
            message: sentence::for_reason(reason).to_owned(),
            retry_after: None,
            owner: None,
            rejected_by: None,
            facts: None,
            violations: &[],
            throttled_subject: None,
            resource: None,
            encoded_authorization_message: None,
        }
    }

    fn overloaded() -> Self {
        Self::new(Code::ResourceExhausted, Reason::Overloaded).after(OVERLOADED_WAIT)
    }

    fn after(self, wait: Duration) -> Self {
        Self {
            retry_after: Some(wait),
            ..self
        }
    }

    /// Sets the owner of the credential and the message that depends on it.
    fn owned(self, owner: Owner) -> Self {
        Self {
            message: sentence::for_credential(self.reason, owner).to_owned(),
            owner: Some(owner),
            ..self
        }
    }

    /// Maps an error of a call.
    pub fn from_error(error: &'a Error) -> Self {
        match error {
            Error::InvalidRequest(violations) => Self {
                message: sentence::for_violations(violations),
                violations,
                ..Self::new(Code::InvalidArgument, Reason::InvalidRequest)
            },
            Error::Protocol(code, text) => Self {
                message: sentence::clean(text),
                ..Self::new(*code, Reason::InvalidRequest)
            },
            Error::ProjectNotAllowed => {
                Self::new(Code::PermissionDenied, Reason::ProjectNotAllowed)
            }
            Error::Credentials(error) => Self::from_credentials(error),
            Error::Upstream(lookup) => Self {
                facts: Some(&lookup.facts),
                ..Self::from_lookup(lookup)
            },
            Error::DeadlineExceeded => Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded),
            Error::Overloaded => Self::overloaded(),
            Error::ShuttingDown { retry_after } => Self {
                retry_after: *retry_after,
                ..Self::new(Code::Unavailable, Reason::ShuttingDown)
            },
            Error::WatchExpired { retry_after } => {
                Self::new(Code::Unavailable, Reason::WatchExpired).after(*retry_after)
            }
            Error::Internal => Self::new(Code::Internal, Reason::Internal),
        }
    }

    /// The message: one cleaned line.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The owner of the credential, if the call failed because the credential was rejected or is locked.
    pub fn rejected_owner(&self) -> Option<Owner> {
        match self.reason {
            Reason::CredentialRejected | Reason::CredentialLocked => self.owner,
            _ => None,
        }
    }

    /// The status with all its details. `remaining` is the time that the caller has left: a longer retry delay becomes "do not
    /// retry".
    pub fn to_status(&self, request_id: &str, remaining: Duration) -> Status {
        details::encode(self, request_id, remaining)
    }

    fn from_credentials(error: &credentials::Error) -> Self {
        match error {
            credentials::Error::Missing => {
                Self::new(Code::Unauthenticated, Reason::CredentialMissing).owned(Owner::Caller)
            }
            credentials::Error::Malformed => Self {
                message: sentence::MALFORMED_TOKEN.to_owned(),
                ..Self::new(Code::Unauthenticated, Reason::CredentialRejected).owned(Owner::Caller)
            },
            credentials::Error::Rejected {
                issuer,
                http_status,
            } => Self {
                rejected_by: Some((*issuer, *http_status)),
                ..Self::new(Code::Unauthenticated, Reason::CredentialRejected).owned(Owner::Server)
            },
            credentials::Error::Unavailable { retry_after } => {
                Self::new(Code::Unavailable, Reason::CredentialUnavailable)
                    .owned(Owner::Server)
                    .after(*retry_after)
            }
            credentials::Error::Locked { retry_after } => {
                Self::new(Code::Unauthenticated, Reason::CredentialLocked)
                    .owned(Owner::Server)
                    .after(*retry_after)
            }
            credentials::Error::DeadlineExceeded => {
                Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded)
            }
        }
    }

    fn from_lookup(lookup: &'a FailedLookup) -> Self {
        match &lookup.error {
            upstream::Error::Rejected(rejection) => Self::from_rejection(rejection, lookup),
            upstream::Error::Transport(Reason::Overloaded, _) => Self::overloaded(),
            upstream::Error::Transport(reason, obstacle) => Self {
                message: sentence::for_transport(*reason, *obstacle).to_owned(),
                ..Self::new(Code::Unavailable, *reason)
            },
            upstream::Error::AttemptTimeout => {
                Self::new(Code::DeadlineExceeded, Reason::UpstreamTimeout)
            }
            upstream::Error::Malformed => {
                Self::new(Code::Internal, Reason::UpstreamMalformedResponse)
            }
            upstream::Error::TooLarge => {
                Self::new(Code::Internal, Reason::UpstreamResponseTooLarge)
            }
            upstream::Error::DeadlineExceeded => {
                Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded)
            }
            upstream::Error::CircuitOpen { retry_after } => {
                Self::new(Code::Unavailable, Reason::CircuitOpen).after(*retry_after)
            }
            upstream::Error::ClockSkew => {
                Self::new(Code::Unauthenticated, Reason::ClockSkew).owned(lookup.owner)
            }
            upstream::Error::Throttled {
                retry_after,
                subject,
            } => Self {
                throttled_subject: subject.map(Subject::as_str),
                ..Self::new(Code::ResourceExhausted, Reason::Throttled).after(*retry_after)
            },
            upstream::Error::Credentials(error) => Self::from_credentials(error),
            upstream::Error::Panicked => Self::new(Code::Internal, Reason::Internal),
        }
    }

    fn from_rejection(rejection: &'a Rejection, lookup: &'a FailedLookup) -> Self {
        let FailedLookup {
            facts,
            owner,
            query,
            ..
        } = lookup;
        let verdict = &rejection.verdict;
        let failure = Self::new(verdict.code, verdict.reason);
        let failure = match verdict.code {
            Code::Unauthenticated | Code::PermissionDenied => failure.owned(*owner),
            _ => failure,
        };
        let message = sentence::for_rejection(rejection, facts).unwrap_or(failure.message);
        let resource = verdict.resource.map(|resource| {
            let name = match resource {
                Resource::Task => query.workflow_id.as_str(),
                Resource::Instance => &query.instance_id,
                Resource::Project => &query.project_id,
                Resource::Other => facts.upstream_code.as_deref().unwrap_or_default(),
            };
            (resource, name)
        });
        Self {
            message,
            retry_after: rejection.retry_after,
            throttled_subject: rejection.throttled_subject.map(Subject::as_str),
            resource,
            encoded_authorization_message: rejection.encoded_authorization_message.as_deref(),
            // Quotas, permissions and visible resources all depend on the credential.
            owner: Some(*owner),
            ..failure
        }
    }

    /// Maps a status of the gRPC library, which it returns for a call of health or reflection that it cannot decode. Its text can repeat
    /// parts of the payload, so a message of this module replaces it.
    pub fn from_library(code: Code, message: &str) -> Self {
        let (code, sentence) = match code {
            // gRPC requires RESOURCE_EXHAUSTED for a message over the limit.
            Code::OutOfRange | Code::ResourceExhausted => {
                (Code::ResourceExhausted, sentence::MESSAGE_TOO_LONG)
            }
            Code::Unimplemented if message.contains("compressed") => {
                (Code::Unimplemented, sentence::UNKNOWN_ENCODING)
            }
            Code::Unimplemented => (Code::Unimplemented, sentence::UNKNOWN_METHOD),
            // Only health returns it: for an unknown service name.
            Code::NotFound => (Code::NotFound, sentence::UNKNOWN_SERVICE),
            Code::DeadlineExceeded => {
                return Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded);
            }
            code => (code, sentence::UNREADABLE_REQUEST),
        };
        Self {
            message: sentence.to_owned(),
            ..Self::new(code, Reason::InvalidRequest)
        }
    }
}
