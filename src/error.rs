//! Why a call fails. Only [`crate::status`] turns an [`Error`] into a gRPC status.

use std::time::Duration;

use crate::{
    credentials::{self, Owner},
    telemetry::Facts,
    upstream::{self, TaskQuery},
};

/// Why a call fails.
#[derive(Debug, Clone)]
pub enum Error {
    /// The request breaks the rules of the proto. Holds every violation.
    InvalidRequest(Vec<Violation>),
    /// The call breaks a rule of gRPC over HTTP/2: the code and the message of its status.
    Protocol(tonic::Code, &'static str),
    /// The operator does not allow this project.
    ProjectNotAllowed,
    /// No credential is available for the call.
    Credentials(credentials::Error),
    /// The lookup failed.
    Upstream(Box<FailedLookup>),
    /// The deadline passed outside of the lookup.
    DeadlineExceeded,
    /// Too many calls are in flight.
    Overloaded,
    /// The server drains: it ends its watches, or the shutdown grace period ended before the call.
    ShuttingDown {
        /// When a watch may be opened on another server.
        retry_after: Option<Duration>,
    },
    /// A watch, or its connection, has reached its longest duration.
    WatchExpired {
        /// When the watch may be continued.
        retry_after: Duration,
    },
    /// A bug in the facade: the handler panicked.
    Internal,
}

/// A failed lookup, with all that its status reports.
#[derive(Debug, Clone)]
pub struct FailedLookup {
    /// The cause.
    pub error: upstream::Error,
    /// What the attempts showed.
    pub facts: Facts,
    /// Whose credential was used.
    pub owner: Owner,
    /// The query, from which a `NOT_FOUND` status names the missing resource.
    pub query: TaskQuery,
}

/// One violated rule of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The proto's field name.
    pub field: &'static str,
    /// What is wrong and the accepted form; never the whole value.
    pub description: String,
}
