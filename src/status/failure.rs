//! What each error means to the caller: code, reason, and which facts go with it.

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

/// An overloaded server is worth another try this soon: calls end within seconds.
const OVERLOADED_WAIT: Duration = Duration::from_secs(1);

/// An error in the caller's terms.
#[derive(Debug)]
pub struct Failure<'a> {
    /// The gRPC code.
    pub code: Code,
    /// The reason, for `ErrorInfo` and for the access line.
    pub reason: Reason,
    /// For a person; clean and short.
    pub(super) message: String,
    /// The wait of `RetryInfo`.
    pub(super) retry_after: Option<Duration>,
    /// Whose credential the failure is about.
    pub(super) owner: Option<Owner>,
    /// Who refused to give us a credential, and with which HTTP status.
    pub(super) refused_by: Option<(Issuer, u16)>,
    pub(super) facts: Option<&'a Facts>,
    pub(super) violations: &'a [Violation],
    /// Whose calls are counted, of a throttled call.
    pub(super) throttled_subject: Option<&'static str>,
    /// What is missing, and its name.
    pub(super) resource: Option<(Resource, &'a str)>,
    pub(super) encoded_authorization_message: Option<&'a str>,
}

impl<'a> Failure<'a> {
    /// With a sentence of ours and nothing else.
    fn new(code: Code, reason: Reason) -> Self {
        Self {
            code,
            reason,
            message: sentence::for_reason(reason).to_owned(),
            retry_after: None,
            owner: None,
            refused_by: None,
            facts: None,
            violations: &[],
            throttled_subject: None,
            resource: None,
            encoded_authorization_message: None,
        }
    }

    fn after(self, wait: Duration) -> Self {
        Self {
            retry_after: Some(wait),
            ..self
        }
    }

    /// About a credential, so the sentence depends on whose it is.
    fn owned(self, owner: Owner) -> Self {
        Self {
            message: sentence::for_credential(self.reason, owner).to_owned(),
            owner: Some(owner),
            ..self
        }
    }

    /// What `error` means to the caller.
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
            Error::Overloaded => {
                Self::new(Code::ResourceExhausted, Reason::Overloaded).after(OVERLOADED_WAIT)
            }
            Error::ShuttingDown => Self::new(Code::Unavailable, Reason::ShuttingDown),
            Error::Internal => Self::new(Code::Internal, Reason::Internal),
        }
    }

    /// The status, with all its details. `remaining` is the time that the caller has left: a client is told not to retry if the wait is
    /// longer.
    pub fn to_status(&self, request_id: &str, remaining: Duration) -> Status {
        details::write(self, request_id, remaining)
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
                refused_by: Some((*issuer, *http_status)),
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
            upstream::Error::Transport(reason) => Self::new(Code::Unavailable, *reason),
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
        let ours = Self::new(verdict.code, verdict.reason);
        let ours = match verdict.code {
            Code::Unauthenticated | Code::PermissionDenied => ours.owned(*owner),
            _ => ours,
        };
        let message = match sentence::for_rejection(rejection, facts) {
            Some(theirs) => theirs,
            None => ours.message,
        };
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
            // Quotas, rights and what can be seen all depend on whose credential asked.
            owner: Some(*owner),
            ..ours
        }
    }

    /// What a status of the gRPC library means, which it makes for a call that it cannot decode or route. A message over the limit
    /// becomes `RESOURCE_EXHAUSTED`, as gRPC demands. The library's text can repeat parts of the payload, so a message of this
    /// module replaces it.
    pub fn from_library(code: Code, message: &str) -> Self {
        let (code, sentence) = match code {
            // gRPC over HTTP/2 demands RESOURCE_EXHAUSTED for a message over the limit.
            Code::OutOfRange | Code::ResourceExhausted => {
                (Code::ResourceExhausted, sentence::MESSAGE_TOO_LONG)
            }
            Code::Unimplemented if message.contains("compressed") => {
                (Code::Unimplemented, sentence::UNKNOWN_ENCODING)
            }
            Code::Unimplemented => (Code::Unimplemented, sentence::UNKNOWN_METHOD),
            // Only health asks the library for something by name.
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
