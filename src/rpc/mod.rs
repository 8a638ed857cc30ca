//! The RPCs.

use std::sync::OnceLock;

use crate::{credentials, credentials::Owner, deadline::Deadline, upstream};

/// What one RPC carries besides its message. The edge makes it when the headers arrive and puts an `Arc<Call>` into the
/// request's extensions; the RPC fills in what its upstream work showed, and the edge reads it back for the access line.
#[derive(Debug)]
pub struct Call {
    /// When the RPC must be over.
    pub deadline: Deadline,
    /// The caller's `x-request-id`, or one of ours: 1 to 128 of `[A-Za-z0-9._-]`.
    pub request_id: String,
    /// What the upstream work showed, set once when it is over.
    pub outcome: OnceLock<Outcome>,
}

/// What the access line says about the upstream work of one RPC.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What the attempts showed.
    pub facts: upstream::Facts,
    /// `ErrorInfo.reason` of a failure.
    pub reason: Option<crate::reason::Reason>,
}

/// Why an RPC failed. Only [`crate::status`] turns it into a status.
#[derive(Debug, Clone)]
pub enum Error {
    /// The request breaks the rules of the proto: (field, what is wrong), all of them. INVALID_ARGUMENT.
    InvalidRequest(Vec<Violation>),
    /// The call breaks the rules of gRPC over HTTP/2: the code says which, the text what. `INVALID_REQUEST`.
    Protocol(tonic::Code, &'static str),
    /// The operator does not serve this project.
    ProjectNotAllowed,
    /// No credential.
    Credentials(credentials::Error),
    /// The upstream work failed. `owner` is whose credential it carried; `query` names what may be missing.
    Upstream {
        /// What happened.
        error: upstream::Error,
        /// Whose credential was used.
        owner: Owner,
        /// What was asked.
        query: Box<upstream::TaskQuery>,
    },
    /// The deadline passed outside of the upstream work.
    DeadlineExceeded,
    /// Too many RPCs at once.
    Overloaded,
    /// A fault of ours (a panic).
    Internal,
}

/// One broken rule of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The proto's field name.
    pub field: &'static str,
    /// What is wrong and which form is accepted; never the whole value.
    pub description: String,
}
