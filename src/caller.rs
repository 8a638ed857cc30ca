//! The identity of a caller for fair sharing of permits, of the upstream rate and of the retry budget.

/// The token if callers bring their own, else the client certificate, else the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// The keyed hash of the caller's `x-auth-token`.
    Token([u8; 16]),
    /// The hash of the client certificate.
    Certificate([u8; 16]),
    /// The number of the connection.
    Connection(u64),
}
