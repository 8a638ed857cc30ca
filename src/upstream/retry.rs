//! Decides whether a failed attempt is repeated, and when. Knows nothing of HTTP clients or gRPC: facts in, decision out.
//! The send loop in [`super`] is the only caller.

use std::time::Duration;

use super::{
    verdict::Repeat,
    window::{Count, Window},
};
use crate::wait;

/// No retry starts with less than this left before the deadline: it could hardly end in time, and would cost quota.
const FLOOR: Duration = Duration::from_millis(50);

/// The backoff before the second attempt is a random part of this, doubled with each attempt up to [`BACKOFF_CAP`].
const BACKOFF_BASE: Duration = Duration::from_millis(50);
const BACKOFF_CAP: Duration = Duration::from_secs(2);

/// Retries that are allowed in ten seconds whatever the number of calls, so that a quiet service can retry at all.
const RESERVE: u64 = 10;

/// Caps retries at a share of the calls of the last ten seconds, so that a failing upstream is not hit harder.
#[derive(Debug)]
pub(super) struct Budget {
    percent: u64,
    calls_and_retries: Window,
}

impl Budget {
    pub(super) fn new(percent: u32) -> Self {
        Self {
            percent: u64::from(percent),
            calls_and_retries: Window::new(),
        }
    }

    /// Notes a call, which pays into the budget.
    pub(super) fn call(&self) {
        self.calls_and_retries.add(Count::Total);
    }

    /// Pays for one retry if the budget allows it.
    fn pay(&self) -> bool {
        let (calls, retries) = self.calls_and_retries.sums();
        let allowed = RESERVE + calls * self.percent / 100 > retries;
        if allowed {
            self.calls_and_retries.add(Count::Part);
        }
        allowed
    }
}

/// What a failed attempt tells about repeating it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failed {
    /// Whether this kind of failure is repeated.
    pub(super) repeat: Repeat,
    /// Whether the next attempt may go out at once, because a fresh connection is the whole remedy.
    pub(super) at_once: bool,
    /// The wait that upstream asked for.
    pub(super) retry_after: Option<Duration>,
}

/// Counts the attempts of one call against the policy.
#[derive(Debug)]
pub(super) struct Attempts {
    left: u32,
    made: u32,
    repeated_once: bool,
}

impl Attempts {
    pub(super) fn new(max: u32) -> Self {
        Self {
            left: max.saturating_sub(1),
            made: 1,
            repeated_once: false,
        }
    }

    /// The wait before the next attempt; `None` when there is to be none. `remaining` is the time to the deadline.
    pub(super) fn next(
        &mut self,
        failed: Failed,
        remaining: Duration,
        budget: &Budget,
    ) -> Option<Duration> {
        let repeatable = match failed.repeat {
            Repeat::Never => false,
            Repeat::Once => !self.repeated_once,
            Repeat::Backoff => true,
        };
        if !repeatable || self.left == 0 {
            return None;
        }
        let wait = match failed.retry_after {
            // Jitter on top: callers that were told the same do not come back together.
            Some(asked) => asked + full_jitter(self.made),
            None if failed.at_once && self.made == 1 => Duration::ZERO,
            None => full_jitter(self.made),
        };
        if wait + FLOOR >= remaining || !budget.pay() {
            return None;
        }
        self.left -= 1;
        self.made += 1;
        self.repeated_once |= failed.repeat == Repeat::Once;
        Some(wait)
    }
}

fn full_jitter(made: u32) -> Duration {
    wait::backoff(BACKOFF_BASE, BACKOFF_CAP, made.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const BACKOFF: Failed = Failed {
        repeat: Repeat::Backoff,
        at_once: false,
        retry_after: None,
    };

    #[tokio::test(start_paused = true)]
    async fn attempts_end_at_the_maximum() {
        let budget = Budget::new(100);
        let mut attempts = Attempts::new(3);

        let waits = [(); 3].map(|()| attempts.next(BACKOFF, LONG, &budget).is_some());

        assert_eq!(waits, [true, true, false]);
        assert_eq!(Attempts::new(1).next(BACKOFF, LONG, &budget), None);
    }

    #[tokio::test(start_paused = true)]
    async fn once_is_once_and_never_is_never() {
        let budget = Budget::new(100);
        let once = Failed {
            repeat: Repeat::Once,
            ..BACKOFF
        };
        let never = Failed {
            repeat: Repeat::Never,
            ..BACKOFF
        };
        let mut attempts = Attempts::new(10);

        assert!(attempts.next(once, LONG, &budget).is_some());
        assert_eq!(attempts.next(once, LONG, &budget), None);
        assert!(attempts.next(BACKOFF, LONG, &budget).is_some());
        assert_eq!(attempts.next(never, LONG, &budget), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_grows_to_the_cap_and_is_jittered() {
        for made in 1..=12 {
            let ceiling = Duration::from_millis((50u64 << (made - 1)).min(2000));
            let waits: Vec<_> = (0..200).map(|_| full_jitter(made)).collect();

            assert!(waits.iter().all(|wait| *wait <= ceiling), "attempt {made}");
            assert!(
                waits.iter().any(|wait| *wait > ceiling / 2),
                "attempt {made}"
            );
            assert!(
                waits.iter().any(|wait| *wait < ceiling / 2),
                "attempt {made}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn retry_after_is_obeyed_within_the_deadline_only() {
        let budget = Budget::new(100);
        let asked = Failed {
            retry_after: Some(Duration::from_secs(2)),
            ..BACKOFF
        };

        let wait = Attempts::new(3).next(asked, LONG, &budget);
        assert!(
            wait.is_some_and(|wait| wait >= Duration::from_secs(2)
                && wait <= Duration::from_secs(2) + BACKOFF_BASE),
            "{wait:?}"
        );
        assert_eq!(
            Attempts::new(3).next(asked, Duration::from_secs(2), &budget),
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn no_retry_starts_below_the_floor() {
        let budget = Budget::new(100);
        let at_once = Failed {
            at_once: true,
            ..BACKOFF
        };

        assert_eq!(Attempts::new(3).next(at_once, FLOOR, &budget), None);
        assert_eq!(
            Attempts::new(3).next(at_once, FLOOR * 2, &budget),
            Some(Duration::ZERO)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_allows_the_reserve_and_a_share_of_the_calls() {
        let budget = Budget::new(20);
        for _ in 0..100 {
            budget.call();
        }

        let paid = (0..100).filter(|_| budget.pay()).count();

        assert_eq!(paid, 10 + 20);
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_recovers_when_the_window_has_passed() {
        let budget = Budget::new(0);
        let spent = (0..100).filter(|_| budget.pay()).count();

        tokio::time::advance(Duration::from_secs(10)).await;

        assert_eq!(spent, 10);
        assert!(budget.pay());
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_that_is_not_made_costs_nothing() {
        let budget = Budget::new(0);
        for _ in 0..100 {
            assert_eq!(Attempts::new(3).next(BACKOFF, FLOOR, &budget), None);
        }

        assert!(budget.pay());
    }
}
