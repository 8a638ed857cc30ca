//! Runs the HTTP library's futures of one HTTP/2 stream each, and ends a stream whose reader has stopped.
//!
//! The library waits without limit for a peer that opens no window for the answer. Our answer says until when it may be
//! read, through a cell of the thread that polls both; only a stream that is stuck after that pays for a timer.

use std::{
    cell::Cell,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
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
        let mut stream = Box::pin(Bounded {
            stream,
            limit: None,
            before: None,
        });
        // A connection takes in all its new streams before any task runs, and a thousand connections can bring a hundred
        // each. Most of those are refused at once, so they are over here, one after the other, and never all in memory.
        let before = Arc::new(BeforeTask::default());
        let waker = Waker::from(Arc::clone(&before));
        let mut context = Context::from_waker(&waker);
        let first = catch_unwind(AssertUnwindSafe(|| stream.as_mut().poll(&mut context)));
        // A panic costs this stream and no other of the connection, whose task this is.
        if matches!(first, Ok(Poll::Pending)) {
            *stream.as_mut().project().before = Some(before);
            tokio::spawn(stream);
        }
    }
}

/// Says, from within the stream that is polled now, that its answer must have been read at `at`.
pub(super) fn read_by(at: Instant) {
    READ_BY.set(Some(at));
}

/// Wakes a stream that was polled before it had a task. It keeps the wake until the task asks, so that the task need not poll
/// at once only to leave its own waker.
#[derive(Debug, Default)]
struct BeforeTask(Mutex<Woken>);

#[derive(Debug, Default)]
enum Woken {
    #[default]
    NotYet,
    /// Not yet, and the task wants to know.
    Tell(Waker),
    Yes,
}

impl BeforeTask {
    /// Whether the stream was woken; `task` is woken later if it was not.
    fn woken_or_tell(&self, task: &Waker) -> bool {
        let mut woken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*woken, Woken::Yes) {
            return true;
        }
        *woken = Woken::Tell(task.clone());
        false
    }
}

impl Wake for BeforeTask {
    fn wake(self: Arc<Self>) {
        let mut woken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = mem::replace(&mut *woken, Woken::Yes);
        drop(woken);
        if let Woken::Tell(task) = before {
            task.wake();
        }
    }
}

pin_project! {
    /// A stream that ends, which resets it, when its reader has not taken the answer in time. An `async` block would hold
    /// the stream twice, and every call pays for moving it.
    struct Bounded<F> {
        #[pin]
        stream: F,
        limit: Option<Pin<Box<Sleep>>>,
        // Until the stream's task has to poll it.
        before: Option<Arc<BeforeTask>>,
    }
}

impl<F: Future<Output = ()>> Future for Bounded<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if let Some(before) = this.before {
            if !before.woken_or_tell(context.waker()) {
                return Poll::Pending;
            }
            *this.before = None;
        }
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
    async fn a_stream_that_is_answered_at_once_is_over_before_the_next_one_is_taken() {
        let steps = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&steps);

        Streams.execute(async move {
            seen.fetch_add(1, Ordering::Relaxed);
        });

        assert_eq!(Arc::strong_count(&steps), 1);
        assert_eq!(steps.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_stream_that_waits_goes_on_by_itself() {
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
    async fn a_stream_that_waits_is_polled_again_when_it_is_woken_and_not_before() {
        for turns_of_its_task in [0, 1, 2] {
            let polls = Arc::new(AtomicUsize::new(0));
            let (wake, mut woken) = oneshot::channel::<()>();
            let seen = Arc::clone(&polls);

            Streams.execute(std::future::poll_fn(move |context| {
                seen.fetch_add(1, Ordering::Relaxed);
                woken.poll_unpin(context).map(drop)
            }));
            for _ in 0..turns_of_its_task {
                yield_now().await;
            }
            assert_eq!(polls.load(Ordering::Relaxed), 1, "{turns_of_its_task}");
            wake.send(()).expect("the stream waits");
            for _ in 0..3 {
                yield_now().await;
            }

            assert_eq!(polls.load(Ordering::Relaxed), 2, "{turns_of_its_task}");
            assert_eq!(Arc::strong_count(&polls), 1, "it is over");
        }
    }
}
