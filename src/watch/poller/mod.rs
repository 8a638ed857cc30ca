//! The poller of one watched task: it polls while the task has watchers, and ends when the task is over or its watches fail.

use std::{
    future::pending,
    mem,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tonic::Code;

use super::{Hub, MAX_FORMER_ETAGS, WatchedTask, snapshot::Snapshot};
use crate::{
    caller::Caller,
    coalescer::Lookup,
    credentials::{self, Auth, Owner},
    deadline::{Deadline, Passed},
    error::{Error, FailedLookup},
    lookup::{Lookups, Origin, into_task, task_name},
    quota_store::{Answer, Request, Session, Slot, TaskName},
    reason::Reason,
    status::Failure,
    telemetry::{
        Facts, Progress,
        metrics::{Counted, PollOutcome},
    },
    upstream::{self, Queued},
};

/// The longest wait of a first poll for the rate; one that would wait longer fails at once.
const MAX_FIRST_WAIT: Duration = Duration::from_secs(10);

/// The span of time over which first polls for resumed watches are spread.
const RESUME_SPREAD: Duration = Duration::from_secs(5);

/// How long transient errors keep watches open. Then the watches end with the latest error.
const MAX_STALE: Duration = Duration::from_secs(5 * 60);

/// While nothing changes, each pause is longer than the previous one by this factor, up to [`MAX_GROWTH`] times the interval.
const GROWTH: f64 = 1.5;
const MAX_GROWTH: f64 = 3.0;

/// The longest random addition to a pause, as a part of it: tasks that are first watched at the same moment do not stay in step.
const JITTER: f64 = 0.2;

/// The pauses between two looks while another replica polls the task.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// Two results whose times differ by less may be the same.
const SAME_RESULT: Duration = Duration::from_millis(50);

pub(super) struct Poller {
    hub: Arc<Hub>,
    task: Arc<WatchedTask>,
    lookups: Lookups,
    _counted: Counted,
    /// The pause after the next unchanged poll, as a multiple of the interval.
    growth: f64,
    /// When the latest poll began.
    asked_at: Option<Instant>,
    /// The latest pause. With a quota store, a result of another replica within that pause counts as the next poll.
    latest_pause: Duration,
    /// When RDS returned the latest result.
    result_at: Option<Instant>,
    /// RDS has replied about the task, also with an error that means an unknown task.
    has_reply: bool,
    /// Replies in a row that the task is unknown.
    unknown: u32,
    /// The latest reply called the task completed although one of its parts was not, so it was not published.
    is_withheld: bool,
    /// Since when polls have failed with transient errors, and the latest of them.
    failing: Option<(Instant, Error)>,
}

/// A task in the quota store, for one poll. Dropping it ends the lease of the poll.
struct InFleet {
    session: Session,
    task: TaskName,
}

impl Drop for InFleet {
    fn drop(&mut self) {
        self.session.release_poll(&self.task);
    }
}

/// When and how the result of a poll arrived.
struct Arrival {
    at: SystemTime,
    asked_at: Instant,
    progress: Arc<Progress>,
}

/// What follows a poll.
enum Next {
    /// Another poll after this pause.
    Pause(Duration),
    /// The task is over, or its watches fail.
    End(Result<(), Error>),
}

impl Poller {
    pub(super) fn new(hub: Arc<Hub>, task: Arc<WatchedTask>, lookups: Lookups) -> Self {
        Self {
            _counted: Counted::new(&hub.metrics.watched_tasks),
            hub,
            task,
            lookups,
            growth: 1.0,
            asked_at: None,
            latest_pause: Duration::ZERO,
            result_at: None,
            has_reply: false,
            unknown: 0,
            is_withheld: false,
            failing: None,
        }
    }

    pub(super) async fn run(mut self) {
        self.spread_resumed().await;
        let mut pause = Duration::ZERO;
        loop {
            let stale_at = self.failing.as_ref().map(|(since, _)| *since + MAX_STALE);
            let next = self.pause_and_poll(pause);
            let next = match stale_at {
                Some(at) => timeout_at(at, next).await,
                None => Ok(next.await),
            };
            let next = next.unwrap_or_else(|_| {
                self.task
                    .observations
                    .send_modify(|observation| observation.is_stale = true);
                let stale = self.failing.take();
                Next::End(Err(stale.map_or(Error::Internal, |(_, error)| error)))
            });
            match next {
                Next::Pause(next) => pause = next,
                Next::End(end) => return self.end(end),
            }
            if pause.is_zero() && self.hub.remove_unwatched(&self.task) {
                return;
            }
        }
    }

    /// Pauses and polls. The pause is zero if the task has lost its watchers meanwhile.
    async fn pause_and_poll(&mut self, pause: Duration) -> Next {
        self.pause(pause).await;
        self.latest_pause = pause;
        let in_fleet = self.in_fleet().await;
        let turn = match &in_fleet {
            Some(in_fleet) => self.wait_in_fleet(in_fleet).await,
            None => self.wait_for_rate().await,
        };
        match turn {
            Some(Ok(caller)) => self.poll(caller).await,
            Some(Err(retry_after)) => Next::End(Err(self.throttled(retry_after))),
            None => Next::Pause(Duration::ZERO),
        }
    }

    /// Waits for a random moment if all watchers resume, until one joins that does not.
    async fn spread_resumed(&self) {
        let spread = sleep(RESUME_SPREAD.mul_f64(fastrand::f64()));
        let urgent = async {
            while !self.task.watchers.lock().is_urgent {
                self.task.joined.notified().await;
            }
        };
        tokio::select! {
            () = spread => {}
            () = urgent => {}
            () = self.task.observations.closed() => {}
        }
    }

    /// The task in the quota store, if there is a store and a credential.
    async fn in_fleet(&self) -> Option<InFleet> {
        let store = self.lookups.store.as_ref()?;
        let caller = *self.task.callers().first()?;
        let auth = self.task.watchers.lock().auth.clone();
        let deadline = Deadline::after(self.hub.poll_timeout);
        let auth = match auth {
            Some(auth) => auth,
            None => self.own_credential(caller, deadline).await.ok()?,
        };
        let identity = self.lookups.credentials.shared_identity(&auth);
        let session = store.session(&identity, deadline);
        let task = task_name(&session, &self.task.key.query);
        Some(InFleet { session, task })
    }

    /// The greatest age of a result that counts as this poll. Never one that the poller has used already.
    fn max_age(&self) -> Duration {
        let max_age = self.hub.interval.max(self.latest_pause);
        // The same result looks a little younger if the store replies more slowly.
        let margin = SAME_RESULT.min(self.hub.interval / 2);
        self.result_at.map_or(max_age, |at| {
            max_age.min(at.elapsed().saturating_sub(margin))
        })
    }

    /// As [`Self::wait_for_rate`] for the rate of all replicas, until no other replica polls the task.
    async fn wait_in_fleet(&self, in_fleet: &InFleet) -> Option<Result<Caller, Duration>> {
        let identity = self.task.key.identity;
        let latest = Deadline::after(MAX_FIRST_WAIT);
        let start = async {
            let mut pause = FIRST_LOOK;
            loop {
                let callers = self.task.callers();
                let Some(caller) = callers.first().copied() else {
                    return std::future::pending().await;
                };
                let InFleet { session, task } = in_fleet;
                let request = Request::Poll {
                    task,
                    max_age: self.max_age(),
                };
                let answer = match &self.hub.rate {
                    None => session.admit(request, Slot::UNLIMITED).await,
                    Some(rate) if !self.has_reply => {
                        let start = rate.wait_in_fleet(identity, caller, latest, session, request);
                        start.await
                    }
                    Some(rate) => {
                        let poll = rate.queue_repeated(identity, &callers);
                        let start = poll.start_in_fleet(session, request);
                        match self.start_repeated(&poll, start).await {
                            Ok(caller) => return Ok(caller),
                            Err(answer) => answer,
                        }
                    }
                };
                match answer {
                    Answer::Late(wait) if !self.has_reply => return Err(wait),
                    Answer::Late(_) | Answer::Busy => {}
                    _ => return Ok(caller),
                }
                sleep(pause.mul_f64(1.0 + JITTER * fastrand::f64())).await;
                pause = (pause * 2).min(LONGEST_LOOK);
            }
        };
        tokio::select! {
            biased;
            start = start => Some(start),
            () = self.task.observations.closed() => None,
        }
    }

    /// Waits for the start of a queued poll, and queues it under the callers that join meanwhile.
    async fn start_repeated<T>(&self, poll: &Queued, start: impl Future<Output = T>) -> T {
        let mut start = std::pin::pin!(start);
        loop {
            tokio::select! {
                biased;
                started = &mut start => return started,
                // A caller that joins may be next before the others.
                () = self.task.joined.notified() => poll.add(&self.task.callers()),
            }
        }
    }

    /// Waits until the rate allows a poll, and returns the caller whose share it uses; `None` once the task has no watchers.
    ///
    /// # Errors
    /// The necessary wait, if it is too long for a first poll.
    async fn wait_for_rate(&self) -> Option<Result<Caller, Duration>> {
        let identity = self.task.key.identity;
        let callers = self.task.callers();
        let caller = *callers.first()?;
        let Some(rate) = &self.hub.rate else {
            return Some(Ok(caller));
        };
        let start = async {
            if !self.has_reply {
                let latest = Deadline::after(MAX_FIRST_WAIT);
                let start = rate.wait(identity, caller, latest).await;
                return start.map(|()| caller);
            }
            let poll = rate.queue_repeated(identity, &callers);
            Ok(self.start_repeated(&poll, poll.start()).await)
        };
        tokio::select! {
            biased;
            start = start => Some(start),
            () = self.task.observations.closed() => None,
        }
    }

    /// Polls once on behalf of `caller`. The end of the last watch ends the first poll, as the end of a call ends its lookup, and a poll with
    /// a caller's token. Another poll continues, because the next watcher can use its result.
    async fn poll(&mut self, caller: Caller) -> Next {
        let (auth, span) = {
            let watchers = self.task.watchers.lock();
            if watchers.callers.is_empty() {
                return Next::Pause(Duration::ZERO);
            }
            (watchers.auth.clone(), watchers.span.clone())
        };
        let ends_with_watches = auth.is_some() || !self.has_reply;
        let span = span.map(|span| span.poll());
        let started = Instant::now();
        self.asked_at = Some(started);
        let deadline = Deadline::after(self.hub.poll_timeout);
        let origin = Origin {
            caller,
            deadline,
            span: span.as_ref(),
            max_age: Some(match self.lookups.store {
                Some(_) => self.max_age(),
                None => self.hub.interval,
            }),
        };
        let lookup = async {
            let auth = match auth {
                Some(auth) => auth,
                None => self.own_credential(caller, deadline).await?,
            };
            let lookup = self.lookups.look_up(&self.task.key, &auth, origin, |_| {});
            // A call returns at its deadline, and so does a poll.
            match deadline.bound(lookup).await {
                Ok(lookup) => Ok((lookup, auth.owner())),
                Err(Passed) => {
                    let error = upstream::Error::DeadlineExceeded;
                    Err(self.failed(error, auth.owner()))
                }
            }
        };
        let result = tokio::select! {
            biased;
            result = lookup => result,
            () = self.task.observations.closed(), if ends_with_watches => {
                return Next::Pause(Duration::ZERO);
            }
        };
        let mut arrival = Arrival::now(started);
        let result = result.and_then(|(lookup, owner)| {
            arrival = Arrival::of(&lookup, started);
            self.result_at = Some(lookup.finished_at);
            let task = into_task(lookup, &self.task.key, owner)?;
            let too_large = || self.failed(upstream::Error::TooLarge, owner);
            Snapshot::new(&task).ok_or_else(too_large)
        });
        let reason = |error| Failure::from_error(error).reason;
        let reason = result.as_ref().err().map(reason);
        if let Some(span) = span {
            span.end_poll(started.elapsed(), reason);
        }
        let next = match result {
            Ok(snapshot) => self.observe(snapshot, arrival),
            Err(error) if reason == Some(Reason::TaskNotFound) => {
                self.observe_unknown(error, arrival)
            }
            Err(error) => self.observe_error(error, reason == Some(Reason::Throttled), started),
        };
        match (next, &self.lookups.store, self.result_at) {
            // Replicas that use the same result poll at about the same time again, and one of them for all.
            (Next::Pause(pause), Some(_), Some(at))
                if matches!(reason, None | Some(Reason::TaskNotFound)) =>
            {
                Next::Pause(pause.saturating_sub(at.elapsed()))
            }
            (next, ..) => next,
        }
    }

    /// The current credential of the facade.
    async fn own_credential(&self, caller: Caller, deadline: Deadline) -> Result<Auth, Error> {
        let credentials = &self.lookups.credentials;
        let no_metadata = HeaderMap::new();
        let current = credentials.resolve(&no_metadata, caller, deadline);
        current.await.map_err(Error::Credentials)
    }

    /// Publishes a state of the task.
    fn observe(&mut self, snapshot: Snapshot, arrival: Arrival) -> Next {
        self.has_reply = true;
        self.unknown = 0;
        self.failing = None;
        let was_withheld = mem::replace(&mut self.is_withheld, snapshot.is_contradictory);
        if snapshot.is_contradictory && !was_withheld {
            self.count(PollOutcome::Unchanged);
            self.growth = 1.0;
            return Next::Pause(self.hub.interval);
        }
        let previous = self.task.observations.borrow().snapshot.clone();
        let is_new = previous
            .as_ref()
            .is_none_or(|previous| previous.etag != snapshot.etag);
        if previous.is_none_or(|previous| snapshot.differs_significantly(&previous)) {
            self.growth = 1.0;
        }
        self.count(match is_new {
            true => PollOutcome::Changed,
            false => PollOutcome::Unchanged,
        });
        let is_over = snapshot.is_over;
        let is_awaited = mem::take(&mut self.task.watchers.lock().awaits_poll);
        self.task.observations.send_if_modified(|observation| {
            observation.missing = None;
            observation.checked_at = Some(arrival.at);
            observation.progress = arrival.progress;
            if is_new {
                if let Some(former) = &observation.snapshot {
                    let mut etags = self.task.former_etags.lock();
                    etags.truncate(MAX_FORMER_ETAGS - 1);
                    etags.push_front(former.etag.clone());
                }
                observation.snapshot = Some(Arc::new(snapshot));
                observation.states += 1;
            }
            observation.asked_at = Some(arrival.asked_at);
            // A heartbeat reads the time of the check, so other watchers need not wake.
            is_new || is_awaited
        });
        match is_over {
            true => Next::End(Ok(())),
            false => Next::Pause(self.next_pause()),
        }
    }

    /// Publishes that RDS does not know the task. A task that it knew before may be missing once.
    fn observe_unknown(&mut self, error: Error, arrival: Arrival) -> Next {
        self.has_reply = true;
        self.unknown += 1;
        self.failing = None;
        self.count(PollOutcome::Failed);
        let has_snapshot = self.task.observations.borrow().snapshot.is_some();
        if has_snapshot && self.unknown > 1 {
            return Next::End(Err(error));
        }
        if !has_snapshot {
            self.task.observations.send_modify(|observation| {
                observation.missing = Some(Arc::new(error));
                observation.checked_at = Some(arrival.at);
                observation.progress = arrival.progress;
            });
        }
        Next::Pause(self.next_pause())
    }

    /// Ends the watches, unless the error is transient and RDS has replied before.
    fn observe_error(&mut self, error: Error, is_throttled: bool, asked_at: Instant) -> Next {
        self.count(match is_throttled {
            true => PollOutcome::Throttled,
            false => PollOutcome::Failed,
        });
        if !self.has_reply || !is_transient(&error) {
            return Next::End(Err(error));
        }
        let retry_after = Failure::from_error(&error).retry_after;
        let since = self
            .failing
            .as_ref()
            .map_or_else(Instant::now, |(since, _)| *since);
        if mem::take(&mut self.task.watchers.lock().awaits_poll) {
            let failure = Some((asked_at, Arc::new(error.clone())));
            self.task
                .observations
                .send_modify(|observation| observation.failure = failure);
        }
        self.failing = Some((since, error));
        let pause = self.next_pause();
        Next::Pause(match retry_after {
            // Random, so that the tasks of one credential do not poll together at the end of its throttle window.
            Some(wait) => wait + pause.mul_f64(fastrand::f64()),
            None => pause,
        })
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self
            .hub
            .interval
            .mul_f64(self.growth * (1.0 + JITTER * fastrand::f64()));
        self.growth = (self.growth * GROWTH).min(MAX_GROWTH);
        pause
    }

    /// Waits for the next poll. Without a state that the next watcher can use, the pause ends when the last watcher leaves. A watcher that
    /// awaits a poll shortens the pause to the interval.
    async fn pause(&self, pause: Duration) {
        let has_snapshot = self.task.observations.borrow().snapshot.is_some();
        let awaited = async {
            while !self.task.watchers.lock().awaits_poll {
                self.task.joined.notified().await;
            }
            if let Some(asked_at) = self.asked_at
                && self.failing.is_none()
            {
                sleep_until(asked_at + self.hub.interval).await;
            } else {
                pending().await
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = awaited => {}
            () = self.task.observations.closed(), if !has_snapshot => {}
        }
    }

    fn end(self, end: Result<(), Error>) {
        // First, so that no watcher joins a task whose poller has ended.
        self.hub.remove(&self.task);
        self.task.end(end);
    }

    /// The error of a first poll for which the rate has no room in time.
    fn throttled(&self, retry_after: Duration) -> Error {
        self.count(PollOutcome::Throttled);
        let error = upstream::Error::Throttled {
            retry_after,
            subject: None,
        };
        self.failed(error, self.lookups.credentials.owner())
    }

    fn failed(&self, error: upstream::Error, owner: Owner) -> Error {
        Error::Upstream(Box::new(FailedLookup {
            error,
            facts: Facts::default(),
            owner,
            query: self.task.key.query.clone(),
        }))
    }

    fn count(&self, outcome: PollOutcome) {
        self.hub.metrics.watch_poll(outcome);
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.hub.remove(&self.task);
        if std::thread::panicking() {
            self.hub.metrics.panics.inc();
        }
        // After a panic, or if the runtime stops.
        self.task.end(Err(Error::Internal));
    }
}

/// Whether the next poll may succeed.
fn is_transient(error: &Error) -> bool {
    use credentials::Error as Credential;
    let is_unavailable = |error: &_| {
        matches!(
            error,
            Credential::Unavailable { .. } | Credential::DeadlineExceeded
        )
    };
    let lookup = match error {
        Error::Upstream(lookup) => lookup,
        Error::Credentials(error) => return is_unavailable(error),
        _ => return false,
    };
    match &lookup.error {
        upstream::Error::Rejected(rejection) => {
            let is_transient = matches!(rejection.verdict.code, Code::Unavailable | Code::Aborted);
            let status = lookup.facts.http_status.unwrap_or_default();
            is_transient || matches!(status, 408 | 425 | 429 | 500..)
        }
        upstream::Error::Transport(..)
        | upstream::Error::AttemptTimeout
        | upstream::Error::DeadlineExceeded
        | upstream::Error::CircuitOpen { .. }
        | upstream::Error::Throttled { .. } => true,
        upstream::Error::Credentials(error) => is_unavailable(error),
        _ => false,
    }
}

impl Arrival {
    #[expect(
        clippy::disallowed_methods,
        reason = "check times are shown to callers and decide nothing"
    )]
    fn now(asked_at: Instant) -> Self {
        Self {
            at: SystemTime::now(),
            asked_at,
            progress: Arc::default(),
        }
    }

    fn of(lookup: &Lookup, asked_at: Instant) -> Self {
        // A cached result is older than the poll.
        let now = Self::now(asked_at.min(lookup.finished_at));
        let age = lookup.finished_at.elapsed();
        Self {
            at: now.at.checked_sub(age).unwrap_or(now.at),
            asked_at: now.asked_at,
            progress: Arc::clone(&lookup.progress),
        }
    }
}

#[cfg(test)]
mod tests;
