//! Paces upstream attempts to a configured rate per identity: an attempt that fits before the deadline waits for its
//! turn, one that does not is refused at once.
//!
//! The bucket is governor's. The queue in front of it is ours: it keeps the order, gives the place of an attempt that
//! nobody waits for any more to the next, and so knows each wait before it begins.

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use governor::{
    RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
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

/// One lane per identity.
#[derive(Debug)]
pub(super) struct Rate {
    burst: NonZeroU32,
    /// The time in which the bucket gains one call.
    spacing: Duration,
    lanes: Cache<Identity, Arc<Lane>>,
}

impl Rate {
    pub(super) fn new(config: Config) -> Self {
        Self {
            burst: config.calls,
            spacing: (config.period / config.calls.get()).max(Duration::from_nanos(1)),
            // By then the bucket is full, as that of a new lane.
            lanes: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .time_to_idle(config.period * 2)
                .build(),
        }
    }

    /// Waits for the turn of one attempt. Dropping the future gives the place in the queue back.
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
            .get_with(identity, || Arc::new(Lane::new(self.burst, self.spacing)));
        let Some(place) = lane.enter(self.spacing, deadline)? else {
            return Ok(());
        };
        let _head = lane.head.lock().await;
        while let Err(wait) = lane.take() {
            tokio::time::sleep(wait).await;
        }
        lane.queue().head_leaves_at += self.spacing;
        drop(place);
        // A lane with a queue is in use, even when nobody new comes.
        self.lanes.get(&identity);
        Ok(())
    }
}

#[derive(Debug)]
struct Lane {
    bucket: RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<std::time::Instant>>,
    queue: Mutex<Queue>,
    /// Held by the first in the queue; tokio's mutex is fair, so the others follow in order.
    head: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Queue {
    length: u32,
    /// When the first in the queue may go. Out of date while the queue is empty.
    head_leaves_at: Instant,
}

impl Lane {
    fn new(burst: NonZeroU32, spacing: Duration) -> Self {
        let quota = governor::Quota::with_period(spacing)
            .expect("the spacing is not zero")
            .allow_burst(burst);
        Self {
            bucket: RateLimiter::direct_with_clock(quota, TokioClock),
            queue: Mutex::new(Queue {
                length: 0,
                head_leaves_at: Instant::now(),
            }),
            head: tokio::sync::Mutex::new(()),
        }
    }

    /// A place in the queue, or `None` for one who need not wait. The error is a wait that is too long.
    fn enter(&self, spacing: Duration, deadline: Deadline) -> Result<Option<Place<'_>>, Duration> {
        let mut queue = self.queue();
        if queue.length == 0 {
            match self.take() {
                Ok(()) => return Ok(None),
                Err(wait) => queue.head_leaves_at = Instant::now() + wait,
            }
        }
        let head_leaves_in = queue
            .head_leaves_at
            .saturating_duration_since(Instant::now());
        let wait = head_leaves_in + spacing * queue.length;
        if wait > deadline.remaining() {
            return Err(wait);
        }
        queue.length += 1;
        Ok(Some(Place(self)))
    }

    /// Takes one call out of the bucket, or tells when there will be one.
    fn take(&self) -> Result<(), Duration> {
        self.bucket
            .check()
            .map_err(|not_yet| not_yet.wait_time_from(TokioClock.now()))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a lane's queue, given back when dropped.
struct Place<'a>(&'a Lane);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.queue().length -= 1;
    }
}

/// The clock of all our timers, so that a bucket and the sleep until its next call agree.
#[derive(Debug, Clone)]
struct TokioClock;

impl Clock for TokioClock {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        Instant::now().into_std()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use tokio::task::JoinSet;

    use super::*;

    const ANN: Identity = Identity::Caller([1; 16]);
    const BOB: Identity = Identity::Caller([2; 16]);

    fn rate(calls: u32, period: Duration) -> Arc<Rate> {
        Arc::new(Rate::new(Config {
            calls: NonZeroU32::new(calls).unwrap(),
            period,
        }))
    }

    fn in_seconds(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds))
    }

    /// Starts a turn for each number; each tells its number and when it came, in seconds from now.
    async fn start(
        rate: &Arc<Rate>,
        numbers: std::ops::Range<u32>,
    ) -> JoinSet<(u32, Result<u64, Duration>)> {
        let begun = Instant::now();
        let mut turns = JoinSet::new();
        for number in numbers {
            let rate = Arc::clone(rate);
            turns.spawn(async move {
                let turn = rate.turn(ANN, in_seconds(60)).await;
                (number, turn.map(|()| begun.elapsed().as_secs()))
            });
            tokio::task::yield_now().await;
        }
        turns
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_goes_at_once_and_the_rest_in_order_at_the_rate() {
        let rate = rate(3, Duration::from_secs(3));

        let mut came = start(&rate, 0..7).await.join_all().await;

        came.sort_by_key(|(_, at)| *at);
        let expected = [0, 0, 0, 1, 2, 3, 4];
        let (numbers, times): (Vec<_>, Vec<_>) = came.into_iter().unzip();
        assert_eq!(times, expected.map(Ok));
        assert_eq!(numbers[3..], [3, 4, 5, 6]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_fit_is_refused_at_once_with_the_wait_it_would_have_had() {
        let rate = rate(1, Duration::from_secs(10));
        let _waiting = start(&rate, 0..3).await;
        tokio::time::advance(Duration::from_secs(4)).await;

        let before = Instant::now();
        let refused = rate.turn(ANN, in_seconds(25)).await;

        // Two wait before it: they go in 6 s and in 16 s.
        assert_eq!(refused, Err(Duration::from_secs(26)));
        assert_eq!(Instant::now(), before);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fits_by_the_remainder_of_a_spacing_waits() {
        let rate = rate(1, Duration::from_secs(60));
        rate.turn(ANN, in_seconds(0))
            .await
            .expect("the bucket is full");
        tokio::time::advance(Duration::from_secs(59)).await;

        let turn = rate.turn(ANN, in_seconds(2)).await;

        assert_eq!(turn, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_place_goes_to_the_next_wherever_in_the_queue_it_was() {
        for cancelled in [0, 1, 2] {
            let rate = rate(1, Duration::from_secs(1));
            start(&rate, 0..1).await.join_all().await;
            let mut leaving = None;
            let mut staying = Vec::new();
            for number in 0..3 {
                let turn = start(&rate, number..number + 1).await;
                if number == cancelled {
                    leaving = Some(turn);
                } else {
                    staying.push(turn);
                }
            }
            tokio::time::advance(Duration::from_millis(100)).await;

            drop(leaving);
            tokio::task::yield_now().await;
            staying.push(start(&rate, 3..4).await);
            let mut came = Vec::new();
            for turn in staying {
                came.extend(turn.join_all().await.into_iter().map(|(_, at)| at));
            }

            // The last began 0.1 s later than the others, so its third second is the 2.9th.
            assert_eq!(came, [Ok(1), Ok(2), Ok(2)], "{cancelled}");
            let lane = rate.lanes.get(&ANN).expect("a lane");
            assert_eq!(lane.queue().length, 0, "{cancelled}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_overtakes_a_queue_that_has_not_woken_yet() {
        let rate = rate(1, Duration::from_secs(1));
        start(&rate, 0..1).await.join_all().await;
        let mut first = Box::pin(rate.turn(ANN, in_seconds(9)));
        assert!(futures_util::poll!(&mut first).is_pending());
        tokio::time::advance(Duration::from_secs(1)).await;

        let mut second = Box::pin(rate.turn(ANN, in_seconds(9)));

        assert!(futures_util::poll!(&mut second).is_pending());
        assert_eq!(futures_util::poll!(&mut first), Poll::Ready(Ok(())));
        assert!(futures_util::poll!(&mut second).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn each_identity_has_a_lane_of_its_own() {
        let rate = rate(1, Duration::from_secs(60));

        let turns = [
            rate.turn(ANN, in_seconds(0)).await,
            rate.turn(BOB, in_seconds(0)).await,
            rate.turn(ANN, in_seconds(0)).await,
        ];

        assert_eq!(turns, [Ok(()), Ok(()), Err(Duration::from_secs(60))]);
    }

    #[tokio::test(start_paused = true)]
    async fn ever_new_identities_are_not_all_remembered() {
        let rate = rate(60, Duration::from_secs(60));

        for number in 0..3 * u128::from(MAX_IDENTITIES) {
            let identity = Identity::Caller(number.to_be_bytes());
            rate.turn(identity, in_seconds(0))
                .await
                .expect("a full bucket");
        }

        rate.lanes.run_pending_tasks();
        assert!(rate.lanes.entry_count() <= MAX_IDENTITIES);
    }
}
