//! Paces upstream attempts to a configured rate per credential: at most N starts in any window of T.
//!
//! While the window has room and no attempt waits, an attempt starts at once. Otherwise it waits for its turn if that comes before its
//! deadline, and is refused at once if not. Turns are at least T/N apart and go round among the callers that wait, so that a caller
//! with a hundred questions does not keep others from asking one.
//!
//! Hand-written, because the limiters in crates (governor, leaky-bucket) allow twice N in a window: a full bucket and its refill.

use std::{
    collections::VecDeque,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::sync::Cache;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{caller::Caller, credentials::Identity, deadline::Deadline};

/// Credentials that are paced at once; a forgotten one begins with an empty window.
const MAX_IDENTITIES: u64 = 10_000;

/// Starts that are remembered one by one. With a larger N those within a small part of T count as one moment, the latest of them.
const MAX_STARTS: u32 = 1024;

/// How long before its deadline an attempt that still waits is refused, so that its caller is told when to come back.
const SLACK: Duration = Duration::from_millis(5);

/// How much longer than the period a start counts: requests that leave a period apart may arrive closer together, for example if the
/// first one had to open its connection. At most a twentieth of the period.
const JITTER: Duration = Duration::from_millis(50);

/// Attempts in a period of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Number of attempts.
    pub calls: NonZeroU32,
    /// In this time; not zero.
    pub period: Duration,
}

/// One lane per credential.
#[derive(Debug)]
pub(super) struct Pacing {
    config: Config,
    lanes: Cache<Identity, Arc<Lane>>,
}

impl Pacing {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            // By then the window of the lane is empty, as that of a new one.
            lanes: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .time_to_idle(config.period * 2)
                .build(),
        }
    }

    /// Waits for the turn of one attempt. Dropping the future gives its place to the next.
    ///
    /// # Errors
    /// How long the wait would be, if that is beyond the deadline.
    pub(super) async fn turn(
        &self,
        identity: Identity,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<(), Duration> {
        let lane = self
            .lanes
            .get_with(identity, || Arc::new(Lane::new(self.config)));
        let Some(place) = lane.enter(caller, deadline)? else {
            return Ok(());
        };
        let turn = place.turn();
        let last_moment = deadline.at() - SLACK.min(deadline.remaining());
        let came = tokio::time::timeout_at(last_moment, turn).await;
        // A lane with a queue is in use, even if no attempt joins it.
        self.lanes.get(&identity);
        came.map_err(|_| lane.state().wait_of_next())
    }
}

#[derive(Debug)]
struct Lane(Mutex<State>);

#[derive(Debug)]
struct State {
    config: Config,
    /// How long a start counts.
    window: Duration,
    /// The least time between two turns while attempts wait.
    spacing: Duration,
    /// Starts closer together than this count as one moment.
    resolution: Duration,
    /// The starts within the last period: when, and how many. Oldest first.
    starts: VecDeque<(Instant, u32)>,
    /// The sum of the numbers in `starts`.
    started: u32,
    /// Those who wait, by caller. The first caller's first attempt has the next turn.
    queue: VecDeque<(Caller, VecDeque<Arc<Notify>>)>,
}

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
            queue: VecDeque::new(),
        }))
    }

    /// A place in the queue, or `None` for an attempt that starts at once.
    fn enter(&self, caller: Caller, deadline: Deadline) -> Result<Option<Place<'_>>, Duration> {
        let mut state = self.state();
        let now = Instant::now();
        if state.queue.is_empty() && state.next_at(now) <= now {
            state.start(now);
            return Ok(None);
        }
        let wait = state.wait_of(caller, now);
        if wait > deadline.remaining() {
            return Err(wait);
        }
        let waiter = Arc::new(Notify::new());
        let of_caller = state.queue.iter_mut().find(|(known, _)| *known == caller);
        match of_caller {
            Some((_, waiters)) => waiters.push_back(Arc::clone(&waiter)),
            None => {
                let waiters = VecDeque::from([Arc::clone(&waiter)]);
                state.queue.push_back((caller, waiters));
            }
        }
        Ok(Some(Place { lane: self, waiter }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// When the next attempt may start: no earlier than a spacing after the last one if attempts wait, and with room in the window.
    fn next_at(&mut self, now: Instant) -> Instant {
        while let Some((at, count)) = self.starts.front().copied()
            && now.saturating_duration_since(at) >= self.window
        {
            self.starts.pop_front();
            self.started -= count;
        }
        let mut next = now;
        if let Some((oldest, _)) = self.starts.front()
            && self.started >= self.config.calls.get()
        {
            next = *oldest + self.window;
        }
        if let Some((latest, _)) = self.starts.back()
            && !self.queue.is_empty()
        {
            next = next.max(*latest + self.spacing);
        }
        next
    }

    fn start(&mut self, now: Instant) {
        self.started += 1;
        match self.starts.back_mut() {
            Some((at, count)) if now.saturating_duration_since(*at) < self.resolution => {
                *count += 1;
                *at = now;
            }
            _ => self.starts.push_back((now, 1)),
        }
    }

    /// Gives the turn to the next attempt: it leaves the queue, and its caller goes to the end of the round.
    fn take_turn(&mut self, now: Instant) {
        self.start(now);
        if let Some((_, waiters)) = self.queue.front_mut() {
            waiters.pop_front();
        }
        self.queue.rotate_left(1);
        self.wake_next();
    }

    fn leave(&mut self, waiter: &Arc<Notify>) {
        for (_, waiters) in &mut self.queue {
            waiters.retain(|waiting| !Arc::ptr_eq(waiting, waiter));
        }
        self.wake_next();
    }

    fn wake_next(&mut self) {
        self.queue.retain(|(_, waiters)| !waiters.is_empty());
        if let Some(next) = self.queue.front().and_then(|(_, waiters)| waiters.front()) {
            next.notify_one();
        }
    }

    /// How long another attempt of `caller` would wait, if no other attempt came.
    fn wait_of(&mut self, caller: Caller, now: Instant) -> Duration {
        let of_caller = self.queue.iter().find(|(known, _)| *known == caller);
        // The round in which it would have its turn. Callers ahead of its own have one more turn before it than those behind.
        let round = of_caller.map_or(0, |(_, waiters)| waiters.len());
        let mut before = 0;
        let mut is_behind = false;
        for (known, waiters) in &self.queue {
            is_behind |= *known == caller;
            before += waiters.len().min(if is_behind { round } else { round + 1 });
        }
        self.turn_after(before, now).saturating_duration_since(now)
    }

    /// How long an attempt at the end of the queue would wait.
    fn wait_of_next(&mut self) -> Duration {
        let now = Instant::now();
        let waiting = self.queue.iter().map(|(_, waiters)| waiters.len()).sum();
        self.turn_after(waiting, now).saturating_duration_since(now)
    }

    /// When the turn after `before` others comes.
    fn turn_after(&mut self, before: usize, now: Instant) -> Instant {
        let mut at = self.next_at(now);
        let limit = u64::from(self.config.calls.get());
        let mut free = limit - u64::from(self.started).min(limit);
        // Room in the window is free at once, then as the starts leave it; after that the spacing alone decides.
        let mut leaving = self.starts.iter().copied();
        for turn in 0..=before {
            if turn > 0 {
                at += self.spacing;
            }
            if free > 0 {
                free -= 1;
            } else if let Some((start, count)) = leaving.next() {
                at = at.max(start + self.window);
                free = u64::from(count) - 1;
            }
        }
        at
    }
}

/// A place in a lane's queue, given up when dropped.
struct Place<'a> {
    lane: &'a Lane,
    waiter: Arc<Notify>,
}

impl Place<'_> {
    /// Resolves at this attempt's turn, and takes it.
    async fn turn(self) {
        loop {
            let next_at = {
                let mut state = self.lane.state();
                let now = Instant::now();
                let first = state.queue.front().and_then(|(_, waiters)| waiters.front());
                let is_next = first.is_some_and(|first| Arc::ptr_eq(first, &self.waiter));
                let next_at = state.next_at(now);
                if is_next && next_at <= now {
                    return state.take_turn(now);
                }
                is_next.then_some(next_at)
            };
            match next_at {
                Some(at) => sleep_until(at).await,
                // A wake that comes before this line is kept.
                None => self.waiter.notified().await,
            }
        }
    }
}

impl Drop for Place<'_> {
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

    /// Starts a turn for each caller, in this order; each returns its index, and when it came, in seconds from now.
    async fn start(
        pacing: &Arc<Pacing>,
        callers: &[Caller],
    ) -> JoinSet<(usize, Result<u64, Duration>)> {
        let begun = Instant::now();
        let mut turns = JoinSet::new();
        for (index, caller) in callers.iter().copied().enumerate() {
            let pacing = Arc::clone(pacing);
            turns.spawn(async move {
                let turn = pacing.turn(RDS, caller, in_seconds(600)).await;
                (index, turn.map(|()| begun.elapsed().as_secs()))
            });
            yield_now().await;
        }
        turns
    }

    async fn times(mut turns: JoinSet<(usize, Result<u64, Duration>)>) -> Vec<u64> {
        let mut times = Vec::new();
        while let Some(turn) = turns.join_next().await {
            let (index, at) = turn.unwrap();
            times.push((index, at.expect("a turn before the deadline")));
        }
        times.sort_unstable();
        times.into_iter().map(|(_, at)| at).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_window_is_free_at_once_and_the_rest_wait_for_room_a_spacing_apart() {
        let pacing = pacing(3, Duration::from_secs(30));

        let turns = start(&pacing, &[ANN; 7]).await;

        assert_eq!(times(turns).await, [0, 0, 0, 30, 40, 50, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_take_turns_however_many_attempts_one_of_them_has() {
        let pacing = pacing(1, Duration::from_secs(1));
        start(&pacing, &[ANN]).await.join_all().await;

        let turns = start(
            &pacing,
            &[ANN, ANN, ANN, ANN, BOB, BOB, Caller::Connection(3)],
        )
        .await;

        assert_eq!(times(turns).await, [1, 4, 6, 7, 2, 5, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_without_a_turn_before_its_deadline_is_refused_at_once() {
        let pacing = pacing(1, Duration::from_secs(10));
        let _waiting = start(&pacing, &[ANN; 4]).await;

        let before = Instant::now();
        let last = pacing.turn(RDS, ANN, in_seconds(39)).await.unwrap_err();
        let fair = pacing.turn(RDS, BOB, in_seconds(19)).await.unwrap_err();

        assert_eq!(Instant::now(), before);
        assert_eq!((last.as_secs(), fair.as_secs()), (40, 20));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_others_push_back_is_refused_shortly_before_its_deadline() {
        let pacing = pacing(1, Duration::from_secs(10));
        let _waiting = start(&pacing, &[ANN; 3]).await;
        let begun = Instant::now();
        let mut late = Box::pin(pacing.turn(RDS, ANN, in_seconds(35)));
        assert!(poll!(&mut late).is_pending());

        let _others = start(&pacing, &[BOB; 3]).await;

        let wait = late.await.expect_err("BOB's turns came in between");
        assert_eq!((begun + Duration::from_secs(35)) - Instant::now(), SLACK);
        assert!(wait > Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_place_goes_to_the_next_wherever_in_the_queue_it_was() {
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
            for turns in waiting {
                came.extend(times(turns).await);
            }
            came.sort_unstable();
            assert_eq!(came, [1, 2, 3], "{cancelled}");
            let lane = pacing.lanes.get(&RDS).expect("a lane");
            assert!(lane.state().queue.is_empty(), "{cancelled}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_overtakes_a_queue_that_has_not_woken_yet() {
        let pacing = pacing(1, Duration::from_secs(1));
        start(&pacing, &[ANN]).await.join_all().await;
        let mut first = Box::pin(pacing.turn(RDS, ANN, in_seconds(9)));
        assert!(poll!(&mut first).is_pending());
        tokio::time::advance(Duration::from_secs(2)).await;

        let mut second = Box::pin(pacing.turn(RDS, BOB, in_seconds(9)));

        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut first).is_ready());
        assert!(poll!(&mut second).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn each_credential_has_a_window_of_its_own() {
        let pacing = pacing(1, Duration::from_secs(60));
        let other = Identity::Caller([1; 16]);

        assert!(pacing.turn(RDS, ANN, in_seconds(0)).await.is_ok());
        assert!(pacing.turn(other, ANN, in_seconds(0)).await.is_ok());
        assert!(pacing.turn(RDS, ANN, in_seconds(0)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn ever_new_credentials_are_not_all_remembered() {
        let pacing = pacing(60, Duration::from_secs(60));

        for number in 0..3 * u128::from(MAX_IDENTITIES) {
            let identity = Identity::Caller(number.to_be_bytes());
            let turn = pacing.turn(identity, ANN, in_seconds(0)).await;
            turn.expect("an empty window");
        }

        pacing.lanes.run_pending_tasks();
        assert!(pacing.lanes.entry_count() <= MAX_IDENTITIES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_of_many_starts_is_small_and_still_holds() {
        let calls = 100_000;
        let pacing = pacing(calls, Duration::from_secs(60));
        for _ in 0..calls {
            tokio::time::advance(Duration::from_micros(100)).await;
            pacing
                .turn(RDS, ANN, in_seconds(0))
                .await
                .expect("there is room");
        }

        assert!(pacing.turn(RDS, ANN, in_seconds(0)).await.is_err());
        let lane = pacing.lanes.get(&RDS).expect("a lane");
        assert!(lane.state().starts.len() <= MAX_STARTS as usize + 1);
    }

    proptest! {
        /// Whatever comes, waits and leaves: never more than N starts in a window, and never fewer than that if enough wait.
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
                        let turn = pacing.turn(RDS, Caller::Connection(caller), deadline);
                        let patience = Duration::from_millis(patience);
                        let turn = tokio::time::timeout(patience, turn).await;
                        matches!(turn, Ok(Ok(()))).then(Instant::now)
                    });
                }
                let starts = runs.join_all().await;
                let lane = pacing.lanes.get(&RDS).expect("a lane");
                assert!(lane.state().queue.is_empty());
                starts.into_iter().flatten().collect::<Vec<_>>()
            });
            starts.sort_unstable();
            for window in starts.windows(calls as usize + 1) {
                prop_assert!(*window.last().unwrap() - window[0] > period);
            }
        }
    }
}
