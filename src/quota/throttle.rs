//! Remembers whom the vendor throttles, and until when.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use moka::sync::Cache;
use tokio::time::Instant;

use crate::credentials::Identity;

/// No window is remembered for longer, whatever the answer says.
const LONGEST: Duration = Duration::from_secs(5 * 60);

/// Identities that are remembered at once; beyond it the least used are forgotten and ask upstream again.
const MAX_IDENTITIES: u64 = 10_000;

#[derive(Debug)]
pub(super) struct Throttle {
    base: Instant,
    windows: Cache<Identity, Instant>,
    /// End of the latest window of anyone, in nanoseconds since `base`: mostly past, and then nothing else is looked at.
    latest: AtomicU64,
    /// End of the window of all identities, for a limit that counts by address.
    everyone: AtomicU64,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self {
            base: Instant::now(),
            windows: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .time_to_live(LONGEST)
                .build(),
            latest: AtomicU64::new(0),
            everyone: AtomicU64::new(0),
        }
    }

    /// How long `identity` has to wait; `None` when it may ask.
    pub(super) fn wait(&self, identity: Identity) -> Option<Duration> {
        let now = Instant::now();
        let since_base = nanos(now - self.base);
        if self.latest.load(Ordering::Relaxed) <= since_base {
            return None;
        }
        let everyone = self
            .everyone
            .load(Ordering::Relaxed)
            .saturating_sub(since_base);
        let own = self
            .windows
            .get(&identity)
            .map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        let wait = own.max(Duration::from_nanos(everyone));
        (!wait.is_zero()).then_some(wait)
    }

    /// Upstream throttles `identity`, or with `by_address` everyone who calls from here.
    pub(super) fn remember(&self, identity: Identity, wait: Duration, by_address: bool) {
        let until = Instant::now() + wait.min(LONGEST);
        let since_base = nanos(until - self.base);
        if by_address {
            self.everyone.fetch_max(since_base, Ordering::Relaxed);
        } else {
            self.windows.insert(identity, until);
        }
        self.latest.fetch_max(since_base, Ordering::Relaxed);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: Identity = Identity::Caller([1; 16]);
    const BOB: Identity = Identity::Caller([2; 16]);

    #[tokio::test(start_paused = true)]
    async fn a_window_holds_its_identity_until_it_is_over_and_nobody_else() {
        let throttle = Throttle::new();
        throttle.remember(ANN, Duration::from_secs(7), false);

        tokio::time::advance(Duration::from_secs(3)).await;

        assert_eq!(throttle.wait(ANN), Some(Duration::from_secs(4)));
        assert_eq!(throttle.wait(BOB), None);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(throttle.wait(ANN), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_by_address_holds_everyone() {
        let throttle = Throttle::new();

        throttle.remember(ANN, Duration::from_secs(7), true);

        assert_eq!(throttle.wait(ANN), throttle.wait(BOB));
        assert_eq!(throttle.wait(BOB), Some(Duration::from_secs(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn no_window_is_longer_than_five_minutes() {
        let throttle = Throttle::new();

        throttle.remember(ANN, Duration::from_secs(3600), false);

        assert_eq!(throttle.wait(ANN), Some(LONGEST));
    }
}
