//! Why a call fails. Only [`crate::status`] turns an [`Error`] into a gRPC status.

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
    /// The call breaks the rules of gRPC over HTTP/2: the code says which, the text what.
    Protocol(tonic::Code, &'static str),
    /// The operator does not serve this project.
    ProjectNotAllowed,
    /// There is no credential for the call.
    Credentials(credentials::Error),
    /// The lookup failed.
    Upstream(Box<FailedLookup>),
    /// The deadline passed outside of the lookup.
    DeadlineExceeded,
    /// Too many calls at once.
    Overloaded,
    /// The process ends before the call does.
    ShuttingDown,
    /// A fault of the facade (a panic).
    Internal,
}

/// A failed lookup, with what its status names.
#[derive(Debug, Clone)]
pub struct FailedLookup {
    /// What happened.
    pub error: upstream::Error,
    /// What the attempts showed.
    pub facts: Facts,
    /// Whose credential was used.
    pub owner: Owner,
    /// What was asked, to name what is missing.
    pub query: TaskQuery,
}

/// One violated rule of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The proto's field name.
    pub field: &'static str,
    /// What is wrong and which form is accepted; never the whole value.
    pub description: String,
}
