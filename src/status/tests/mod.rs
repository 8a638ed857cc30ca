//! What every failed call must look like, checked in [`check`] by all tests below.

/// Answers of the vendor, one by one.
mod answers;
/// Any status with any bytes.
mod any;
/// Failures without an answer.
mod ours;
/// Our own sentences.
mod sentences;
/// What may come out of an answer's text, and how long it may be.
mod text;

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tonic_types::{ErrorDetail, ErrorDetails, StatusExt};

use super::*;
use crate::{
    credentials::{self, Issuer, Owner},
    rpc::Violation,
    upstream::{self, ErrorKind, Facts, TaskQuery, rejection},
};

const WAIT: Duration = Duration::from_secs(7);

fn query() -> Box<TaskQuery> {
    Box::new(TaskQuery {
        project_id: "project-1".to_owned(),
        instance_id: "instance-1".to_owned(),
        workflow_id: "workflow-1".to_owned(),
        workflow_name: None,
    })
}

fn upstream(kind: ErrorKind, facts: Facts, owner: Owner) -> rpc::Error {
    rpc::Error::Upstream {
        error: upstream::Error { kind, facts },
        owner,
        query: query(),
    }
}

/// The failure that an answer of the vendor becomes.
fn answered_to(owner: Owner, http_status: u16, headers: &HeaderMap, body: &[u8]) -> rpc::Error {
    let (rejection, facts) =
        rejection::of_answer(http_status, headers, body, SystemTime::UNIX_EPOCH);
    upstream(ErrorKind::Rejected(Box::new(rejection)), facts, owner)
}

fn answered(http_status: u16, body: &str) -> Status {
    let error = answered_to(
        Owner::Caller,
        http_status,
        &HeaderMap::new(),
        body.as_bytes(),
    );
    of_error(&error, "r-1")
}

fn info(status: &Status) -> (String, HashMap<String, String>) {
    let info = status.get_details_error_info().expect("always there");
    (info.reason, info.metadata)
}

fn metadata(status: &Status, key: &str) -> Option<String> {
    info(status).1.get(key).cloned()
}

/// What holds for every failed call; returns its details.
fn check(status: &Status) -> ErrorDetails {
    let details = status.check_error_details().expect("details decode");
    let all = status.check_error_details_vec().expect("details decode");
    let mut kinds: Vec<_> = all.iter().map(std::mem::discriminant).collect();
    kinds.dedup();
    assert_eq!(kinds.len(), all.len(), "each detail at most once");
    assert!(
        !all.iter()
            .any(|detail| matches!(detail, ErrorDetail::DebugInfo(_)))
    );

    let error_info = details.error_info().expect("always an ErrorInfo");
    assert_eq!(error_info.domain, "rds-task-facade");
    assert!(
        details
            .request_info()
            .is_some_and(|info| info.request_id == "r-1")
    );
    assert!(status.details().len() <= 4096, "{}", status.details().len());

    let message = status.message();
    assert!(!message.is_empty());
    assert!(message.chars().count() <= 256, "{message}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
    let mut headers = HeaderMap::new();
    status.add_header(&mut headers).expect("headers hold it");
    assert!(headers["grpc-message"].len() <= 1536);
    let trailers: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum();
    assert!(trailers < 8192, "{trailers}");

    let pushback = status.metadata().get("grpc-retry-pushback-ms");
    let wait = details.retry_info().and_then(|info| info.retry_delay);
    assert_eq!(
        pushback.map(|value| value.to_str().unwrap().to_owned()),
        wait.map(|wait| wait.as_millis().to_string())
    );
    assert_eq!(
        error_info.reason == "THROTTLED",
        details.quota_failure().is_some()
    );
    assert_eq!(
        status.code() == Code::NotFound,
        details.resource_info().is_some()
    );
    details
}
