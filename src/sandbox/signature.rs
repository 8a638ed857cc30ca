//! The signature SDK-HMAC-SHA256 of a received request, as defined by the "API request signing guide". Shares no code with the
//! crate's signer, so that an error cannot be in both.

use std::fmt::Write as _;

use aws_lc_rs::{digest, hmac};
use bytes::Bytes;
use http::Request;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// The first word of `Authorization`, and the first line of the string to sign.
pub(super) const ALGORITHM: &str = "SDK-HMAC-SHA256";

/// Everything except `A-Z a-z 0-9 - _ . ~`.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// As [`ESCAPED`], but without `/`.
const ESCAPED_IN_PATHS: &AsciiSet = &ESCAPED.remove(b'/');

/// The canonical request; `None` if a signed header is absent or repeated. Bytes, because header values may not be UTF-8.
pub(super) fn canonical_request(request: &Request<Bytes>, signed_headers: &str) -> Option<Vec<u8>> {
    let mut canonical = format!(
        "{}\n{}\n{}\n",
        request.method().as_str().to_uppercase(),
        canonical_path(request.uri().path()),
        canonical_query(request.uri().query().unwrap_or_default()),
    )
    .into_bytes();
    for name in signed_headers.split(';') {
        let mut values = request.headers().get_all(name).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        canonical.extend_from_slice(name.as_bytes());
        canonical.push(b':');
        canonical.extend_from_slice(value.as_bytes().trim_ascii());
        canonical.push(b'\n');
    }
    let payload_hash = match request.headers().get("x-sdk-content-sha256") {
        Some(given) if !given.is_empty() && !request.body().is_empty() => given.as_bytes().to_vec(),
        _ => sha256(request.body()).into_bytes(),
    };
    canonical.extend_from_slice(format!("\n{signed_headers}\n").as_bytes());
    canonical.extend_from_slice(&payload_hash);
    Some(canonical)
}

/// The signature in lower-case hex. `date` is the value of `X-Sdk-Date`.
pub(super) fn signature(canonical_request: &[u8], date: &str, secret_key: &str) -> String {
    let string_to_sign = format!("{ALGORITHM}\n{date}\n{}", sha256(canonical_request));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret_key.as_bytes());
    hex(hmac::sign(&key, string_to_sign.as_bytes()).as_ref())
}

/// Decodes the path, encodes each segment again and appends the final slash that the request itself does not have.
fn canonical_path(path: &str) -> String {
    let mut path = encode(&decode(path), ESCAPED_IN_PATHS);
    if !path.ends_with('/') {
        path.push('/');
    }
    path
}

/// Decodes the pairs, sorts them by key and value, and encodes them again.
fn canonical_query(query: &str) -> String {
    let mut pairs: Vec<_> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect();
    pairs.sort();
    let pairs: Vec<_> = pairs
        .iter()
        .map(|(key, value)| format!("{}={}", encode(key, ESCAPED), encode(value, ESCAPED)))
        .collect();
    pairs.join("&")
}

/// Percent-decodes. A `%` without two hex digits stays; invalid UTF-8 becomes U+FFFD.
fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn encode(text: &str, escaped: &'static AsciiSet) -> String {
    utf8_percent_encode(text, escaped).to_string()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String does not fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = r#"{"workflow_id": "102772a9-31fa-4129-b9f8-7638e2792f3b", "workflow_name": "CreateMysqlSingleHAInstance"}"#;

    fn example() -> http::request::Builder {
        Request::post("/v3/0483b6b16e954cb88930a360d2c4e663/instances/1ffc4167903840cb93a3da56d28c14fdin01/task-center-detail")
            .header("Content-Type", "application/json")
            .header("X-Sdk-Date", "20251209T080910Z")
            .header("User-Agent", "huaweicloud-usdk-python/3.0; signing-vectors/1")
            .header("X-Project-Id", "0483b6b16e954cb88930a360d2c4e663")
            .header("Host", "rds.cn-north-4.myhuaweicloud.com")
    }

    // Expected values: this request signed by the official Python SDK 3.1.219.
    #[test]
    fn documented_example_has_the_signature_of_the_official_sdk() {
        let request = example().body(Bytes::from_static(BODY.as_bytes())).unwrap();

        let canonical = canonical_request(
            &request,
            "content-type;host;user-agent;x-project-id;x-sdk-date",
        )
        .unwrap();
        let signature = signature(
            &canonical,
            "20251209T080910Z",
            "exampleSecretKey0000000000000000000001Ab",
        );

        assert_eq!(
            std::str::from_utf8(&canonical).unwrap(),
            "POST\n/v3/0483b6b16e954cb88930a360d2c4e663/instances/1ffc4167903840cb93a3da56d28c14fdin01/task-center-detail/\n\n\
             content-type:application/json\nhost:rds.cn-north-4.myhuaweicloud.com\n\
             user-agent:huaweicloud-usdk-python/3.0; signing-vectors/1\nx-project-id:0483b6b16e954cb88930a360d2c4e663\n\
             x-sdk-date:20251209T080910Z\n\ncontent-type;host;user-agent;x-project-id;x-sdk-date\n\
             0ea0c5c80b89d26d1be5c8a3d8b55601216fea1dfc2149d8fcba9cab2f9d9c1e"
        );
        assert_eq!(
            signature,
            "4c106cb513d22dd95032a42557fb2bca90ab865ba5b4567e6b7f39cc2a4d82ec"
        );
    }

    #[test]
    fn absent_and_repeated_signed_headers_are_rejected() {
        let absent = example().body(Bytes::new()).unwrap();
        let repeated = example().header("Host", "b").body(Bytes::new()).unwrap();

        assert_eq!(canonical_request(&absent, "host;x-security-token"), None);
        assert_eq!(canonical_request(&repeated, "host"), None);
    }

    #[test]
    fn path_and_query_are_normalized() {
        let paths = [
            ("/a", "/a/"),
            ("/a/", "/a/"),
            ("/a%2fb", "/a/b/"),
            ("/%e4%b8%ad%zz+", "/%E4%B8%AD%25zz%2B/"),
            ("/~-_.", "/~-_./"),
        ];

        for (path, expected) in paths {
            assert_eq!(canonical_path(path), expected, "{path}");
        }
        assert_eq!(canonical_query("b=2&a=%2B&b=1&c"), "a=%2B&b=1&b=2&c=");
        assert_eq!(canonical_query(""), "");
    }

    #[test]
    fn content_hash_header_is_used_only_with_a_body() {
        let hash = |body: &'static str| {
            let request = example().header("X-Sdk-Content-Sha256", "UNSIGNED-PAYLOAD");
            let request = request.body(Bytes::from_static(body.as_bytes())).unwrap();
            let canonical = canonical_request(&request, "host").unwrap();
            String::from_utf8(canonical)
                .unwrap()
                .rsplit('\n')
                .next()
                .unwrap()
                .to_owned()
        };

        assert_eq!(hash("{}"), "UNSIGNED-PAYLOAD");
        assert_eq!(
            hash(""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
