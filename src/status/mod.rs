//! The only place where a failure becomes a `tonic::Status`: its code, reason, sentence and `google.rpc` details.
//!
//! [`failure`] says what a failure means, [`sentence`] what a person is told, [`details`] how both are written down within
//! the size that clients accept.

mod details;
mod failure;
mod sentence;
#[cfg(test)]
mod tests;

use tonic::{Code, Status};

pub(crate) use details::upstream_id_value;
use failure::Failure;

use crate::{reason::Reason, rpc};

/// The status of a failed RPC, with all its details.
pub fn of_error(error: &rpc::Error, request_id: &str) -> Status {
    details::write(&Failure::of(error), request_id)
}

/// Why an RPC failed, for the access line and the metrics.
pub fn reason(error: &rpc::Error) -> Reason {
    Failure::of(error).reason
}

/// The full status for one that the gRPC library made itself, when a request could not be decoded or routed.
///
/// A message over the limit becomes `RESOURCE_EXHAUSTED`, as gRPC demands. The library's text can repeat parts of the
/// payload, so a sentence of ours takes its place.
pub fn complete(code: Code, message: &str, request_id: &str) -> Status {
    details::write(&Failure::of_library(code, message), request_id)
}
