//! Runs the HTTP library's future of each HTTP/2 stream, and resets a stream whose reply is not read in time.
//!
//! The library waits without limit for a client that opens no window for the reply. The reply sets its read deadline in a
//! thread-local cell while the stream is polled; only a stream that is still pending after that poll pays for a timer.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

thread_local! {
    static READ_DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Spawns streams on the runtime of the worker that polls the connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams;

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let mut stream = Box::pin(Bounded {
            stream,
            read_timer: None,
            early: None,
        });
        // Polled once before it becomes a task: a connection accepts all its new streams before any task runs, and a thousand
        // connections can bring a hundred each. Most of those fail at once with RESOURCE_EXHAUSTED, so they end here one by one
        // and are never all in memory.
        let early = Arc::new(EarlyWaker::default());
        let waker = Waker::from(Arc::clone(&early));
        let mut context = Context::from_waker(&waker);
        let first = catch_unwind(AssertUnwindSafe(|| stream.as_mut().poll(&mut context)));
        // A panic ends this stream only: this is the task of the whole connection.
        if matches!(first, Ok(Poll::Pending)) {
            *stream.as_mut().project().early = Some(early);
            tokio::spawn(stream);
        }
    }
}

/// Sets the time by which the client must have read the reply of the stream that is being polled.
pub(super) fn set_read_deadline(at: Instant) {
    READ_DEADLINE.set(Some(at));
}

/// The waker of a stream that was polled before it had a task. It stores a wake-up for the task, which therefore need not poll
/// the stream again only to register its own waker.
#[derive(Debug, Default)]
struct EarlyWaker {
    woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for EarlyWaker {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

pin_project! {
    /// A stream that ends, which resets it, if the client has not read the reply in time. An `async` block would hold the
    /// stream twice, and every call would pay for moving it.
    struct Bounded<F> {
        #[pin]
        stream: F,
        read_timer: Option<Pin<Box<Sleep>>>,
        // Set until the task polls the stream for the first time.
        early: Option<Arc<EarlyWaker>>,
    }
}

impl<F: Future<Output = ()>> Future for Bounded<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if let Some(early) = this.early {
            early.task.register(context.waker());
            if !early.woken.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            *this.early = None;
        }
        // A stream that panicked may have left a deadline.
        READ_DEADLINE.set(None);
        let done = this.stream.poll(context);
        let read_deadline = READ_DEADLINE.take();
        if done.is_ready() {
            return Poll::Ready(());
        }
        if let Some(at) = read_deadline {
            *this.read_timer = Some(Box::pin(sleep_until(at)));
        }
        match this.read_timer {
            Some(timer) => timer.as_mut().poll(context),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures_util::FutureExt as _;
    use hyper::rt::Executor as _;
    use tokio::{sync::oneshot, task::yield_now};

    use super::*;

    #[tokio::test]
    async fn a_stream_that_completes_at_once_needs_no_task() {
        let steps = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&steps);

        Streams.execute(async move {
            seen.fetch_add(1, Ordering::Relaxed);
        });

        assert_eq!(Arc::strong_count(&steps), 1);
        assert_eq!(steps.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_stream_that_waits_completes_as_a_task() {
        let steps = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&steps);

        Streams.execute(async move {
            seen.fetch_add(1, Ordering::Relaxed);
            yield_now().await;
            seen.fetch_add(1, Ordering::Relaxed);
        });
        for _ in 0..3 {
            yield_now().await;
        }

        assert_eq!(steps.load(Ordering::Relaxed), 2);
        assert_eq!(Arc::strong_count(&steps), 1, "it is over");
    }

    #[tokio::test]
    async fn a_waiting_stream_is_polled_only_when_it_is_woken() {
        for task_turns in [0, 1, 2] {
            let polls = Arc::new(AtomicUsize::new(0));
            let (wake, mut woken) = oneshot::channel::<()>();
            let seen = Arc::clone(&polls);

            Streams.execute(std::future::poll_fn(move |context| {
                seen.fetch_add(1, Ordering::Relaxed);
                woken.poll_unpin(context).map(drop)
            }));
            for _ in 0..task_turns {
                yield_now().await;
            }
            assert_eq!(polls.load(Ordering::Relaxed), 1, "{task_turns}");
            wake.send(()).expect("the stream waits");
            for _ in 0..3 {
                yield_now().await;
            }

            assert_eq!(polls.load(Ordering::Relaxed), 2, "{task_turns}");
            assert_eq!(Arc::strong_count(&polls), 1, "it is over");
        }
    }
}
