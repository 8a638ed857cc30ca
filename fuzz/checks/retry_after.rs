//! `Retry-After` headers and throttling messages are parsed to a wait of at most five minutes, or to none.
//!
//! The input's first line is the peer's `Date`, the next three are values of `Retry-After`, the rest is a message.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{
    HeaderMap, HeaderValue,
    header::{DATE, RETRY_AFTER},
};
use rds_task_facade::{
    upstream::throttling_text::{self, Subject},
    wait,
};

use super::{lines, text};

const FIVE_MINUTES: Duration = Duration::from_secs(300);

pub(crate) fn check(input: &[u8]) {
    let [date, first, second, third, message] = lines(input);
    let values: Vec<HeaderValue> = [first, second, third]
        .into_iter()
        .filter_map(|value| HeaderValue::from_bytes(value).ok())
        .collect();
    let mut headers = HeaderMap::new();
    if let Ok(date) = HeaderValue::from_bytes(date) {
        headers.insert(DATE, date);
    }
    for value in &values {
        headers.append(RETRY_AFTER, value.clone());
    }
    // 2026-01-05T12:00:00Z.
    let noon = UNIX_EPOCH + Duration::from_secs(1_767_614_400);
    let peers = headers
        .get(DATE)
        .and_then(|value| time(value.to_str().ok()?.trim()));
    assert_eq!(wait::date(&headers), peers);

    for now in [Some(noon), peers, None] {
        let longest = values
            .iter()
            .filter_map(|value| expected_wait(value, now))
            .max();
        let expected = longest.map(|wait| wait.min(FIVE_MINUTES));
        assert_eq!(wait::retry_after(&headers, now), expected, "{now:?}");
    }

    check_message(&text(message));
}

fn expected_wait(value: &HeaderValue, now: Option<SystemTime>) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    seconds(text).or_else(|| Some(time(text)?.duration_since(now?).unwrap_or_default()))
}

/// RFC 9110, section 10.2.3: `delay-seconds = 1*DIGIT`. More than ten digits are more than a century.
fn seconds(text: &str) -> Option<Duration> {
    let mut seconds: u64 = 0;
    for c in text.chars() {
        seconds = (seconds * 10 + u64::from("0123456789".find(c)? as u32)).min(10_000_000_000);
    }
    (!text.is_empty()).then(|| Duration::from_secs(seconds))
}

fn time(text: &str) -> Option<SystemTime> {
    httpdate::parse_http_date(text).ok()
}

fn check_message(message: &str) {
    let throttling = throttling_text::read(message);
    let length = throttling.window.unwrap_or(FIVE_MINUTES);
    assert!(
        length > Duration::ZERO && length <= FIVE_MINUTES,
        "{length:?}"
    );
    let lower = message.to_ascii_lowercase();
    let named = |subject: &str| lower.contains(&["policy ", subject, " over"].concat());
    let first = ["user", "ip", "api"]
        .into_iter()
        .find(|subject| named(subject));
    assert_eq!(throttling.subject.map(Subject::as_str), first);

    // A limit in the gateway's wording is parsed.
    let count: u64 = message.bytes().map(u64::from).sum();
    for (unit, length) in [
        ("second", 1),
        ("minute", 60),
        ("hour", 3600),
        ("day", 86_400),
    ] {
        let worded = format!("policy ip over ratelimit,limit:{count},time:{count} {unit}");
        let expected = Duration::from_secs(count * length).min(FIVE_MINUTES);
        let read = throttling_text::read(&worded);
        assert_eq!(read.window.unwrap_or_default(), expected);
        assert_eq!(read.subject, Some(Subject::Ip));
    }
}
