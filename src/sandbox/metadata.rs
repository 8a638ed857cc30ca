//! The metadata service of a virtual machine: temporary keys, and metadata tokens for the hardened mode.

use bytes::Bytes;
use http::{Request, StatusCode};
use jiff::SignedDuration;
use serde_json::json;

use super::{
    iam::{random_text, time},
    response::{self, Response},
    state::{SigningKey, State, remember},
};

/// Longest life of a metadata token, in seconds: six hours, as the SDK requests.
const LONGEST_TOKEN_LIFE: i64 = 21_600;

/// Responds to `PUT /meta-data/latest/api/token`: a metadata token, as text.
pub(super) fn issue_metadata_token(request: &Request<Bytes>, state: &mut State) -> Response {
    state.counts.metadata_token_requests += 1;
    if let Some(status) = state.metadata_error.take() {
        return plain(status, "This error was injected.");
    }
    let life = request
        .headers()
        .get("x-metadata-token-ttl-seconds")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|seconds| (1..=LONGEST_TOKEN_LIFE).contains(seconds));
    let Some(life) = life else {
        return plain(
            StatusCode::BAD_REQUEST,
            "X-Metadata-Token-Ttl-Seconds must be 1 to 21600.",
        );
    };
    let token = random_text(56);
    let expires_at = state.now() + SignedDuration::from_secs(life);
    remember(&mut state.metadata_tokens, 0, (token.clone(), expires_at));
    plain(StatusCode::OK, token)
}

/// Responds to `GET /openstack/latest/securitykey`: a new temporary key each time.
pub(super) fn issue_key(request: &Request<Bytes>, state: &mut State) -> Response {
    state.counts.key_requests += 1;
    if let Some(status) = state.metadata_error.take() {
        return plain(status, "This error was injected.");
    }
    let now = state.now();
    let given = request.headers().get("x-metadata-token");
    let known = state
        .metadata_tokens
        .iter()
        .any(|(token, end)| given.is_some_and(|given| given == token.as_str()) && now < *end);
    if state.hardened && !known {
        return plain(StatusCode::UNAUTHORIZED, "Invalid metadata token.");
    }

    let key = SigningKey {
        access: format!("HST{}", random_text(17).to_uppercase()),
        secret: random_text(40),
        security_token: format!("hQpj{}", random_text(600)),
        security_token_required: true,
        expires_at: Some(now + state.key_life),
        bad_signatures_in_a_row: 0,
        locked_until: None,
    };
    let credential = json!({
        "access": key.access,
        "secret": key.secret,
        "securitytoken": key.security_token,
        "expires_at": time(now + state.key_life),
    });
    remember(&mut state.keys, 1, key);
    response::json(
        StatusCode::OK,
        json!({"credential": credential}).to_string(),
    )
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response {
    response::response(status, "text/plain", text)
}
