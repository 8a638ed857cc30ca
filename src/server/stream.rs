//! Runs the HTTP library's futures of one HTTP/2 stream each, and ends a stream whose reader has stopped.
//!
//! The library waits without limit for a peer that opens no window for the answer. Our answer says until when it may be
//! read, through a cell of the thread that polls both; only a stream that is stuck after that pays for a timer.

use std::{
    cell::Cell,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
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
        tokio::spawn(Bounded {
            stream,
            limit: None,
        });
    }
}

/// Says, from within the stream that is polled now, that its answer must have been read at `at`.
pub(super) fn read_by(at: Instant) {
    READ_BY.set(Some(at));
}

pin_project! {
    /// A stream that ends, which resets it, when its reader has not taken the answer in time. An `async` block would hold
    /// the stream twice, and every call pays for moving it.
    struct Bounded<F> {
        #[pin]
        stream: F,
        limit: Option<Pin<Box<Sleep>>>,
    }
}

impl<F: Future<Output = ()>> Future for Bounded<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let done = this.stream.poll(context);
        let read_by = READ_BY.take();
        if done.is_ready() {
            return Poll::Ready(());
        }
        if let Some(at) = read_by {
            *this.limit = Some(Box::pin(sleep_until(at)));
        }
        match this.limit {
            Some(timer) => timer.as_mut().poll(context),
            None => Poll::Pending,
        }
    }
}
