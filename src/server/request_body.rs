//! The body of a request, whose unread rest is discarded instead of reset.
//!
//! Many calls end before their message has arrived, for example rejected ones. If the body were dropped then, the HTTP library would
//! reset the stream, and remember only the latest resets and only for a second. It counts DATA that was in transit for any other reset
//! stream as a violation by the client, and ends the connection, with all calls on it, at the 256th. So the rest of each request is
//! read and discarded while the reply goes out.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::timeout};

/// Bytes of one request that are discarded; the stream of a longer request is reset. Most clients stop when they have the reply.
const MAX_BYTES: usize = 1024 * 1024;
/// Incomplete requests of all connections after their replies, about 1.3 KiB each; one connection has at most as many as streams.
const MAX_REQUESTS: usize = 8192;

/// The body of a request. After a drop, its rest is read and discarded.
#[derive(Debug)]
pub(super) struct RequestBody {
    /// `None` only after the drop.
    incoming: Option<Incoming>,
    discarded: Arc<Discarded>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, discarded: &Arc<Discarded>) -> Self {
        Self {
            incoming: Some(incoming),
            discarded: Arc::clone(discarded),
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(incoming) = self.incoming.take() else {
            return;
        };
        if !incoming.is_end_stream() {
            let mut rest = Limited::new(incoming, MAX_BYTES);
            self.discarded
                .run(async move { while let Some(Ok(_)) = rest.frame().await {} });
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.incoming {
            Some(incoming) => Pin::new(incoming).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming
            .as_ref()
            .map_or_else(SizeHint::default, Body::size_hint)
    }
}

/// The requests whose rest is being discarded, of all connections.
#[derive(Debug)]
pub(super) struct Discarded {
    /// How long the rest of one request may take: as long as a slow network may delay it.
    timeout: Duration,
    /// At most [`MAX_REQUESTS`], the oldest first; complete ones stay behind an incomplete one. `None` after [`Self::cancel`]. A client
    /// that never completes its requests thus ends its own, which are the oldest, and not those of other clients.
    tasks: Mutex<Option<VecDeque<AbortHandle>>>,
}

impl Discarded {
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            tasks: Mutex::new(Some(VecDeque::new())),
        }
    }

    /// Resets the streams of all incomplete requests, now and from now on, so that a drain does not wait for them.
    pub(super) fn cancel(&self) {
        let tasks = self.tasks.lock().take();
        tasks.iter().flatten().for_each(AbortHandle::abort);
    }

    /// Runs `rest`, which reads a request to its end.
    fn run(&self, rest: impl Future<Output = ()> + Send + 'static) {
        let mut rest = Box::pin(rest);
        // Most requests have arrived already and need no task.
        if rest.as_mut().now_or_never().is_some() {
            return;
        }
        let mut guard = self.tasks.lock();
        let Some(tasks) = guard.as_mut() else {
            return;
        };
        while tasks.front().is_some_and(AbortHandle::is_finished) {
            tasks.pop_front();
        }
        if tasks.len() >= MAX_REQUESTS
            && let Some(oldest) = tasks.pop_front()
        {
            oldest.abort();
        }
        let task = tokio::spawn(timeout(self.timeout, rest));
        tasks.push_back(task.abort_handle());
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn incomplete_requests_end_with_their_timeout_as_the_oldest_of_too_many_or_when_cancelled()
     {
        let held = Arc::new(());
        let wait = || {
            let held = Arc::clone(&held);
            async move {
                pending::<()>().await;
                drop(held);
            }
        };
        let settled = async || {
            // Time advances when no task can run.
            tokio::time::sleep(Duration::from_millis(1)).await;
            Arc::strong_count(&held) - 1
        };
        let discarded = Discarded::new(Duration::from_secs(30));

        for _ in 0..MAX_REQUESTS + 10 {
            discarded.run(wait());
        }
        assert_eq!(settled().await, MAX_REQUESTS);
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(settled().await, 0);

        discarded.run(wait());
        assert_eq!(settled().await, 1);
        discarded.cancel();
        assert_eq!(settled().await, 0);
        discarded.run(wait());
        assert_eq!(settled().await, 0);
    }
}
