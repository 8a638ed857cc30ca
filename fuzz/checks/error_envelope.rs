//! A reply with any status, body and headers becomes a complete status of the contract: a code of its closed set, a short clean
//! message, at most 4 KiB of details. An unreadable body or a text about a credential never reaches the caller.
//!
//! The input's lines: HTTP status, `Retry-After`, `x-request-id`; the rest is the body.

use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use rds_task_facade::{
    credentials::Owner,
    error::{Error, FailedLookup},
    status::Failure,
    telemetry::Facts,
    upstream::{
        self, Rejection, TaskQuery, rejection,
        wire::{NotATask, parse_task_detail},
    },
};
use serde::de::IgnoredAny;
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{lines, status_contract::assert_complete};

/// Codes that error replies of the vendor map to.
const CODES_OF_REPLIES: [Code; 13] = [
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

/// Parts of gateway messages that quote a request.
const SECRET_SHAPED: [&str; 5] = [
    "authorization:",
    "sdk-hmac",
    "x-auth-token",
    "x-security-token",
    "signature=",
];

pub(crate) fn check(input: &[u8]) {
    let [http_status, retry_after, request_id, body] = lines(input);
    let http_status = number(http_status);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (RETRY_AFTER, retry_after),
        ("x-request-id".parse().expect("a name"), request_id),
    ] {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.insert(name, value);
        }
    }
    let Some((rejection, facts)) = rejection_of(http_status, &headers, body) else {
        return;
    };

    for owner in [Owner::Caller, Owner::Server] {
        let status = status_of(&rejection, &facts, owner);
        let without_text = Rejection {
            message: String::new(),
            ..rejection.clone()
        };
        let own_message = status_of(&without_text, &facts, owner);
        let own_message = own_message.message();
        assert!(
            CODES_OF_REPLIES.contains(&status.code()),
            "{:?}",
            status.code()
        );
        let details = assert_complete(&status);
        let wait = details.retry_info().and_then(|info| info.retry_delay);
        assert!(wait.unwrap_or_default() <= Duration::from_secs(300));

        if status.message() != own_message {
            let lower = status.message().to_ascii_lowercase();
            assert!(
                !SECRET_SHAPED.iter().any(|name| lower.contains(name)),
                "{lower}"
            );
            assert!(!lower.starts_with('<'), "{lower}");
            assert!(
                http_status != 401 && status.code() != Code::Unauthenticated,
                "{lower}"
            );
        }
        if !is_object(body) && !body.trim_ascii().is_empty() {
            let unreadable = rejection_of(http_status, &headers, b"?");
            let (rejection, facts) = unreadable.expect("no task");
            let unreadable_status = status_of(&rejection, &facts, owner);
            assert_eq!(status.message(), unreadable_status.message());
            let metadata =
                |details: ErrorDetails| details.error_info().map(|info| info.metadata.clone());
            assert_eq!(
                metadata(details),
                metadata(assert_complete(&unreadable_status))
            );
        }
    }
}

/// The rejection for a reply; `None` for a task, and for a 200 that is neither a task nor an error.
pub(crate) fn rejection_of(
    http_status: u16,
    headers: &HeaderMap,
    body: &[u8],
) -> Option<(Rejection, Facts)> {
    if http_status != 200 {
        return Some(rejection::from_reply(
            http_status,
            headers,
            body,
            UNIX_EPOCH,
        ));
    }
    match parse_task_detail(body) {
        Err(NotATask::ErrorObject(envelope)) => {
            Some(rejection::from_envelope(200, headers, envelope, UNIX_EPOCH))
        }
        _ => None,
    }
}

/// The status that the caller receives.
pub(crate) fn status_of(rejection: &Rejection, facts: &Facts, owner: Owner) -> Status {
    let error = Error::Upstream(Box::new(FailedLookup {
        error: upstream::Error::Rejected(Box::new(rejection.clone())),
        facts: facts.clone(),
        owner,
        query: TaskQuery {
            project_id: "project-1".to_owned(),
            instance_id: "instance-1".to_owned(),
            workflow_id: "workflow-1".to_owned(),
            workflow_name: None,
        },
    }));
    Failure::from_error(&error).to_status("r-1", Duration::MAX)
}

/// Converts any bytes to an HTTP status, so that mutations reach every status.
fn number(text: &[u8]) -> u16 {
    text.iter().fold(0_u16, |number, byte| {
        number
            .wrapping_mul(10)
            .wrapping_add(u16::from(byte.wrapping_sub(b'0')))
    })
}

fn is_object(body: &[u8]) -> bool {
    body.trim_ascii_start().starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(body).is_ok()
}
