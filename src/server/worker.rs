//! The worker threads. Each has a single-threaded runtime, its own service (with its own pool of upstream connections), and the
//! connections that the accept loop hands to it. A multi-threaded runtime costs up to twice the CPU per call, because every reply
//! becomes a separate write.

use std::{io, net::SocketAddr, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::{OwnedSemaphorePermit, oneshot},
};
use tokio_util::task::TaskTracker;

use super::{connection, edge::Edge};
use crate::{lateness, rpc::Service, supervise::Task, telemetry::metrics::Counted};

/// Events taken per `epoll_wait`. Few at a time let a call finish while its data is still in the CPU cache.
const EVENTS_PER_POLL: usize = 8;

/// One worker, as the accept loop sees it.
pub(super) struct Worker<S> {
    handle: Handle,
    edge: Arc<Edge<S>>,
    connections: TaskTracker,
    stop: oneshot::Sender<()>,
    stopped: oneshot::Receiver<()>,
}

impl<S: Service> Worker<S> {
    /// Starts the thread.
    pub(super) fn start(index: usize, edge: Edge<S>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_io_events_per_tick(EVENTS_PER_POLL)
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stop_requested) = oneshot::channel::<()>();
        let (running, stopped) = oneshot::channel::<()>();
        let metrics = Arc::clone(&edge.shared.sinks.metrics);
        thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stop_requested => {}
                        never = metrics.background.supervise(Task::Lateness, lateness::measure) => match never {},
                    }
                });
                runtime.shutdown_background();
                drop(running);
            })?;
        Ok(Self {
            handle,
            edge: Arc::new(edge),
            connections: TaskTracker::new(),
            stop,
            stopped,
        })
    }

    /// The number of open connections.
    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Serves a connection on this worker.
    pub(super) fn serve(
        &self,
        socket: std::net::TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) {
        let edge = Arc::clone(&self.edge);
        let metrics = Arc::clone(&edge.shared.sinks.metrics);
        let counted = Counted::new(&metrics.connections);
        self.connections.spawn_on(
            async move {
                let _held = (permit, counted);
                if let Err(reason) = connection::serve(socket, peer, edge).await {
                    metrics.connection_refused(reason);
                }
            },
            &self.handle,
        );
    }

    /// Waits until no connection is open; no new one may be served.
    pub(super) async fn drained(&self) {
        self.connections.close();
        self.connections.wait().await;
    }

    /// Ends the thread and drops its connections.
    pub(super) async fn stop(self) {
        drop(self.stop);
        let _ = self.stopped.await;
    }
}
