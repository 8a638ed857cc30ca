//! What an error answer of the vendor means, as data.

use std::time::Duration;

use tonic::Code;

use crate::reason::Reason;

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
