//! A queued attempt or poll, and its start without a quota store.

use std::sync::Arc;

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::lane::Lane;
use crate::caller::Caller;

/// A queued attempt or poll, which leaves the queue when dropped.
#[derive(Debug)]
pub struct Queued {
    pub(super) lane: Arc<Lane>,
    pub(super) waiter: Arc<Notify>,
    pub(super) kind: usize,
    /// The latest start that the quota store may assign, if there is a limit.
    pub(super) latest: Option<Instant>,
}

impl Queued {
    /// Queues a poll under further callers as well, unless it has left the queue already. It stays queued under its other callers.
    pub fn add(&self, callers: &[Caller]) {
        let mut state = self.lane.state();
        if state.is_queued(self.kind, &self.waiter) {
            state.queue(self.kind, callers, &self.waiter);
            state.wake_next();
        }
    }

    /// Waits until this waiter is next and may start. Returns the caller under whom it does. Dropping the future does not leave the queue.
    pub async fn start(&self) -> Caller {
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

impl Drop for Queued {
    fn drop(&mut self) {
        self.lane.state().leave(&self.waiter);
    }
}
