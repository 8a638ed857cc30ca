//! The vendor's operation `ShowTaskDetail`: one request, as many attempts as the policy allows, one answer or one error.

mod attempt;
mod breaker;
mod client;
mod clock;
pub mod envelope;
pub mod known_codes;
mod options;
mod overrides;
mod rate;
pub mod rejection;
mod request;
mod retry;
mod throttle;
pub mod throttling_text;
pub mod verdict;
mod window;
pub mod wire;

use std::time::Duration;

pub use self::{
    client::{Client, Endpoint, Progress},
    options::Options,
    rate::Config as RateConfig,
};
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

/// A task, and what it took to get it.
#[derive(Debug, Clone)]
pub struct Found {
    /// The task as upstream writes it.
    pub task: wire::TaskDetail,
    /// What the attempts showed.
    pub facts: Facts,
}

/// What the attempts of one call showed, for the access line and the details of a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Attempts that were put on the wire.
    pub attempts: u32,
    /// HTTP status of the last answer.
    pub http_status: Option<u16>,
    /// The vendor's error code in the last answer, for example `DBS.200543`. At most 64 printable ASCII characters.
    pub upstream_code: Option<String>,
    /// Request id that the vendor gave the last attempt. At most 128 printable ASCII characters.
    pub upstream_request_id: Option<String>,
}

/// Why a lookup brought no task.
#[derive(Debug, Clone)]
pub struct Error {
    /// What happened.
    pub kind: ErrorKind,
    /// What the attempts showed.
    pub facts: Facts,
}

impl From<ErrorKind> for Error {
    /// One that no attempt has shown anything about.
    fn from(kind: ErrorKind) -> Self {
        Self {
            kind,
            facts: Facts::default(),
        }
    }
}

/// What happened to a lookup that brought no task.
#[derive(Debug, Clone)]
pub enum ErrorKind {
    /// The vendor answered with an error, or with a status that this call never has.
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
    /// Held back: the vendor throttles this identity, or our own rate limit is used up.
    Throttled {
        /// When the window is over.
        retry_after: Duration,
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
    /// Whom a throttling text names: `user` or `ip`.
    pub throttled_subject: Option<String>,
    /// Whether the gateway refused the signature (or the key itself), which counts towards the lock of the key.
    pub signature_refused: bool,
    /// Whether the gateway says that the key is locked: no call with it for `retry_after`.
    pub lock_announced: bool,
}
