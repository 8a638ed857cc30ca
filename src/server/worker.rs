//! The worker threads. Each has a runtime of one thread, a service of its own (so its own pool of upstream connections),
//! and the connections that the accept loop gives it. Measured, a runtime of several threads costs up to twice the CPU
//! per call, because every answer becomes a write of its own.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    runtime::{Builder, Handle},
    sync::{OwnedSemaphorePermit, oneshot, watch},
};
use tokio_util::task::TaskTracker;

use super::connection::{self, Phase, Shared};
use crate::{lateness, rpc::Service, telemetry::metrics::Metrics};

/// Sockets that are ready, taken from the kernel at once. What they wake runs before the next are taken, so a call's memory is
/// still in the processor's cache when its answer goes out: of a thousand at once, each would push the others out.
const EVENTS_AT_A_TIME: usize = 8;

/// One worker, as the accept loop sees it.
pub(super) struct Worker<S> {
    handle: Handle,
    shared: Arc<Shared<S>>,
    connections: Arc<AtomicUsize>,
    phase: watch::Sender<Phase>,
    stop: oneshot::Sender<()>,
    stopped: oneshot::Receiver<()>,
}

impl<S> fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<S: Service> Worker<S> {
    /// Starts a thread, and makes what its connections share on it, inside its runtime.
    pub(super) async fn start(
        index: usize,
        shared: impl FnOnce() -> Shared<S> + Send + 'static,
    ) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_io_events_per_tick(EVENTS_AT_A_TIME)
            .build()?;
        let handle = runtime.handle().clone();
        let (started, start) = oneshot::channel();
        let (stop, mut end) = oneshot::channel::<()>();
        let (running, stopped) = oneshot::channel::<()>();
        thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || {
                runtime.block_on(async {
                    // The accept loop may be gone already; then `end` says so too.
                    let _ = started.send(Arc::new(shared()));
                    tokio::select! {
                        _ = &mut end => {}
                        () = lateness::measure() => {}
                    }
                });
                // Without waiting for a name lookup that may hang in a helper thread.
                runtime.shutdown_background();
                drop(running);
            })?;
        let shared = start
            .await
            .map_err(|_| io::Error::other("a worker thread ended while it started"))?;
        Ok(Self {
            handle,
            shared,
            connections: Arc::default(),
            phase: watch::Sender::new(Phase::Serve),
            stop,
            stopped,
        })
    }

    /// Connections that it holds.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Serves `socket` here.
    pub(super) fn take(
        &self,
        socket: std::net::TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
        metrics: &Arc<Metrics>,
        tracker: &TaskTracker,
    ) {
        let open = Open::new(&self.connections, permit, metrics.connections.clone());
        let shared = Arc::clone(&self.shared);
        let phase = self.phase.subscribe();
        let refused = metrics.connections_refused.clone();
        tracker.spawn_on(
            async move {
                let _open = open;
                if !connection::serve(socket, peer, shared, phase).await {
                    refused.inc();
                }
            },
            &self.handle,
        );
    }

    /// Sends GOAWAY on every connection.
    pub(super) fn go_away(&self) {
        self.phase.send_replace(Phase::GoAway);
    }

    /// Ends the thread; what is still open there is dropped.
    pub(super) async fn stop(self) {
        drop(self.stop);
        let _ = self.stopped.await;
    }
}

/// One open connection, counted as long as it lives.
struct Open {
    _permit: OwnedSemaphorePermit,
    of_worker: Arc<AtomicUsize>,
    of_process: Gauge,
}

impl Open {
    fn new(of_worker: &Arc<AtomicUsize>, permit: OwnedSemaphorePermit, of_process: Gauge) -> Self {
        of_worker.fetch_add(1, Ordering::Relaxed);
        of_process.inc();
        Self {
            _permit: permit,
            of_worker: Arc::clone(of_worker),
            of_process,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.of_worker.fetch_sub(1, Ordering::Relaxed);
        self.of_process.dec();
    }
}
