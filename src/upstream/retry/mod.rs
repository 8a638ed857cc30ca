//! Decides whether a failed attempt is retried, and when. Independent of HTTP clients and gRPC: facts in, decision out.
//! The send loop in [`super`] is the only caller.

#[cfg(test)]
mod tests;

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
        self.calls_and_retries.add_if(Count::Part, || {
            let (calls, retries) = self.calls_and_retries.sums();
            RESERVE + calls * self.percent / 100 > retries
        })
    }
}

/// What a failed attempt implies for the next one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Advice {
    /// Whether this kind of failure is retried.
    pub(super) repeat: Repeat,
    /// Whether the next attempt may go out at once, because a fresh connection is the whole remedy.
    pub(super) at_once: bool,
    /// The wait that upstream asked for.
    pub(super) retry_after: Option<Duration>,
}

impl Advice {
    /// Retries this kind of failure after the usual backoff.
    pub(super) fn repeat(repeat: Repeat) -> Self {
        Self {
            repeat,
            at_once: false,
            retry_after: None,
        }
    }
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
        advice: Advice,
        remaining: Duration,
        budget: &Budget,
    ) -> Option<Duration> {
        let repeatable = match advice.repeat {
            Repeat::Never => false,
            Repeat::Once => !self.repeated_once,
            Repeat::Backoff => true,
        };
        if !repeatable || self.left == 0 {
            return None;
        }
        let wait = match advice.retry_after {
            // Jitter on top: callers that were told the same do not come back together.
            Some(asked) => asked + full_jitter(self.made),
            None if advice.at_once && self.made == 1 => Duration::ZERO,
            None => full_jitter(self.made),
        };
        if wait + FLOOR >= remaining || !budget.pay() {
            return None;
        }
        self.left -= 1;
        self.made += 1;
        self.repeated_once |= advice.repeat == Repeat::Once;
        Some(wait)
    }
}

fn full_jitter(made: u32) -> Duration {
    wait::backoff(BACKOFF_BASE, BACKOFF_CAP, made.saturating_sub(1))
}
