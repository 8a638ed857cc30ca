//! How long a fetched credential lives, by the issuer's clock. The facade's own clock may be wrong.

use std::time::{Duration, SystemTime};

/// The vendor's longest lifetime of tokens and temporary keys; a longer one is wrong.
const MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The assumed lifetime if the response has no end: short compared with the 24 hours of tokens and keys, long compared with a fetch.
const DEFAULT: Duration = Duration::from_secs(60 * 60);

/// The remaining lifetime, at most 24 hours; `None` if it is over.
pub(super) fn lifetime(expires_at: Option<SystemTime>, now: SystemTime) -> Option<Duration> {
    let Some(expires_at) = expires_at else {
        return Some(DEFAULT);
    };
    let left = expires_at.duration_since(now).ok()?;
    (!left.is_zero()).then(|| left.min(MAX))
}

/// Parses a time such as `2026-02-03T04:05:06.789000Z`, with or without decimals.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    SystemTime::try_from(text.parse::<jiff::Timestamp>().ok()?).ok()
}

/// The facade's clock: for the metric of the expiry, and for a lifetime if the reply of the issuer has no date.
#[expect(
    clippy::disallowed_methods,
    reason = "credentials come with points in time; everything else here is monotonic"
)]
pub(super) fn our_clock() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn a_lifetime_is_clamped_to_a_day_and_none_if_it_is_over() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let hour = Duration::from_secs(3600);
        let cases = [
            ("an hour", Some(now + hour), Some(hour)),
            ("a century", Some(now + hour * 24 * 36_500), Some(MAX)),
            ("no end named", None, Some(DEFAULT)),
            ("just over", Some(now), None),
            ("long over", Some(now - hour), None),
        ];

        for (name, expires_at, expected) in cases {
            assert_eq!(lifetime(expires_at, now), expected, "{name}");
        }
    }

    #[test]
    fn times_are_parsed_with_and_without_decimals() {
        let second = parse("2026-02-03T04:05:06Z").unwrap();

        assert_eq!(
            parse("2026-02-03T04:05:06.789000Z"),
            Some(second + Duration::from_millis(789))
        );
        assert_eq!(parse("tomorrow"), None);
    }
}
