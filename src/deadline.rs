//! The deadline of a call: a point in monotonic time, set when the call's headers arrive and passed down to every wait. Nothing below
//! the edge extends it.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The longest duration of any setting or deadline: adding it to the current time cannot overflow.
pub const THIRTY_YEARS: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// The point in time at which a call must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

/// The deadline passed before the awaited event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed;

impl Deadline {
    /// The deadline `timeout` from now, at most [`THIRTY_YEARS`].
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout.min(THIRTY_YEARS))
    }

    /// The point in time itself, for timers.
    pub fn at(self) -> Instant {
        self.0
    }

    /// The time left; zero once the deadline has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Awaits `event`, but not beyond the deadline.
    ///
    /// # Errors
    /// [`Passed`] if the deadline comes first; `event` is dropped.
    pub async fn bound<F: Future>(self, event: F) -> Result<F::Output, Passed> {
        tokio::time::timeout_at(self.0, event)
            .await
            .map_err(|_| Passed)
    }
}

/// The deadline of work that several calls share: the latest of their deadlines, so it moves when a call joins.
///
/// The work reads it before each step that takes time. It does not have to enforce it: each call stops waiting at its own deadline,
/// and work without a waiting call is dropped.
#[derive(Debug, Clone)]
pub struct SharedDeadline {
    base: Instant,
    nanos: Arc<AtomicU64>,
}

impl SharedDeadline {
    /// The deadline of work that one call starts.
    pub fn new(first: Deadline) -> Self {
        let shared = Self {
            base: Instant::now(),
            nanos: Arc::new(AtomicU64::new(0)),
        };
        shared.extend(first);
        shared
    }

    /// Includes the deadline of another call that waits for the work.
    pub fn extend(&self, joined: Deadline) {
        let nanos = joined.0.saturating_duration_since(self.base).as_nanos();
        self.nanos
            .fetch_max(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The latest deadline of the calls that have joined.
    pub fn deadline(&self) -> Deadline {
        Deadline(self.base + Duration::from_nanos(self.nanos.load(Ordering::Relaxed)))
    }
}

/// Parses the value of the `grpc-timeout` metadata: 1 to 8 digits and one of `H M S m u n` ("gRPC over HTTP/2", section "Requests").
pub fn parse_grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits
        .iter()
        .fold(0u64, |n, digit| n * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Some(Duration::from_secs(count * 60 * 60)),
        b'M' => Some(Duration::from_secs(count * 60)),
        b'S' => Some(Duration::from_secs(count)),
        b'm' => Some(Duration::from_millis(count)),
        b'u' => Some(Duration::from_micros(count)),
        b'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_grpc_timeout_is_parsed() {
        let cases = [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("4S", Duration::from_secs(4)),
            ("5m", Duration::from_millis(5)),
            ("6u", Duration::from_micros(6)),
            ("7n", Duration::from_nanos(7)),
            ("0m", Duration::ZERO),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ];

        for (text, expected) in cases {
            assert_eq!(
                parse_grpc_timeout(text.as_bytes()),
                Some(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn malformed_grpc_timeout_is_rejected() {
        let cases = [
            "",
            "S",
            "200x",
            "+5m",
            "-5m",
            " 5m",
            "5m ",
            "123456789m",
            "5",
            "5.0S",
            "5mm",
            "\u{0665}S",
        ];

        for text in cases {
            assert_eq!(parse_grpc_timeout(text.as_bytes()), None, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_shared_deadline_is_the_latest_of_its_calls() {
        let short = Deadline::after(Duration::from_secs(1));
        let long = Deadline::after(Duration::from_secs(9));
        let shared = SharedDeadline::new(short);

        let alone = shared.deadline();
        shared.extend(long);
        shared.extend(short);

        assert_eq!((alone, shared.deadline()), (short, long));
    }

    #[tokio::test(start_paused = true)]
    async fn a_huge_timeout_does_not_overflow() {
        assert!(Deadline::after(Duration::MAX) > Deadline::after(Duration::from_secs(1)));
    }
}
