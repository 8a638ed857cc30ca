//! What must hold of every reader of bytes from outside, whatever the bytes are: one file and one check for each reader.
//!
//! `cargo test` runs each check for a second, on the inputs in `tests/corpora` and on what comes of them by small changes.
//! `bash fuzz/run TARGET SECONDS` runs one of them for as long as wanted, guided by coverage. Compiled for these two only.

mod canonical_request;
mod error_envelope;
mod grpc_timeout;
mod profile_file;
mod reply_json;
mod request_validation;
mod retry_after;
#[cfg(test)]
mod short_run;
mod trace_context;

use std::{collections::HashSet, mem};

use http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetail, ErrorDetails, StatusExt as _};

/// Codes that an answer of the vendor can become.
pub(crate) const CODES_OF_ANSWERS: [Code; 13] = [
    Code::InvalidArgument,
    Code::DeadlineExceeded,
    Code::NotFound,
    Code::AlreadyExists,
    Code::PermissionDenied,
    Code::ResourceExhausted,
    Code::FailedPrecondition,
    Code::Aborted,
    Code::Unimplemented,
    Code::Internal,
    Code::Unavailable,
    Code::Unauthenticated,
    Code::Unknown,
];

/// Panics when what it is given shows that something does not hold.
pub type Check = fn(&[u8]);

/// The name of each target, as in `tests/corpora`, with its check.
pub const TARGETS: [(&str, Check); 8] = [
    ("canonical_request", canonical_request::check),
    ("error_envelope", error_envelope::check),
    ("grpc_timeout", grpc_timeout::check),
    ("profile_file", profile_file::check),
    ("reply_json", reply_json::check),
    ("request_validation", request_validation::check),
    ("retry_after", retry_after::check),
    ("trace_context", trace_context::check),
];

/// The input's lines, with all that is left in the last; empty where there is none.
fn lines<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == b'\n');
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Any bytes as text, with a mark in place of what is none.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a failed call must look like, whatever failed.
pub(crate) fn assert_fit_for_a_caller(status: &Status) -> ErrorDetails {
    let message = status.message();
    assert!(!message.is_empty());
    assert!(message.chars().count() <= 256, "{message:?}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
    assert!(status.details().len() <= 4096, "{}", status.details().len());

    let all = status.check_error_details_vec().expect("details decode");
    let kinds: HashSet<_> = all.iter().map(mem::discriminant).collect();
    assert_eq!(kinds.len(), all.len(), "each detail at most once");
    let debug = |detail| matches!(detail, &ErrorDetail::DebugInfo(_));
    assert!(!all.iter().any(debug));
    let details = status.check_error_details().expect("details decode");
    let info = details.error_info().expect("always an ErrorInfo");
    assert_eq!(info.domain, "rds-task-facade");
    assert!(details.request_info().is_some());
    let mut texts: Vec<&String> = info.metadata.iter().flat_map(<[_; 2]>::from).collect();
    if let Some(missing) = details.resource_info() {
        texts.extend([&missing.resource_name, &missing.description]);
    }
    for violation in details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
    {
        texts.extend([&violation.field, &violation.description]);
    }
    for violation in details
        .quota_failure()
        .iter()
        .flat_map(|quota| &quota.violations)
    {
        texts.extend([&violation.subject, &violation.description]);
    }
    for text in texts {
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }

    let wait = details.retry_info().and_then(|info| info.retry_delay);
    let pushback = status.metadata().get("grpc-retry-pushback-ms");
    assert_eq!(
        pushback.map(|value| value.as_bytes().to_owned()),
        wait.map(|wait| wait.as_nanos().div_ceil(1_000_000).to_string().into_bytes())
    );
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers).expect("headers hold it");
    assert!(trailers["grpc-message"].len() <= 1536);
    let bytes: usize = trailers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum();
    assert!(bytes < 8192, "{bytes}");
    details
}
