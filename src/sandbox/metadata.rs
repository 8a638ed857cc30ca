//! The metadata service of a cloud machine: temporary keys, and the tokens of its hardened mode.

use bytes::Bytes;
use http::{Request, StatusCode};
use jiff::SignedDuration;

use super::{
    answer::{Answer, answer, json},
    iam::{random_text, time},
    state::{Key, State},
};

/// Longest life of a metadata token, in seconds: the six hours that the SDK asks for.
const LONGEST_TOKEN_LIFE: i64 = 21_600;

/// Answers `PUT /meta-data/latest/api/token`: the token of the hardened mode, as text.
pub(super) fn issue_metadata_token(request: &Request<Bytes>, state: &mut State) -> Answer {
    state.counts.metadata_token_requests += 1;
    if let Some(status) = state.metadata_failure.take() {
        return plain(status, "The sandbox was told to fail.");
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
    state.remember_metadata_token(token.clone(), expires_at);
    plain(StatusCode::OK, token)
}

/// Answers `GET /openstack/latest/securitykey`: a new temporary key each time.
pub(super) fn issue_key(request: &Request<Bytes>, state: &mut State) -> Answer {
    state.counts.key_requests += 1;
    if let Some(status) = state.metadata_failure.take() {
        return plain(status, "The sandbox was told to fail.");
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

    let key = Key {
        access: format!("HST{}", random_text(17).to_uppercase()),
        secret: random_text(40),
        security_token: format!("hQpj{}", random_text(600)),
        security_token_required: true,
        expires_at: Some(now + state.key_life),
        bad_signatures_in_a_row: 0,
        locked_until: None,
    };
    let answer = json(
        StatusCode::OK,
        format!(
            r#"{{"credential":{{"access":"{}","secret":"{}","securitytoken":"{}","expires_at":"{}"}}}}"#,
            key.access,
            key.secret,
            key.security_token,
            time(now + state.key_life),
        ),
    );
    state.remember_key(key);
    answer
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain", text)
}
