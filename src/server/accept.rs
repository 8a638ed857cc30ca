//! The accept loop. One loop for all workers: the spread is even whatever the kernel's hash says, and a second process on
//! the same port fails loudly instead of taking half of the connections.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, sleep},
};
use tokio_util::task::TaskTracker;

use super::worker::Worker;
use crate::{rpc::Service, telemetry::metrics::Metrics};

/// The pause after the first failed accept; it doubles to [`MAX_PAUSE`] while they go on failing.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// At most one line per this time says that connections cannot be accepted.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Where connections go, and how many may.
#[derive(Debug)]
pub(super) struct Door<S> {
    pub(super) workers: Vec<Worker<S>>,
    pub(super) connections: Arc<Semaphore>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) tracker: TaskTracker,
}

impl<S: Service> Door<S> {
    /// Lets the listener's connections in until it is dropped.
    pub(super) async fn open(&self, listener: &TcpListener) -> Infallible {
        let mut pause = FIRST_PAUSE;
        let mut logged: Option<Instant> = None;
        loop {
            match accept(listener).await {
                Ok((socket, peer)) => {
                    pause = FIRST_PAUSE;
                    self.admit(socket, peer);
                }
                Err(error) if of_one_connection(&error) => {}
                // Out of descriptors or memory. The waiting connection stays in the queue, so without a pause this loop
                // would take a whole core.
                Err(error) => {
                    if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                        tracing::error!(%error, "cannot accept connections; will go on trying");
                        logged = Some(Instant::now());
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    /// Lets in what the kernel has already accepted, and closes the listener.
    pub(super) fn close(self, listener: TcpListener) -> Vec<Worker<S>> {
        // Asks the kernel itself: the runtime may not have heard of the last connections yet. One that the kernel completes
        // between the last answer and the close is reset before it has said a word, so no call is lost with it.
        let Ok(pending) = listener.into_std() else {
            return self.workers;
        };
        loop {
            match pending.accept() {
                Ok((socket, peer)) => self.admit(socket, peer),
                Err(error) if of_one_connection(&error) => {}
                Err(_) => break,
            }
        }
        self.workers
    }

    fn admit(&self, socket: std::net::TcpStream, peer: SocketAddr) {
        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            self.metrics.connections_refused.inc();
            return;
        };
        let worker = self
            .workers
            .iter()
            .min_by_key(|worker| worker.connections());
        // Without the second an answer waits for the acknowledgement of the one before: 40 ms.
        let prepared = socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_nodelay(true));
        match (prepared, worker) {
            (Ok(()), Some(worker)) => {
                worker.take(socket, peer, permit, &self.metrics, &self.tracker);
            }
            _ => {
                self.metrics.connections_refused.inc();
            }
        }
    }
}

/// The next connection, taken out of this runtime: a worker will put it into its own.
async fn accept(listener: &TcpListener) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let (socket, peer) = listener.accept().await?;
    Ok((socket.into_std()?, peer))
}

/// Whether a failed accept concerns one connection only, which ended before we had it.
fn of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}
