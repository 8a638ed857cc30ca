//! Detects whether this thread lacks CPU time: its timers fire long after they are due. A timeout that fires then is not evidence against
//! the peer, whose reply may have arrived unread.

use std::{cell::Cell, convert::Infallible, time::Duration};

use tokio::time::{Instant, sleep_until};

/// The thread is late if a timer fires this long after it was due.
const LATE: Duration = Duration::from_millis(100);

/// How long the thread counts as late afterwards: the default connect timeout, since a connect may have started then.
const MEMORY: Duration = Duration::from_secs(3);

/// The time between two measurements. They also keep one timer pending that fires before most calls' deadlines: registering a timer that
/// becomes the earliest makes tokio wake its driver, an eventfd write and an extra `epoll_wait` per call.
const INTERVAL: Duration = Duration::from_secs(1);

thread_local! {
    static LATE_AT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Measures this thread's timers until it is dropped.
pub async fn measure() -> Infallible {
    loop {
        let due = Instant::now() + INTERVAL;
        sleep_until(due).await;
        note(due);
    }
}

/// Whether a timer that was due at `due` and fires now, or another one within the last seconds, was late.
pub fn is_late(due: Instant) -> bool {
    note(due);
    LATE_AT
        .get()
        .is_some_and(|late_at| late_at.elapsed() < MEMORY)
}

fn note(due: Instant) {
    if due.elapsed() >= LATE {
        LATE_AT.set(Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_fires_late_makes_the_thread_late_for_some_seconds() {
        let on_time = Instant::now();
        assert!(!is_late(on_time));

        tokio::time::advance(LATE).await;
        assert!(is_late(on_time));
        assert!(is_late(Instant::now()), "and all others of the thread");

        tokio::time::advance(MEMORY).await;
        assert!(!is_late(Instant::now()));
    }

    #[tokio::test]
    async fn work_that_blocks_the_thread_is_noticed_without_a_timeout() {
        let measuring = tokio::spawn(measure());
        tokio::task::yield_now().await;

        std::thread::sleep(INTERVAL + 2 * LATE);
        tokio::time::sleep(Duration::from_millis(1)).await;

        assert!(is_late(Instant::now()));
        measuring.abort();
    }
}
