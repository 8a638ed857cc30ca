//! Where the credential of an upstream request comes from: the configured source, and [`Credentials::resolve`] per call.

use std::time::Duration;

/// Why there is no credential for a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The caller brought no `x-auth-token`.
    #[error("no x-auth-token in the call's metadata")]
    Missing,
    /// The caller's `x-auth-token` is repeated or malformed.
    #[error("x-auth-token is repeated or malformed")]
    Malformed,
    /// The identity service refused our own credential (401 or 403).
    #[error("the identity service refuses the configured credential")]
    Rejected {
        /// HTTP status of the refusal.
        http_status: u16,
        /// When it will be tried again.
        retry_after: Duration,
    },
    /// Our own credential cannot be fetched now.
    #[error("the configured credential cannot be fetched")]
    Unavailable {
        /// When the next fetch is due.
        retry_after: Duration,
    },
    /// The key is locked, by the gateway or by our guard.
    #[error("the key is locked after failed signatures")]
    Locked {
        /// When the lock is over.
        retry_after: Duration,
    },
    /// The deadline passed while waiting.
    #[error("the deadline passed while waiting for a credential")]
    DeadlineExceeded,
}

/// Whose credential an upstream request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The caller's, passed through.
    Caller,
    /// The facade's own.
    Server,
}
