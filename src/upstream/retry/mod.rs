//! Decides whether and when a failed attempt is retried. Independent of the HTTP client and of gRPC.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::verdict::Repeat;
use crate::{caller::Caller, wait};

/// No retry starts with less than this left before the deadline: it would cost quota and hardly end in time.
const FLOOR: Duration = Duration::from_millis(50);

/// The backoff before the second attempt is a random part of this, doubled with each attempt up to [`BACKOFF_CAP`].
const BACKOFF_BASE: Duration = Duration::from_millis(50);
const BACKOFF_CAP: Duration = Duration::from_secs(2);

/// How long calls and retries count.
const WINDOW: Duration = Duration::from_secs(10);

/// Retries that are allowed in [`WINDOW`] with any number of calls, so that retries work at a low call rate.
const RESERVE: u64 = 10;

/// The retry budget: limits retries to a percentage of the calls of the last ten seconds, so that retries do not overload a failing
/// upstream.
///
/// Callers share it fairly. If one caller uses it up, each other caller still has its share (the budget divided by the callers that have
/// retried), so that all together retry at most twice the budget.
#[derive(Debug)]
pub(super) struct Budget {
    percent: u64,
    counts: Mutex<Counts>,
}

/// The calls and retries of the last ten seconds, in slots of one second, the newest last.
#[derive(Debug)]
struct Counts {
    epoch: Instant,
    slots: VecDeque<Slot>,
}

#[derive(Debug)]
struct Slot {
    /// Seconds since the epoch.
    second: u64,
    calls: u64,
    retries: HashMap<Caller, u64>,
}

impl Budget {
    pub(super) fn new(percent: u32) -> Self {
        Self {
            percent: u64::from(percent),
            counts: Mutex::new(Counts {
                epoch: Instant::now(),
                slots: VecDeque::new(),
            }),
        }
    }

    /// Counts a call, which increases the budget.
    pub(super) fn call(&self) {
        self.counts.lock().current().calls += 1;
    }

    /// Withdraws one retry of `caller` if the budget allows it.
    fn withdraw(&self, caller: Caller) -> bool {
        let mut counts = self.counts.lock();
        counts.current();
        let calls: u64 = counts.slots.iter().map(|slot| slot.calls).sum();
        let mut by_caller = HashMap::new();
        let retries = counts.slots.iter().flat_map(|slot| &slot.retries);
        retries.for_each(|(caller, count)| *by_caller.entry(*caller).or_default() += count);
        let used: u64 = by_caller.values().sum();
        let own = *by_caller.entry(caller).or_default();
        let allowed = RESERVE + calls * self.percent / 100;
        let share = allowed / by_caller.len() as u64;
        let is_allowed = used < allowed || (used < 2 * allowed && own < share);
        if is_allowed {
            *counts.current().retries.entry(caller).or_default() += 1;
        }
        is_allowed
    }
}

impl Counts {
    /// The slot of this second. Removes expired slots.
    fn current(&mut self) -> &mut Slot {
        let second = self.epoch.elapsed().as_secs();
        self.slots
            .retain(|slot| slot.second + WINDOW.as_secs() > second);
        if self.slots.back().is_none_or(|slot| slot.second != second) {
            self.slots.push_back(Slot {
                second,
                calls: 0,
                retries: HashMap::new(),
            });
        }
        self.slots
            .back_mut()
            .expect("there is a slot of this second")
    }
}

/// What a failed attempt implies for the next one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Advice {
    /// Whether this kind of failure is retried.
    pub(super) repeat: Repeat,
    /// Whether the next attempt may start without backoff, because a new connection is enough.
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

    /// The wait before the next attempt; `None` if there is no retry. `remaining` is the time to the deadline.
    pub(super) fn next(
        &mut self,
        advice: Advice,
        remaining: Duration,
        budget: &Budget,
        caller: Caller,
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
            // Adds jitter, so that callers with the same wait do not retry at the same moment.
            Some(asked) => asked + full_jitter(self.made),
            None if advice.at_once && self.made == 1 => Duration::ZERO,
            None => full_jitter(self.made),
        };
        if wait + FLOOR >= remaining || !budget.withdraw(caller) {
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
