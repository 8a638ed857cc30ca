//! The accept loop. One loop for all workers: it spreads connections evenly, which the kernel's hash with `SO_REUSEPORT` does not, and
//! a second process on the same port fails loudly instead of taking half of the connections.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use tokio::net::TcpListener;

use super::{edge::Shared, worker::Worker};
use crate::{
    accept::{Accept, is_connection_error, without_mapping},
    rpc::Service,
    telemetry::metrics::Refusal,
};

/// Accepts connections within the connection limit and distributes them over the workers.
pub(super) struct Acceptor<S> {
    pub(super) workers: Vec<Worker<S>>,
    pub(super) shared: Arc<Shared>,
}

impl<S: Service> Acceptor<S> {
    /// Accepts the listener's connections until the future is dropped.
    pub(super) async fn accept_from(&self, listener: &TcpListener) -> Infallible {
        let mut accept = Accept::new("grpc");
        loop {
            let (socket, peer) = accept.next(listener).await;
            // Detached from this runtime, so that a worker can register it with its own.
            if let Ok(socket) = socket.into_std() {
                self.dispatch(socket, peer);
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
                Ok((socket, peer)) => self.dispatch(socket, without_mapping(peer)),
                Err(error) if is_connection_error(&error) => {}
                Err(_) => return,
            }
        }
    }

    /// Hands a connection to the worker with the fewest, or closes it if the limit is reached.
    fn dispatch(&self, socket: std::net::TcpStream, peer: SocketAddr) {
        let permit = Arc::clone(&self.shared.connections).try_acquire_owned();
        let worker = self
            .workers
            .iter()
            .min_by_key(|worker| worker.connections());
        // TCP_NODELAY: with Nagle's algorithm a reply waits for the peer's delayed ACK of the previous one (40 ms).
        let prepared = socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_nodelay(true));
        let metrics = &self.shared.sinks.metrics;
        match (permit, worker, prepared) {
            (Ok(permit), Some(worker), Ok(())) => {
                worker.serve(socket, peer, permit);
            }
            (_, _, Err(_)) => metrics.connection_refused(Refusal::Closed),
            _ => metrics.connection_refused(Refusal::Limit),
        }
    }
}
