//! What a failed call must look like, whatever failed; for tests and fuzz targets.

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

/// Panics unless a caller can make use of this failure; returns its details.
pub(crate) fn assert_sound(status: &Status) -> ErrorDetails {
    let message = status.message();
    assert!(!message.is_empty());
    assert!(message.chars().count() <= 256, "{message:?}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
    assert!(status.details().len() <= 4096, "{}", status.details().len());

    let all = status.check_error_details_vec().expect("details decode");
    let kinds: HashSet<_> = all.iter().map(mem::discriminant).collect();
    assert_eq!(kinds.len(), all.len(), "each detail at most once");
    let is_debug_info = |detail| matches!(detail, &ErrorDetail::DebugInfo(_));
    assert!(!all.iter().any(is_debug_info));
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
