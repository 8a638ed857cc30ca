//! The sandbox's own paths, with which a test looks at it and makes it fail. The vendor has nothing of the kind.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{
    answer::{self, Answer},
    state::{Failure, State},
};

/// Bound of what can be set in seconds, either way: 150 years, within the years that the clock can hold.
const MOST_SECONDS: i64 = 150 * 365 * 24 * 60 * 60;

/// Bound of what can be set in milliseconds.
const MOST_MILLISECONDS: u64 = 60_000;

/// Answers a request under `/sandbox/`; `None` when there is no such path.
pub(super) fn answer(request: &Request<Bytes>, state: &mut State) -> Option<Answer> {
    let name = request.uri().path().strip_prefix("/sandbox/")?;
    let done = match (request.method(), name) {
        (&Method::GET, "counts") => return Some(ok(counts(state))),
        (&Method::GET, "requests") => return Some(ok(requests(state))),
        (&Method::POST, "revoke-tokens") => {
            state
                .tokens
                .iter_mut()
                .for_each(|token| token.revoked = true);
            Some(())
        }
        (&Method::POST, _) => set(name, request.uri(), state)?,
        _ => return None,
    };
    Some(match done {
        Some(()) => ok(json!({})),
        None => answer::json(
            StatusCode::BAD_REQUEST,
            json!({"error": "a parameter is missing or out of range, see docs/sandbox.md"})
                .to_string(),
        ),
    })
}

/// Changes one setting. The outer `None`: no such setting; the inner one: a bad parameter.
fn set(name: &str, uri: &Uri, state: &mut State) -> Option<Option<()>> {
    Some(match name {
        "clock" => seconds(uri, "offset-seconds").map(|offset| state.clock_offset = offset),
        "token-life" => seconds(uri, "seconds").map(|life| state.token_life = life),
        "key-life" => seconds(uri, "seconds").map(|life| state.key_life = life),
        "hardened" => number(uri, "on").map(|on: bool| state.hardened = on),
        "fail-iam" => failure(uri).map(|failure| state.iam_failure = failure),
        "fail-metadata" => failure(uri).map(|failure| state.metadata_failure = failure),
        "slow-credentials" => number(uri, "ms")
            .filter(|delay| *delay <= MOST_MILLISECONDS)
            .map(|delay| state.credential_delay = Duration::from_millis(delay)),
        _ => return None,
    })
}

/// The value of a query parameter, as it stands.
pub(super) fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    uri.query()?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (key == name).then_some(value)
    })
}

fn number<T: std::str::FromStr>(uri: &Uri, name: &str) -> Option<T> {
    parameter(uri, name)?.parse().ok()
}

fn seconds(uri: &Uri, name: &str) -> Option<SignedDuration> {
    let seconds = number(uri, name)?;
    (-MOST_SECONDS..=MOST_SECONDS)
        .contains(&seconds)
        .then(|| SignedDuration::from_secs(seconds))
}

fn failure(uri: &Uri) -> Option<Failure> {
    let status = number(uri, "status").filter(|status| (400..=599).contains(status))?;
    Some(Failure {
        status: StatusCode::from_u16(status).ok()?,
        times: number(uri, "times")?,
    })
}

fn ok(body: Value) -> Answer {
    answer::json(StatusCode::OK, body.to_string())
}

fn counts(state: &State) -> Value {
    let counts = state.counts;
    json!({
        "connections": counts.connections,
        "task_requests": counts.task_requests,
        "task_requests_in_flight": counts.task_requests_in_flight,
        "token_requests": counts.token_requests,
        "key_requests": counts.key_requests,
        "metadata_token_requests": counts.metadata_token_requests,
        "bad_signatures": counts.bad_signatures,
    })
}

/// The last task requests, newest first, with their credentials: this is a sandbox, and tests look for them here.
fn requests(state: &State) -> Value {
    let requests = state.requests.iter().map(|request| {
        let headers: Vec<_> = request
            .headers
            .iter()
            .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
            .collect();
        json!({
            "method": request.method.as_str(),
            "path": request.uri.to_string(),
            "headers": headers,
            "body": String::from_utf8_lossy(&request.body),
        })
    });
    requests.collect()
}
