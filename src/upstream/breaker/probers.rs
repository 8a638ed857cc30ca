//! Which callers may probe while a circuit is open.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::caller::Caller;

/// The time between two probes. Short enough to recover within 2 s after upstream does; long enough that the probes of an instance take
/// at most 40 of the vendor's 60 requests per minute.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(1500);

/// Limit on tracked callers per open circuit. Beyond it, one more probe goes out per [`PROBE_INTERVAL`].
pub(super) const MAX_PROBERS: usize = 32;

/// The callers with a probe in flight or a recently failed one.
#[derive(Debug, Default)]
pub(super) struct Probers {
    pub(super) callers: HashMap<Caller, Prober>,
    /// The last probe of a caller that is not tracked.
    untracked_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prober {
    Probing,
    FailedAt(Instant),
}

impl Prober {
    fn counts(self, now: Instant) -> bool {
        match self {
            Self::Probing => true,
            Self::FailedAt(at) => now.saturating_duration_since(at) < PROBE_INTERVAL,
        }
    }
}

impl Probers {
    /// Whether `caller` may probe.
    pub(super) fn check(&self, caller: Caller, now: Instant) -> Result<(), Duration> {
        match self.callers.get(&caller) {
            Some(Prober::Probing) => Err(PROBE_INTERVAL),
            Some(Prober::FailedAt(at)) => {
                let waited = now.saturating_duration_since(*at);
                match PROBE_INTERVAL.checked_sub(waited) {
                    Some(rest) if !rest.is_zero() => Err(rest),
                    _ => Ok(()),
                }
            }
            None if self.callers.len() < MAX_PROBERS => Ok(()),
            None => match self.untracked_at.map(|at| at + PROBE_INTERVAL) {
                Some(next) if next > now => Err(next - now),
                _ => Ok(()),
            },
        }
    }

    pub(super) fn is_probing(&self, caller: Caller) -> bool {
        self.callers.get(&caller) == Some(&Prober::Probing)
    }

    pub(super) fn is_any_probing(&self) -> bool {
        self.callers
            .values()
            .any(|prober| *prober == Prober::Probing)
    }

    pub(super) fn start(&mut self, caller: Caller, now: Instant) {
        if !self.insert(caller, Prober::Probing, now) {
            self.untracked_at = Some(now);
        }
    }

    pub(super) fn failed(&mut self, caller: Caller, now: Instant) {
        self.insert(caller, Prober::FailedAt(now), now);
    }

    /// Tracks the caller, if the limit allows it.
    fn insert(&mut self, caller: Caller, prober: Prober, now: Instant) -> bool {
        self.callers.retain(|_, prober| prober.counts(now));
        let fits = self.callers.len() < MAX_PROBERS || self.callers.contains_key(&caller);
        if fits {
            self.callers.insert(caller, prober);
        }
        fits
    }

    pub(super) fn cancelled(&mut self, caller: Caller) {
        if self.is_probing(caller) {
            self.callers.remove(&caller);
        }
    }
}
