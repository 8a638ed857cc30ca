//! Rate limiter for upstream attempts and for the polls of watches: at most N starts per credential in any window of T.
//!
//! While the window has room and the queue is empty, an attempt starts at once. Otherwise it waits if it can start before its deadline, and
//! is rejected at once if not. Queued attempts start at least T/N apart, round robin among callers, so that a caller with a hundred calls
//! does not delay the calls of others by more than one start each.
//!
//! The first poll of a watched task starts like an attempt, but without a distance from others. Repeated polls have a queue of their own and
//! start at least T/N apart. While any of them is queued, first polls may use only half of the window.
//!
//! With a quota store, attempts take their starts from the store, which applies the rate to all replicas. While it delays some of them,
//! only the head of the queue asks ([`Pacing::wait_in_fleet`]). While the store is not available, the rate divided by the number of replicas
//! applies here, and afterwards, too, until the starts that the store has not seen have left the window. Each attempt that this rule has
//! started then asks the store on its own.
//!
//! Hand-written, because the limiters in crates (governor, leaky-bucket) allow 2N starts in a window: a full bucket and its refill.

mod fleet;
mod lane;
mod queued;
#[cfg(test)]
mod tests;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::{sync::Notify, time::Instant};

use self::lane::{FIRST, Lane, REPEATED};
pub use self::queued::Queued;
use crate::{
    caller::Caller,
    credentials::Identity,
    deadline::Deadline,
    quota_store::{Answer, Request, Session},
};

/// Limit on credentials with a window; an evicted one starts with an empty window.
const MAX_IDENTITIES: u64 = 10_000;

/// Limit on entries of a window. With a larger N, the starts within T/1024 share an entry.
const MAX_STARTS: u32 = 1024;

/// An attempt that still waits is rejected this long before its deadline, so that its caller gets an error with `RetryInfo`.
const SLACK: Duration = Duration::from_millis(5);

/// The same for attempts whose starts the quota store assigns: their waits cannot be foreseen exactly, so more of them wait until then. At
/// most a quarter of the time until the deadline.
const FLEET_SLACK: Duration = Duration::from_millis(50);

/// How much longer than the period a start counts: requests sent a period apart may arrive closer together, for example if the earlier
/// one had to open its connection. At most a twentieth of the period.
const JITTER: Duration = Duration::from_millis(50);

/// Limit on waiters that are woken at once to ask the quota store.
const MAX_ASKING: usize = 64;

/// The longest wait of a repeated poll for a start from the quota store. One with a longer wait asks again later.
const LONGEST_POLL_WAIT: Duration = Duration::from_secs(60);

/// Attempts in a period of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// The number of attempts.
    pub calls: NonZeroU32,
    /// The period, not zero.
    pub period: Duration,
}

/// A rate limiter: a lane per credential.
#[derive(Debug)]
pub struct Pacing {
    config: Config,
    spacings: [Duration; 2],
    lanes: Cache<Identity, Arc<Lane>>,
}

impl Pacing {
    /// A limiter of attempts, with empty windows.
    pub fn new(config: Config) -> Self {
        let spacing = config.period / config.calls.get();
        Self::with_spacings(config, [spacing; 2])
    }

    /// A limiter of polls, with empty windows.
    pub fn for_polls(config: Config) -> Self {
        let spacing = config.period / config.calls.get();
        Self::with_spacings(config, [Duration::ZERO, spacing])
    }

    fn with_spacings(config: Config, spacings: [Duration; 2]) -> Self {
        Self {
            config,
            spacings,
            // After that time the window is empty, so a new lane is equivalent.
            lanes: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_idle(config.period * 2)
                .build(),
        }
    }

    /// Waits until one attempt or first poll may start. Dropping the future leaves the queue.
    ///
    /// # Errors
    /// The necessary wait, if it exceeds the deadline.
    pub async fn wait(
        &self,
        identity: Identity,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<(), Duration> {
        let lane = self.lane(identity);
        let Some(queued) = lane.enter(caller, deadline)? else {
            return Ok(());
        };
        let start = queued.start();
        let latest = deadline.at() - SLACK.min(deadline.remaining());
        let started = tokio::time::timeout_at(latest, start).await;
        // Keeps a lane with a queue from being evicted, even if no attempt joins it.
        self.lanes.get(&identity);
        started.map(drop).map_err(|_| lane.state().wait_at_end())
    }

    /// As [`Self::wait`], with the start taken from the quota store. Returns [`Answer::Start`] once the attempt or first poll may start,
    /// else why it may not.
    pub async fn wait_in_fleet(
        &self,
        identity: Identity,
        caller: Caller,
        deadline: Deadline,
        session: &Session,
        request: Request<'_>,
    ) -> Answer {
        let lane = self.lane(identity);
        let latest = deadline.at() - FLEET_SLACK.min(deadline.remaining() / 4);
        let queued = {
            let mut state = lane.state();
            let now = Instant::now();
            if !state.queues[FIRST].is_empty() || state.room_at(FIRST, now) > now {
                let wait = state.wait_of(caller, now);
                if wait > deadline.remaining() {
                    return Answer::Late(wait);
                }
            }
            let waiter = Arc::new(Notify::new());
            state.queue(FIRST, &[caller], &waiter);
            Queued {
                lane: Arc::clone(&lane),
                waiter,
                kind: FIRST,
                latest: Some(latest),
            }
        };
        let start = queued.start_in_fleet(session, request);
        let started = tokio::time::timeout_at(latest, start).await;
        // Keeps a lane with a queue from being evicted, even if no attempt joins it.
        self.lanes.get(&identity);
        match started {
            Ok(Ok(_)) => Answer::Start(Duration::ZERO),
            Ok(Err(answer)) => answer,
            Err(_) => Answer::Late(lane.state().wait_at_end()),
        }
    }

    /// Queues a repeated poll under each of these callers. It starts when the first of them is next.
    pub fn queue_repeated(&self, identity: Identity, callers: &[Caller]) -> Queued {
        let (lane, waiter) = (self.lane(identity), Arc::new(Notify::new()));
        {
            let mut state = lane.state();
            state.queue(REPEATED, callers, &waiter);
            state.wake_next();
        }
        Queued {
            lane,
            waiter,
            kind: REPEATED,
            latest: None,
        }
    }

    fn lane(&self, identity: Identity) -> Arc<Lane> {
        let new = || Arc::new(Lane::new(self.config, self.spacings));
        self.lanes.get_with(identity, new)
    }
}
