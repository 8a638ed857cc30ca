//! Request signing, SDK-HMAC-SHA256, as a pure function: request, key and time in, headers out.
//!
//! Sources: "API request signing guide", and what the vendor's Python SDK 3.1.219 does (`tests/fixtures/signing`).

use std::time::SystemTime;

use aws_lc_rs::{digest, hmac};
use http::HeaderValue;
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::auth::AccessKey;

const ALGORITHM: &str = "SDK-HMAC-SHA256";

/// The parts of a request that its signature covers.
#[derive(Debug, Clone, Copy)]
pub struct SigningRequest<'a> {
    /// In capitals.
    pub method: &'a str,
    /// The path as sent, without the query.
    pub path: &'a str,
    /// Names and values of the query before percent-encoding. It must be sent encoded as [`canonical_request`] does.
    pub query: &'a [(&'a str, &'a str)],
    /// The headers to sign, without those of the signer: lower-case names, in any order. `host` is required, with the port if the
    /// URL has one.
    pub headers: &'a [(&'a str, &'a str)],
    /// The bytes that are sent.
    pub body: &'a [u8],
}

/// The headers that sign a request. All are marked sensitive, so that no `Debug` prints them.
#[derive(Debug, Clone)]
pub struct Signed {
    /// `X-Sdk-Date`.
    pub x_sdk_date: HeaderValue,
    /// `X-Security-Token`, with temporary keys.
    pub x_security_token: Option<HeaderValue>,
    /// `Authorization`.
    pub authorization: HeaderValue,
}

/// Signs a request at the time `at`. The gateway accepts it up to 15 minutes before and after, so each attempt is signed separately.
pub fn sign(request: &SigningRequest<'_>, key: &AccessKey, at: SystemTime) -> Signed {
    let date = x_sdk_date(at);
    let headers = signed_headers(request, key, &date);
    let canonical = canonical_request(request, &headers);
    let signature = signature(key, &string_to_sign(&date, &canonical));

    let mut authorization = String::with_capacity(256);
    authorization.push_str(ALGORITHM);
    authorization.push_str(" Access=");
    authorization.push_str(&key.access_key_id);
    authorization.push_str(", SignedHeaders=");
    push_names(&mut authorization, &headers);
    authorization.push_str(", Signature=");
    authorization.push_str(&signature);
    let sensitive = |text: String| {
        let mut value = HeaderValue::try_from(text).expect("made of visible ASCII and blanks");
        value.set_sensitive(true);
        value
    };
    Signed {
        x_sdk_date: sensitive(date),
        x_security_token: key.security_token.clone(),
        authorization: sensitive(authorization),
    }
}

/// All headers that the signature covers, sorted by name.
fn signed_headers<'a>(
    request: &SigningRequest<'a>,
    key: &'a AccessKey,
    date: &'a str,
) -> Vec<(&'a str, &'a str)> {
    let mut headers = Vec::with_capacity(request.headers.len() + 2);
    headers.extend_from_slice(request.headers);
    headers.push(("x-sdk-date", date));
    if let Some(token) = &key.security_token {
        let token = token.to_str().expect("a security token is visible ASCII");
        headers.push(("x-security-token", token));
    }
    headers.sort_unstable_by_key(|(name, _)| *name);
    headers
}

/// The request in the form that both sides hash. `headers` are all signed headers, sorted by name.
pub fn canonical_request(request: &SigningRequest<'_>, headers: &[(&str, &str)]) -> String {
    let headers_length: usize = headers.iter().map(|(n, v)| 2 * n.len() + v.len() + 3).sum();
    let mut text = String::with_capacity(request.path.len() + headers_length + 128);
    text.push_str(request.method);
    text.push('\n');
    push_path(&mut text, request.path);
    text.push('\n');
    push_query(&mut text, request.query);
    text.push('\n');
    for (name, value) in headers {
        text.push_str(name);
        text.push(':');
        text.push_str(value.trim());
        text.push('\n');
    }
    text.push('\n');
    push_names(&mut text, headers);
    text.push('\n');
    push_hex(
        &mut text,
        digest::digest(&digest::SHA256, request.body).as_ref(),
    );
    text
}

/// The text that the key signs.
pub fn string_to_sign(x_sdk_date: &str, canonical_request: &str) -> String {
    let mut text = String::with_capacity(128);
    text.push_str(ALGORITHM);
    text.push('\n');
    text.push_str(x_sdk_date);
    text.push('\n');
    let hash = digest::digest(&digest::SHA256, canonical_request.as_bytes());
    push_hex(&mut text, hash.as_ref());
    text
}

/// The signature in lower-case hex.
pub fn signature(key: &AccessKey, string_to_sign: &str) -> String {
    let mut text = String::with_capacity(64);
    let tag = hmac::sign(&key.signing_key, string_to_sign.as_bytes());
    push_hex(&mut text, tag.as_ref());
    text
}

fn x_sdk_date(at: SystemTime) -> String {
    // Years beyond 9999 do not fit the format. A gateway accepts no such clock.
    let at = Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH);
    at.strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// The path decoded, encoded again part by part, and with a slash at its end, which the requested path need not have.
fn push_path(text: &mut String, path: &str) {
    // A `%` without two hex digits stays, and bytes that are not UTF-8 become U+FFFD.
    let decoded = percent_decode_str(path).decode_utf8_lossy();
    for (index, part) in decoded.split('/').enumerate() {
        if index > 0 {
            text.push('/');
        }
        push_encoded(text, part);
    }
    if !decoded.ends_with('/') {
        text.push('/');
    }
}

fn push_query(text: &mut String, query: &[(&str, &str)]) {
    let mut pairs = query.to_vec();
    pairs.sort_unstable();
    for (index, (name, value)) in pairs.into_iter().enumerate() {
        if index > 0 {
            text.push('&');
        }
        push_encoded(text, name);
        text.push('=');
        push_encoded(text, value);
    }
}

fn push_names(text: &mut String, headers: &[(&str, &str)]) {
    for (index, (name, _)) in headers.iter().enumerate() {
        if index > 0 {
            text.push(';');
        }
        text.push_str(name);
    }
}

/// Everything except letters, digits, `-`, `_`, `.` and `~` is percent-encoded.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

fn push_encoded(text: &mut String, part: &str) {
    text.extend(utf8_percent_encode(part, ENCODED));
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const VECTORS: &str = include_str!("../../tests/fixtures/signing/vectors.json");

    /// Cases that cannot occur here, with the reason; the README of the fixtures has the details.
    const NOT_OURS: [&str; 6] = [
        "client-security-token-empty",
        "signer-underscore-header",
        "signer-text-body",
        "signer-content-hash-given",
        "signer-content-hash-no-body",
        "signer-method-case",
    ];

    /// The SDK's own values for query parameters: text, a truth value, or a list that makes one pair for each item.
    fn texts(value: &Value) -> Vec<String> {
        match value {
            Value::String(text) => vec![text.clone()],
            Value::Array(items) => items.iter().flat_map(texts).collect(),
            other => vec![other.to_string()],
        }
    }

    fn time(x_sdk_date: &str) -> SystemTime {
        let part = |range: std::ops::Range<usize>| x_sdk_date[range].to_owned();
        let text = format!(
            "{}-{}-{}T{}:{}:{}Z",
            part(0..4),
            part(4..6),
            part(6..8),
            part(9..11),
            part(11..13),
            part(13..15)
        );
        SystemTime::try_from(text.parse::<Timestamp>().unwrap()).unwrap()
    }

    #[test]
    fn every_vendor_vector_that_can_occur_agrees_at_each_step() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let mut ran = 0;

        for vector in vectors["vectors"].as_array().unwrap() {
            let text = |name: &str| vector[name].as_str().unwrap_or_default();
            let name = text("name");
            if NOT_OURS.contains(&name) {
                continue;
            }
            let key = AccessKey::parse(text("ak"), text("sk"), vector["security_token"].as_str())
                .unwrap();
            let mut headers: Vec<(String, String)> = vector["headers"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, value)| (name.to_lowercase(), value.as_str().unwrap().to_owned()))
                .collect();
            if !headers.iter().any(|(name, _)| name == "host") {
                headers.push(("host".to_owned(), text("host").to_owned()));
            }
            if let Some(project_id) = vector["project_id"].as_str() {
                headers.push(("x-project-id".to_owned(), project_id.to_owned()));
            }
            let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (&**n, &**v)).collect();
            let query: Vec<(&str, String)> = vector["query"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|pair| {
                    texts(&pair[1])
                        .into_iter()
                        .map(|value| (pair[0].as_str().unwrap(), value))
                })
                .collect();
            let query: Vec<(&str, &str)> = query.iter().map(|(n, v)| (*n, &**v)).collect();
            let request = SigningRequest {
                method: text("method"),
                path: text("resource_path"),
                query: &query,
                headers: &headers,
                body: text("body").as_bytes(),
            };
            let expected = |name: &str| vector["expected"][name].as_str().unwrap();
            let date = x_sdk_date(time(text("x_sdk_date")));

            let canonical = canonical_request(&request, &signed_headers(&request, &key, &date));
            assert_eq!(canonical, expected("canonical_request"), "{name}");

            let to_sign = string_to_sign(&date, expected("canonical_request"));
            assert_eq!(to_sign, expected("string_to_sign"), "{name}");

            let signature = signature(&key, expected("string_to_sign"));
            let authorization = expected("authorization");
            assert_eq!(
                Some(&*signature),
                authorization.rsplit('=').next(),
                "{name}"
            );

            let signed = sign(&request, &key, time(text("x_sdk_date")));
            assert_eq!(signed.authorization, authorization, "{name}");
            assert_eq!(signed.x_sdk_date, text("x_sdk_date"), "{name}");
            assert_eq!(
                signed.x_security_token.map(|token| token.len()),
                vector["security_token"].as_str().map(str::len),
                "{name}"
            );
            ran += 1;
        }

        assert_eq!(ran, 64 - NOT_OURS.len());
    }

    #[test]
    fn invalid_escapes_stay_and_invalid_utf8_becomes_the_replacement_character() {
        let mut text = String::new();

        push_path(&mut text, "/a%2/%zz/%+1/%ff/%");

        assert_eq!(text, "/a%252/%25zz/%25%2B1/%EF%BF%BD/%25/");
    }

    #[test]
    fn the_signed_headers_do_not_print() {
        let key = AccessKey::parse("canary-ak", "canary-sk", Some("canary-st")).unwrap();
        let request = SigningRequest {
            method: "POST",
            path: "/",
            query: &[],
            headers: &[("host", "example.com")],
            body: b"",
        };

        let printed = format!("{:?}", sign(&request, &key, SystemTime::UNIX_EPOCH));

        assert!(
            !printed.contains("canary") && !printed.contains("Signature"),
            "{printed}"
        );
    }
}
