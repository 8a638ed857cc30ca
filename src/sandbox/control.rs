//! Paths under `/sandbox/` that inspect the sandbox and inject errors. The vendor has no such paths.
//!
//! They need no credential, so a web page must not reach them through a browser on this machine: neither directly, with its own
//! `Origin`, nor under a host name that it has pointed to a loopback address (DNS rebinding).

use std::{net::IpAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, Uri, header, uri::Authority};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{
    auth::single,
    response::{self, Response},
    state::{InjectedError, State},
};

/// Largest number of seconds, positive or negative: 150 years, within the range of the clock.
const MAX_SECONDS: i64 = 150 * 365 * 24 * 60 * 60;

/// Largest number of milliseconds.
const MAX_MILLISECONDS: u64 = 60_000;

/// Responds to a request under `/sandbox/`; `None` for an unknown path.
pub(super) fn respond(request: &Request<Bytes>, state: &mut State) -> Option<Response> {
    let uri = request.uri();
    let name = uri.path().strip_prefix("/sandbox/")?;
    if is_foreign(request.headers()) {
        let message = "the Host or Origin header is not that of this sandbox";
        return Some(error(StatusCode::FORBIDDEN, message));
    }
    let valid = match (request.method(), name) {
        (&Method::GET, "counts") => return Some(ok(json!(state.counts))),
        (&Method::GET, "requests") => return Some(ok(requests(state))),
        (&Method::POST, "revoke-tokens") => {
            for token in &mut state.tokens {
                token.revoked = true;
            }
            true
        }
        (&Method::POST, "clock") => set(&mut state.clock_offset, seconds(uri, "offset-seconds")),
        (&Method::POST, "token-life") => set(&mut state.token_life, seconds(uri, "seconds")),
        (&Method::POST, "key-life") => set(&mut state.key_life, seconds(uri, "seconds")),
        (&Method::POST, "hardened") => set(&mut state.hardened, number(uri, "on")),
        (&Method::POST, "fail-iam") => set(&mut state.iam_error, injected_error(uri)),
        (&Method::POST, "fail-metadata") => set(&mut state.metadata_error, injected_error(uri)),
        (&Method::POST, "slow-credentials") => {
            let delay = number(uri, "ms").filter(|delay| *delay <= MAX_MILLISECONDS);
            set(
                &mut state.credential_delay,
                delay.map(Duration::from_millis),
            )
        }
        _ => return None,
    };
    if !valid {
        let message = "a parameter is missing or invalid; see docs/sandbox.md";
        return Some(error(StatusCode::BAD_REQUEST, message));
    }
    Some(ok(json!({})))
}

/// Whether the request may come from a web page: its host is not a loopback address or `localhost`, or it has an origin other than
/// that host.
fn is_foreign(headers: &HeaderMap) -> bool {
    let Some(host) = single(headers, "host") else {
        return true;
    };
    let is_origin = |origin: &[u8]| origin.strip_prefix(b"http://") == Some(host.as_bytes());
    let mut origins = headers.get_all(header::ORIGIN).iter();
    !is_loopback(host) || !origins.all(|origin| is_origin(origin.as_bytes()))
}

fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority.host().trim_matches(['[', ']']);
    let address = name.parse().map(|address: IpAddr| address.is_loopback());
    !host.contains('@') && address.unwrap_or_else(|_| name.eq_ignore_ascii_case("localhost"))
}

/// Changes a setting if the value is valid. Returns whether it was.
fn set<T>(setting: &mut T, value: Option<T>) -> bool {
    let valid = value.is_some();
    if let Some(value) = value {
        *setting = value;
    }
    valid
}

/// The value of a query parameter, without decoding.
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
    (-MAX_SECONDS..=MAX_SECONDS)
        .contains(&seconds)
        .then(|| SignedDuration::from_secs(seconds))
}

fn injected_error(uri: &Uri) -> Option<InjectedError> {
    let status = number(uri, "status").filter(|status| (400..=599).contains(status))?;
    Some(InjectedError {
        status: StatusCode::from_u16(status).ok()?,
        times: number(uri, "times")?,
    })
}

fn error(status: StatusCode, message: &str) -> Response {
    response::json(status, json!({"error": message}).to_string())
}

fn ok(body: Value) -> Response {
    response::json(StatusCode::OK, body.to_string())
}

/// The last task requests, newest first, with credentials, because tests check them.
fn requests(state: &State) -> Value {
    let requests = state.requests.iter().map(|request| {
        let headers: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
            .collect();
        json!({
            "method": request.method().as_str(),
            "path": request.uri().to_string(),
            "headers": headers,
            "body": String::from_utf8_lossy(request.body()),
        })
    });
    requests.collect()
}
