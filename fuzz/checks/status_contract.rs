//! The contract of every error status. Shared with the unit tests of `src/status`.

use std::{collections::HashSet, mem};

use http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetail, ErrorDetails, StatusExt as _};

/// Panics unless the status has a short clean message and all details that clients rely on, and fits into header limits. Returns the
/// details.
pub(crate) fn assert_complete(status: &Status) -> ErrorDetails {
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
    let request_info = details.request_info().expect("always a RequestInfo");
    assert_eq!(request_info.request_id, "r-1");
    assert_eq!(
        info.reason == "THROTTLED",
        details.quota_failure().is_some()
    );
    let is_not_found = status.code() == Code::NotFound;
    assert_eq!(is_not_found, details.resource_info().is_some());
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
