//! The only place where a failure becomes a `tonic::Status`.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::rpc::Error;

/// The status of a failed RPC.
pub fn of_error(error: &Error, request_id: &str) -> Status {
    match error {
        Error::Protocol(code, text) => with_reason(*code, text, "INVALID_REQUEST", request_id),
        Error::DeadlineExceeded => with_reason(
            Code::DeadlineExceeded,
            "the deadline passed",
            "DEADLINE_EXCEEDED",
            request_id,
        ),
        Error::Overloaded => with_reason(
            Code::ResourceExhausted,
            "too many calls in flight",
            "OVERLOADED",
            request_id,
        ),
        _ => with_reason(Code::Internal, "internal error", "INTERNAL", request_id),
    }
}

/// Gives a status that the gRPC library made its details.
pub fn complete(code: Code, message: &str, request_id: &str) -> Status {
    with_reason(code, message, "INVALID_REQUEST", request_id)
}

fn with_reason(code: Code, message: &str, reason: &str, request_id: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(
        reason,
        "rds-task-facade",
        std::collections::HashMap::<String, String>::new(),
    );
    details.set_request_info(request_id, "");
    Status::with_error_details(code, message, details)
}
