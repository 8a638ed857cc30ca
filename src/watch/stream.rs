//! The messages of one watch. The caller first asks whether a message is due, and for its content only when HTTP/2 has room for it, so the
//! newest state is chosen at that moment.

use std::{
    future::Future as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    sync::watch::Receiver,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::ReusableBoxFuture;

use super::{Hub, Observation, Subscription, Watcher, snapshot::Snapshot};
use crate::{
    coalescer::LookupKey,
    error::Error,
    lookup::Lookups,
    pb::WatchTaskDetailResponse,
    telemetry::{
        Progress,
        metrics::{Metrics, WatchMessage},
    },
};

/// The silence of a stream after which a heartbeat is due, so that none lasts longer than 25 s: below the idle limits of 60 s of common
/// proxies, which HTTP/2's PING does not reset.
const HEARTBEAT: Duration = Duration::from_secs(24);

/// What a watch sends next.
#[derive(Debug)]
pub enum Item {
    /// A message, whose content [`WatchStream::message`] chooses.
    Message,
    /// The stream ends: OK if the task is over.
    End(Result<(), Arc<Error>>),
}

/// The messages of one watch, after the first answer of RDS.
#[derive(Debug)]
pub struct WatchStream {
    subscription: Subscription,
    /// Resolves when there is a new observation.
    changed: ReusableBoxFuture<'static, Receiver<Observation>>,
    newest: Observation,
    heartbeat: Pin<Box<Sleep>>,
    /// The etag that the client knows: from its request, then from the latest message.
    known_etag: String,
    /// The number of states up to the latest message; `None` before the first one.
    sent_states: Option<u64>,
    /// A message with the final state was sent.
    has_sent_end: bool,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// Watches a task. Returns when RDS has given an answer about it. `etag` is that of the last message that the client has seen, or
    /// empty.
    ///
    /// # Errors
    /// That of the first poll. A task that RDS does not know is an error unless `allow_missing` is set.
    pub async fn watch(
        self: &Arc<Self>,
        lookups: &Lookups,
        key: &Arc<LookupKey>,
        watcher: Watcher,
        etag: String,
        allow_missing: bool,
    ) -> Result<WatchStream, Arc<Error>> {
        let begun_at = Instant::now();
        let mut subscription = self.subscribe(lookups, key, watcher);
        let newest = loop {
            let newest = subscription.observations.borrow_and_update().clone();
            // Another instance may have sent the client a state that is newer than the one known here. A state for which RDS was asked
            // after the call began is not older.
            let is_current = |snapshot: &Snapshot| {
                etag.is_empty()
                    || etag == snapshot.etag
                    || snapshot.is_over
                    || newest.asked_at >= Some(begun_at)
                    || subscription.task.former_etags.lock().contains(&etag)
            };
            if let Some((asked_at, error)) = &newest.failure
                && *asked_at >= begun_at
            {
                return Err(Arc::clone(error));
            }
            match (&newest.snapshot, &newest.missing, &newest.end) {
                (Some(snapshot), ..) if is_current(snapshot) => break newest,
                (_, _, Some(Err(error))) => return Err(Arc::clone(error)),
                (None, Some(_), _) if allow_missing => break newest,
                (None, Some(error), _) => return Err(Arc::clone(error)),
                (Some(_), ..) => {
                    subscription.task.watchers.lock().awaits_poll = true;
                    subscription.task.joined.notify_one();
                }
                _ => {}
            }
            if subscription.observations.changed().await.is_err() {
                return Err(Arc::new(Error::Internal));
            }
        };
        let metrics = Arc::clone(&self.metrics);
        Ok(WatchStream::new(subscription, newest, etag, metrics))
    }
}

async fn changed(mut observations: Receiver<Observation>) -> Receiver<Observation> {
    // The sender outlives its receivers: the subscription holds the task.
    let _ = observations.changed().await;
    observations
}

impl WatchStream {
    fn new(
        subscription: Subscription,
        newest: Observation,
        known_etag: String,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            changed: ReusableBoxFuture::new(changed(subscription.observations.clone())),
            subscription,
            newest,
            heartbeat: Box::pin(sleep_until(Instant::now() + HEARTBEAT)),
            known_etag,
            sent_states: None,
            has_sent_end: false,
            metrics,
        }
    }

    /// What the attempts of the latest poll showed.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.newest.progress
    }

    /// Whether the watch ends because transient errors have lasted too long.
    pub fn is_stale(&self) -> bool {
        self.newest.is_stale
    }

    /// What is sent next. Also registers for the item after it, so that the stream is polled when that item is due, even if HTTP/2 has no
    /// room for it.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Item> {
        self.observe(context);
        let silent = self.heartbeat.as_mut().poll(context).is_ready();
        if self.has_news() {
            return Poll::Ready(Item::Message);
        }
        if let Some(end) = &self.newest.end {
            return Poll::Ready(Item::End(end.clone()));
        }
        match silent || self.sent_states.is_none() {
            true => Poll::Ready(Item::Message),
            false => Poll::Pending,
        }
    }

    /// An encoded message, in two parts: the newest state, or a heartbeat if the client knows it.
    pub fn message(&mut self, context: &mut Context<'_>) -> [Bytes; 2] {
        self.observe(context);
        self.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
        let _ = self.heartbeat.as_mut().poll(context);
        let has_news = self.has_news();
        let states = self.newest.states;
        let sent_states = self.sent_states.replace(states);
        match &self.newest.snapshot {
            Some(snapshot) if has_news => {
                let skipped = states - sent_states.unwrap_or(states - 1) - 1;
                self.metrics.watch_states_skipped.inc_by(skipped);
                self.known_etag.clone_from(&snapshot.etag);
                self.has_sent_end = snapshot.is_over;
                self.with_check_time(snapshot.message.clone(), WatchMessage::State)
            }
            snapshot => {
                let unchanged = WatchTaskDetailResponse {
                    etag: snapshot
                        .as_ref()
                        .map_or_else(String::new, |snapshot| snapshot.etag.clone()),
                    ..WatchTaskDetailResponse::default()
                };
                self.known_etag.clone_from(&unchanged.etag);
                self.with_check_time(unchanged.encode_to_vec().into(), WatchMessage::Heartbeat)
            }
        }
    }

    /// Takes the newest observation and registers for the next one.
    fn observe(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(mut observations) = self.changed.poll(context) {
            self.newest = observations.borrow_and_update().clone();
            self.changed.set(changed(observations));
        }
    }

    /// Whether there is a state that the client does not know, or the final one.
    fn has_news(&self) -> bool {
        self.newest.snapshot.as_ref().is_some_and(|snapshot| {
            snapshot.etag != self.known_etag || snapshot.is_over && !self.has_sent_end
        })
    }

    /// The message, of which `encoded` is the part before the check time.
    fn with_check_time(&self, encoded: Bytes, kind: WatchMessage) -> [Bytes; 2] {
        self.metrics.watch_message(kind);
        let checked_at = self.subscription.observations.borrow().checked_at;
        let checked = WatchTaskDetailResponse {
            // Not of the newest observation that this stream was woken for: a poll without a change wakes no stream.
            check_time: checked_at.map(Into::into),
            ..WatchTaskDetailResponse::default()
        };
        [encoded, checked.encode_to_vec().into()]
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::SystemTime};

    use futures_util::poll;
    use http::HeaderValue;

    use super::*;
    use crate::{
        caller::Caller,
        coalescer::Coalescer,
        credentials::{Auth, Identity, Token},
        pb::GetTaskDetailResponse,
        task,
        upstream::TaskQuery,
        watch::WatchedTask,
    };

    /// A task without a poller, whose observations the test publishes.
    struct Task(Arc<WatchedTask>, Arc<Metrics>);

    impl Task {
        fn new() -> Self {
            let metrics = Metrics::new();
            let coalescer = Coalescer::new(&crate::options::defaults(), Arc::clone(&metrics));
            let query = TaskQuery {
                project_id: "p".into(),
                instance_id: "i".into(),
                workflow_id: "w".into(),
                workflow_name: None,
            };
            let task = WatchedTask::new(coalescer.key(Identity::Server, query));
            Self(Arc::new(task), metrics)
        }

        fn publish(&self, status: &str) {
            let task = task::Task::new(GetTaskDetailResponse {
                status: Some(status.to_owned()),
                ..GetTaskDetailResponse::default()
            });
            self.0.observations.send_modify(|observation| {
                observation.snapshot = Some(Arc::new(Snapshot::new(&task).expect("short")));
                observation.states += 1;
                observation.checked_at = Some(SystemTime::UNIX_EPOCH);
            });
        }

        fn watch(&self, etag: &str) -> WatchStream {
            let auth = Auth::Token(Token {
                value: HeaderValue::from_static("t"),
                generation: 0,
                identity: Identity::Server,
                fragments: None,
            });
            let watcher = Watcher {
                caller: Caller::Connection(1),
                auth,
                span: None,
                resumes: false,
            };
            let mut subscription = WatchedTask::join(&self.0, watcher);
            let newest = subscription.observations.borrow_and_update().clone();
            let metrics = Arc::clone(&self.1);
            WatchStream::new(subscription, newest, etag.to_owned(), metrics)
        }
    }

    /// The status of the next message, or "-" without a task.
    async fn next(stream: &mut WatchStream) -> String {
        let item = poll_fn(|context| stream.poll_next(context)).await;
        if let Item::End(_) = item {
            return format!("{item:?}");
        }
        let parts = poll_fn(|context| Poll::Ready(stream.message(context))).await;
        let message = WatchTaskDetailResponse::decode(&*parts.concat()).expect("a message");
        assert!(message.check_time.is_some());
        assert_eq!(message.etag.len(), 32);
        let status = |task: GetTaskDetailResponse| task.status.expect("a status");
        message.task.map_or_else(|| "-".to_owned(), status)
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_follows_24_seconds_of_silence() {
        let task = Task::new();
        task.publish("Running");
        let mut stream = task.watch("");
        assert_eq!(next(&mut stream).await, "Running");

        for expected in [24, 48] {
            let begun = Instant::now();
            assert_eq!(next(&mut stream).await, "-", "{expected}");
            assert_eq!(begun.elapsed().as_secs(), 24);
        }
        tokio::time::advance(Duration::from_secs(20)).await;
        task.publish("Pending");
        assert_eq!(next(&mut stream).await, "Pending");
        let begun = Instant::now();
        assert_eq!(next(&mut stream).await, "-");
        assert_eq!(begun.elapsed().as_secs(), 24);
        drop(stream);
        assert!(
            task.0.watchers.lock().auth.is_none(),
            "no credential is kept"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_gets_the_newest_state_only() {
        let task = Task::new();
        task.publish("1");
        let mut stream = task.watch("");
        assert_eq!(next(&mut stream).await, "1");

        for status in ["2", "3", "4"] {
            task.publish(status);
        }

        assert_eq!(next(&mut stream).await, "4");
        assert_eq!(task.1.watch_states_skipped.get(), 2);
        let mut more = Box::pin(next(&mut stream));
        assert!(poll!(&mut more).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_state_is_chosen_when_there_is_room_for_a_message() {
        let task = Task::new();
        task.publish("1");
        let mut stream = task.watch("");
        assert_eq!(next(&mut stream).await, "1");
        task.publish("2");
        let due = poll_fn(|context| stream.poll_next(context)).await;
        assert!(matches!(due, Item::Message));

        task.publish("3");

        assert_eq!(next(&mut stream).await, "3");
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_that_was_left_and_came_back_between_two_reads_is_no_change() {
        let task = Task::new();
        task.publish("1");
        let mut stream = task.watch("");
        assert_eq!(next(&mut stream).await, "1");

        task.publish("2");
        task.publish("1");

        assert_eq!(next(&mut stream).await, "-", "only the heartbeat");
    }

    #[tokio::test(start_paused = true)]
    async fn the_final_state_is_sent_before_the_end_even_if_the_client_knows_it() {
        let task = Task::new();
        task.publish("Completed");
        let etag = task
            .0
            .observations
            .borrow()
            .snapshot
            .clone()
            .expect("a state")
            .etag
            .clone();
        task.0
            .observations
            .send_modify(|observation| observation.end = Some(Ok(())));
        let mut stream = task.watch(&etag);

        assert_eq!(next(&mut stream).await, "Completed");
        assert_eq!(next(&mut stream).await, "End(Ok(()))");
    }
}
