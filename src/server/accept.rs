//! The accept loop. One loop for all workers: it spreads connections evenly, which the kernel's hash with `SO_REUSEPORT` does not, and
//! a second process on the same port fails loudly instead of taking half of the connections.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, sleep},
};

use super::worker::Worker;
use crate::{rpc::Service, telemetry::metrics::Metrics};

/// The pause after the first failed accept; it doubles up to [`MAX_PAUSE`] with each further failure in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// At most one log line per interval reports that connections cannot be accepted.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Accepts connections within the connection limit and distributes them over the workers.
pub(super) struct Acceptor<S> {
    pub(super) workers: Vec<Worker<S>>,
    /// One permit per connection.
    pub(super) connections: Arc<Semaphore>,
    pub(super) metrics: Arc<Metrics>,
}

impl<S: Service> Acceptor<S> {
    /// Accepts the listener's connections until the future is dropped.
    pub(super) async fn accept_from(&self, listener: &TcpListener) -> Infallible {
        let mut pause = FIRST_PAUSE;
        let mut logged: Option<Instant> = None;
        loop {
            match accept(listener).await {
                Ok((socket, peer)) => {
                    pause = FIRST_PAUSE;
                    self.dispatch(socket, peer);
                }
                Err(error) if is_connection_error(&error) => {}
                // Out of descriptors or memory. The waiting connection stays in the queue, so without a pause this loop
                // would take a whole core.
                Err(error) => {
                    if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                        tracing::error!(%error, "cannot accept connections; retrying");
                        logged = Some(Instant::now());
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    /// Accepts the connections that the kernel has already completed, and closes the listener.
    pub(super) fn close(&self, listener: TcpListener) {
        // Calls accept(2) itself, because the runtime may not have seen the last connections yet. A connection that the kernel
        // completes between the last accept and the close is reset before it carries a call.
        let Ok(pending) = listener.into_std() else {
            return;
        };
        loop {
            match pending.accept() {
                Ok((socket, peer)) => self.dispatch(socket, peer),
                Err(error) if is_connection_error(&error) => {}
                Err(_) => return,
            }
        }
    }

    /// Hands a connection to the worker with the fewest, or closes it if the limit is reached.
    fn dispatch(&self, socket: std::net::TcpStream, peer: SocketAddr) {
        let permit = Arc::clone(&self.connections).try_acquire_owned();
        let worker = self
            .workers
            .iter()
            .min_by_key(|worker| worker.connections());
        // TCP_NODELAY: with Nagle's algorithm a reply waits for the peer's delayed ACK of the previous one (40 ms).
        let prepared = socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_nodelay(true));
        match (permit, worker, prepared) {
            (Ok(permit), Some(worker), Ok(())) => {
                worker.serve(socket, peer, permit, &self.metrics);
            }
            _ => {
                self.metrics.connections_refused.inc();
            }
        }
    }
}

/// The next connection, detached from this runtime so that a worker can register it with its own.
async fn accept(listener: &TcpListener) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let (socket, peer) = listener.accept().await?;
    Ok((socket.into_std()?, peer))
}

/// Whether a failed accept concerns one connection only, which ended before it was accepted.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}
