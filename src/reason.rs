//! The closed list of reasons that a failed RPC can carry in `google.rpc.ErrorInfo`.

/// Why an RPC failed. Clients switch on [`Reason::as_str`]; the gRPC code that goes with it is decided where the failure
/// is understood (`upstream::verdict` for answers, `status` for everything of our own).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The task does not exist, is over for more than a month, or is not registered yet.
    TaskNotFound,
    /// The instance does not exist.
    InstanceNotFound,
    /// Something else that the request names does not exist.
    ResourceNotFound,
    /// Something of that name exists already.
    AlreadyExists,
    /// Another operation is running on the instance.
    InstanceBusy,
    /// The state of the instance, account or project forbids it until somebody changes that state.
    PreconditionFailed,
    /// The identity lacks the right.
    PermissionDenied,
    /// A quota other than the call rate is used up.
    QuotaExhausted,
    /// Too many calls; wait as `RetryInfo` says.
    Throttled,
    /// RDS refused an argument that passed our own rules.
    UpstreamInvalidArgument,
    /// RDS or its gateway is passingly not able to answer.
    UpstreamUnavailable,
    /// An attempt, or the gateway's own backend call, took too long.
    UpstreamTimeout,
    /// RDS failed.
    UpstreamInternal,
    /// The API is not there: wrong endpoint, region or path.
    UpstreamApiNotFound,
    /// RDS refused a header or the form of our request; not the caller's doing.
    UpstreamRejectedRequest,
    /// A final status that this call never has.
    UpstreamUnexpectedStatus,
    /// A redirect, which is never followed.
    UpstreamRedirect,
    /// An error that says nothing known.
    UpstreamUnknown,
    /// The endpoint's name does not resolve.
    UpstreamDns,
    /// No connection.
    UpstreamConnect,
    /// The TLS handshake failed.
    UpstreamTls,
    /// The connection broke before an answer.
    UpstreamReset,
    /// The answer broke off.
    UpstreamTruncated,
    /// The answer is not HTTP.
    UpstreamProtocol,
    /// The answer cannot be read.
    UpstreamMalformedResponse,
    /// The answer is over 1 MiB.
    UpstreamResponseTooLarge,
    /// The RPC's own deadline passed.
    DeadlineExceeded,
    /// The request breaks the rules of the proto or of gRPC.
    InvalidRequest,
    /// The operator serves other projects only.
    ProjectNotAllowed,
    /// No `x-auth-token`, where the caller has to bring one.
    CredentialMissing,
    /// The credential was refused; `credentialOwner` tells whose.
    CredentialRejected,
    /// The key is locked after failed signatures; wait as `RetryInfo` says.
    CredentialLocked,
    /// Our own credential cannot be fetched now.
    CredentialUnavailable,
    /// Our clock and the gateway's differ too much for a signature.
    ClockSkew,
    /// Too many RPCs at once.
    Overloaded,
    /// The facade ends, and the call outlived the grace for calls in flight.
    ShuttingDown,
    /// RDS failed so often that calls are held back.
    CircuitOpen,
    /// A fault of the facade.
    Internal,
}

impl Reason {
    /// The `UPPER_SNAKE_CASE` text of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TaskNotFound => "TASK_NOT_FOUND",
            Self::InstanceNotFound => "INSTANCE_NOT_FOUND",
            Self::ResourceNotFound => "RESOURCE_NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::InstanceBusy => "INSTANCE_BUSY",
            Self::PreconditionFailed => "PRECONDITION_FAILED",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::QuotaExhausted => "QUOTA_EXHAUSTED",
            Self::Throttled => "THROTTLED",
            Self::UpstreamInvalidArgument => "UPSTREAM_INVALID_ARGUMENT",
            Self::UpstreamUnavailable => "UPSTREAM_UNAVAILABLE",
            Self::UpstreamTimeout => "UPSTREAM_TIMEOUT",
            Self::UpstreamInternal => "UPSTREAM_INTERNAL",
            Self::UpstreamApiNotFound => "UPSTREAM_API_NOT_FOUND",
            Self::UpstreamRejectedRequest => "UPSTREAM_REJECTED_REQUEST",
            Self::UpstreamUnexpectedStatus => "UPSTREAM_UNEXPECTED_STATUS",
            Self::UpstreamRedirect => "UPSTREAM_REDIRECT",
            Self::UpstreamUnknown => "UPSTREAM_UNKNOWN",
            Self::UpstreamDns => "UPSTREAM_DNS",
            Self::UpstreamConnect => "UPSTREAM_CONNECT",
            Self::UpstreamTls => "UPSTREAM_TLS",
            Self::UpstreamReset => "UPSTREAM_RESET",
            Self::UpstreamTruncated => "UPSTREAM_TRUNCATED",
            Self::UpstreamProtocol => "UPSTREAM_PROTOCOL",
            Self::UpstreamMalformedResponse => "UPSTREAM_MALFORMED_RESPONSE",
            Self::UpstreamResponseTooLarge => "UPSTREAM_RESPONSE_TOO_LARGE",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::ProjectNotAllowed => "PROJECT_NOT_ALLOWED",
            Self::CredentialMissing => "CREDENTIAL_MISSING",
            Self::CredentialRejected => "CREDENTIAL_REJECTED",
            Self::CredentialLocked => "CREDENTIAL_LOCKED",
            Self::CredentialUnavailable => "CREDENTIAL_UNAVAILABLE",
            Self::ClockSkew => "CLOCK_SKEW",
            Self::Overloaded => "OVERLOADED",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::CircuitOpen => "CIRCUIT_OPEN",
            Self::Internal => "INTERNAL",
        }
    }
}
