//! How long to wait before a retry: `Retry-After` of a response, or backoff.

use std::time::{Duration, SystemTime};

use http::{
    HeaderMap, HeaderValue,
    header::{DATE, RETRY_AFTER},
};

/// Cap of every wait that a peer asks for: the longest throttle window of the gateway.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(5 * 60);

/// Parses `Retry-After`, in seconds or as an HTTP date. At most [`MAX_RETRY_AFTER`]; zero for a date in the past.
///
/// `None` if there is no valid value; a date is valid only with `now`, the peer's time of day. The longest of several values
/// counts, because it is the safe choice.
pub fn retry_after(headers: &HeaderMap, now: Option<SystemTime>) -> Option<Duration> {
    let waits = headers.get_all(RETRY_AFTER).iter().filter_map(|value| {
        let until = match seconds(value.to_str().ok()?.trim()) {
            Some(wait) => return Some(wait),
            None => http_date(value)?,
        };
        Some(until.duration_since(now?).unwrap_or_default())
    });
    waits.max().map(|wait| wait.min(MAX_RETRY_AFTER))
}

/// The peer's time of day when it sent the response: the `Date` header.
pub fn date(headers: &HeaderMap) -> Option<SystemTime> {
    http_date(headers.get(DATE)?)
}

/// Backoff with full jitter: a random part of `first` doubled `doublings` times, capped at `longest`.
pub fn backoff(first: Duration, longest: Duration, doublings: u32) -> Duration {
    first
        .saturating_mul(2u32.saturating_pow(doublings))
        .min(longest)
        .mul_f64(fastrand::f64())
}

/// Parses digits and nothing else; a number beyond `u64` counts as its maximum.
fn seconds(text: &str) -> Option<Duration> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| Duration::from_secs(text.parse().unwrap_or(u64::MAX)))
}

fn http_date(value: &HeaderValue) -> Option<SystemTime> {
    httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry_after_headers<const N: usize>(values: [&str; N]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_bytes(text.as_bytes()).unwrap();
        values.iter().map(|text| (RETRY_AFTER, value(text))).fold(
            HeaderMap::new(),
            |mut headers, (name, value)| {
                headers.append(name, value);
                headers
            },
        )
    }

    /// 2026-01-05T12:00:00Z.
    fn noon() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_614_400)
    }

    #[test]
    fn retry_after_is_parsed_as_seconds_or_date_and_never_exceeds_five_minutes() {
        let cases = [
            ("seconds", "7", Some(7)),
            ("zero", "0", Some(0)),
            ("surrounding blanks", " 7 ", Some(7)),
            ("maximum", "300", Some(300)),
            ("over the maximum", "301", Some(300)),
            ("a billion", "1000000000", Some(300)),
            ("larger than a u64", "99999999999999999999999", Some(300)),
            ("date ahead", "Mon, 05 Jan 2026 12:00:30 GMT", Some(30)),
            ("date far ahead", "Mon, 05 Jan 2026 13:00:00 GMT", Some(300)),
            ("date in the past", "Mon, 05 Jan 2026 11:00:00 GMT", Some(0)),
            (
                "obsolete date format",
                "Monday, 05-Jan-26 12:00:30 GMT",
                Some(30),
            ),
            ("negative", "-1", None),
            ("signed", "+7", None),
            ("fraction", "1.5", None),
            ("exponent", "1e9", None),
            ("with a unit", "7s", None),
            ("garbage", "soon", None),
            ("empty", "", None),
            ("digits of another script", "\u{0667}", None),
        ];

        for (name, text, expected) in cases {
            assert_eq!(
                retry_after(&retry_after_headers([text]), Some(noon())),
                expected.map(Duration::from_secs),
                "{name}"
            );
        }
    }

    #[test]
    fn the_longest_of_several_valid_values_counts() {
        let several = retry_after_headers(["3", "garbage", "9", "5"]);

        assert_eq!(
            retry_after(&several, Some(noon())),
            Some(Duration::from_secs(9))
        );
        assert_eq!(retry_after(&HeaderMap::new(), Some(noon())), None);
    }

    #[test]
    fn a_date_is_relative_to_the_peers_time_and_invalid_without_it() {
        let mut headers = retry_after_headers(["Mon, 05 Jan 2026 12:00:30 GMT"]);
        assert_eq!(retry_after(&headers, date(&headers)), None);

        headers.insert(
            DATE,
            HeaderValue::from_static("Mon, 05 Jan 2026 12:00:00 GMT"),
        );

        assert_eq!(date(&headers), Some(noon()));
        assert_eq!(
            retry_after(&headers, date(&headers)),
            Some(Duration::from_secs(30))
        );
    }
}
