//! Encodes a failure as a status: `google.rpc` details of at most 4 KiB, and metadata.

use std::{collections::HashMap, time::Duration};

use http::{HeaderMap, HeaderValue};
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::failure::Failure;
use crate::{
    credentials::{Issuer, Owner},
    reason::Reason,
    telemetry::Facts,
    upstream::{known_codes, verdict::Resource},
};

/// `ErrorInfo.domain` of every failure.
pub(super) const DOMAIN: &str = "rds-task-facade";
/// The size limit of the encoded `google.rpc.Status`. Base64 makes it a third longer; together with all other trailers it must stay
/// below 8 KiB, from which on gRPC's C core drops them.
pub(super) const MAX_DETAILS_BYTES: usize = 4096;

const AUTHORIZATION_KEY: &str = "encodedAuthorizationMessage";

pub(super) fn encode(failure: &Failure<'_>, request_id: &str, remaining: Duration) -> Status {
    let mut authorization = failure.encoded_authorization_message.unwrap_or_default();
    let mut violations = failure.violations;
    loop {
        let status = build(failure, request_id, remaining, authorization, violations);
        let over = status.details().len().saturating_sub(MAX_DETAILS_BYTES);
        if over > 0 && !authorization.is_empty() {
            let keep = authorization.len().saturating_sub(over);
            let end = (0..=keep).rfind(|&end| authorization.is_char_boundary(end));
            authorization = &authorization[..end.unwrap_or(0)];
        } else if over > 0 && !violations.is_empty() {
            violations = &violations[..violations.len() - 1];
        } else {
            return status;
        }
    }
}

fn build(
    failure: &Failure<'_>,
    request_id: &str,
    remaining: Duration,
    authorization: &str,
    violations: &[crate::error::Violation],
) -> Status {
    let mut details = ErrorDetails::with_error_info(
        failure.reason.as_str(),
        DOMAIN,
        error_metadata(failure, authorization),
    );
    details.set_request_info(request_id, "");
    let mut metadata = HeaderMap::new();

    if !violations.is_empty() {
        let fields: Vec<_> = violations
            .iter()
            .map(|violation| FieldViolation::new(violation.field, &violation.description))
            .collect();
        details.set_bad_request(fields);
    }
    if let Some(wait) = failure.retry_after {
        details.set_retry_info(Some(wait));
        metadata.insert("grpc-retry-pushback-ms", pushback(wait, remaining));
    }
    if failure.reason == Reason::Throttled {
        details.add_quota_failure_violation(
            failure.throttled_subject.unwrap_or_default(),
            "calls to RDS within a time window",
        );
    }
    if let (Code::NotFound, Some((resource, name))) = (failure.code, failure.resource) {
        let (kind, description) = describe(resource);
        details.set_resource_info(kind, name, "", description);
    }
    if let Some(id) = failure.facts.and_then(upstream_id_value) {
        metadata.insert("x-upstream-request-id", id);
    }
    let metadata = MetadataMap::from_headers(metadata);
    Status::with_error_details_and_metadata(failure.code, &failure.message, details, metadata)
}

fn error_metadata(failure: &Failure<'_>, authorization: &str) -> HashMap<String, String> {
    let facts = failure.facts;
    let code = facts.and_then(|facts| facts.upstream_code.as_deref());
    let (service, http_status) = match failure.rejected_by {
        Some((Issuer::Identity, http_status)) => (Some("IAM"), Some(http_status)),
        Some((Issuer::Metadata, http_status)) => (Some("METADATA"), Some(http_status)),
        None => (
            code.and_then(known_codes::service),
            facts.and_then(|facts| facts.http_status),
        ),
    };
    let owner = failure.owner.map(|owner| match owner {
        Owner::Caller => "caller",
        Owner::Server => "server",
    });
    let request_id = facts.and_then(|facts| facts.upstream_request_id.as_deref());
    let pairs = [
        ("upstreamService", service.map(str::to_owned)),
        ("upstreamCode", code.map(str::to_owned)),
        ("httpStatus", http_status.map(|status| status.to_string())),
        ("upstreamRequestId", request_id.map(str::to_owned)),
        ("credentialOwner", owner.map(str::to_owned)),
        (
            AUTHORIZATION_KEY,
            (!authorization.is_empty()).then(|| authorization.to_owned()),
        ),
    ];
    pairs
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
}

/// The value of `x-upstream-request-id`. Marked sensitive only to keep it out of the HPACK tables: it rarely repeats.
pub(crate) fn upstream_id_value(facts: &Facts) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(facts.upstream_request_id.as_deref()?).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The delay after which a client with a retry policy should retry, in milliseconds, rounded up. Negative ("do not retry") if that is
/// after its deadline: the client would wait in vain and lose this status (gRFC A6).
fn pushback(wait: Duration, remaining: Duration) -> HeaderValue {
    if wait >= remaining {
        return HeaderValue::from_static("-1");
    }
    let milliseconds = wait.as_micros().div_ceil(1000);
    HeaderValue::from(u64::try_from(milliseconds).unwrap_or(u64::MAX))
}

/// Type and description of the missing resource.
fn describe(resource: Resource) -> (&'static str, &'static str) {
    match resource {
        Resource::Task => (
            "task",
            "unknown to RDS, ended more than a month ago, or started seconds ago and not registered yet",
        ),
        Resource::Instance => ("instance", "unknown to RDS in this project"),
        Resource::Project => ("project", "unknown to IAM"),
        Resource::Other => (
            "resource",
            "the resource that the RDS error code reports as missing",
        ),
    }
}
