//! Paces upstream attempts to a configured rate per identity: an attempt that fits before the deadline waits for its
//! turn, one that does not is refused at once.

use std::{
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use governor::{DefaultDirectRateLimiter, RateLimiter, clock::Clock as _};
use moka::sync::Cache;
use tokio::time::Instant;

use crate::{credentials::Identity, deadline::Deadline};

/// Identities that are paced at once; a forgotten one begins with a full bucket.
const MAX_IDENTITIES: u64 = 10_000;

/// Calls in a period of time, all of which may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Number of calls.
    pub calls: NonZeroU32,
    /// In this time; not zero.
    pub period: Duration,
}

/// One bucket per identity.
#[derive(Debug)]
pub(super) struct Rate {
    config: Config,
    lanes: Cache<Identity, Arc<Lane>>,
}

#[derive(Debug)]
struct Lane {
    bucket: DefaultDirectRateLimiter,
    /// Held by the first in the queue; tokio's mutex is fair, so the others follow in order.
    head: tokio::sync::Mutex<()>,
    /// When the first in the queue may go.
    head_leaves_at: Mutex<Instant>,
    queue_length: AtomicU32,
}

impl Rate {
    pub(super) fn new(config: Config) -> Self {
        let idle = config.period.max(Duration::from_secs(1)) * 2;
        Self {
            config,
            lanes: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .time_to_idle(idle)
                .build(),
        }
    }

    /// Waits for the turn of one attempt.
    ///
    /// # Errors
    /// How long the wait would be, when that is beyond the deadline.
    pub(super) async fn turn(
        &self,
        identity: Identity,
        deadline: Deadline,
    ) -> Result<(), Duration> {
        let lane = self
            .lanes
            .get_with(identity, || Arc::new(Lane::new(self.config)));
        let place = Place::take(&lane);
        if place.ahead == 0 && lane.bucket.check().is_ok() {
            return Ok(());
        }
        let spacing = self.config.period / self.config.calls.get();
        let wait = lane.head_leaves_in(spacing) + spacing * place.ahead;
        if wait > deadline.remaining() {
            return Err(wait);
        }
        let turn = async {
            let _head = lane.head.lock().await;
            while let Err(not_yet) = lane.bucket.check() {
                let wait = not_yet.wait_time_from(governor::clock::DefaultClock::default().now());
                *lane.head_leaves_at() = Instant::now() + wait;
                tokio::time::sleep(wait).await;
            }
        };
        deadline.bound(turn).await.map_err(|_| spacing)
    }
}

impl Lane {
    fn new(config: Config) -> Self {
        let spacing = (config.period / config.calls.get()).max(Duration::from_nanos(1));
        let quota = governor::Quota::with_period(spacing)
            .expect("the spacing is not zero")
            .allow_burst(config.calls);
        Self {
            bucket: RateLimiter::direct(quota),
            head: tokio::sync::Mutex::new(()),
            head_leaves_at: Mutex::new(Instant::now()),
            queue_length: AtomicU32::new(0),
        }
    }

    fn head_leaves_at(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.head_leaves_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// At most one spacing: a queue that just formed has not noted its head's time yet.
    fn head_leaves_in(&self, spacing: Duration) -> Duration {
        let noted = self
            .head_leaves_at()
            .saturating_duration_since(Instant::now());
        if noted.is_zero() {
            spacing
        } else {
            noted.min(spacing)
        }
    }
}

/// A place in a lane's queue, given back when dropped.
struct Place<'a> {
    lane: &'a Lane,
    ahead: u32,
}

impl<'a> Place<'a> {
    fn take(lane: &'a Lane) -> Self {
        Self {
            lane,
            ahead: lane.queue_length.fetch_add(1, Ordering::Relaxed),
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.lane.queue_length.fetch_sub(1, Ordering::Relaxed);
    }
}
