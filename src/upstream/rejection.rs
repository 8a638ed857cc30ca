//! Parses an error reply into a [`Rejection`]: envelope, verdict, wait, and evidence about the key.

use std::time::SystemTime;

use http::HeaderMap;
use tonic::Code;

use super::{
    Rejection,
    envelope::{self, BodyKind, Envelope, is_printable},
    key_evidence::{self, KeyEvidence},
    throttling_text::{self, Throttling},
    verdict::{self, Credential, Verdict},
};
pub use crate::credentials::key_guard::KEY_LOCK;
use crate::{reason::Reason, telemetry::Facts, wait::retry_after};

const REQUEST_ID_HEADER: &str = "x-request-id";

/// Parses a reply with an error status. Leaves `attempts` of the facts at zero: the send loop counts them.
pub fn from_reply(
    http_status: u16,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> (Rejection, Facts) {
    from_envelope(http_status, headers, envelope::read(body), now)
}

/// As [`from_reply`], for a parsed body: a 200 with an error object.
pub fn from_envelope(
    http_status: u16,
    headers: &HeaderMap,
    envelope: Envelope,
    now: SystemTime,
) -> (Rejection, Facts) {
    let code = envelope.error_code.as_deref();
    let verdict = verdict::from_reply(http_status, code, envelope.body);
    let is_unauthenticated =
        http_status == 401 || (http_status == 200 && verdict.code == Code::Unauthenticated);
    let key_evidence = match is_unauthenticated {
        true => key_evidence::read(
            envelope.body == BodyKind::JsonObject,
            code,
            &envelope.message,
        ),
        false => KeyEvidence::None,
    };
    let throttling = match verdict.reason {
        Reason::Throttled => throttling_text::read(&envelope.message),
        _ => Throttling::default(),
    };
    let verdict = if key_evidence == KeyEvidence::Locked {
        locked(verdict)
    } else {
        verdict
    };
    let named = match may_retry_after(http_status, &verdict) {
        true => retry_after(headers, Some(now)),
        false => None,
    };
    // A throttled call has to wait: instead of zero, the text's or the verdict's wait counts.
    let named = named.filter(|wait| !(wait.is_zero() && verdict.reason == Reason::Throttled));

    let facts = Facts {
        http_status: Some(http_status),
        upstream_request_id: request_id(headers).or(envelope.request_id),
        upstream_code: envelope.error_code,
        ..Facts::default()
    };
    let rejection = Rejection {
        verdict,
        message: envelope.message,
        encoded_authorization_message: envelope.encoded_authorization_message,
        retry_after: named.or(throttling.window).or(verdict.wait),
        throttled_subject: throttling.subject,
        key_evidence,
    };
    (rejection, facts)
}

/// The vendor's request id from the header; `None` unless it is 1 to 128 printable ASCII characters.
pub fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID_HEADER)?.to_str().ok()?.trim();
    is_printable(id, 128).then(|| id.to_owned())
}

/// Whether waiting helps, so that `Retry-After` counts.
fn may_retry_after(http_status: u16, verdict: &Verdict) -> bool {
    verdict.wait.is_some()
        || verdict.code == Code::Unavailable
        || (http_status == 413 && verdict.reason == Reason::QuotaExhausted)
}

/// While the key is locked the gateway rejects correct signatures too, so only waiting helps.
fn locked(verdict: Verdict) -> Verdict {
    Verdict {
        reason: Reason::CredentialLocked,
        credential: Credential::Rejected,
        wait: Some(KEY_LOCK),
        ..verdict
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{HeaderValue, header::RETRY_AFTER};

    use super::*;

    fn reply(http_status: u16, retry_after: Option<&str>, body: &str) -> (Rejection, Facts) {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from_str(value).unwrap());
        }
        from_reply(
            http_status,
            &headers,
            body.as_bytes(),
            SystemTime::UNIX_EPOCH,
        )
    }

    #[test]
    fn the_wait_is_the_headers_else_the_texts_else_the_rows() {
        let throttled = r#"{"error_code":"APIGW.0308","error_msg":"policy user over ratelimit,limit:200,time:2 minute"}"#;
        let busy = r#"{"error_code":"DBS.200011"}"#;
        let cases = [
            ("throttled, no wait named", 429, None, "", Some(60)),
            ("throttled, header", 429, Some("7"), throttled, Some(7)),
            (
                "throttled, unreadable header",
                429,
                Some("-1"),
                "",
                Some(60),
            ),
            ("throttled, text", 429, None, throttled, Some(120)),
            (
                "throttled, unreadable header, text",
                429,
                Some("x"),
                throttled,
                Some(120),
            ),
            ("busy", 409, None, busy, Some(10)),
            ("busy, header", 409, Some("20"), busy, Some(20)),
            (
                "not ready yet",
                500,
                None,
                r#"{"error_code":"DBS.280036"}"#,
                Some(10),
            ),
            ("transient", 503, None, "", None),
            ("transient, header", 503, Some("5"), "", Some(5)),
            ("bad gateway, header", 502, Some("5"), "", Some(5)),
            ("quota", 413, None, "", None),
            ("quota, header", 413, Some("5"), "", Some(5)),
            (
                "body that stays too large",
                413,
                Some("5"),
                r#"{"error_code":"APIGW.0201"}"#,
                None,
            ),
            ("failed", 500, Some("5"), "", None),
            ("denied", 403, Some("5"), "", None),
            ("invalid argument", 400, Some("5"), throttled, None),
            ("gateway timeout", 504, Some("5"), "", None),
        ];

        for (name, http_status, header, body, expected) in cases {
            let (rejection, _) = reply(http_status, header, body);

            assert_eq!(
                rejection.retry_after,
                expected.map(Duration::from_secs),
                "{name}"
            );
        }
    }

    #[test]
    fn the_text_of_a_throttled_call_names_the_subject_and_no_other_text_does() {
        let body = r#"{"error_msg":"policy ip over ratelimit,limit:60,time:1 minute"}"#;

        assert_eq!(
            reply(429, None, body).0.throttled_subject,
            Some(throttling_text::Subject::Ip)
        );
        assert_eq!(reply(400, None, body).0.throttled_subject, None);
    }

    #[test]
    fn only_a_failed_authentication_is_evidence_about_the_key() {
        let signature = r#"{"error_code":"APIGW.0301","error_msg":"verify aksk signature fail"}"#;
        let cases = [
            ("401", 401, signature, KeyEvidence::Rejected),
            (
                "200 with an error object",
                200,
                signature,
                KeyEvidence::Rejected,
            ),
            ("500", 500, signature, KeyEvidence::None),
            ("a page", 401, "<html>", KeyEvidence::Rejected),
            (
                "half an object",
                401,
                r#"{"error_code":"APIGW.03"#,
                KeyEvidence::Rejected,
            ),
            ("no body", 401, "", KeyEvidence::Rejected),
            ("403 with a page", 403, "<html>", KeyEvidence::None),
            (
                "another code",
                401,
                r#"{"error_code":"APIGW.0307"}"#,
                KeyEvidence::None,
            ),
        ];

        for (name, http_status, body, expected) in cases {
            let (rejection, _) = reply(http_status, None, body);

            assert_eq!(rejection.key_evidence, expected, "{name}");
        }
    }

    #[test]
    fn a_locked_key_has_its_own_reason_and_waits_five_minutes() {
        let body =
            r#"{"error_code":"APIGW.0301","error_msg":"AK access failed to reach the limit"}"#;

        let (rejection, _) = reply(401, None, body);

        assert_eq!(rejection.verdict.code, Code::Unauthenticated);
        assert_eq!(rejection.verdict.reason, Reason::CredentialLocked);
        assert_eq!(rejection.verdict.credential, Credential::Rejected);
        assert_eq!(rejection.retry_after, Some(Duration::from_secs(300)));
    }

    #[test]
    fn the_request_id_of_the_header_goes_before_that_of_the_body() {
        let body = br#"{"error_code":"APIGW.0101","request_id":"of-body"}"#;
        let long = "x".repeat(129);
        let cases = [
            ("header", Some("of-header"), Some("of-header")),
            ("no header", None, Some("of-body")),
            ("empty header", Some(""), Some("of-body")),
            ("header with a blank", Some("of header"), Some("of-body")),
            ("header too long", Some(long.as_str()), Some("of-body")),
        ];

        for (name, header, expected) in cases {
            let mut headers = HeaderMap::new();
            if let Some(value) = header {
                headers.insert(REQUEST_ID_HEADER, HeaderValue::from_str(value).unwrap());
            }

            let (_, facts) = from_reply(404, &headers, body, SystemTime::UNIX_EPOCH);

            assert_eq!(facts.upstream_request_id.as_deref(), expected, "{name}");
            assert_eq!(facts.upstream_code.as_deref(), Some("APIGW.0101"), "{name}");
            assert_eq!(facts.http_status, Some(404), "{name}");
        }
    }

    #[test]
    fn a_page_instead_of_a_reply_leaves_no_trace_of_its_text() {
        let (rejection, facts) = reply(502, None, "<html>secret</html>");

        assert_eq!(rejection.message, "");
        assert_eq!(facts.upstream_code, None);
        assert_eq!(rejection.verdict.code, Code::Unavailable);
    }
}
