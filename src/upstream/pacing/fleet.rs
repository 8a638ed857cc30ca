//! The start of a queued attempt or poll with a quota store, which applies the rate to all replicas.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{
    JITTER, LONGEST_POLL_WAIT, MAX_STARTS,
    lane::{FIRST, REPEATED, State},
    queued::Queued,
};
use crate::{
    caller::Caller,
    quota_store::{Answer, Request, Session, Slot},
};

/// What the replies of the quota store have shown.
#[derive(Debug)]
pub(super) struct Fleet {
    /// The store has replied to the latest request.
    pub(super) is_up: bool,
    /// The local rule divides the rate by this number.
    pub(super) replicas: u32,
    /// Until then the local rule applies, even if the store is up: the window holds starts, of any replica, that the store has not seen.
    pub(super) alone_until: Instant,
    /// The latest start of an attempt or first poll that the rate has delayed; `None` once their queue is empty.
    pub(super) next_at: Option<Instant>,
    /// The time between the two latest of these starts, with those of other replicas in between.
    pub(super) gap: Duration,
    /// The starts that the store has assigned to the heads of the queues. If a head leaves, the next one uses its start.
    pub(super) assigned: [Option<Instant>; 2],
}

/// How a waiter may start.
enum Due<'a> {
    /// The local rule applies and has started it.
    Started(LocalStart<'a>),
    /// As the head of its queue, at the time that the store assigns.
    Head,
    /// At once if the store permits it, although it is not the head.
    AtOnce,
}

/// A start that the local rule has counted. Dropping it withdraws it, unless it has led to an attempt or poll.
pub(super) struct LocalStart<'a> {
    pub(super) queued: &'a Queued,
    pub(super) caller: Caller,
    /// Whether it had to wait for the rate.
    pub(super) has_waited: bool,
    /// `None` once it has led to an attempt or poll.
    pub(super) at: Option<Instant>,
}

impl LocalStart<'_> {
    /// Counts the start at this time, and returns the caller under whom it is.
    pub(super) fn begin(mut self, now: Instant) -> Caller {
        if let Some(at) = self.at.take() {
            let mut state = self.queued.lane.state();
            state.withdraw(self.queued.kind, at);
            state.start(self.queued.kind, now);
        }
        self.caller
    }
}

impl Drop for LocalStart<'_> {
    fn drop(&mut self) {
        if let Some(at) = self.at {
            self.queued.lane.state().withdraw(self.queued.kind, at);
        }
    }
}

impl Queued {
    /// As [`Self::start`], with the start taken from the quota store. Dropping the future may leave the queue.
    ///
    /// While this replica keeps to its share, the local rule decides when the waiter leaves the queue, and the store counts the start, delays
    /// it further, or rejects it. So waiters within the share do not wait for each other's replies of the store.
    ///
    /// # Errors
    /// Any reply of the store but [`Answer::Start`] and [`Answer::Unavailable`].
    pub async fn start_in_fleet(
        &self,
        session: &Session,
        request: Request<'_>,
    ) -> Result<Caller, Answer> {
        let (kind, latest) = (self.kind, self.latest);
        loop {
            let due = self.due().await;
            let assigned = match due {
                Due::Head => self.lane.state().assigned(kind, Instant::now()),
                _ => None,
            };
            let at = match assigned {
                Some(at) => at,
                None => {
                    let mut slot = self.lane.state().slot(kind, latest);
                    match &due {
                        Due::Started(start) => slot.has_waited |= start.has_waited,
                        Due::Head => {}
                        Due::AtOnce => slot.longest = Duration::ZERO,
                    }
                    let answer = session.admit(request, slot).await;
                    let mut state = self.lane.state();
                    let now = Instant::now();
                    state.answered(kind, &answer, session, now);
                    match (&due, answer) {
                        (Due::Head, Answer::Start(wait)) => state.assign(kind, now + wait),
                        (_, Answer::Start(wait)) => now + wait,
                        (Due::Started(..), Answer::Unavailable) => {
                            state.keep_to_share(now);
                            now
                        }
                        // The local rule applies now.
                        (_, Answer::Unavailable) => continue,
                        (Due::AtOnce, Answer::Late(_)) => continue,
                        (_, answer) => return Err(answer),
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
                let again = match assigned {
                    // The start was assigned to a waiter that has left the queue, so the store does not know the probe of this one.
                    Some(_) => request,
                    None => request.again(),
                };
                let answer = session.admit(again, Slot::UNLIMITED).await;
                if !matches!(answer, Answer::Start(_) | Answer::Unavailable) {
                    return Err(answer);
                }
            }
            let now = Instant::now();
            let started = match due {
                Due::Started(start) => Some(start.begin(now)),
                Due::Head => self.lane.state().start_head(kind, now),
                Due::AtOnce => self.lane.state().start_waiter(kind, &self.waiter, now),
            };
            if let Some(caller) = started {
                return Ok(caller);
            }
        }
    }

    /// Waits until this waiter may start, or may ask the store for a start.
    async fn due(&self) -> Due<'_> {
        let kind = self.kind;
        loop {
            let wait_until = {
                let mut state = self.lane.state();
                let now = Instant::now();
                let is_head = state
                    .head(kind)
                    .is_some_and(|head| Arc::ptr_eq(head, &self.waiter));
                if !is_head && kind == FIRST && state.is_free(now) {
                    return Due::AtOnce;
                }
                let at = is_head.then(|| state.due_at(kind, now));
                if at.is_some_and(|at| at <= now) {
                    if state.fleet.is_none() || state.follows_store(now) {
                        return Due::Head;
                    }
                    let has_waited = state.has_waited(kind);
                    if let Some(caller) = state.start_head(kind, now) {
                        return Due::Started(LocalStart {
                            queued: self,
                            caller,
                            has_waited,
                            at: Some(now),
                        });
                    }
                }
                at
            };
            match wait_until {
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
    pub(super) fn slot(&mut self, kind: usize, latest: Option<Instant>) -> Slot {
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
            has_waited: self.has_waited(kind),
            longest: latest.map_or(LONGEST_POLL_WAIT, |latest| {
                latest.saturating_duration_since(Instant::now())
            }),
        }
    }

    /// Records the start that the store has assigned to the head of a queue.
    fn assign(&mut self, kind: usize, at: Instant) -> Instant {
        if let Some(fleet) = &mut self.fleet {
            fleet.assigned[kind] = Some(at);
        }
        at
    }

    /// Another replica may take the room of a start that the store has not seen, so the local rule applies until it has left the window.
    fn keep_to_share(&mut self, now: Instant) {
        let leaves_at = now + self.window();
        if let Some(fleet) = &mut self.fleet {
            fleet.alone_until = leaves_at;
        }
    }

    /// The start that the store has assigned to a head which has left, unless it is over: the store counts it at its time.
    pub(super) fn assigned(&mut self, kind: usize, now: Instant) -> Option<Instant> {
        let jitter = self.window - self.config.period;
        let assigned = &mut self.fleet.as_mut()?.assigned[kind];
        *assigned = assigned.filter(|at| now <= *at + jitter);
        *assigned
    }

    /// Whether no attempt or first poll waits for the rate. Then they need not wait for each other's replies of the store.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        self.fleet.as_ref().is_none_or(|fleet| {
            let is_delayed = fleet.next_at.is_some() || fleet.assigned[FIRST].is_some();
            self.follows_store(now) && !is_delayed
        })
    }

    /// Whether starts of this kind wait for the rate, and not only for the replies of the store.
    pub(super) fn has_waited(&self, kind: usize) -> bool {
        let fleet = self.fleet.as_ref();
        kind == REPEATED || fleet.is_some_and(|fleet| fleet.next_at.is_some())
    }

    /// When the local rule permits the start of the head of this queue.
    pub(super) fn due_at(&mut self, kind: usize, now: Instant) -> Instant {
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
    pub(super) fn answered(
        &mut self,
        kind: usize,
        answer: &Answer,
        session: &Session,
        now: Instant,
    ) {
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
            && kind == FIRST
        {
            let at = now + *wait;
            let gap = fleet
                .next_at
                .map(|previous| at.saturating_duration_since(previous));
            fleet.gap = gap.unwrap_or_default().max(self.spacings[FIRST]);
            fleet.next_at = Some(at);
        }
    }
}
