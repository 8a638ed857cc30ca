//! The gateway's clock, as far as it is known: ours, corrected by what the `Date` header of a refused signature taught.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime},
};

/// The gateway accepts a signature up to 15 minutes off its clock (API request signing guide, "Error codes"). A refusal
/// with a difference near that is taken for a wrong clock; below it, for a wrong key.
const SKEW: Duration = Duration::from_secs(14 * 60);

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

    /// Learns from the `Date` of an answer that refused a signature of the time `signed_at`. Whether they differ so much
    /// that the clock is the likely cause.
    pub(super) fn learn(&self, date: SystemTime, signed_at: SystemTime) -> bool {
        let difference = seconds_between(signed_at, date);
        let skewed = difference.unsigned_abs() >= SKEW.as_secs();
        if skewed {
            // Not added to the offset in use: many requests of the same wrong time may be refused at once.
            self.offset_seconds
                .store(seconds_between(our_clock(), date), Ordering::Relaxed);
            tracing::warn!(
                difference_seconds = difference,
                "clock differs from the gateway's; signing with its time"
            );
        }
        skewed
    }
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
    fn a_difference_near_the_window_corrects_the_clock_and_a_smaller_one_does_not() {
        let cases = [
            (at(0), at(13), false),
            (at(0), at(16), true),
            (at(16), at(0), true),
            (at(13), at(0), false),
        ];

        for (signed_at, date, skewed) in cases {
            let clock = Clock::default();

            assert_eq!(
                clock.learn(date, signed_at),
                skewed,
                "{signed_at:?} {date:?}"
            );

            assert_shows(&clock, if skewed { date } else { our_clock() });
        }
    }

    #[test]
    fn refusals_of_the_same_wrong_time_correct_the_clock_once() {
        let clock = Clock::default();

        for _ in 0..3 {
            assert!(clock.learn(at(16), at(0)));
        }

        assert_shows(&clock, at(16));
    }

    #[test]
    fn a_later_correction_replaces_the_first() {
        let clock = Clock::default();

        clock.learn(at(60), at(0));
        clock.learn(at(0), at(60));

        assert_shows(&clock, at(0));
    }
}
