//! Any status with any body and headers becomes a complete status of the contract: a code of its closed set, a short clean
//! message, details of 4 KiB at most; nothing of a body that cannot be read or of a text about a credential.
//!
//! The input's lines: HTTP status, `Retry-After`, `x-request-id`; the rest is the body.

use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use serde::de::IgnoredAny;
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::lines;
use crate::{
    credentials::Owner,
    error::{Error, FailedLookup},
    status::{
        Failure,
        sound::{CODES_OF_ANSWERS, assert_sound},
    },
    telemetry::Facts,
    upstream::{
        self, Rejection, TaskQuery, rejection,
        wire::{NotATask, parse_task_detail},
    },
};

/// What the gateway's texts name when they repeat a request.
const SECRET_SHAPED: [&str; 5] = [
    "authorization:",
    "sdk-hmac",
    "x-auth-token",
    "x-security-token",
    "signature=",
];

pub(super) fn check(input: &[u8]) {
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
    let Some((rejection, facts)) = rejected(http_status, &headers, body) else {
        return;
    };

    for owner in [Owner::Caller, Owner::Server] {
        let told = told(&rejection, &facts, owner);
        let without_text = Rejection {
            message: String::new(),
            ..rejection.clone()
        };
        let ours = self::told(&without_text, &facts, owner);
        assert!(CODES_OF_ANSWERS.contains(&told.code()), "{:?}", told.code());
        let details = assert_sound(&told);
        let wait = details.retry_info().and_then(|info| info.retry_delay);
        assert!(wait.unwrap_or_default() <= Duration::from_secs(300));

        if told.message() != ours.message() {
            let lower = told.message().to_ascii_lowercase();
            assert!(
                !SECRET_SHAPED.iter().any(|name| lower.contains(name)),
                "{lower}"
            );
            assert!(!lower.starts_with('<'), "{lower}");
            assert!(
                http_status != 401 && told.code() != Code::Unauthenticated,
                "{lower}"
            );
        }
        if !is_object(body) && !body.trim_ascii().is_empty() {
            let (rejection, facts) = rejected(http_status, &headers, b"?").expect("no task");
            let of_nothing = self::told(&rejection, &facts, owner);
            assert_eq!(told.message(), of_nothing.message());
            let metadata =
                |details: ErrorDetails| details.error_info().map(|info| info.metadata.clone());
            assert_eq!(metadata(details), metadata(assert_sound(&of_nothing)));
        }
    }
}

/// As the send loop understands an answer; `None` for a task and for a 200 that is nothing known.
fn rejected(http_status: u16, headers: &HeaderMap, body: &[u8]) -> Option<(Rejection, Facts)> {
    if http_status != 200 {
        return Some(rejection::of_answer(http_status, headers, body, UNIX_EPOCH));
    }
    match parse_task_detail(body) {
        Err(NotATask::ErrorObject(envelope)) => {
            Some(rejection::of_envelope(200, headers, envelope, UNIX_EPOCH))
        }
        _ => None,
    }
}

fn told(rejection: &Rejection, facts: &Facts, owner: Owner) -> Status {
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
    Failure::from_error(&error).to_status("r-1")
}

/// The digits of a status; other bytes are one, too.
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

#[test]
fn any_answer_becomes_a_complete_status_that_repeats_nothing_it_must_not() {
    super::short_run::holds("error_envelope");
}
