//! Authenticates requests like the gateway: by a known token, or by a signature that it recomputes.

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use jiff::{SignedDuration, Timestamp, civil, tz::TimeZone};

use super::{
    TOKEN,
    response::ErrorReply,
    signature,
    state::{SigningKey, State},
};

/// Largest difference between `X-Sdk-Date` and the gateway's clock (API request signing guide).
const WINDOW: SignedDuration = SignedDuration::from_mins(15);

/// Consecutive bad signatures that lock a key, and for how long (API request signing guide).
const BAD_SIGNATURES_TO_LOCK: u32 = 5;
const LOCK: SignedDuration = SignedDuration::from_mins(5);

/// Checks the token or signature of a request.
pub(super) fn authenticate(request: &Request<Bytes>, state: &mut State) -> Result<(), ErrorReply> {
    let headers = request.headers();
    match (
        headers.contains_key("x-auth-token"),
        headers.contains_key(header::AUTHORIZATION),
    ) {
        (true, true) => Err(unauthorized(
            "both x-auth-token and authorization are present",
        )),
        (false, false) => Err(unauthorized("x-auth-token not found")),
        (true, false) => check_token(headers, state),
        (false, true) => check_signature(request, state),
    }
}

fn check_token(headers: &HeaderMap, state: &State) -> Result<(), ErrorReply> {
    let value =
        single(headers, "x-auth-token").ok_or_else(|| unauthorized("decrypt token fail"))?;
    if value == TOKEN {
        return Ok(());
    }
    let token = state.tokens.iter().find(|token| token.value == value);
    let token = token.ok_or_else(|| unauthorized("decrypt token fail"))?;
    if token.revoked || token.expires_at <= state.now() {
        return Err(ErrorReply {
            status: StatusCode::UNAUTHORIZED,
            code: "APIGW.0307",
            message: "The token must be updated.".to_owned(),
        });
    }
    if !token.has_project {
        return Err(unauthorized("the token is not scoped to a project"));
    }
    Ok(())
}

fn check_signature(request: &Request<Bytes>, state: &mut State) -> Result<(), ErrorReply> {
    let headers = request.headers();
    let now = state.now();
    let authorization = single(headers, "authorization").and_then(parse_authorization);
    let (access, signed_headers, given) =
        authorization.ok_or_else(|| unauthorized("authorization is not properly formatted"))?;
    let key = state.keys.iter_mut().find(|key| key.access == access);
    let key = key.ok_or_else(|| {
        unauthorized(&format!(
            "Get secretKey failed,ak:{access},err:ak not exist"
        ))
    })?;
    if key.locked_until.is_some_and(|until| now < until) {
        return Err(unauthorized("AK access failed to reach the limit"));
    }
    if key.expires_at.is_some_and(|end| end <= now) {
        return Err(unauthorized("the security token has expired"));
    }
    if !is_security_token_valid(headers, key) {
        return Err(unauthorized("the security token does not belong to the ak"));
    }

    let date = single(headers, "x-sdk-date").ok_or_else(|| unauthorized("x-sdk-date not found"))?;
    let signed_at = parse_date(date).ok_or_else(|| unauthorized("x-sdk-date is malformed"))?;
    if now.duration_since(signed_at).abs() > WINDOW {
        return Err(unauthorized(&format!(
            "signature expired, signature time:{date},server time:{}",
            now.strftime("%Y%m%dT%H%M%SZ")
        )));
    }
    for name in ["host", "x-sdk-date"] {
        if !signed_headers.split(';').any(|signed| signed == name) {
            return Err(unauthorized(&format!(
                "{name} is not among the signed headers"
            )));
        }
    }

    let canonical = signature::canonical_request(request, signed_headers);
    let expected = canonical
        .as_ref()
        .map(|canonical| signature::signature(canonical, date, &key.secret));
    if expected.as_deref() == Some(given) {
        key.bad_signatures_in_a_row = 0;
        return Ok(());
    }
    key.bad_signatures_in_a_row += 1;
    if key.bad_signatures_in_a_row >= BAD_SIGNATURES_TO_LOCK {
        key.bad_signatures_in_a_row = 0;
        key.locked_until = Some(now + LOCK);
    }
    state.counts.bad_signatures += 1;
    // Like the gateway, include the canonical request, with | for line feeds.
    let canonical = String::from_utf8_lossy(&canonical.unwrap_or_default()).replace('\n', "|");
    Err(unauthorized(&format!(
        "verify aksk signature fail, canonicalRequest:{canonical}"
    )))
}

/// The security token is required for temporary keys, optional for the documented key.
fn is_security_token_valid(headers: &HeaderMap, key: &SigningKey) -> bool {
    match single(headers, "x-security-token") {
        Some(token) => token == key.security_token,
        None => !key.security_token_required && !headers.contains_key("x-security-token"),
    }
}

/// Access key id, names of the signed headers, and signature in the value of `Authorization`.
fn parse_authorization(value: &str) -> Option<(&str, &str, &str)> {
    let rest = value.strip_prefix(signature::ALGORITHM)?;
    let rest = rest.strip_prefix(" Access=")?;
    let (access, rest) = rest.split_once(", SignedHeaders=")?;
    let (signed_headers, signature) = rest.split_once(", Signature=")?;
    Some((access, signed_headers, signature))
}

/// `YYYYMMDDTHHMMSSZ`, UTC.
fn parse_date(text: &str) -> Option<Timestamp> {
    if text.len() != "YYYYMMDDTHHMMSSZ".len() {
        return None;
    }
    let date = civil::DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok()?;
    TimeZone::UTC.to_timestamp(date).ok()
}

/// The value of a header that is present exactly once.
pub(super) fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    value.to_str().ok()
}

fn unauthorized(reason: &str) -> ErrorReply {
    ErrorReply {
        status: StatusCode::UNAUTHORIZED,
        code: "APIGW.0301",
        message: format!("Incorrect IAM authentication information: {reason}"),
    }
}
