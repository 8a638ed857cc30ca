//! The window and the queues of one credential.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

use super::{Config, JITTER, MAX_ASKING, MAX_STARTS, fleet::Fleet, queued::Queued};
use crate::{caller::Caller, deadline::Deadline};

/// Starts that leave the window together, with the latest of them.
#[derive(Debug)]
pub(super) struct Starts {
    pub(super) first: Instant,
    pub(super) latest: Instant,
    pub(super) counts: Counts,
}

/// A number for each kind of start: [`FIRST`] and [`REPEATED`].
pub(super) type Counts = [u32; 2];

/// Attempts and first polls.
pub(super) const FIRST: usize = 0;
/// Repeated polls.
pub(super) const REPEATED: usize = 1;

#[derive(Debug)]
pub(super) struct Lane(Mutex<State>);

#[derive(Debug)]
pub(super) struct State {
    pub(super) config: Config,
    /// How long a start counts against the rate.
    pub(super) window: Duration,
    /// The minimum time between the latest start and a queued one of each kind.
    pub(super) spacings: [Duration; 2],
    /// The state of the lane with a quota store.
    pub(super) fleet: Option<Fleet>,
    /// Starts within this time share an entry.
    pub(super) resolution: Duration,
    /// The starts in the window, oldest first.
    pub(super) starts: VecDeque<Starts>,
    /// The sums of the numbers in `starts`.
    pub(super) started: Counts,
    /// The queues of each kind.
    pub(super) queues: [Queue; 2],
}

/// The waiters by caller. The first waiter of the first caller starts next.
pub(super) type Queue = VecDeque<(Caller, VecDeque<Arc<Notify>>)>;

impl Lane {
    pub(super) fn new(config: Config, spacings: [Duration; 2]) -> Self {
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
    pub(super) fn enter(
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
        state.queue(FIRST, &[caller], &waiter);
        Ok(Some(Queued {
            lane: Arc::clone(self),
            waiter,
            kind: FIRST,
            latest: None,
        }))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

impl State {
    /// Whether only the quota store applies the rate.
    pub(super) fn follows_store(&self, now: Instant) -> bool {
        let fleet = self.fleet.as_ref();
        fleet.is_some_and(|fleet| fleet.is_up && fleet.alone_until <= now)
    }

    /// The number of starts in a window.
    pub(super) fn calls(&self) -> u32 {
        let replicas = self.fleet.as_ref().map_or(1, |fleet| fleet.replicas);
        (self.config.calls.get() / replicas).max(1)
    }

    /// How long a start counts. With more replicas than starts, each replica has one start in a longer window.
    pub(super) fn window(&self) -> Duration {
        let calls = self.config.calls.get();
        match &self.fleet {
            Some(Fleet { replicas, .. }) if *replicas > calls => self.window * *replicas / calls,
            _ => self.window,
        }
    }

    pub(super) fn spacing(&self, kind: usize) -> Duration {
        let replicas = self.fleet.as_ref().map_or(1, |fleet| fleet.replicas);
        self.spacings[kind] * replicas
    }

    /// When the window has room for a start of this kind.
    pub(super) fn room_at(&mut self, kind: usize, now: Instant) -> Instant {
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
    pub(super) fn next_at(&mut self, kind: usize, now: Instant) -> Instant {
        let room_at = self.room_at(kind, now);
        match self.starts.back() {
            Some(newest) if !self.follows_store(now) => {
                room_at.max(newest.latest + self.spacing(kind))
            }
            _ => room_at,
        }
    }

    /// The number of attempts or first polls in a window.
    pub(super) fn limit_of_first(&self) -> u32 {
        self.half_while_polls_repeat(self.calls())
    }

    pub(super) fn half_while_polls_repeat(&self, calls: u32) -> u32 {
        match self.queues[REPEATED].is_empty() {
            true => calls,
            false => calls.div_ceil(2),
        }
    }

    pub(super) fn start(&mut self, kind: usize, now: Instant) {
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

    /// Removes the start of this time, which has not led to an attempt or poll.
    pub(super) fn withdraw(&mut self, kind: usize, at: Instant) {
        let is_same = |starts: &Starts| {
            starts.counts[kind] > 0 && (starts.first..=starts.latest).contains(&at)
        };
        if let Some(index) = self.starts.iter().rposition(is_same) {
            self.started[kind] -= 1;
            self.starts[index].counts[kind] -= 1;
            if self.starts[index].counts == [0; 2] {
                self.starts.remove(index);
            }
        }
    }

    /// Appends a waiter to the queues of callers where it is not yet.
    pub(super) fn queue(&mut self, kind: usize, callers: &[Caller], waiter: &Arc<Notify>) {
        let queue = &mut self.queues[kind];
        for caller in callers {
            match queue.iter_mut().find(|(known, _)| known == caller) {
                Some((_, waiters)) if waiters.iter().any(|known| Arc::ptr_eq(known, waiter)) => {}
                Some((_, waiters)) => waiters.push_back(Arc::clone(waiter)),
                None => queue.push_back((*caller, VecDeque::from([Arc::clone(waiter)]))),
            }
        }
    }

    pub(super) fn is_queued(&self, kind: usize, waiter: &Arc<Notify>) -> bool {
        let mut waiters = self.queues[kind].iter().flat_map(|(_, waiters)| waiters);
        waiters.any(|known| Arc::ptr_eq(known, waiter))
    }

    /// The kind of the next queued start, and when it is possible. The first kind wins a tie.
    pub(super) fn next(&mut self, now: Instant) -> Option<(usize, Instant)> {
        let queued = [FIRST, REPEATED].map(|kind| match self.queues[kind].is_empty() {
            true => None,
            false => Some((kind, self.next_at(kind, now))),
        });
        queued.into_iter().flatten().min_by_key(|(_, at)| *at)
    }

    /// The waiter at the head of a queue.
    pub(super) fn head(&self, kind: usize) -> Option<&Arc<Notify>> {
        let (_, waiters) = self.queues[kind].front()?;
        waiters.front()
    }

    /// Starts the head of a queue and moves its caller, which is returned, to the end of the queue.
    pub(super) fn start_head(&mut self, kind: usize, now: Instant) -> Option<Caller> {
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
    pub(super) fn start_waiter(
        &mut self,
        kind: usize,
        waiter: &Arc<Notify>,
        now: Instant,
    ) -> Option<Caller> {
        let is_own = |own: &Arc<Notify>| Arc::ptr_eq(own, waiter);
        let mut queue = self.queues[kind].iter();
        let (caller, _) = queue.find(|(_, waiters)| waiters.iter().any(is_own))?;
        let caller = *caller;
        self.start(kind, now);
        self.leave(waiter);
        Some(caller)
    }

    pub(super) fn leave(&mut self, waiter: &Arc<Notify>) {
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

    pub(super) fn wake_next(&mut self) {
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
    pub(super) fn wait_of(&mut self, caller: Caller, now: Instant) -> Duration {
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
    pub(super) fn wait_at_end(&mut self) -> Duration {
        let now = Instant::now();
        let waiting = self.queues[FIRST]
            .iter()
            .map(|(_, waiters)| waiters.len())
            .sum();
        self.start_after(waiting, now)
            .saturating_duration_since(now)
    }

    /// When an attempt with `before` others ahead of it would start.
    pub(super) fn start_after(&mut self, before: usize, now: Instant) -> Instant {
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
