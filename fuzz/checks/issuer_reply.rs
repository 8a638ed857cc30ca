//! Replies of IAM and of the metadata service become a credential that is valid for a day at most, or an error without any secret in it.
//!
//! The input's lines: HTTP status, `Date`, `X-Subject-Token`, `X-IAM-Trace-Id`, words of secrets; the rest is the body.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use rds_task_facade::credentials::{
    fetch::Response,
    iam::{explanation, token},
    metadata::temporary_key,
    secret::Malformed,
};
use serde_json::Value;

use super::{lines, text};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) fn check(input: &[u8]) {
    let [status, date, subject_token, trace_id, secrets, body] = lines(input);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("date", date),
        ("x-subject-token", subject_token),
        ("x-iam-trace-id", trace_id),
    ] {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.insert(name, value);
        }
    }
    let response = Response {
        status: text(status).parse().unwrap_or(500),
        headers,
        body: body.to_vec().into(),
    };
    check_explanation(&response, &text(secrets));
    check_token(&response, subject_token);
    check_key(&response);
}

/// The explanation is logged.
fn check_explanation(response: &Response, secrets: &str) {
    let words: Vec<&str> = secrets.split_whitespace().collect();
    let explanation = explanation(response, &[secrets]);

    assert!(!explanation.contains(char::is_control), "{explanation:?}");
    let (ids, message) = explanation.split_once(": ").unwrap_or((&explanation, ""));
    let ids = ids.split(", ").skip(1).map(|id| {
        let id = id.strip_prefix("code ").or(id.strip_prefix("trace id "));
        id.unwrap_or_else(|| panic!("{explanation:?}"))
    });
    let message: Vec<&str> = message.split(' ').collect();
    assert!(message.len() <= 40, "{explanation:?}");
    for shown in ids.chain(message).filter(|shown| *shown != "***") {
        let bare = shown.trim_matches(|c: char| c.is_ascii_punctuation());
        assert!(
            !words.contains(&shown) && !words.contains(&bare),
            "{explanation:?}"
        );
        // In any case of ASCII letters.
        let shown = shown.to_ascii_lowercase();
        let is_part = |word: &&&str| word.len() > 5 && shown.contains(&word.to_ascii_lowercase());
        assert_eq!(words.iter().find(is_part), None, "{explanation:?}");
    }
}

fn check_token(response: &Response, sent: &[u8]) {
    match token(response) {
        Ok(fetched) => {
            let lifetime = fetched.lifetime.expect("a limit");
            assert!(lifetime > Duration::ZERO && lifetime <= DAY, "{lifetime:?}");
            assert!(fetched.value.is_sensitive());
            let token = fetched.value.as_bytes();
            assert!(!token.is_empty() && token.iter().all(u8::is_ascii_graphic));
            assert_eq!(sent, token);
        }
        Err(error) => {
            assert!(CAUSES.contains(&&*error.cause), "{error:?}");
            assert!(error.rejected_by.is_none() && error.wait.is_zero());
        }
    }
}

fn check_key(response: &Response) {
    let sent: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let sent = |name| sent["credential"][name].as_str().unwrap_or_default();
    match temporary_key(response, None) {
        Ok(fetched) => {
            let lifetime = fetched.lifetime.expect("a limit");
            assert!(lifetime > Duration::ZERO && lifetime <= DAY, "{lifetime:?}");
            let shown = format!("{:?}", fetched.value);
            for secret in ["secret", "securitytoken"].map(sent) {
                assert!(secret.len() < 20 || !shown.contains(secret), "{shown}");
            }
        }
        Err(error) => {
            let problem = PARTS.iter().find_map(|part| error.cause.strip_prefix(part));
            let is_known = problem.map_or(KEY_CAUSES.contains(&&*error.cause), |problem| {
                PROBLEMS.iter().any(|known| known.to_string() == problem)
            });
            assert!(is_known, "{error:?}");
        }
    }
}

const CAUSES: [&str; 3] = [
    "the reply has no X-Subject-Token",
    "the X-Subject-Token in the reply is malformed",
    "the token in the reply has already expired",
];

const KEY_CAUSES: [&str; 2] = [
    "the reply holds no temporary key",
    "the key in the reply has already expired",
];

const PARTS: [&str; 3] = [
    "the access key id (AK) ",
    "the secret access key (SK) ",
    "the security token ",
];

const PROBLEMS: [Malformed; 7] = [
    Malformed::Empty,
    Malformed::LineBreak,
    Malformed::Blank,
    Malformed::NotVisibleAscii,
    Malformed::Invisible,
    Malformed::Quoted,
    Malformed::TooLong,
];
