//! How long a fetched credential lives, by the issuer's own clock: ours may be wrong, and often is when it matters.

use std::time::{Duration, SystemTime};

use ::http::{HeaderMap, HeaderName, header};

/// The vendor's longest life of a token and of temporary keys. Whatever claims more is wrong.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Taken when the answer names no end: short against the 24 hours that both kinds live, long against our fetches.
const UNNAMED: Duration = Duration::from_secs(60 * 60);

/// Longest wait that we let an issuer impose by `Retry-After`.
const LONGEST_WAIT: Duration = Duration::from_secs(5 * 60);

/// What is left of a life that ends at `expires_at`, at most 24 hours; `None` when it is over.
pub(super) fn lifetime(expires_at: Option<SystemTime>, now: SystemTime) -> Option<Duration> {
    let Some(expires_at) = expires_at else {
        return Some(UNNAMED);
    };
    let left = expires_at.duration_since(now).ok()?;
    (!left.is_zero()).then(|| left.min(LONGEST))
}

/// Reads a time such as `2026-02-03T04:05:06.789000Z`, with or without decimals.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    SystemTime::try_from(text.parse::<jiff::Timestamp>().ok()?).ok()
}

/// The issuer's clock as of its answer: the `Date` header.
pub(super) fn date(headers: &HeaderMap) -> Option<SystemTime> {
    http_date(headers, header::DATE)
}

/// Our own clock: the last resort where the issuer names no time, and what the metric of the expiry is told in.
#[expect(
    clippy::disallowed_methods,
    reason = "credentials come with points in time; everything else here is monotonic"
)]
pub(super) fn our_clock() -> SystemTime {
    SystemTime::now()
}

/// How long the issuer asks to wait, at most five minutes.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a number can hold are a very long time.
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        http_date(headers, header::RETRY_AFTER)?
            .duration_since(date(headers)?)
            .ok()?
    };
    Some(wait.min(LONGEST_WAIT))
}

fn http_date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?.trim()).ok()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn a_life_is_clamped_to_a_day_and_one_that_is_over_is_none() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let hour = Duration::from_secs(3600);
        let cases = [
            ("an hour", Some(now + hour), Some(hour)),
            ("a century", Some(now + hour * 24 * 36_500), Some(LONGEST)),
            ("no end named", None, Some(UNNAMED)),
            ("just over", Some(now), None),
            ("long over", Some(now - hour), None),
        ];

        for (name, expires_at, expected) in cases {
            assert_eq!(lifetime(expires_at, now), expected, "{name}");
        }
    }

    #[test]
    fn end_times_are_read_with_and_without_decimals() {
        let second = parse("2026-02-03T04:05:06Z").unwrap();

        assert_eq!(
            parse("2026-02-03T04:05:06.789000Z"),
            Some(second + Duration::from_millis(789))
        );
        assert_eq!(parse("tomorrow"), None);
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_date_and_clamped_to_five_minutes() {
        let cases = [
            ("7", Some(7)),
            ("86400", Some(300)),
            ("Fri, 30 Oct 2026 08:00:30 GMT", Some(30)),
            ("Fri, 30 Oct 2026 07:00:00 GMT", None),
            (" 7 ", Some(7)),
            ("99999999999999999999999", Some(300)),
            (" Fri, 30 Oct 2026 08:00:30 GMT", Some(30)),
            ("-1", None),
            ("+7", None),
            ("", None),
            ("soon", None),
        ];

        for (text, seconds) in cases {
            let headers = HeaderMap::from_iter([
                (
                    header::DATE,
                    "Fri, 30 Oct 2026 08:00:00 GMT".parse().unwrap(),
                ),
                (header::RETRY_AFTER, text.parse().unwrap()),
            ]);

            assert_eq!(
                retry_after(&headers),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }
}
