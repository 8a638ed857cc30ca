//! The closed list of reasons that a failed call can carry in `google.rpc.ErrorInfo`.

use strum::{IntoStaticStr, VariantArray};

/// Why a call failed. Clients switch on [`Reason::as_str`]. The gRPC code of a reply from RDS is decided in `upstream::verdict`, that of
/// any other error in `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray, IntoStaticStr)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Reason {
    /// The task does not exist, ended more than a month ago, or is not registered yet.
    TaskNotFound,
    /// The instance does not exist.
    InstanceNotFound,
    /// Another resource that the request names does not exist.
    ResourceNotFound,
    /// A resource of that name already exists.
    AlreadyExists,
    /// Another operation is running on the instance.
    InstanceBusy,
    /// The state of the instance, account or project forbids the call until that state is changed.
    PreconditionFailed,
    /// The identity lacks the permission.
    PermissionDenied,
    /// A quota other than the call rate is used up.
    QuotaExhausted,
    /// Too many calls; retry after the delay in `RetryInfo`.
    Throttled,
    /// RDS rejected an argument that passed validation.
    UpstreamInvalidArgument,
    /// RDS or its gateway is temporarily unavailable.
    UpstreamUnavailable,
    /// An attempt, or the gateway's call to its backend, timed out.
    UpstreamTimeout,
    /// RDS had an internal error.
    UpstreamInternal,
    /// The endpoint does not offer the API: wrong endpoint, region or path.
    UpstreamApiNotFound,
    /// RDS rejected a header or the form of the request; the caller cannot fix that.
    UpstreamRejectedRequest,
    /// An HTTP status that this operation never returns.
    UpstreamUnexpectedStatus,
    /// A redirect, which is never followed.
    UpstreamRedirect,
    /// An unknown error.
    UpstreamUnknown,
    /// The endpoint's name does not resolve.
    UpstreamDns,
    /// No connection could be established.
    UpstreamConnect,
    /// The TLS handshake failed.
    UpstreamTls,
    /// The connection closed before a reply.
    UpstreamReset,
    /// The reply is incomplete.
    UpstreamTruncated,
    /// The reply is not HTTP.
    UpstreamProtocol,
    /// The reply cannot be decoded.
    UpstreamMalformedResponse,
    /// The reply is over 1 MiB, or the task has over 10 000 parts.
    UpstreamResponseTooLarge,
    /// The deadline of the call passed.
    DeadlineExceeded,
    /// The request breaks the rules of the proto or of gRPC.
    InvalidRequest,
    /// The operator does not allow the project.
    ProjectNotAllowed,
    /// The caller must send `x-auth-token` and did not.
    CredentialMissing,
    /// The credential was rejected; `credentialOwner` names its owner.
    CredentialRejected,
    /// The key is locked after failed signatures; retry after the delay in `RetryInfo`.
    CredentialLocked,
    /// The facade's credential cannot be fetched now.
    CredentialUnavailable,
    /// The clocks of the facade and the gateway differ too much for a signature.
    ClockSkew,
    /// Too many calls are in flight, or the process is out of descriptors.
    Overloaded,
    /// The call did not end within the shutdown grace period.
    ShuttingDown,
    /// The watch has reached its longest duration; continue it with the last etag.
    WatchExpired,
    /// The circuit breaker is open, because RDS failed too often.
    CircuitOpen,
    /// A bug in the facade.
    Internal,
}

impl Reason {
    /// The text on the wire: the name of the variant in `UPPER_SNAKE_CASE`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
