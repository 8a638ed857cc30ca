//! Rate limiter for upstream attempts and for the polls of watches: at most N starts per credential in any window of T.
//!
//! While the window has room and the queue is empty, an attempt starts at once. Otherwise it waits if it can start before its deadline, and
//! is rejected at once if not. Queued attempts start at least T/N apart, round robin among callers, so that a caller with a hundred calls
//! does not delay the calls of others by more than one start each.
//!
//! The first poll of a watched task starts like an attempt, but without a distance from others. Repeated polls have a queue of their own and
//! start at least T/N apart. While any of them is queued, first polls may use only half of the window.
//!
//! With a quota store, attempts take their starts from the store, which applies the rate to all replicas. While it delays
//! some of them, only the head of the queue asks ([`Pacing::wait_in_fleet`]). While the store is not available, the rate divided by the number of
//! replicas applies here, and afterwards, too, until the starts that the store has not seen have left the window.
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

use crate::{
    caller::Caller,
    credentials::Identity,
    deadline::Deadline,
    quota_store::{Answer, Request, Session, Slot},
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
            state.queue(FIRST, caller, &waiter);
            let lane = Arc::clone(&lane);
            Queued { lane, waiter }
        };
        let start = queued.start_in_fleet(FIRST, Some(latest), session, request);
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
    pub fn queue_repeated(&self, identity: Identity, callers: &[Caller]) -> QueuedPoll {
        let lane = self.lane(identity);
        let poll = QueuedPoll {
            queued: Queued {
                waiter: Arc::new(Notify::new()),
                lane,
            },
        };
        poll.add(callers);
        poll
    }

    fn lane(&self, identity: Identity) -> Arc<Lane> {
        let new = || Arc::new(Lane::new(self.config, self.spacings));
        self.lanes.get_with(identity, new)
    }
}

/// A repeated poll that waits for its start. Dropping it leaves the queue.
#[derive(Debug)]
pub struct QueuedPoll {
    queued: Queued,
}

impl QueuedPoll {
    /// Queues the poll under further callers as well. It stays queued under its other callers.
    pub fn add(&self, callers: &[Caller]) {
        let mut state = self.queued.lane.state();
        for caller in callers {
            state.queue(REPEATED, *caller, &self.queued.waiter);
        }
        state.wake_next();
    }

    /// Waits until the poll may start, and returns the caller under whom it does. Dropping the future does not leave the queue.
    pub async fn start(&self) -> Caller {
        self.queued.start().await
    }

    /// As [`Self::start`], with the start taken from the quota store. See [`Pacing::wait_in_fleet`].
    ///
    /// # Errors
    /// Why the poll may not start. It has to be queued again.
    pub async fn start_in_fleet(
        &self,
        session: &Session,
        request: Request<'_>,
    ) -> Result<Caller, Answer> {
        let start = self.queued.start_in_fleet(REPEATED, None, session, request);
        start.await
    }
}

/// Starts that leave the window together, with the latest of them.
#[derive(Debug)]
struct Starts {
    first: Instant,
    latest: Instant,
    counts: Counts,
}

/// A number for each kind of start: [`FIRST`] and [`REPEATED`].
type Counts = [u32; 2];

/// Attempts and first polls.
const FIRST: usize = 0;
/// Repeated polls.
const REPEATED: usize = 1;

#[derive(Debug)]
struct Lane(Mutex<State>);

#[derive(Debug)]
struct State {
    config: Config,
    /// How long a start counts against the rate.
    window: Duration,
    /// The minimum time between the latest start and a queued one of each kind.
    spacings: [Duration; 2],
    /// The state of the lane with a quota store.
    fleet: Option<Fleet>,
    /// Starts within this time share an entry.
    resolution: Duration,
    /// The starts in the window, oldest first.
    starts: VecDeque<Starts>,
    /// The sums of the numbers in `starts`.
    started: Counts,
    /// The queues of each kind.
    queues: [Queue; 2],
}

/// What is known from the quota store.
#[derive(Debug)]
struct Fleet {
    /// It has replied to the latest request.
    is_up: bool,
    /// While it has not, the rate is divided by this number.
    replicas: u32,
    /// When all starts without it, of any replica, have left the window.
    alone_until: Instant,
    /// The latest start of an attempt or first poll that the rate has delayed; `None` once their queue is empty.
    next_at: Option<Instant>,
    /// The time between the two latest of these starts, with those of other replicas in between.
    gap: Duration,
    /// The starts that the store has assigned to the heads of the queues. If a head leaves, the next one uses its start.
    assigned: [Option<Instant>; 2],
}

/// The waiters by caller. The first waiter of the first caller starts next.
type Queue = VecDeque<(Caller, VecDeque<Arc<Notify>>)>;

impl Lane {
    fn new(config: Config, spacings: [Duration; 2]) -> Self {
        Self(Mutex::new(State {
            config,
            window: config.period + JITTER.min(config.period / 20),
            spacings,
            resolution: match config.calls.get() > MAX_STARTS {
                true => config.period / MAX_STARTS,
                false => Duration::ZERO,
            },
            fleet: None,
            starts: VecDeque::new(),
            started: [0; 2],
            queues: Default::default(),
        }))
    }

    /// Joins the queue; `None` for an attempt that starts at once.
    fn enter(
        self: &Arc<Self>,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<Option<Queued>, Duration> {
        let mut state = self.state();
        let now = Instant::now();
        if state.queues[FIRST].is_empty() && state.room_at(FIRST, now) <= now {
            state.start(FIRST, now);
            return Ok(None);
        }
        let wait = state.wait_of(caller, now);
        if wait > deadline.remaining() {
            return Err(wait);
        }
        let waiter = Arc::new(Notify::new());
        state.queue(FIRST, caller, &waiter);
        let lane = Arc::clone(self);
        Ok(Some(Queued { lane, waiter }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether only the quota store applies the rate.
    fn follows_store(&self, now: Instant) -> bool {
        let fleet = self.fleet.as_ref();
        fleet.is_some_and(|fleet| fleet.is_up && fleet.alone_until <= now)
    }

    /// The number of starts in a window.
    fn calls(&self) -> u32 {
        let replicas = self.fleet.as_ref().map_or(1, |fleet| fleet.replicas);
        (self.config.calls.get() / replicas).max(1)
    }

    /// How long a start counts. With more replicas than starts, each replica has one start in a longer window.
    fn window(&self) -> Duration {
        let calls = self.config.calls.get();
        match &self.fleet {
            Some(Fleet { replicas, .. }) if *replicas > calls => self.window * *replicas / calls,
            _ => self.window,
        }
    }

    fn spacing(&self, kind: usize) -> Duration {
        let replicas = self.fleet.as_ref().map_or(1, |fleet| fleet.replicas);
        self.spacings[kind] * replicas
    }

    /// When the window has room for a start of this kind.
    fn room_at(&mut self, kind: usize, now: Instant) -> Instant {
        let window = self.window();
        while let Some(oldest) = self.starts.front()
            && now.saturating_duration_since(oldest.latest) >= window
        {
            self.started[FIRST] -= oldest.counts[FIRST];
            self.started[REPEATED] -= oldest.counts[REPEATED];
            self.starts.pop_front();
        }
        let mut room_at = now;
        if self.follows_store(now) {
            return room_at;
        }
        if let Some(oldest) = self.starts.front()
            && self.started.iter().sum::<u32>() >= self.calls()
        {
            room_at = oldest.latest + window;
        }
        if kind == FIRST && self.started[FIRST] >= self.limit_of_first() {
            let first = self.starts.iter().find(|starts| starts.counts[FIRST] > 0);
            room_at = first.map_or(room_at, |starts| room_at.max(starts.latest + window));
        }
        room_at
    }

    /// When the next queued start of this kind is possible.
    fn next_at(&mut self, kind: usize, now: Instant) -> Instant {
        let room_at = self.room_at(kind, now);
        match self.starts.back() {
            Some(newest) if !self.follows_store(now) => {
                room_at.max(newest.latest + self.spacing(kind))
            }
            _ => room_at,
        }
    }

    /// The number of attempts or first polls in a window.
    fn limit_of_first(&self) -> u32 {
        self.half_while_polls_repeat(self.calls())
    }

    fn half_while_polls_repeat(&self, calls: u32) -> u32 {
        match self.queues[REPEATED].is_empty() {
            true => calls,
            false => calls.div_ceil(2),
        }
    }

    fn start(&mut self, kind: usize, now: Instant) {
        self.started[kind] += 1;
        match self.starts.back_mut() {
            Some(newest) if now.saturating_duration_since(newest.first) < self.resolution => {
                newest.counts[kind] += 1;
                newest.latest = now;
            }
            _ => {
                let mut counts = [0; 2];
                counts[kind] = 1;
                self.starts.push_back(Starts {
                    first: now,
                    latest: now,
                    counts,
                });
            }
        }
    }

    /// Appends a waiter to the queue of a caller, unless it is there already.
    fn queue(&mut self, kind: usize, caller: Caller, waiter: &Arc<Notify>) {
        let queue = &mut self.queues[kind];
        match queue.iter_mut().find(|(known, _)| *known == caller) {
            Some((_, waiters)) if waiters.iter().any(|known| Arc::ptr_eq(known, waiter)) => {}
            Some((_, waiters)) => waiters.push_back(Arc::clone(waiter)),
            None => queue.push_back((caller, VecDeque::from([Arc::clone(waiter)]))),
        }
    }

    /// The kind of the next queued start, and when it is possible. The first kind wins a tie.
    fn next(&mut self, now: Instant) -> Option<(usize, Instant)> {
        let queued = [FIRST, REPEATED].map(|kind| match self.queues[kind].is_empty() {
            true => None,
            false => Some((kind, self.next_at(kind, now))),
        });
        queued.into_iter().flatten().min_by_key(|(_, at)| *at)
    }

    /// The waiter at the head of a queue.
    fn head(&self, kind: usize) -> Option<&Arc<Notify>> {
        let (_, waiters) = self.queues[kind].front()?;
        waiters.front()
    }

    /// Starts the head of a queue and moves its caller, which is returned, to the end of the queue.
    fn start_head(&mut self, kind: usize, now: Instant) -> Option<Caller> {
        self.start(kind, now);
        if let Some(fleet) = &mut self.fleet {
            fleet.assigned[kind] = None;
        }
        let (caller, waiters) = self.queues[kind].front_mut()?;
        let (caller, started) = (*caller, waiters.pop_front()?);
        self.queues[kind].rotate_left(1);
        // A poll may be queued under other callers, too.
        self.leave(&started);
        Some(caller)
    }

    /// Starts a waiter that is not the head of its queue, and returns its caller.
    fn start_waiter(&mut self, kind: usize, waiter: &Arc<Notify>, now: Instant) -> Option<Caller> {
        let is_own = |own: &Arc<Notify>| Arc::ptr_eq(own, waiter);
        let mut queue = self.queues[kind].iter();
        let (caller, _) = queue.find(|(_, waiters)| waiters.iter().any(is_own))?;
        let caller = *caller;
        self.start(kind, now);
        self.leave(waiter);
        Some(caller)
    }

    fn leave(&mut self, waiter: &Arc<Notify>) {
        for queue in &mut self.queues {
            queue.retain_mut(|(_, waiters)| {
                waiters.retain(|waiting| !Arc::ptr_eq(waiting, waiter));
                !waiters.is_empty()
            });
        }
        if let Some(fleet) = &mut self.fleet
            && self.queues[FIRST].is_empty()
        {
            fleet.next_at = None;
        }
        self.wake_next();
    }

    fn wake_next(&mut self) {
        if self.follows_store(Instant::now()) {
            let heads = [FIRST, REPEATED].map(|kind| self.head(kind));
            heads
                .into_iter()
                .flatten()
                .for_each(|head| head.notify_one());
            if self.is_free(Instant::now()) {
                let waiters = self.queues[FIRST].iter().flat_map(|(_, waiters)| waiters);
                waiters.take(MAX_ASKING).for_each(|it| it.notify_one());
            }
            return;
        }
        if let Some((kind, _)) = self.next(Instant::now())
            && let Some(head) = self.head(kind)
        {
            head.notify_one();
        }
    }

    /// How long another attempt of `caller` would wait if the queue stayed as it is.
    fn wait_of(&mut self, caller: Caller, now: Instant) -> Duration {
        let queue = &self.queues[FIRST];
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
        let waiting = self.queues[FIRST]
            .iter()
            .map(|(_, waiters)| waiters.len())
            .sum();
        self.start_after(waiting, now)
            .saturating_duration_since(now)
    }

    /// When an attempt with `before` others ahead of it would start.
    fn start_after(&mut self, before: usize, now: Instant) -> Instant {
        if self.follows_store(now) {
            let Some(Fleet {
                next_at: Some(at),
                gap,
                ..
            }) = self.fleet
            else {
                return now;
            };
            let before = u32::try_from(before).unwrap_or(u32::MAX);
            return at.max(now) + gap.saturating_mul(before);
        }
        let mut at = self.next_at(FIRST, now);
        let (calls, window) = (self.calls(), self.window());
        let limit = self.limit_of_first();
        // Below the whole rate, only starts of the same kind count.
        let count = |counts: &Counts| match limit < calls {
            true => counts[FIRST],
            false => counts.iter().sum(),
        };
        let mut free = limit.saturating_sub(count(&self.started));
        // The window has room now, or when a start leaves it; after all of them only the spacing counts.
        let mut leaving = self
            .starts
            .iter()
            .filter(|starts| count(&starts.counts) > 0);
        for position in 0..=before {
            if position > 0 {
                at += self.spacing(FIRST);
            }
            if free > 0 {
                free -= 1;
            } else if let Some(starts) = leaving.next() {
                at = at.max(starts.latest + window);
                free = count(&starts.counts) - 1;
            }
        }
        at
    }
}

/// A queued attempt or poll, which leaves the queue when dropped.
#[derive(Debug)]
struct Queued {
    lane: Arc<Lane>,
    waiter: Arc<Notify>,
}

impl Queued {
    /// Waits until this waiter is next and may start. Returns the caller under whom it was queued.
    async fn start(&self) -> Caller {
        loop {
            let wait_until = {
                let mut state = self.lane.state();
                let now = Instant::now();
                let next = state.next(now);
                let own = next.filter(|(kind, _)| {
                    state
                        .head(*kind)
                        .is_some_and(|head| Arc::ptr_eq(head, &self.waiter))
                });
                if let Some((kind, at)) = own
                    && at <= now
                    && let Some(caller) = state.start_head(kind, now)
                {
                    return caller;
                }
                if own.is_none() {
                    // The head may sleep only because this waiter was the head when it looked.
                    state.wake_next();
                }
                own.map(|(_, at)| at)
            };
            match wait_until {
                // Woken earlier if another one leaves or joins.
                Some(at) => tokio::select! {
                    () = sleep_until(at) => {}
                    () = self.waiter.notified() => {}
                },
                // `Notify` stores a wake-up that comes before this line.
                None => self.waiter.notified().await,
            }
        }
    }
}

impl Queued {
    /// Waits until this waiter is the head of its queue and has a start from the quota store. With `latest`, the start must not be later.
    ///
    /// # Errors
    /// Any reply of the store but [`Answer::Start`] and [`Answer::Unavailable`].
    async fn start_in_fleet(
        &self,
        kind: usize,
        latest: Option<Instant>,
        session: &Session,
        request: Request<'_>,
    ) -> Result<Caller, Answer> {
        loop {
            let is_head = self.due(kind).await;
            let assigned = match is_head {
                true => self.lane.state().assigned(kind, Instant::now()),
                false => None,
            };
            let at = match assigned {
                Some(at) => at,
                None => {
                    let mut slot = self.lane.state().slot(kind, latest);
                    if !is_head {
                        slot.longest = Duration::ZERO;
                    }
                    let answer = session.admit(request, slot).await;
                    let mut state = self.lane.state();
                    let now = Instant::now();
                    state.answered(kind, &answer, session, now);
                    match answer {
                        Answer::Start(wait) => now + wait,
                        Answer::Unavailable | Answer::Late(_) if !is_head => continue,
                        // The local rule applies now.
                        Answer::Unavailable if state.due_at(kind, now) > now => continue,
                        Answer::Unavailable => {
                            let leaves_at = now + state.window();
                            if let Some(fleet) = &mut state.fleet {
                                fleet.alone_until = leaves_at;
                            }
                            now
                        }
                        _ => return Err(answer),
                    }
                }
            };
            let wait = at.saturating_duration_since(Instant::now());
            if latest.is_some_and(|latest| at > latest) && !wait.is_zero() {
                return Err(Answer::Late(wait));
            }
            if assigned.is_some() || !wait.is_zero() {
                sleep_until(at).await;
                // There may be a throttle window, a rest or a result since the store has assigned the start.
                let answer = session.admit(request.again(), Slot::UNLIMITED).await;
                if !matches!(answer, Answer::Start(_) | Answer::Unavailable) {
                    return Err(answer);
                }
            }
            let (mut state, now) = (self.lane.state(), Instant::now());
            let started = match is_head {
                true => state.start_head(kind, now),
                false => state.start_waiter(kind, &self.waiter, now),
            };
            if let Some(caller) = started {
                return Ok(caller);
            }
        }
    }

    /// Waits until this waiter is the head of its queue, and until the local rule permits a start if it applies; or, with the result false,
    /// until it may ask the store for a start at once although it is not the head.
    async fn due(&self, kind: usize) -> bool {
        loop {
            let wait_until = {
                let mut state = self.lane.state();
                let now = Instant::now();
                let is_head = state
                    .head(kind)
                    .is_some_and(|head| Arc::ptr_eq(head, &self.waiter));
                if !is_head && kind == FIRST && state.is_free(now) {
                    return false;
                }
                is_head.then(|| state.due_at(kind, now))
            };
            match wait_until {
                Some(at) if at <= Instant::now() => return true,
                Some(at) => tokio::select! {
                    () = sleep_until(at) => {}
                    () = self.waiter.notified() => {}
                },
                None => self.waiter.notified().await,
            }
        }
    }
}

impl State {
    /// The start that the head of a queue asks the quota store for.
    fn slot(&mut self, kind: usize, latest: Option<Instant>) -> Slot {
        let calls = self.config.calls.get();
        // The store keeps every start, so a large number in a window becomes a smaller one in a part of it.
        let parts = calls.div_ceil(MAX_STARTS);
        let calls = calls / parts;
        let period = self.config.period / parts;
        Slot {
            calls,
            window: period + JITTER.min(period / 20),
            spacing: self.spacings[kind],
            // First polls have no spacing, and attempts have no other kind.
            limit_of_first: self.spacings[kind]
                .is_zero()
                .then(|| self.half_while_polls_repeat(calls)),
            has_waited: kind == REPEATED
                || self
                    .fleet
                    .as_ref()
                    .is_some_and(|fleet| fleet.next_at.is_some()),
            longest: latest.map_or(LONGEST_POLL_WAIT, |latest| {
                latest.saturating_duration_since(Instant::now())
            }),
        }
    }

    /// The start that the store has assigned to a head which has left, unless it is over: the store counts it at its time.
    fn assigned(&mut self, kind: usize, now: Instant) -> Option<Instant> {
        let jitter = self.window - self.config.period;
        let assigned = &mut self.fleet.as_mut()?.assigned[kind];
        *assigned = assigned.filter(|at| now <= *at + jitter);
        *assigned
    }

    /// Whether no attempt or first poll waits for the rate. Then they need not wait for each other's replies of the store.
    fn is_free(&self, now: Instant) -> bool {
        self.fleet.as_ref().is_none_or(|fleet| {
            let is_delayed = fleet.next_at.is_some() || fleet.assigned[FIRST].is_some();
            fleet.is_up && fleet.alone_until <= now && !is_delayed
        })
    }

    /// Whether starts of this kind wait for the rate, and not only for the replies of the store.
    fn has_waited(&self, kind: usize) -> bool {
        let fleet = self.fleet.as_ref();
        kind == REPEATED || fleet.is_some_and(|fleet| fleet.next_at.is_some())
    }

    /// When the local rule permits the start of the head of this queue.
    fn due_at(&mut self, kind: usize, now: Instant) -> Instant {
        let at = match self.has_waited(kind) {
            true => self.next_at(kind, now),
            false => self.room_at(kind, now),
        };
        if at > now
            && kind == FIRST
            && let Some(fleet) = &mut self.fleet
        {
            fleet.next_at = Some(at);
        }
        at
    }

    /// Takes over what a reply shows about the quota store.
    fn answered(&mut self, kind: usize, answer: &Answer, session: &Session, now: Instant) {
        let replicas = session.replicas();
        // Other replicas may have made starts that the store has not seen.
        let alone_until = session.back_since().map(|since| since + self.window());
        let fleet = self.fleet.get_or_insert(Fleet {
            is_up: true,
            replicas,
            alone_until: now,
            next_at: None,
            gap: self.spacings[FIRST],
            assigned: [None; 2],
        });
        fleet.is_up = *answer != Answer::Unavailable;
        fleet.replicas = replicas;
        fleet.alone_until = alone_until.map_or(fleet.alone_until, |at| at.max(fleet.alone_until));
        if kind == FIRST {
            match answer {
                // The rate delays starts from now on.
                Answer::Late(wait) => _ = fleet.next_at.get_or_insert(now + *wait),
                // The delays between starts are too short for them to wait for each other.
                Answer::Start(Duration::ZERO) if self.spacings[FIRST] < JITTER => {
                    fleet.next_at = None;
                }
                _ => {}
            }
        }
        if let Answer::Start(wait) = answer
            && !wait.is_zero()
        {
            let at = now + *wait;
            fleet.assigned[kind] = Some(at);
            if kind == REPEATED {
                return;
            }
            let gap = fleet
                .next_at
                .map(|previous| at.saturating_duration_since(previous));
            fleet.gap = gap.unwrap_or_default().max(self.spacings[FIRST]);
            fleet.next_at = Some(at);
        }
    }
}

impl Drop for Queued {
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

    fn polls(calls: u32, period: Duration) -> Arc<Pacing> {
        Arc::new(Pacing::for_polls(Config {
            calls: NonZeroU32::new(calls).unwrap(),
            period,
        }))
    }

    /// Queues a repeated poll for each list of callers. Each returns its start in seconds from now, and the caller that it used.
    async fn repeat(pacing: &Arc<Pacing>, callers: &[&[Caller]]) -> JoinSet<(u64, Caller)> {
        let begun = Instant::now();
        let mut polls = JoinSet::new();
        for callers in callers {
            let poll = pacing.queue_repeated(RDS, callers);
            polls.spawn(async move {
                let caller = poll.start().await;
                (begun.elapsed().as_secs(), caller)
            });
            yield_now().await;
        }
        polls
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_polls_start_a_spacing_apart_and_round_robin_among_callers() {
        let pacing = polls(3, Duration::from_secs(30));

        let polls = repeat(&pacing, &[&[ANN], &[ANN], &[ANN], &[BOB], &[ANN, BOB]]).await;

        let mut starts = polls.join_all().await;
        starts.sort_unstable_by_key(|(at, _)| *at);
        assert_eq!(
            starts,
            [(0, ANN), (10, ANN), (20, BOB), (30, ANN), (40, BOB)]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_poll_keeps_its_place_when_callers_join() {
        let pacing = polls(1, Duration::from_secs(10));
        let mut first = repeat(&pacing, &[&[ANN]]).await;
        first.join_next().await;
        let shared = pacing.queue_repeated(RDS, &[ANN]);
        let mut others = repeat(&pacing, &[&[ANN], &[ANN]]).await;
        let begun = Instant::now();

        for number in 10..20 {
            shared.add(&[ANN, Caller::Connection(number)]);
        }

        assert_eq!(shared.start().await, ANN);
        assert_eq!(begun.elapsed().as_secs(), 10);
        assert_eq!(others.join_next().await.unwrap().unwrap().0, 20);
        assert_eq!(others.join_next().await.unwrap().unwrap().0, 30);
        let lane = pacing.lanes.get(&RDS).expect("a lane");
        assert!(lane.state().queues.iter().all(VecDeque::is_empty));
    }

    #[tokio::test(start_paused = true)]
    async fn first_polls_start_at_once_before_repeated_ones() {
        let pacing = polls(6, Duration::from_secs(60));
        let mut repeated = repeat(&pacing, &[&[ANN], &[ANN]]).await;
        repeated.join_next().await;
        tokio::time::advance(Duration::from_secs(1)).await;

        for caller in [BOB, BOB, BOB] {
            let first = pacing.wait(RDS, caller, in_seconds(0)).await;
            first.expect("half of the window");
        }
        let fourth = pacing.wait(RDS, BOB, in_seconds(10)).await;

        let wait = fourth.expect_err("the other half is for repeated polls");
        assert_eq!(wait.as_secs(), 60);
        let (at, _) = repeated.join_next().await.unwrap().unwrap();
        assert_eq!(at, 11);
    }

    #[tokio::test(start_paused = true)]
    async fn ever_new_first_polls_of_a_caller_leave_repeated_polls_their_half() {
        let pacing = polls(30, Duration::from_secs(60));
        let greedy = Arc::clone(&pacing);
        let _greedy = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                let _ = greedy.wait(RDS, BOB, in_seconds(10)).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }));
        tokio::time::sleep(Duration::from_secs(90)).await;
        let begun = Instant::now();

        for _ in 0..60 {
            pacing.queue_repeated(RDS, &[ANN]).start().await;
        }

        // Fifteen a minute, after at most a minute in which the window is still full of first polls.
        assert!(
            begun.elapsed() <= Duration::from_secs(5 * 60),
            "{:?}",
            begun.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_became_second_wakes_the_first() {
        let pacing = polls(2, Duration::from_secs(10));
        repeat(&pacing, &[&[ANN]]).await.join_all().await;
        tokio::time::advance(Duration::from_secs(5)).await;
        start(&pacing, &[ANN]).await.join_all().await;
        let mut repeated = repeat(&pacing, &[&[ANN]]).await;
        let mut first = start(&pacing, &[BOB]).await;

        // Both could have started by now.
        tokio::time::advance(Duration::from_secs(20)).await;

        let begun = Instant::now();
        first
            .join_next()
            .await
            .expect("a poll")
            .expect("no panic")
            .1
            .expect("a start");
        assert_eq!(Instant::now(), begun);
        repeated
            .join_next()
            .await
            .expect("a poll")
            .expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn queued_first_polls_start_when_the_window_has_room_without_a_spacing() {
        let pacing = polls(3, Duration::from_secs(9));
        start(&pacing, &[ANN; 3]).await.join_all().await;

        let starts = start(&pacing, &[ANN; 3]).await;

        assert_eq!(times(starts).await, [9, 9, 9]);
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
