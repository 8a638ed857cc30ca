//! What each failure means: code, reason, and which facts go with it.

use std::time::Duration;

use tonic::Code;

use super::sentence;
use crate::{
    credentials::{self, Issuer, Owner},
    reason::Reason,
    rpc::{self, Violation},
    upstream::{self, ErrorKind, Facts, Rejection, TaskQuery, verdict::Resource},
};

/// An overloaded server is worth another try this soon: calls end within seconds.
const OVERLOADED_WAIT: Duration = Duration::from_secs(1);

/// A failure, understood, before it is written down.
#[derive(Debug)]
pub(super) struct Failure<'a> {
    pub(super) code: Code,
    pub(super) reason: Reason,
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
    pub(super) throttled_subject: Option<&'a str>,
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
            message: sentence::of_reason(reason).to_owned(),
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
            message: sentence::of_credential(self.reason, owner).to_owned(),
            owner: Some(owner),
            ..self
        }
    }

    pub(super) fn of(error: &'a rpc::Error) -> Self {
        match error {
            rpc::Error::InvalidRequest(violations) => Self {
                message: sentence::of_violations(violations),
                violations,
                ..Self::new(Code::InvalidArgument, Reason::InvalidRequest)
            },
            rpc::Error::Protocol(code, text) => Self {
                message: sentence::clean(text),
                ..Self::new(*code, Reason::InvalidRequest)
            },
            rpc::Error::ProjectNotAllowed => {
                Self::new(Code::PermissionDenied, Reason::ProjectNotAllowed)
            }
            rpc::Error::Credentials(error) => Self::of_credentials(error),
            rpc::Error::Upstream {
                error,
                owner,
                query,
            } => Self {
                facts: Some(&error.facts),
                ..Self::of_upstream(error, *owner, query)
            },
            rpc::Error::DeadlineExceeded => {
                Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded)
            }
            rpc::Error::Overloaded => {
                Self::new(Code::ResourceExhausted, Reason::Overloaded).after(OVERLOADED_WAIT)
            }
            rpc::Error::ShuttingDown => Self::new(Code::Unavailable, Reason::ShuttingDown),
            rpc::Error::Internal => Self::new(Code::Internal, Reason::Internal),
        }
    }

    fn of_credentials(error: &credentials::Error) -> Self {
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

    fn of_upstream(error: &'a upstream::Error, owner: Owner, query: &'a TaskQuery) -> Self {
        match &error.kind {
            ErrorKind::Rejected(rejection) => {
                Self::of_rejection(rejection, &error.facts, owner, query)
            }
            ErrorKind::Transport(reason) => Self::new(Code::Unavailable, *reason),
            ErrorKind::AttemptTimeout => Self::new(Code::DeadlineExceeded, Reason::UpstreamTimeout),
            ErrorKind::Malformed => Self::new(Code::Internal, Reason::UpstreamMalformedResponse),
            ErrorKind::TooLarge => Self::new(Code::Internal, Reason::UpstreamResponseTooLarge),
            ErrorKind::DeadlineExceeded => {
                Self::new(Code::DeadlineExceeded, Reason::DeadlineExceeded)
            }
            ErrorKind::CircuitOpen { retry_after } => {
                Self::new(Code::Unavailable, Reason::CircuitOpen).after(*retry_after)
            }
            ErrorKind::ClockSkew => {
                Self::new(Code::Unauthenticated, Reason::ClockSkew).owned(owner)
            }
            ErrorKind::Throttled { retry_after } => {
                Self::new(Code::ResourceExhausted, Reason::Throttled).after(*retry_after)
            }
            ErrorKind::Credentials(error) => Self::of_credentials(error),
            ErrorKind::Panicked => Self::new(Code::Internal, Reason::Internal),
        }
    }

    fn of_rejection(
        rejection: &'a Rejection,
        facts: &'a Facts,
        owner: Owner,
        query: &'a TaskQuery,
    ) -> Self {
        let verdict = &rejection.verdict;
        let ours = Self::new(verdict.code, verdict.reason);
        let ours = match verdict.code {
            Code::Unauthenticated | Code::PermissionDenied => ours.owned(owner),
            _ => ours,
        };
        let message = match sentence::of_upstream(rejection, facts) {
            Some(theirs) => theirs,
            None => ours.message,
        };
        let resource = verdict.resource.map(|resource| {
            let name = match resource {
                Resource::Task => &query.workflow_id,
                Resource::Instance => &query.instance_id,
                Resource::Project => &query.project_id,
                Resource::Other => facts.upstream_code.as_deref().unwrap_or_default(),
            };
            (resource, name)
        });
        Self {
            message,
            retry_after: rejection.retry_after,
            throttled_subject: rejection.throttled_subject.as_deref(),
            resource,
            encoded_authorization_message: rejection.encoded_authorization_message.as_deref(),
            // Quotas, rights and what can be seen all depend on whose credential asked.
            owner: Some(owner),
            ..ours
        }
    }

    /// What the gRPC library said about a call that it could not decode or route.
    pub(super) fn of_library(code: Code, message: &str) -> Self {
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
