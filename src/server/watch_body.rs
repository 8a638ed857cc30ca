//! The response body of a watch, and the end of watches.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderMap;
use http_body::Frame;
use tokio::time::sleep;
use tonic::Code;

use super::{
    message,
    reply::{self, MAX_FRAME_BYTES},
    stream,
};
use crate::{
    call::Call,
    error::Error,
    status::Failure,
    telemetry::{
        Progress,
        metrics::{Counted, Metrics, WatchEnd},
    },
    watch::{Item, WatchStream},
};

/// The first byte of every message. The HTTP library takes one piece of data before it has room for it, and asks for the next one when the
/// first has been sent: the content of a message is chosen only then.
const UNCOMPRESSED: &[u8] = &[0];

/// The body of a watch.
pub(super) struct WatchBody {
    stream: WatchStream,
    /// Resolves with the error that ends the watch from outside.
    ending: BoxFuture<'static, Error>,
    /// That error, once `ending` has resolved.
    ended: Option<Error>,
    /// The first byte of a message was handed over.
    has_begun: bool,
    /// The rest of the message that is being sent.
    data: Bytes,
    open: OpenWatch,
    call: Box<Call>,
}

impl WatchBody {
    pub(super) fn new(
        call: Box<Call>,
        stream: WatchStream,
        ending: BoxFuture<'static, Error>,
        open: OpenWatch,
    ) -> Self {
        Self {
            stream,
            ending,
            ended: None,
            has_begun: false,
            data: Bytes::new(),
            open,
            call,
        }
    }

    /// The next frame: the first byte of a message, its rest, or the trailers, which come last.
    pub(super) fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Frame<Bytes>> {
        stream::set_watch(true);
        if self.has_begun {
            self.has_begun = false;
            let parts = self.stream.message(context);
            let progress = Arc::clone(self.stream.progress());
            self.call.record.progress = Some(progress);
            self.call.record.messages += 1;
            self.data = message::join_parts(&parts).split_off(UNCOMPRESSED.len());
        }
        if self.data.is_empty() {
            // Both register for their next event.
            let item = self.stream.poll_next(context);
            if self.ended.is_none()
                && let Poll::Ready(error) = self.ending.as_mut().poll(context)
            {
                self.ended = Some(error);
            }
            match (item, self.ended.take()) {
                (Poll::Ready(Item::Message), ended) => {
                    self.ended = ended;
                    self.has_begun = true;
                    // Until the next poll it is unknown whether there is room.
                    stream::set_watch(false);
                    self.call.record.bytes += UNCOMPRESSED.len() as u64;
                    return Poll::Ready(Frame::data(Bytes::from_static(UNCOMPRESSED)));
                }
                (Poll::Ready(Item::End(Ok(()))), _) => {
                    self.open.end_with(WatchEnd::Over);
                    return Poll::Ready(Frame::trailers(reply::ok_trailers(&mut self.call)));
                }
                (Poll::Ready(Item::End(Err(error))), _) => {
                    return Poll::Ready(Frame::trailers(self.fail(&error)));
                }
                (Poll::Pending, Some(error)) => {
                    return Poll::Ready(Frame::trailers(self.fail(&error)));
                }
                (Poll::Pending, None) => return Poll::Pending,
            }
        }
        let frame = self.data.split_to(self.data.len().min(MAX_FRAME_BYTES));
        self.call.record.bytes += frame.len() as u64;
        Poll::Ready(Frame::data(frame))
    }

    fn fail(&mut self, error: &Error) -> HeaderMap {
        self.open.end(error, self.stream.is_stale(), &mut self.call);
        let mut trailers = HeaderMap::new();
        let failure = Failure::from_error(error);
        reply::write_trailers(&failure, &mut trailers, &mut self.call);
        trailers
    }
}

/// Counts a watch while it is open, and why it ended.
pub(super) struct OpenWatch {
    metrics: Arc<Metrics>,
    _counted: Counted,
    has_ended: bool,
}

impl OpenWatch {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            _counted: Counted::new(&metrics.watches),
            metrics,
            has_ended: false,
        }
    }

    /// Counts an end with this error, and records what the poll showed that brought it.
    pub(super) fn end(&mut self, error: &Error, is_stale: bool, call: &mut Call) {
        if let Error::Upstream(lookup) = error {
            let progress = Progress::finished(lookup.facts.clone());
            call.record.progress = Some(progress);
        }
        self.end_with(match error {
            Error::DeadlineExceeded => WatchEnd::Deadline,
            Error::WatchExpired { .. } => WatchEnd::Expired,
            Error::ShuttingDown { .. } => WatchEnd::Drain,
            Error::Protocol(Code::Cancelled, _) => WatchEnd::Cancelled,
            _ if is_stale => WatchEnd::Stale,
            _ => WatchEnd::Error,
        });
    }

    fn end_with(&mut self, cause: WatchEnd) {
        self.has_ended = true;
        self.metrics.watch_ended(cause);
    }
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        if !self.has_ended {
            self.metrics.watch_ended(match stream::is_unread() {
                true => WatchEnd::Unread,
                false => WatchEnd::Cancelled,
            });
        }
    }
}

/// Spreads the ends of watches evenly over a part of the drain.
#[derive(Debug)]
pub(super) struct WatchDrain {
    span: Duration,
    next: AtomicU64,
}

/// The fractional part of the golden ratio. Its multiples fill an interval evenly, however many there are.
const GOLDEN: f64 = 0.618_033_988_749_895;

impl WatchDrain {
    pub(super) fn new(span: Duration) -> Arc<Self> {
        Arc::new(Self {
            span,
            next: AtomicU64::new(fastrand::u64(..1000)),
        })
    }

    /// Waits for the end of one watch.
    pub(super) async fn wait(&self) {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let part = (index as f64 * GOLDEN).fract();
        sleep(self.span.mul_f64(part)).await;
    }
}
