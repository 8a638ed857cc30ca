//! Signatures equal those of a simple signer that follows the vendor's rules step by step.
//! Source: "API request signing guide", section "Signature algorithm".
//!
//! The input's lines: method, path, query, headers, AK, SK, security token, seconds since 1970; the rest is the body.

use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rds_task_facade::credentials::{
    AccessKey,
    signer::{SigningRequest, sign},
};

use super::{lines, text};

pub(crate) fn check(input: &[u8]) {
    let [method, path, query, headers, ak, sk, token, seconds, body] = lines(input);
    let (method, path) = (text(method), text(path));
    let query = pairs(&text(query), '&', '=');
    let headers = header_pairs(&text(headers));
    let seconds = seconds.iter().fold(0_u64, |n, byte| {
        n * 10 % 100_000_000_000 + u64::from(byte % 10)
    });
    let (sk, token) = (text(sk), text(token));
    let Ok(key) = AccessKey::parse(&text(ak), &sk, Some(&token)) else {
        return;
    };
    let request = SigningRequest {
        method: &method,
        path: &path,
        query: &query.iter().map(|(n, v)| (&**n, &**v)).collect::<Vec<_>>(),
        headers: &headers
            .iter()
            .map(|(n, v)| (&**n, &**v))
            .collect::<Vec<_>>(),
        body,
    };

    let signed = sign(&request, &key, UNIX_EPOCH + Duration::from_secs(seconds));

    let date = x_sdk_date(seconds);
    assert_eq!(signed.x_sdk_date.to_str().expect("ASCII"), date);
    let mut to_sign = headers;
    to_sign.insert("x-sdk-date".to_owned(), date.clone());
    if let Some(token) = &key.security_token {
        let token = token.to_str().expect("ASCII").to_owned();
        to_sign.insert("x-security-token".to_owned(), token);
    }
    let names = to_sign.keys().cloned().collect::<Vec<_>>().join(";");
    let lines: String = to_sign
        .iter()
        .map(|(name, value)| format!("{name}:{}\n", value.trim()))
        .collect();
    let canonical = [
        method.clone(),
        canonical_path(&path),
        canonical_query(query),
        lines,
        names.clone(),
        hex(&sha256(body)),
    ]
    .join("\n");
    let string_to_sign = format!(
        "SDK-HMAC-SHA256\n{date}\n{}",
        hex(&sha256(canonical.as_bytes()))
    );
    let secret = sk.strip_suffix('\n').unwrap_or(&sk);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    let signature = hex(&hmac(secret.as_bytes(), string_to_sign.as_bytes()));
    assert_eq!(
        signed.authorization.to_str().expect("ASCII"),
        format!(
            "SDK-HMAC-SHA256 Access={}, SignedHeaders={names}, Signature={signature}",
            key.access_key_id
        )
    );
}

fn pairs(text: &str, between: char, within: char) -> Vec<(String, String)> {
    let items = text.split(between).filter(|item| !item.is_empty());
    items
        .map(|item| item.split_once(within).unwrap_or((item, "")))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Valid headers for the signer: unique lower-case names and printable values, without the headers that the signer adds.
fn header_pairs(text: &str) -> BTreeMap<String, String> {
    let name = |text: &str| -> String {
        let lower = text.to_ascii_lowercase();
        lower
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .collect()
    };
    let value =
        |text: &str| -> String { text.chars().filter(|c| matches!(c, ' '..='~')).collect() };
    pairs(text, '|', ':')
        .into_iter()
        .map(|(n, v)| (name(&n), value(&v)))
        .filter(|(name, _)| !name.is_empty() && !name.starts_with("x-s"))
        .collect()
}

/// "Decode the path, encode each of its parts, and end it with a slash."
fn canonical_path(path: &str) -> String {
    let mut decoded = Vec::new();
    let mut rest = path.as_bytes();
    while !rest.is_empty() {
        let digits = rest.get(1..3).filter(|_| rest[0] == b'%');
        let byte =
            digits.and_then(|digits| Some(hex_digit(digits[0])? * 16 + hex_digit(digits[1])?));
        decoded.push(byte.unwrap_or(rest[0]));
        rest = &rest[if byte.is_some() { 3 } else { 1 }..];
    }
    let parts: Vec<String> = text(&decoded).split('/').map(encoded).collect();
    let path = parts.join("/");
    if path.ends_with('/') {
        path
    } else {
        path + "/"
    }
}

fn hex_digit(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// "Sort the parameters by name, those of one name by value, each encoded, as name=value."
fn canonical_query(query: Vec<(String, String)>) -> String {
    let mut by_name: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in query {
        by_name.entry(name).or_default().push(value);
    }
    let mut parameters = Vec::new();
    for (name, mut values) in by_name {
        values.sort();
        parameters.extend(
            values
                .iter()
                .map(|value| format!("{}={}", encoded(&name), encoded(value))),
        );
    }
    parameters.join("&")
}

/// Percent-encodes everything except the unreserved characters of RFC 3986.
fn encoded(part: &str) -> String {
    const UNRESERVED: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~";
    let encode = |c: char| match UNRESERVED.contains(c) {
        true => c.to_string(),
        false => c
            .to_string()
            .bytes()
            .map(|byte| format!("%{byte:02X}"))
            .collect(),
    };
    part.chars().map(encode).collect()
}

/// The date, counted year by year and month by month from 1970.
fn x_sdk_date(seconds: u64) -> String {
    let is_leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    let mut days = seconds / 86_400;
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!(
        "{year:04}{month:02}{:02}T{hour:02}{minute:02}{second:02}Z",
        days + 1
    )
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    digest::digest(&digest::SHA256, bytes).as_ref().to_vec()
}

/// RFC 2104, built from the hash alone.
fn hmac(secret: &[u8], text: &[u8]) -> Vec<u8> {
    let mut key = if secret.len() > 64 {
        sha256(secret)
    } else {
        secret.to_vec()
    };
    key.resize(64, 0);
    let padded = |pad: u8| key.iter().map(|byte| byte ^ pad).collect::<Vec<_>>();
    let inner = sha256(&[padded(0x36), text.to_vec()].concat());
    sha256(&[padded(0x5c), inner].concat())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
