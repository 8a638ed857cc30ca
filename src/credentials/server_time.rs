//! How long a fetched credential lives, by the issuer's own clock: ours may be wrong, and often is when it matters.

use std::time::{Duration, SystemTime};

/// The vendor's longest life of a token and of temporary keys. Whatever claims more is wrong.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Taken when the answer names no end: short against the 24 hours that both kinds live, long against our fetches.
const UNNAMED: Duration = Duration::from_secs(60 * 60);

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

/// Our own clock: the last resort where the issuer names no time, and what the metric of the expiry is told in.
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
}
