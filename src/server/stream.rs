//! Runs the HTTP library's futures of one HTTP/2 stream each, and ends a stream whose reader has stopped.
//!
//! The library waits without limit for a peer that opens no window for the answer. Our answer says until when it may be
//! read, through a cell of the thread that polls both; only a stream that is stuck after that pays for a timer.

use std::{cell::Cell, future::poll_fn, pin::pin, task::Poll};

use tokio::time::{Instant, Sleep, sleep_until};

thread_local! {
    static READ_BY: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Spawns streams on the runtime of the worker that polls the connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams;

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        tokio::spawn(bounded(stream));
    }
}

/// Says, from within the stream that is polled now, that its answer must have been read at `at`.
pub(super) fn read_by(at: Instant) {
    READ_BY.set(Some(at));
}

/// Drops `stream`, which resets it, when its reader has not taken the answer in time.
async fn bounded(stream: impl Future<Output = ()>) {
    let mut stream = pin!(stream);
    let mut limit: Option<std::pin::Pin<Box<Sleep>>> = None;
    poll_fn(|context| {
        let done = stream.as_mut().poll(context);
        let read_by = READ_BY.take();
        if done.is_ready() {
            return Poll::Ready(());
        }
        if let Some(at) = read_by {
            limit = Some(Box::pin(sleep_until(at)));
        }
        match &mut limit {
            Some(timer) => timer.as_mut().poll(context),
            None => Poll::Pending,
        }
    })
    .await;
}
