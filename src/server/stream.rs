//! Runs the HTTP library's future of each HTTP/2 stream, and resets a stream whose reply is not read in time.
//!
//! The library waits without limit for a client that opens no window for the reply. The reply sets its read deadline in a
//! thread-local cell while the stream is polled; only a stream that is still pending after that poll pays for a timer.
//!
//! A watch has no read deadline, because it may be silent. The library takes the first byte of a message, and asks for the rest when that byte
//! had room. Until then the time runs within which the client must read. A drain shortens it, because the watch cannot end without room either.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// How long a message of a watch may wait for room.
const MAX_UNREAD: Duration = Duration::from_secs(60);
/// How long a message may wait for room during a drain.
const MAX_UNREAD_IN_DRAIN: Duration = Duration::from_secs(1);

thread_local! {
    static READ: Cell<Read> = const { Cell::new(Read::Unasked) };
    static UNREAD: Cell<bool> = const { Cell::new(false) };
}

/// What a reply set while its stream was polled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Read {
    /// It was not asked for data.
    #[default]
    Unasked,
    /// The client must have read it by then.
    By(Instant),
    /// It is a watch.
    Watch {
        /// No message waits for room.
        has_room: bool,
    },
}

/// Spawns streams on the runtime of the worker that polls the connection.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    /// Cancelled when a drain sends GOAWAY. Shared by the streams of one connection.
    pub(super) go_away: Arc<CancellationToken>,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let mut stream = Box::pin(Bounded {
            stream,
            read_timer: None,
            is_watch: false,
            go_away: Arc::clone(&self.go_away),
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
    READ.set(Read::By(at));
}

/// Marks the stream that is being polled as a watch. `has_room`: no message waits for room.
pub(super) fn set_watch(has_room: bool) {
    READ.set(Read::Watch { has_room });
}

/// Whether the stream that is being dropped is reset because its client did not read.
pub(super) fn is_unread() -> bool {
    UNREAD.get()
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
        is_watch: bool,
        go_away: Arc<CancellationToken>,
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
        // A stream that panicked may have left a value.
        READ.set(Read::Unasked);
        UNREAD.set(false);
        let done = this.stream.poll(context);
        let read = READ.take();
        if done.is_ready() {
            return Poll::Ready(());
        }
        match read {
            Read::By(at) => *this.read_timer = Some(Box::pin(sleep_until(at))),
            Read::Watch { has_room: true } => {
                *this.is_watch = true;
                *this.read_timer = None;
            }
            Read::Unasked if !*this.is_watch => {}
            Read::Watch { has_room: false } | Read::Unasked => {
                *this.is_watch = true;
                let wait = match this.go_away.is_cancelled() {
                    true => MAX_UNREAD_IN_DRAIN,
                    false => MAX_UNREAD,
                };
                let at = Instant::now() + wait;
                if !matches!(this.read_timer, Some(timer) if timer.deadline() <= at) {
                    *this.read_timer = Some(Box::pin(sleep_until(at)));
                }
            }
        }
        let Some(timer) = this.read_timer else {
            return Poll::Pending;
        };
        ready!(timer.as_mut().poll(context));
        // The stream is dropped next.
        UNREAD.set(true);
        Poll::Ready(())
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
    use tokio::{
        sync::{Notify, oneshot},
        task::yield_now,
        time::sleep,
    };

    use super::*;

    fn streams() -> Streams {
        Streams {
            go_away: Arc::default(),
        }
    }

    #[tokio::test]
    async fn a_stream_that_completes_at_once_needs_no_task() {
        let steps = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&steps);

        streams().execute(async move {
            seen.fetch_add(1, Ordering::Relaxed);
        });

        assert_eq!(Arc::strong_count(&steps), 1);
        assert_eq!(steps.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_stream_that_waits_completes_as_a_task() {
        let steps = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&steps);

        streams().execute(async move {
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

            streams().execute(std::future::poll_fn(move |context| {
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

    /// A watch that has room for a message `polls` times, and then none.
    fn watch(
        polls: usize,
    ) -> (
        impl Future<Output = ()> + Send,
        Arc<Notify>,
        oneshot::Receiver<bool>,
    ) {
        struct Dropped(Option<oneshot::Sender<bool>>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                let sender = self.0.take().expect("dropped once");
                let _ = sender.send(is_unread());
            }
        }
        let (sender, dropped) = oneshot::channel();
        let message = Arc::new(Notify::new());
        let next = Arc::clone(&message);
        let mut left = polls;
        let watch = async move {
            let _dropped = Dropped(Some(sender));
            loop {
                if left > 0 {
                    left -= 1;
                    set_watch(true);
                }
                next.notified().await;
            }
        };
        (watch, message, dropped)
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_is_reset_when_a_message_has_had_no_room_for_a_minute() {
        let (stream, message, dropped) = watch(2);
        streams().execute(stream);
        // Silence is no reason: there is no message without room.
        sleep(Duration::from_secs(3600)).await;
        message.notify_one();
        sleep(Duration::from_secs(3600)).await;
        let begun = Instant::now();

        for _ in 0..5 {
            message.notify_one();
            sleep(Duration::from_secs(10)).await;
        }

        assert_eq!(dropped.await, Ok(true));
        assert_eq!(begun.elapsed().as_secs(), MAX_UNREAD.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_whose_first_message_has_no_room_is_reset_after_a_minute() {
        let begun = Instant::now();
        let (stream, _message, dropped) = watch(0);

        streams().execute(async move {
            set_watch(false);
            stream.await;
        });

        assert_eq!(dropped.await, Ok(true));
        assert_eq!(begun.elapsed().as_secs(), MAX_UNREAD.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_a_second_for_a_watch_without_room() {
        let streams = streams();
        let (stream, message, dropped) = watch(1);
        streams.execute(stream);
        message.notify_one();
        sleep(Duration::from_secs(10)).await;
        let begun = Instant::now();

        streams.go_away.cancel();
        message.notify_one();

        assert_eq!(dropped.await, Ok(true));
        assert_eq!(begun.elapsed(), MAX_UNREAD_IN_DRAIN);
    }

    #[tokio::test(start_paused = true)]
    async fn room_for_a_message_ends_the_wait() {
        let (stream, message, mut dropped) = watch(usize::MAX);
        streams().execute(stream);

        for _ in 0..100 {
            message.notify_one();
            sleep(Duration::from_secs(10)).await;
        }

        assert!(dropped.try_recv().is_err(), "the watch is open");
    }
}
