//! The vendor's operation `ShowTaskDetail`, with retries, rate limiting, circuit breaking and error mapping.

mod attempt;
mod breaker;
mod client;
pub mod clock;
pub mod envelope;
mod fleet;
pub mod key_evidence;
pub mod known_codes;
mod list_items;
mod options;
mod overrides;
mod pacing;
mod redaction;
pub mod rejection;
mod request;
mod retry;
mod throttle;
pub mod throttling_text;
pub mod verdict;
pub mod wire;

use std::time::Duration;

pub use self::{
    client::{Client, Endpoint, LookupContext, Scope},
    options::{Options, rate},
    pacing::{Config as RateConfig, Pacing, Queued},
};
use self::{key_evidence::KeyEvidence, throttling_text::Subject};
use crate::{credentials, http_client::Obstacle, reason::Reason};

/// One task lookup, already validated: building the URL and the body from it cannot fail.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TaskQuery {
    /// 1 to 64 of letters, digits, `-` and `_`, so it cannot change the URL's path.
    pub project_id: String,
    /// As `project_id`.
    pub instance_id: String,
    /// 1 to 128 of letters, digits, `-` and `_`.
    pub workflow_id: String,
    /// Sent only when the caller set it; at most 256 characters, no control characters.
    pub workflow_name: Option<String>,
}

/// Why a lookup failed.
#[derive(Debug, Clone)]
pub enum Error {
    /// The vendor replied with an error, or with a status that this operation never has.
    Rejected(Box<Rejection>),
    /// No complete reply: one of `UPSTREAM_DNS`, `_CONNECT`, `_TLS`, `_RESET`, `_TRUNCATED`, `_PROTOCOL`.
    Transport(Reason, Option<Obstacle>),
    /// The last attempt outlived the attempt timeout.
    AttemptTimeout,
    /// A 200 whose body cannot be read as a task.
    Malformed,
    /// A reply over the size limit, or a task with more than 10 000 parts.
    TooLarge,
    /// The call's deadline passed.
    DeadlineExceeded,
    /// The breaker is open.
    CircuitOpen {
        /// Until the next probe may go out.
        retry_after: Duration,
    },
    /// The system's clock and the gateway's differ too much for a signature to be accepted.
    ClockSkew,
    /// Not sent: the vendor throttles this credential, or the configured rate is used up.
    Throttled {
        /// Until the throttle window ends or the rate allows the attempt.
        retry_after: Duration,
        /// Whose requests the vendor counts, if its message names a subject.
        subject: Option<Subject>,
    },
    /// No credential was available for an attempt.
    Credentials(credentials::Error),
    /// A bug: the lookup panicked.
    Panicked,
}

/// An error reply of the vendor with its meaning.
#[derive(Debug, Clone)]
pub struct Rejection {
    /// The meaning.
    pub verdict: verdict::Verdict,
    /// The vendor's text, not sanitized; empty if the reply was not an error object.
    pub message: String,
    /// The `encoded_authorization_message` of a policy denial.
    pub encoded_authorization_message: Option<String>,
    /// The wait before another attempt helps: from `Retry-After`, else the throttling text, else the verdict.
    pub retry_after: Option<Duration>,
    /// Whose requests the vendor counts, from the throttling text.
    pub throttled_subject: Option<Subject>,
    /// What the reply shows about the key that signed the attempt, if a key did.
    pub key_evidence: KeyEvidence,
}
