//! The identity by which permits, the upstream rate and the retry budget are shared fairly among callers.

/// Who makes a call: the token if callers send their own, else the client certificate, else the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// The keyed hash of the caller's `x-auth-token`.
    Token([u8; 16]),
    /// The hash of the client certificate.
    Certificate([u8; 16]),
    /// The number of the connection.
    Connection(u64),
}
