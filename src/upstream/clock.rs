//! The gateway's clock, as far as it is known: the system's, corrected by what the replies to refused signatures showed.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime},
};

/// The gateway accepts a signature up to 15 minutes off its clock (API request signing guide, "Error codes"). A refusal with a
/// difference near that is taken for a wrong clock; below it, for a wrong key.
const SKEW: Duration = Duration::from_secs(14 * 60);

/// A larger offset is taken for a wrong report of the time, not for a wrong clock: a day, and a minute for the reply's way.
const MAX_OFFSET: Duration = Duration::from_secs(24 * 60 * 60 + 60);

/// An offset to the system's clock.
#[derive(Debug, Default)]
pub(super) struct Clock {
    offset_seconds: AtomicI64,
}

impl Clock {
    /// The time to sign with.
    pub(super) fn now(&self) -> SystemTime {
        shift(our_clock(), self.offset_seconds.load(Ordering::Relaxed))
    }

    /// Corrects the clock by the gateway's own time, as of its reply. Whether it could: a time more than a day off is not believed.
    pub(super) fn correct(&self, gateway: SystemTime) -> bool {
        let offset = seconds_between(our_clock(), gateway);
        let is_credible = offset.unsigned_abs() <= MAX_OFFSET.as_secs();
        if is_credible {
            // Not added to the offset in use: many requests of the same wrong time may be refused at once.
            let before = self.offset_seconds.swap(offset, Ordering::Relaxed);
            // A second of difference is the time that the reply took.
            if before.abs_diff(offset) > 1 {
                tracing::warn!(
                    offset_seconds = offset,
                    "the system's clock differs from the gateway's; signing with its time"
                );
            }
        }
        is_credible
    }

    /// Drops an offset that has proved wrong: a signature of the corrected time was refused too.
    pub(super) fn reset(&self) {
        if self.offset_seconds.swap(0, Ordering::Relaxed) != 0 {
            tracing::warn!(
                "signing with the system's own time again: the corrected time was refused"
            );
        }
    }
}

/// Whether a signature of the time `signed_at` is so far from the gateway's time that the clock is the likely cause of its refusal.
pub(super) fn is_skewed(gateway: SystemTime, signed_at: SystemTime) -> bool {
    seconds_between(signed_at, gateway).unsigned_abs() >= SKEW.as_secs()
}

#[expect(
    clippy::disallowed_methods,
    reason = "signatures carry the time of day"
)]
fn our_clock() -> SystemTime {
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
    fn the_clock_follows_the_last_credible_time_until_that_proves_wrong() {
        let clock = Clock::default();
        let ahead = our_clock() + Duration::from_secs(3600);
        let behind = our_clock() - Duration::from_secs(7200);

        for _ in 0..3 {
            assert!(clock.correct(ahead));
        }
        assert_shows(&clock, ahead);
        assert!(clock.correct(behind));
        assert_shows(&clock, behind);
        clock.reset();
        assert_shows(&clock, our_clock());
    }

    #[test]
    fn a_time_more_than_a_day_off_is_not_believed() {
        for gateway in [
            at(0) - Duration::from_secs(400 * 86_400),
            SystemTime::UNIX_EPOCH,
        ] {
            let clock = Clock::default();

            assert!(!clock.correct(gateway));

            assert_shows(&clock, our_clock());
        }
    }
}
