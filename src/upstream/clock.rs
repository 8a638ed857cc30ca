//! The time for signatures: the system's clock, corrected by the gateway's time from its replies to expired signatures.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime},
};

/// The gateway accepts a signature up to 15 minutes off its clock (API request signing guide, "Error codes"). A rejection with a
/// difference near that is attributed to the clock; with a smaller one, to the key.
pub const SKEW: Duration = Duration::from_secs(14 * 60);

/// A larger offset is attributed to a wrong reply, not to the system's clock: a day, and a minute of latency.
const MAX_OFFSET: Duration = Duration::from_secs(24 * 60 * 60 + 60);

/// An offset to the system's clock.
#[derive(Debug, Default)]
pub(super) struct Clock {
    offset_seconds: AtomicI64,
}

impl Clock {
    /// The time to sign with.
    pub(super) fn now(&self) -> SystemTime {
        shift(system_clock(), self.offset_seconds.load(Ordering::Relaxed))
    }

    /// Sets the clock to the gateway's time. Returns false, and changes nothing, for a time that is more than a day off.
    pub(super) fn correct(&self, gateway: SystemTime) -> bool {
        let offset = seconds_between(system_clock(), gateway);
        let is_plausible = offset.unsigned_abs() <= MAX_OFFSET.as_secs();
        if is_plausible {
            // Replaces the offset in use: many concurrent requests may be rejected for the same wrong time.
            let before = self.offset_seconds.swap(offset, Ordering::Relaxed);
            // A difference of one second is latency.
            if before.abs_diff(offset) > 1 {
                tracing::warn!(
                    offset_seconds = offset,
                    "the system's clock differs from the gateway's; signing with its time"
                );
            }
        }
        is_plausible
    }

    /// Removes the offset after a signature of the corrected time was rejected too. Returns whether there was one.
    pub(super) fn reset(&self) -> bool {
        let had_offset = self.offset_seconds.swap(0, Ordering::Relaxed) != 0;
        if had_offset {
            tracing::warn!(
                "signing with the system's time again: the corrected time was rejected too"
            );
        }
        had_offset
    }
}

/// How far the system's clock is behind this time of the gateway, in seconds; negative if it is ahead.
pub fn seconds_behind(gateway: SystemTime) -> i64 {
    seconds_between(system_clock(), gateway)
}

/// Whether `signed_at` is so far from the gateway's time that the clock is the likely cause of the rejection.
pub(super) fn is_skewed(gateway: SystemTime, signed_at: SystemTime) -> bool {
    seconds_between(signed_at, gateway).unsigned_abs() >= SKEW.as_secs()
}

#[expect(
    clippy::disallowed_methods,
    reason = "signatures carry the time of day"
)]
fn system_clock() -> SystemTime {
    SystemTime::now()
}

fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    match to.duration_since(from) {
        Ok(ahead) => i64::try_from(ahead.as_secs()).unwrap_or(i64::MAX),
        Err(behind) => -i64::try_from(behind.duration().as_secs()).unwrap_or(i64::MAX),
    }
}

fn shift(at: SystemTime, seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    let shifted = if seconds < 0 {
        at.checked_sub(by)
    } else {
        at.checked_add(by)
    };
    shifted.unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn at(minutes: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000 + minutes * 60)
    }

    #[track_caller]
    fn assert_shows(clock: &Clock, expected: SystemTime) {
        let moved = seconds_between(expected, clock.now());
        assert!((-1..5).contains(&moved), "{moved} s off");
    }

    #[test]
    fn a_difference_near_the_window_is_skew_and_a_smaller_one_is_not() {
        let cases = [
            (at(0), at(13), false),
            (at(0), at(16), true),
            (at(16), at(0), true),
            (at(13), at(0), false),
        ];

        for (signed_at, gateway, expected) in cases {
            assert_eq!(is_skewed(gateway, signed_at), expected, "{signed_at:?}");
        }
    }

    #[test]
    fn the_last_plausible_time_counts_until_it_is_rejected() {
        let clock = Clock::default();
        let ahead = system_clock() + Duration::from_secs(3600);
        let behind = system_clock() - Duration::from_secs(7200);

        for _ in 0..3 {
            assert!(clock.correct(ahead));
        }
        assert_shows(&clock, ahead);
        assert!(clock.correct(behind));
        assert_shows(&clock, behind);
        clock.reset();
        assert_shows(&clock, system_clock());
    }

    #[test]
    fn a_time_more_than_a_day_off_is_ignored() {
        for gateway in [
            at(0) - Duration::from_secs(400 * 86_400),
            SystemTime::UNIX_EPOCH,
        ] {
            let clock = Clock::default();

            assert!(!clock.correct(gateway));

            assert_shows(&clock, system_clock());
        }
    }
}
