//! Restarts background tasks that panic, and counts the restarts: a bug in one of them must not end what the program needs all the time,
//! such as the refresh of its credential.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;
use prometheus_client::metrics::counter::Counter;
use strum::VariantNames;
use tokio::time::sleep;

/// The pause before a restart, so that a task that panics at once takes little CPU time.
pub const PAUSE: Duration = Duration::from_secs(1);

/// A background task, as the label `task`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Task {
    /// Serves metrics and probes.
    Admin,
    /// Accepts gRPC connections.
    Accept,
    /// Reloads changed certificates of the listener.
    Certificates,
    /// Refreshes the credential of the facade.
    Credential,
    /// Sets the health status when the readiness changes.
    Health,
    /// Detects that a worker lacks CPU time.
    Lateness,
    /// Connects to the quota store.
    QuotaStore,
    /// Exports spans.
    Spans,
}

/// Counts restarts, indexed by [`Task`].
#[derive(Debug)]
pub struct Restarts(pub [Counter; Task::VARIANTS.len()]);

impl Restarts {
    /// Runs a task to its end, again after each panic.
    pub async fn supervise<F: Future>(
        &self,
        task: Task,
        mut start: impl FnMut() -> F,
    ) -> F::Output {
        loop {
            if let Some(ended) = self.catch(task, start()).await {
                return ended;
            }
        }
    }

    /// Runs a task to its end; `None` if it has panicked and the caller should start it again now.
    pub async fn catch<T>(&self, task: Task, running: impl Future<Output = T>) -> Option<T> {
        let ended = AssertUnwindSafe(running).catch_unwind().await;
        if ended.is_err() {
            self.count(task);
            sleep(PAUSE).await;
        }
        ended.ok()
    }

    /// Counts and logs a panic after which the task restarts.
    pub fn count(&self, task: Task) {
        self.0[task as usize].inc();
        let name = Task::VARIANTS[task as usize];
        tracing::error!(task = name, "background task panicked; restarting it");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_restarted_after_a_pause_and_counted_until_it_ends() {
        let restarts = Restarts(Default::default());
        let starts = Cell::new(0);

        let begun = tokio::time::Instant::now();
        let ended = restarts
            .supervise(Task::Credential, async || {
                starts.update(|starts| starts + 1);
                tokio::task::yield_now().await;
                assert!(starts.get() > 3, "panics three times");
                "ended"
            })
            .await;

        assert_eq!(ended, "ended");
        assert_eq!(restarts.0[Task::Credential as usize].get(), 3);
        assert_eq!(restarts.0[Task::Accept as usize].get(), 0);
        assert_eq!(begun.elapsed(), 3 * PAUSE);
    }
}
