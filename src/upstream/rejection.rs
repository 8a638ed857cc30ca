//! Puts an error answer together: its envelope, its verdict, how long to wait, and what it says about the key.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, header::RETRY_AFTER};
use tonic::Code;

use super::{
    Facts, Rejection,
    envelope::{self, Envelope, is_printable},
    retry_after,
    verdict::{self, Credential, Verdict},
};
use crate::reason::Reason;

/// How long the gateway locks a key after too many bad signatures. Source: API request signing guide, FAQ.
pub const KEY_LOCK: Duration = Duration::from_secs(5 * 60);

const REQUEST_ID_HEADER: &str = "x-request-id";
const SIGNATURE_REFUSED: &str = "APIGW.0301";

/// Reads an answer with an error status. `attempts` of the facts is left at zero: the send loop counts them.
pub fn of_answer(
    http_status: u16,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> (Rejection, Facts) {
    of_envelope(http_status, headers, envelope::read(body), now)
}

/// As [`of_answer`], for a body that has been read already: a 200 with an error object in it.
pub fn of_envelope(
    http_status: u16,
    headers: &HeaderMap,
    envelope: Envelope,
    now: SystemTime,
) -> (Rejection, Facts) {
    let code = envelope.error_code.as_deref();
    let verdict = verdict::of_answer(http_status, code, envelope.body);
    let says = |text| contains_ignoring_case(&envelope.message, text);
    let signature = code == Some(SIGNATURE_REFUSED) && verdict.code == Code::Unauthenticated;
    let lock_announced = signature && says("AK access failed to reach the limit");
    let signature_refused = signature && !lock_announced && !says("decrypt token fail");
    let throttling = match verdict.reason {
        Reason::Throttled => retry_after::throttling(&envelope.message),
        _ => retry_after::Throttling::default(),
    };
    let verdict = if lock_announced {
        locked(verdict)
    } else {
        verdict
    };
    let named = if may_name_a_wait(http_status, &verdict) {
        retry_after::parse(headers.get_all(RETRY_AFTER), now)
    } else {
        None
    };

    let facts = Facts {
        attempts: 0,
        http_status: Some(http_status),
        upstream_request_id: request_id(headers).or(envelope.request_id),
        upstream_code: envelope.error_code,
    };
    let rejection = Rejection {
        verdict,
        message: envelope.message,
        encoded_authorization_message: envelope.encoded_authorization_message,
        retry_after: named.or(throttling.window).or(verdict.retry_info),
        throttled_subject: throttling.subject.map(str::to_owned),
        signature_refused,
        lock_announced,
    };
    (rejection, facts)
}

/// The vendor's request id of an answer, from its header; `None` when it is not 1 to 128 printable ASCII characters.
pub fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID_HEADER)?.to_str().ok()?.trim();
    is_printable(id, 128).then(|| id.to_owned())
}

/// `RetryInfo` tells the caller that waiting helps, so `Retry-After` counts only where that is so.
fn may_name_a_wait(http_status: u16, verdict: &Verdict) -> bool {
    verdict.retry_info.is_some()
        || verdict.code == Code::Unavailable
        || (http_status == 413 && verdict.reason == Reason::QuotaExhausted)
}

/// While the key is locked right signatures are refused too, so nothing but waiting helps.
fn locked(verdict: Verdict) -> Verdict {
    Verdict {
        reason: Reason::CredentialLocked,
        credential: Credential::Refused,
        retry_info: Some(KEY_LOCK),
        ..verdict
    }
}

fn contains_ignoring_case(text: &str, part: &str) -> bool {
    text.to_ascii_lowercase()
        .contains(&part.to_ascii_lowercase())
}
