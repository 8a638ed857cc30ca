//! Rate limiter for upstream attempts and for the polls of watches: at most N starts per credential in any window of T.
//!
//! While the window has room and the queue is empty, an attempt starts at once. Otherwise it waits if it can start before its deadline, and
//! is rejected at once if not. Queued attempts start at least T/N apart, round robin among callers, so that a caller with a hundred calls
//! does not delay the calls of others by more than one start each. The repeated polls of watches have a queue of their own. While both
//! queues have entries, they start in turn, so that first polls of ever-new tasks do not stop the polls of others.
//!
//! Hand-written, because the limiters in crates (governor, leaky-bucket) allow 2N starts in a window: a full bucket and its refill.

use std::{
    collections::VecDeque,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{caller::Caller, credentials::Identity, deadline::Deadline};

/// Limit on credentials with a window; an evicted one starts with an empty window.
const MAX_IDENTITIES: u64 = 10_000;

/// Limit on entries of a window. With a larger N, the starts within T/1024 share an entry.
const MAX_STARTS: u32 = 1024;

/// An attempt that still waits is rejected this long before its deadline, so that its caller gets an error with `RetryInfo`.
const SLACK: Duration = Duration::from_millis(5);

/// How much longer than the period a start counts: requests sent a period apart may arrive closer together, for example if the earlier
/// one had to open its connection. At most a twentieth of the period.
const JITTER: Duration = Duration::from_millis(50);

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
    lanes: Cache<Identity, Arc<Lane>>,
}

impl Pacing {
    /// A limiter with empty windows.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            // After that time the window is empty, so a new lane is equivalent.
            lanes: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_idle(config.period * 2)
                .build(),
        }
    }

    /// Waits until one attempt may start. Dropping the future leaves the queue.
    ///
    /// # Errors
    /// The necessary wait, if it exceeds the deadline.
    pub async fn wait(
        &self,
        identity: Identity,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<(), Duration> {
        let lane = self
            .lanes
            .get_with(identity, || Arc::new(Lane::new(self.config)));
        let Some(queued) = lane.enter(caller, deadline)? else {
            return Ok(());
        };
        let start = queued.start();
        let latest = deadline.at() - SLACK.min(deadline.remaining());
        let started = tokio::time::timeout_at(latest, start).await;
        // Keeps a lane with a queue from being evicted, even if no attempt joins it.
        self.lanes.get(&identity);
        started.map_err(|_| lane.state().wait_at_end())
    }

    /// Waits until a repeated poll may start, however long that takes, as the poll of the caller with the fewest queued polls. Dropping
    /// the future leaves the queue. Returns the caller.
    ///
    /// # Panics
    /// Without callers.
    pub async fn wait_patiently(&self, identity: Identity, callers: &[Caller]) -> Caller {
        let lane = self
            .lanes
            .get_with(identity, || Arc::new(Lane::new(self.config)));
        let (queued, caller) = lane.enter_patiently(callers);
        queued.start().await;
        self.lanes.get(&identity);
        caller
    }
}

/// Starts that leave the window together, with the latest of them.
#[derive(Debug)]
struct Starts {
    first: Instant,
    latest: Instant,
    count: u32,
}

#[derive(Debug)]
struct Lane(Mutex<State>);

#[derive(Debug)]
struct State {
    config: Config,
    /// How long a start counts against the rate.
    window: Duration,
    /// The minimum time between two starts while attempts are queued.
    spacing: Duration,
    /// Starts within this time share an entry.
    resolution: Duration,
    /// The starts in the window, oldest first.
    starts: VecDeque<Starts>,
    /// The sum of the numbers in `starts`.
    started: u32,
    /// The queued attempts, then the queued polls. The first entry of the first caller starts next.
    queues: [Queue; 2],
    /// The latest start from a queue was an attempt.
    is_turn_of_polls: bool,
}

/// Attempts or polls by caller.
type Queue = VecDeque<(Caller, VecDeque<Arc<Notify>>)>;

const ATTEMPTS: usize = 0;
const POLLS: usize = 1;

impl Lane {
    fn new(config: Config) -> Self {
        let calls = config.calls.get();
        Self(Mutex::new(State {
            config,
            window: config.period + JITTER.min(config.period / 20),
            spacing: config.period / calls,
            resolution: match calls > MAX_STARTS {
                true => config.period / MAX_STARTS,
                false => Duration::ZERO,
            },
            starts: VecDeque::new(),
            started: 0,
            queues: Default::default(),
            is_turn_of_polls: false,
        }))
    }

    /// Joins the queue; `None` for an attempt that starts at once.
    fn enter(&self, caller: Caller, deadline: Deadline) -> Result<Option<Queued<'_>>, Duration> {
        let mut state = self.state();
        let now = Instant::now();
        if state.queues[ATTEMPTS].is_empty() && state.next_at(now, false) <= now {
            state.start(now);
            return Ok(None);
        }
        let wait = state.wait_of(caller, now);
        if wait > deadline.remaining() {
            return Err(wait);
        }
        let waiter = state.queue(ATTEMPTS, caller);
        Ok(Some(Queued { lane: self, waiter }))
    }

    /// Joins the queue of polls as the caller with the fewest queued polls.
    fn enter_patiently(&self, callers: &[Caller]) -> (Queued<'_>, Caller) {
        let mut state = self.state();
        let queued = |caller: &&Caller| {
            let known = state.queues[POLLS]
                .iter()
                .find(|(known, _)| known == *caller);
            known.map_or(0, |(_, waiters)| waiters.len())
        };
        let caller = *callers.iter().min_by_key(queued).expect("a caller");
        let waiter = state.queue(POLLS, caller);
        (Queued { lane: self, waiter }, caller)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// When the next attempt may start: when the window has room and, for a queued attempt, `spacing` after the latest start.
    fn next_at(&mut self, now: Instant, is_queued: bool) -> Instant {
        while let Some(oldest) = self.starts.front()
            && now.saturating_duration_since(oldest.latest) >= self.window
        {
            self.started -= oldest.count;
            self.starts.pop_front();
        }
        let mut next = now;
        if let Some(oldest) = self.starts.front()
            && self.started >= self.config.calls.get()
        {
            next = oldest.latest + self.window;
        }
        if let Some(newest) = self.starts.back()
            && is_queued
        {
            next = next.max(newest.latest + self.spacing);
        }
        next
    }

    fn start(&mut self, now: Instant) {
        self.started += 1;
        match self.starts.back_mut() {
            Some(newest) if now.saturating_duration_since(newest.first) < self.resolution => {
                newest.count += 1;
                newest.latest = now;
            }
            _ => self.starts.push_back(Starts {
                first: now,
                latest: now,
                count: 1,
            }),
        }
    }

    /// Appends a waiter of `caller` to a queue.
    fn queue(&mut self, queue: usize, caller: Caller) -> Arc<Notify> {
        let waiter = Arc::new(Notify::new());
        let queue = &mut self.queues[queue];
        match queue.iter_mut().find(|(known, _)| *known == caller) {
            Some((_, waiters)) => waiters.push_back(Arc::clone(&waiter)),
            None => queue.push_back((caller, VecDeque::from([Arc::clone(&waiter)]))),
        }
        waiter
    }

    /// The queue of the waiter that starts next, if any.
    fn next_queue(&self) -> usize {
        match [ATTEMPTS, POLLS].map(|queue| self.queues[queue].is_empty()) {
            [true, _] => POLLS,
            [false, false] if self.is_turn_of_polls => POLLS,
            [false, _] => ATTEMPTS,
        }
    }

    /// The waiter that starts next.
    fn next(&self) -> Option<&Arc<Notify>> {
        let (_, waiters) = self.queues[self.next_queue()].front()?;
        waiters.front()
    }

    /// Starts the next waiter and moves its caller to the end of the queue.
    fn start_next(&mut self, now: Instant) {
        self.start(now);
        let next = self.next_queue();
        let queue = &mut self.queues[next];
        queue[0].1.pop_front();
        queue.rotate_left(1);
        self.is_turn_of_polls = next == ATTEMPTS;
        self.wake_next();
    }

    fn leave(&mut self, waiter: &Arc<Notify>) {
        for (_, waiters) in self.queues.iter_mut().flatten() {
            waiters.retain(|waiting| !Arc::ptr_eq(waiting, waiter));
        }
        self.wake_next();
    }

    fn wake_next(&mut self) {
        for queue in &mut self.queues {
            queue.retain(|(_, waiters)| !waiters.is_empty());
        }
        if let Some(next) = self.next() {
            next.notify_one();
        }
    }

    /// How long another attempt of `caller` would wait if the queue stayed as it is.
    fn wait_of(&mut self, caller: Caller, now: Instant) -> Duration {
        let queue = &self.queues[ATTEMPTS];
        let queued = queue.iter().find(|(known, _)| *known == caller);
        // The round robin's round in which it would start. Callers before its own start one more attempt until then than those behind.
        let round = queued.map_or(0, |(_, waiters)| waiters.len());
        let mut before = 0;
        let mut is_behind = false;
        for (known, waiters) in queue {
            is_behind |= *known == caller;
            before += waiters.len().min(if is_behind { round } else { round + 1 });
        }
        self.start_after(before, now).saturating_duration_since(now)
    }

    /// How long an attempt at the end of the queue would wait.
    fn wait_at_end(&mut self) -> Duration {
        let now = Instant::now();
        let waiting = self.queues[ATTEMPTS]
            .iter()
            .map(|(_, waiters)| waiters.len())
            .sum();
        self.start_after(waiting, now)
            .saturating_duration_since(now)
    }

    /// When an attempt with `before` others ahead of it would start.
    fn start_after(&mut self, before: usize, now: Instant) -> Instant {
        let polls = self.queues[POLLS].iter().map(|(_, waiters)| waiters.len());
        let before = before
            + polls
                .sum::<usize>()
                .min(before + usize::from(self.is_turn_of_polls));
        let mut at = self.next_at(now, true);
        let limit = u64::from(self.config.calls.get());
        let mut free = limit - u64::from(self.started).min(limit);
        // The window has room now, or when a start leaves it; after all of them only the spacing counts.
        let mut leaving = self.starts.iter();
        for position in 0..=before {
            if position > 0 {
                at += self.spacing;
            }
            if free > 0 {
                free -= 1;
            } else if let Some(starts) = leaving.next() {
                at = at.max(starts.latest + self.window);
                free = u64::from(starts.count) - 1;
            }
        }
        at
    }
}

/// A queued attempt, which leaves the queue when dropped.
struct Queued<'a> {
    lane: &'a Lane,
    waiter: Arc<Notify>,
}

impl Queued<'_> {
    /// Waits until this attempt is next and may start.
    async fn start(self) {
        loop {
            let next_at = {
                let mut state = self.lane.state();
                let now = Instant::now();
                let is_next = state
                    .next()
                    .is_some_and(|first| Arc::ptr_eq(first, &self.waiter));
                let next_at = state.next_at(now, true);
                if is_next && next_at <= now {
                    return state.start_next(now);
                }
                is_next.then_some(next_at)
            };
            match next_at {
                Some(at) => sleep_until(at).await,
                // `Notify` stores a wake-up that comes before this line.
                None => self.waiter.notified().await,
            }
        }
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.lane.state().leave(&self.waiter);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use proptest::prelude::*;
    use tokio::task::{JoinSet, yield_now};

    use super::*;

    const RDS: Identity = Identity::Server;
    const ANN: Caller = Caller::Connection(1);
    const BOB: Caller = Caller::Connection(2);

    fn pacing(calls: u32, period: Duration) -> Arc<Pacing> {
        Arc::new(Pacing::new(Config {
            calls: NonZeroU32::new(calls).unwrap(),
            period,
        }))
    }

    fn in_seconds(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds))
    }

    /// Queues an attempt for each caller, in this order. Each returns its index and its start in seconds from now.
    async fn start(
        pacing: &Arc<Pacing>,
        callers: &[Caller],
    ) -> JoinSet<(usize, Result<u64, Duration>)> {
        let begun = Instant::now();
        let mut starts = JoinSet::new();
        for (index, caller) in callers.iter().copied().enumerate() {
            let pacing = Arc::clone(pacing);
            starts.spawn(async move {
                let start = pacing.wait(RDS, caller, in_seconds(600)).await;
                (index, start.map(|()| begun.elapsed().as_secs()))
            });
            yield_now().await;
        }
        starts
    }

    async fn times(mut starts: JoinSet<(usize, Result<u64, Duration>)>) -> Vec<u64> {
        let mut times = Vec::new();
        while let Some(start) = starts.join_next().await {
            let (index, at) = start.unwrap();
            times.push((index, at.expect("a start before the deadline")));
        }
        times.sort_unstable();
        times.into_iter().map(|(_, at)| at).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_window_is_free_at_once_and_the_rest_wait_for_room_a_spacing_apart() {
        let pacing = pacing(3, Duration::from_secs(30));

        let starts = start(&pacing, &[ANN; 7]).await;

        assert_eq!(times(starts).await, [0, 0, 0, 30, 40, 50, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_start_round_robin_even_if_one_has_many_attempts() {
        let pacing = pacing(1, Duration::from_secs(1));
        start(&pacing, &[ANN]).await.join_all().await;

        let starts = start(
            &pacing,
            &[ANN, ANN, ANN, ANN, BOB, BOB, Caller::Connection(3)],
        )
        .await;

        assert_eq!(times(starts).await, [1, 4, 6, 7, 2, 5, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_cannot_start_before_its_deadline_is_rejected_at_once() {
        let pacing = pacing(1, Duration::from_secs(10));
        let _waiting = start(&pacing, &[ANN; 4]).await;

        let before = Instant::now();
        let last = pacing.wait(RDS, ANN, in_seconds(39)).await.unwrap_err();
        let fair = pacing.wait(RDS, BOB, in_seconds(19)).await.unwrap_err();

        assert_eq!(Instant::now(), before);
        assert_eq!((last.as_secs(), fair.as_secs()), (40, 20));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_delayed_by_others_is_rejected_shortly_before_its_deadline() {
        let pacing = pacing(1, Duration::from_secs(10));
        let _waiting = start(&pacing, &[ANN; 3]).await;
        let begun = Instant::now();
        let mut late = Box::pin(pacing.wait(RDS, ANN, in_seconds(35)));
        assert!(poll!(&mut late).is_pending());

        let _others = start(&pacing, &[BOB; 3]).await;

        let wait = late.await.expect_err("BOB's starts came in between");
        assert_eq!((begun + Duration::from_secs(35)) - Instant::now(), SLACK);
        assert!(wait > Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_attempt_leaves_the_queue_at_any_position() {
        for cancelled in 0..3 {
            let pacing = pacing(1, Duration::from_secs(1));
            start(&pacing, &[ANN]).await.join_all().await;
            let mut waiting = Vec::new();
            for caller in [ANN, BOB, ANN] {
                waiting.push(start(&pacing, &[caller]).await);
            }

            drop(waiting.remove(cancelled));
            yield_now().await;
            waiting.push(start(&pacing, &[BOB]).await);

            let mut came = Vec::new();
            for starts in waiting {
                came.extend(times(starts).await);
            }
            came.sort_unstable();
            assert_eq!(came, [1, 2, 3], "{cancelled}");
            let lane = pacing.lanes.get(&RDS).expect("a lane");
            assert!(
                lane.state().queues.iter().all(VecDeque::is_empty),
                "{cancelled}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_overtakes_a_queue_that_has_not_woken_yet() {
        let pacing = pacing(1, Duration::from_secs(1));
        start(&pacing, &[ANN]).await.join_all().await;
        let mut first = Box::pin(pacing.wait(RDS, ANN, in_seconds(9)));
        assert!(poll!(&mut first).is_pending());
        tokio::time::advance(Duration::from_secs(2)).await;

        let mut second = Box::pin(pacing.wait(RDS, BOB, in_seconds(9)));

        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut first).is_ready());
        assert!(poll!(&mut second).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn each_credential_has_a_window_of_its_own() {
        let pacing = pacing(1, Duration::from_secs(60));
        let other = Identity::Caller([1; 16]);

        assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_ok());
        assert!(pacing.wait(other, ANN, in_seconds(0)).await.is_ok());
        assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn ever_new_credentials_are_not_all_remembered() {
        let pacing = pacing(60, Duration::from_secs(60));

        for number in 0..3 * u128::from(MAX_IDENTITIES) {
            let identity = Identity::Caller(number.to_be_bytes());
            let start = pacing.wait(identity, ANN, in_seconds(0)).await;
            start.expect("an empty window");
        }

        pacing.lanes.run_pending_tasks();
        assert!(pacing.lanes.entry_count() <= MAX_IDENTITIES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_steady_load_below_the_rate_starts_at_once() {
        let pacing = pacing(60_000, Duration::from_secs(60));

        for _ in 0..3 * 60 * 800 {
            tokio::time::advance(Duration::from_micros(1250)).await;
            let start = pacing.wait(RDS, ANN, in_seconds(0)).await;
            start.expect("800 a second of 1000");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_of_the_first_queued_attempt_includes_the_spacing() {
        let pacing = pacing(2, Duration::from_secs(10));
        start(&pacing, &[ANN]).await.join_all().await;
        tokio::time::advance(Duration::from_millis(9900)).await;
        start(&pacing, &[ANN]).await.join_all().await;

        let before = Instant::now();
        let wait = pacing.wait(RDS, ANN, in_seconds(2)).await.unwrap_err();

        assert_eq!((Instant::now(), wait.as_secs()), (before, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_of_many_starts_is_small_and_still_holds() {
        let calls = 100_000;
        let pacing = pacing(calls, Duration::from_secs(60));
        for _ in 0..calls {
            tokio::time::advance(Duration::from_micros(100)).await;
            pacing
                .wait(RDS, ANN, in_seconds(0))
                .await
                .expect("there is room");
        }

        assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
        let lane = pacing.lanes.get(&RDS).expect("a lane");
        assert!(lane.state().starts.len() <= MAX_STARTS as usize + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn polls_start_a_spacing_apart_round_robin_and_after_attempts() {
        let pacing = pacing(3, Duration::from_secs(30));
        let begun = Instant::now();
        let mut polls = JoinSet::new();
        for callers in [&[ANN][..], &[ANN], &[ANN], &[BOB], &[ANN, BOB]] {
            let pacing = Arc::clone(&pacing);
            polls.spawn(async move {
                let caller = pacing.wait_patiently(RDS, callers).await;
                (begun.elapsed().as_secs(), caller)
            });
            yield_now().await;
        }
        tokio::time::advance(Duration::from_secs(1)).await;

        // The first poll has started at 0 s, this attempt starts at once.
        let attempt = pacing.wait(RDS, Caller::Connection(3), in_seconds(0)).await;

        attempt.expect("room in the window");
        let mut starts = polls.join_all().await;
        starts.sort_unstable_by_key(|(at, _)| *at);
        assert_eq!(
            starts,
            [(0, ANN), (11, ANN), (30, BOB), (40, ANN), (50, BOB)]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_queued_attempt_starts_before_a_poll_that_was_queued_earlier() {
        let pacing = pacing(1, Duration::from_secs(10));
        start(&pacing, &[ANN]).await.join_all().await;
        let mut poll = Box::pin(pacing.wait_patiently(RDS, &[ANN]));
        assert!(poll!(&mut poll).is_pending());

        let mut attempt = Box::pin(pacing.wait(RDS, ANN, in_seconds(11)));
        assert!(poll!(&mut attempt).is_pending());
        tokio::time::advance(Duration::from_millis(10_050)).await;

        assert!(poll!(&mut poll).is_pending());
        assert!(poll!(&mut attempt).is_ready());
        tokio::time::advance(Duration::from_millis(10_050)).await;
        assert!(poll!(&mut poll).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn queued_polls_and_attempts_start_in_turn() {
        let pacing = pacing(1, Duration::from_secs(10));
        start(&pacing, &[ANN]).await.join_all().await;
        let begun = Instant::now();
        let mut polls = JoinSet::new();
        for _ in 0..2 {
            let pacing = Arc::clone(&pacing);
            polls.spawn(async move {
                pacing.wait_patiently(RDS, &[BOB]).await;
                begun.elapsed().as_secs()
            });
            yield_now().await;
        }

        let attempts = start(&pacing, &[ANN; 4]).await;
        let wait = pacing.wait(RDS, BOB, in_seconds(0)).await.unwrap_err();

        // After the first attempt and poll of ANN and BOB.
        assert_eq!(wait.as_secs(), 30);
        assert_eq!(times(attempts).await, [10, 30, 50, 60]);
        assert_eq!(polls.join_all().await, [20, 40]);
    }

    proptest! {
        /// With any arrivals and cancellations, at most N attempts start in any window.
        #[test]
        fn never_more_than_n_in_any_window(
            calls in 1..6u32,
            attempts in prop::collection::vec((0..4u64, 0..4000u64, 0..9000u64), 1..60),
        ) {
            let period = Duration::from_secs(3);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let mut starts = runtime.block_on(async {
                let pacing = pacing(calls, period);
                let mut runs = JoinSet::new();
                for (caller, comes, patience) in attempts {
                    let pacing = Arc::clone(&pacing);
                    runs.spawn(async move {
                        tokio::time::sleep(Duration::from_millis(comes)).await;
                        let deadline = Deadline::after(Duration::from_secs(20));
                        let start = pacing.wait(RDS, Caller::Connection(caller), deadline);
                        let patience = Duration::from_millis(patience);
                        let start = tokio::time::timeout(patience, start).await;
                        matches!(start, Ok(Ok(()))).then(Instant::now)
                    });
                }
                let starts = runs.join_all().await;
                let lane = pacing.lanes.get(&RDS).expect("a lane");
                assert!(lane.state().queues.iter().all(VecDeque::is_empty));
                starts.into_iter().flatten().collect::<Vec<_>>()
            });
            starts.sort_unstable();
            for window in starts.windows(calls as usize + 1) {
                prop_assert!(*window.last().unwrap() - window[0] > period);
            }
        }
    }
}
