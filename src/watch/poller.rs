//! The poller of one watched task: it polls while the task has watchers, and ends when the task is over or its watches fail.

use std::{
    mem,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::{Hub, MAX_FORMER_ETAGS, Observation, WatchedTask, snapshot::Snapshot};
use crate::{
    caller::Caller,
    coalescer::Lookup,
    credentials::{Auth, Owner},
    deadline::Deadline,
    error::{Error, FailedLookup},
    lookup::{Lookups, Origin, into_task},
    reason::Reason,
    status::Failure,
    task::to_message,
    telemetry::{
        Facts, Progress,
        metrics::{Counted, PollOutcome},
    },
    upstream,
};

/// The longest wait of a first poll for the rate; one that would wait longer fails at once.
const MAX_FIRST_WAIT: Duration = Duration::from_secs(10);

/// The span of time over which first polls for resumed watches are spread.
const RESUME_SPREAD: Duration = Duration::from_secs(5);

/// How long transient errors may last before the watches end with the latest of them.
const MAX_STALE: Duration = Duration::from_secs(5 * 60);

/// While nothing changes, each pause is longer than the previous one by this factor, up to [`MAX_GROWTH`] times the interval.
const GROWTH: f64 = 1.5;
const MAX_GROWTH: f64 = 3.0;

/// The part of a pause that is added at random, so that tasks which are watched at the same moment do not stay in step.
const JITTER: f64 = 0.2;

pub(super) struct Poller {
    hub: Arc<Hub>,
    task: Arc<WatchedTask>,
    lookups: Lookups,
    _counted: Counted,
    /// The pause after the next unchanged poll, as a multiple of the interval.
    growth: f64,
    /// When RDS last gave an answer about the task.
    last_answer: Instant,
    /// Unknown tasks in a row.
    unknown: u32,
    /// The latest poll called the task completed although a part of it was not.
    is_doubtful: bool,
}

/// When and how the result of a poll arrived.
struct Answer {
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
            last_answer: Instant::now(),
            unknown: 0,
            is_doubtful: false,
        }
    }

    pub(super) async fn run(mut self) {
        self.spread_resumed().await;
        loop {
            let next = match self.turn().await {
                Some(Ok(caller)) => self.poll(caller).await,
                Some(Err(retry_after)) => Next::End(Err(self.throttled(retry_after))),
                // Nobody watches any more.
                None => Next::Pause(Duration::ZERO),
            };
            match next {
                Next::Pause(pause) => self.pause(pause).await,
                Next::End(end) => return self.end(end),
            }
            if self.hub.remove_unwatched(&self.task) {
                return;
            }
        }
    }

    /// Waits for a random moment if all watchers resume, until one joins that does not.
    async fn spread_resumed(&self) {
        let spread = sleep(RESUME_SPREAD.mul_f64(fastrand::f64()));
        let urgent = async {
            while !self.task.watchers().is_urgent {
                self.task.joined.notified().await;
            }
        };
        tokio::select! {
            () = spread => {}
            () = urgent => {}
            () = self.task.observations.closed() => {}
        }
    }

    /// Waits until the rate allows a poll, and returns the caller whose share it uses; `None` once nobody watches.
    ///
    /// # Errors
    /// The necessary wait, if it is too long for a first poll.
    async fn turn(&self) -> Option<Result<Caller, Duration>> {
        let identity = self.task.key.identity;
        let is_first = self.task.observations.borrow().checked_at.is_none();
        loop {
            let callers = self.task.callers();
            let caller = *callers.first()?;
            let turn = async {
                match &self.hub.rate {
                    None => Ok(caller),
                    Some(rate) if is_first => {
                        let latest = Deadline::after(MAX_FIRST_WAIT);
                        rate.wait(identity, caller, latest).await.map(|()| caller)
                    }
                    Some(rate) => Ok(rate.wait_patiently(identity, &callers).await),
                }
            };
            tokio::select! {
                biased;
                turn = turn => return Some(turn),
                () = self.task.observations.closed() => return None,
                // The new watcher's caller may have a shorter wait.
                () = self.task.joined.notified(), if !is_first => {}
            }
        }
    }

    /// Polls once on behalf of `caller`.
    async fn poll(&mut self, caller: Caller) -> Next {
        let (auth, span) = {
            let watchers = self.task.watchers();
            (watchers.auth.clone(), watchers.span.clone())
        };
        let Some(auth) = auth else {
            return Next::Pause(Duration::ZERO);
        };
        let span = span.map(|span| span.poll());
        let started = Instant::now();
        let deadline = Deadline::after(self.hub.poll_timeout);
        let origin = Origin {
            caller,
            deadline,
            span: span.as_ref(),
            max_age: Some(self.hub.interval),
        };
        let lookup = async {
            let auth = self.current(auth, caller, deadline).await?;
            let lookup = self.lookups.look_up(&self.task.key, &auth, origin, |_| {});
            // A call returns at its deadline, and so does a poll.
            let lookup = deadline.bound(lookup).await;
            Ok((lookup.map_err(|_| Error::DeadlineExceeded)?, auth))
        };
        let is_first = self.task.observations.borrow().checked_at.is_none();
        let result = tokio::select! {
            biased;
            result = lookup => result,
            // As the end of a call ends its lookup. A later poll goes on: the next watcher profits from it.
            () = self.task.observations.closed(), if is_first => return Next::Pause(Duration::ZERO),
        };
        let mut answer = Answer::now(started);
        let result = result.and_then(|(lookup, auth)| {
            answer = Answer::of(&lookup, started);
            let task = into_task(lookup, &self.task.key, &auth)?;
            Snapshot::new(to_message(task)).ok_or_else(|| {
                let error = upstream::Error::TooLarge;
                self.failed(error, auth.owner())
            })
        });
        let reason = |error| Failure::from_error(error).reason;
        let reason = result.as_ref().err().map(reason);
        if let Some(span) = span {
            span.end_poll(started.elapsed(), reason);
        }
        match result {
            Ok(snapshot) => self.observe(snapshot, answer),
            Err(error) if reason == Some(Reason::TaskNotFound) => {
                self.observe_unknown(error, answer)
            }
            Err(error) => self.observe_error(error),
        }
    }

    /// The credential for the next poll: a caller's own, or the current one of the facade.
    async fn current(&self, auth: Auth, caller: Caller, deadline: Deadline) -> Result<Auth, Error> {
        match auth.owner() {
            Owner::Caller => Ok(auth),
            Owner::Server => {
                let credentials = &self.lookups.credentials;
                let no_metadata = HeaderMap::new();
                let current = credentials.resolve(&no_metadata, caller, deadline);
                current.await.map_err(Error::Credentials)
            }
        }
    }

    /// Publishes a state of the task.
    fn observe(&mut self, snapshot: Snapshot, answer: Answer) -> Next {
        self.last_answer = Instant::now();
        self.unknown = 0;
        let was_doubtful = mem::replace(&mut self.is_doubtful, snapshot.is_contradictory);
        if snapshot.is_contradictory && !was_doubtful {
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
        self.task.observations.send_modify(|observation| {
            if is_new {
                if let Some(former) = &observation.snapshot {
                    let mut etags = self.task.former_etags();
                    etags.truncate(MAX_FORMER_ETAGS - 1);
                    etags.push_front(former.etag.clone());
                }
                observation.snapshot = Some(Arc::new(snapshot));
                observation.states += 1;
            }
            observation.missing = None;
            observation.checked_at = Some(answer.at);
            observation.asked_at = Some(answer.asked_at);
            observation.progress = answer.progress;
        });
        match is_over {
            true => Next::End(Ok(())),
            false => Next::Pause(self.next_pause()),
        }
    }

    /// Publishes that RDS does not know the task. A task that it knew before may be missing once.
    fn observe_unknown(&mut self, error: Error, answer: Answer) -> Next {
        self.last_answer = Instant::now();
        self.unknown += 1;
        self.count(PollOutcome::Failed);
        let has_snapshot = self.task.observations.borrow().snapshot.is_some();
        if has_snapshot && self.unknown > 1 {
            return Next::End(Err(error));
        }
        if !has_snapshot {
            self.task.observations.send_modify(|observation| {
                observation.missing = Some(Arc::new(error));
                observation.checked_at = Some(answer.at);
                observation.progress = answer.progress;
            });
        }
        Next::Pause(self.next_pause())
    }

    /// Ends the watches, unless the error is transient and they have had an answer in the last minutes.
    fn observe_error(&mut self, error: Error) -> Next {
        let failure = Failure::from_error(&error);
        self.count(match failure.reason {
            Reason::Throttled => PollOutcome::Throttled,
            _ => PollOutcome::Failed,
        });
        let is_transient = match failure.code {
            Code::Unavailable | Code::DeadlineExceeded | Code::Aborted => true,
            Code::ResourceExhausted => failure.reason == Reason::Throttled,
            Code::Internal => failure.reason == Reason::UpstreamInternal,
            _ => false,
        };
        let retry_after = failure.retry_after;
        let is_first = self.task.observations.borrow().checked_at.is_none();
        if is_first || !is_transient || self.last_answer.elapsed() >= MAX_STALE {
            return Next::End(Err(error));
        }
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

    /// Waits for the next poll. Without a state that the next watcher can use, the pause ends when nobody watches any more.
    async fn pause(&self, pause: Duration) {
        let has_snapshot = self.task.observations.borrow().snapshot.is_some();
        tokio::select! {
            () = sleep(pause) => {}
            () = self.task.observations.closed(), if !has_snapshot => {}
        }
    }

    fn end(self, end: Result<(), Error>) {
        // First, so that nobody joins a task whose poller has ended.
        self.hub.remove(&self.task);
        self.task
            .observations
            .send_modify(|observation| observation.end = Some(end.map_err(Arc::new)));
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
        self.task
            .observations
            .send_if_modified(|observation: &mut Observation| {
                let has_not_ended = observation.end.is_none();
                if has_not_ended {
                    observation.end = Some(Err(Arc::new(Error::Internal)));
                }
                has_not_ended
            });
    }
}

impl Answer {
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
