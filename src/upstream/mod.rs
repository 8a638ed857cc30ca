//! The vendor's operation `ShowTaskDetail`: one request, as many attempts as the policy allows, one answer or one error.

mod attempt;
mod breaker;
mod client;
mod clock;
pub mod envelope;
pub mod key_evidence;
pub mod known_codes;
mod options;
mod overrides;
mod pacing;
pub mod rejection;
mod request;
mod retry;
mod throttle;
pub mod throttling_text;
pub mod verdict;
pub mod wire;

use std::time::Duration;

pub use self::{
    client::{Client, Endpoint, LookupContext},
    options::Options,
    pacing::Config as RateConfig,
};
use self::{key_evidence::KeyEvidence, throttling_text::Subject};
use crate::{credentials, reason::Reason};

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
    /// No complete answer: one of `UPSTREAM_DNS`, `_CONNECT`, `_TLS`, `_RESET`, `_TRUNCATED`, `_PROTOCOL`.
    Transport(Reason),
    /// The last attempt outlived the attempt timeout.
    AttemptTimeout,
    /// A 200 whose body cannot be read as a task.
    Malformed,
    /// An answer over the size limit.
    TooLarge,
    /// The RPC's deadline passed.
    DeadlineExceeded,
    /// The breaker is open.
    CircuitOpen {
        /// When the next probe may go out.
        retry_after: Duration,
    },
    /// Our clock and the gateway's differ too much for a signature to be accepted.
    ClockSkew,
    /// Held back: the vendor throttles this credential, or the configured rate is used up.
    Throttled {
        /// When the window is over.
        retry_after: Duration,
        /// Whose requests the vendor counts, if it says so.
        subject: Option<Subject>,
    },
    /// No credential for an attempt.
    Credentials(credentials::Error),
    /// A fault of ours: the work panicked.
    Panicked,
}

/// An error answer, understood.
#[derive(Debug, Clone)]
pub struct Rejection {
    /// What it means.
    pub verdict: verdict::Verdict,
    /// The vendor's own text, not yet cleaned; empty when the answer was no error object.
    pub message: String,
    /// The `encoded_authorization_message` of a policy denial.
    pub encoded_authorization_message: Option<String>,
    /// How long to wait, where the answer or the table says so: `Retry-After`, else the throttling text, else the row's own.
    pub retry_after: Option<Duration>,
    /// Whose requests a throttling text counts.
    pub throttled_subject: Option<Subject>,
    /// What the reply says about the key that signed the attempt, if a key did.
    pub key_evidence: KeyEvidence,
}
