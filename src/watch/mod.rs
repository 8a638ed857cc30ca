//! Watches of tasks. One poller for each task and credential, whose observations all watchers of that task share.
//!
//! ```text
//! watcher 1..n (any worker) -> Hub::subscribe -> tokio::sync::watch::Receiver<Observation>    the newest observation only
//!                                                          ^
//! poller: pause -> rate limiter -> lookup (as of a unary call) -> compare with the previous state -> publish
//! ```
//!
//! A slow reader costs no memory: a stream encodes the newest state when HTTP/2 has room for it ([`stream`]).

mod options;
mod poller;
pub mod snapshot;
mod stream;

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub use self::{
    options::Options,
    stream::{Item, WatchStream},
};
use self::{poller::Poller, snapshot::Snapshot};
use crate::{
    caller::Caller,
    coalescer::LookupKey,
    credentials::{Auth, Owner},
    error::Error,
    lookup::Lookups,
    telemetry::{Progress, ServerSpan, metrics::Metrics},
    upstream::Pacing,
};

/// The number of earlier states of a task that a client may name to get the newest one without another poll.
const MAX_FORMER_ETAGS: usize = 32;

/// All watched tasks. One per process: all workers share it.
#[derive(Debug)]
pub struct Hub {
    interval: Duration,
    rate: Option<Pacing>,
    /// The deadline of a poll: that of a unary call without one.
    poll_timeout: Duration,
    tasks: Mutex<HashMap<Arc<LookupKey>, Arc<WatchedTask>>>,
    metrics: Arc<Metrics>,
}

/// Who watches a task, and how.
#[derive(Debug)]
pub struct Watcher {
    /// Whose share of the poll rate the watch uses.
    pub caller: Caller,
    /// The credential of its polls.
    pub auth: Auth,
    /// The span of the stream, to which polls are linked.
    pub span: Option<Arc<ServerSpan>>,
    /// The caller has seen a state before: its first poll may wait, so that all watches of a stopped replica do not poll at once.
    pub resumes: bool,
}

/// A task and its watchers.
#[derive(Debug)]
struct WatchedTask {
    key: Arc<LookupKey>,
    observations: watch::Sender<Observation>,
    /// The etags of earlier states, of the latest [`MAX_FORMER_ETAGS`] only.
    former_etags: Mutex<VecDeque<String>>,
    watchers: Mutex<Watchers>,
    /// Notified when a watcher joins.
    joined: Notify,
}

#[derive(Debug, Default)]
struct Watchers {
    /// Callers with the number of their watches.
    callers: HashMap<Caller, usize>,
    /// The credential of the watcher that joined last if it is the caller's. For the facade's own credential, each poll takes the current
    /// one.
    auth: Option<Auth>,
    /// The span of the watcher that joined last.
    span: Option<Arc<ServerSpan>>,
    /// A watcher waits for a poll that begins after it has joined.
    awaits_poll: bool,
    /// One of the watchers does not resume an earlier watch, so the first poll is due.
    is_urgent: bool,
}

/// The results of the polls so far.
#[derive(Debug, Clone, Default)]
struct Observation {
    /// The newest state; `None` before RDS has reported one.
    snapshot: Option<Arc<Snapshot>>,
    /// The number of states so far.
    states: u64,
    /// The error of the latest poll, if RDS does not know the task yet.
    missing: Option<Arc<Error>>,
    /// When RDS last confirmed the state, or that it does not know the task.
    checked_at: Option<SystemTime>,
    /// When the poll began that brought or confirmed the state; `None` without a state.
    asked_at: Option<Instant>,
    /// The error of a poll that a watcher awaited, and when that poll began.
    failure: Option<(Instant, Arc<Error>)>,
    /// What the attempts of the latest answer showed.
    progress: Arc<Progress>,
    /// Set when the poller has ended: the task is over, or its watches fail.
    end: Option<Result<(), Arc<Error>>>,
    /// The watches end because transient errors have lasted too long.
    is_stale: bool,
}

/// One watcher's view of a task. Dropping it ends the watch.
#[derive(Debug)]
struct Subscription {
    task: Arc<WatchedTask>,
    caller: Caller,
    observations: watch::Receiver<Observation>,
}

impl Hub {
    /// A hub without watches. `poll_timeout` bounds each poll.
    pub fn new(options: &Options, poll_timeout: Duration, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            interval: options.watch_interval,
            rate: options.watch_rate.map(Pacing::for_polls),
            poll_timeout,
            tasks: Mutex::default(),
            metrics,
        })
    }

    /// Joins the watchers of a task. The first one starts its poller, which uses `lookups`.
    fn subscribe(
        self: &Arc<Self>,
        lookups: &Lookups,
        key: &Arc<LookupKey>,
        watcher: Watcher,
    ) -> Subscription {
        let mut tasks = self.tasks.lock();
        match tasks.entry(Arc::clone(key)) {
            Entry::Occupied(entry) => WatchedTask::join(entry.get(), watcher),
            Entry::Vacant(entry) => {
                let task = Arc::new(WatchedTask::new(Arc::clone(key)));
                entry.insert(Arc::clone(&task));
                let subscription = WatchedTask::join(&task, watcher);
                let poller = Poller::new(Arc::clone(self), task, lookups.clone());
                tokio::spawn(poller.run());
                subscription
            }
        }
    }

    /// Removes a task, so that the next watcher starts a new poller.
    fn remove(&self, task: &Arc<WatchedTask>) {
        if let Entry::Occupied(entry) = self.tasks.lock().entry(Arc::clone(&task.key))
            && Arc::ptr_eq(entry.get(), task)
        {
            entry.remove();
        }
    }

    /// Removes a task that has no watchers. Returns whether it did.
    fn remove_unwatched(&self, task: &Arc<WatchedTask>) -> bool {
        // Watchers join while the map is locked, so none can join in between.
        let mut tasks = self.tasks.lock();
        let is_unwatched = task.watchers.lock().callers.is_empty();
        if is_unwatched {
            tasks.remove(&task.key);
        }
        is_unwatched
    }
}

impl WatchedTask {
    fn new(key: Arc<LookupKey>) -> Self {
        Self {
            key,
            observations: watch::Sender::default(),
            former_etags: Mutex::default(),
            watchers: Mutex::default(),
            joined: Notify::new(),
        }
    }

    fn join(task: &Arc<Self>, watcher: Watcher) -> Subscription {
        let mut watchers = task.watchers.lock();
        *watchers.callers.entry(watcher.caller).or_default() += 1;
        watchers.auth = Some(watcher.auth).filter(|auth| auth.owner() == Owner::Caller);
        watchers.span = watcher.span;
        watchers.is_urgent |= !watcher.resumes;
        drop(watchers);
        task.joined.notify_one();
        Subscription {
            task: Arc::clone(task),
            caller: watcher.caller,
            observations: task.observations.subscribe(),
        }
    }

    /// The callers that watch the task.
    fn callers(&self) -> Vec<Caller> {
        self.watchers.lock().callers.keys().copied().collect()
    }

    /// Publishes the end, once.
    fn end(&self, end: Result<(), Error>) {
        self.observations.send_if_modified(|observation| {
            let is_first = observation.end.is_none();
            if is_first {
                observation.end = Some(end.map_err(Arc::new));
            }
            is_first
        });
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut watchers = self.task.watchers.lock();
        if let Entry::Occupied(mut count) = watchers.callers.entry(self.caller) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        if watchers.callers.is_empty() {
            // The credential of a caller is held no longer than its watch.
            watchers.auth = None;
            watchers.span = None;
        }
    }
}
