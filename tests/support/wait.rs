//! Waiting for events. Every wait has a deadline and names its event, so that no test hangs.

use std::time::Duration;

use tokio::time::{sleep, timeout};

/// The deadline of every wait: far longer than any event takes, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A timeout for the program under test that [`PATIENCE`] always beats: an event that arrives was not caused by it.
pub(crate) const LONGER_THAN_PATIENCE: &str = "120s";

/// Awaits the event, named by `what`; panics after [`PATIENCE`].
pub(crate) async fn within<F: Future>(what: &str, event: F) -> F::Output {
    let ended = timeout(PATIENCE, event).await;
    ended.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Polls the condition until it holds; panics after [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !condition().await {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
