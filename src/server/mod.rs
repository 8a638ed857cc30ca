//! The gRPC listener: accept loop, TLS, limits, drain, and what every RPC passes on its way in and out.
//!
//! tonic's own server is not used; its generated service, its `Status`, health and reflection are. That server cannot hold
//! what a caller may rely on here: a passed deadline answered as such, a drain that ends whatever peers do, an age limit
//! that spares calls in flight, bounded handshakes, a connection limit, certificates read again.
//!
//! ```text
//! main thread: accept loop, health, certificates, drain      accept.rs health.rs tls.rs mod.rs
//!   | one socket to the worker with the fewest
//! worker thread, one runtime each                            worker.rs
//!   connection: TLS -> preface -> HTTP/2 -> age, GOAWAY       connection.rs preface.rs stream.rs
//!     call: checks, deadline, permit, message -> handler      edge.rs message.rs
//!           <- status, body, record                           reply.rs
//! ```

mod accept;
mod certificate;
mod connection;
mod edge;
mod health;
mod message;
mod options;
mod preface;
mod reply;
mod stream;
#[cfg(test)]
mod tests;
pub mod tls;
mod worker;

use std::{fmt, io, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use options::{Options, Timings};

use crate::{fair_limit::FairLimit, rpc::Service, telemetry::Sinks};

/// How much of the shutdown grace is kept for telling calls that they are cut off, and for ending.
const MAX_FAREWELL: Duration = Duration::from_millis(500);

/// What the listener works with.
pub struct Parts<F> {
    /// Makes the service; called once on each worker, inside its runtime.
    pub facade: F,
    /// Whether a first credential is there.
    pub ready: watch::Receiver<bool>,
    /// Kept at whether we are SERVING, for `/readyz`.
    pub serving: watch::Sender<bool>,
    /// Where calls and connections are reported.
    pub sinks: Arc<Sinks>,
    /// Called once, when nothing can fail any more and connections are let in.
    pub started: Box<dyn FnOnce() + Send>,
}

impl<F> fmt::Debug for Parts<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

/// Why the listener did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate, key or client CA cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// The listener cannot be used.
    #[error("cannot listen: {0}")]
    Listener(#[source] io::Error),
    /// A worker thread cannot be started.
    #[error("cannot start a worker thread: {0}")]
    Worker(#[source] io::Error),
}

/// Serves until `shutdown`, then drains: `NOT_SERVING`, `drain_delay`, GOAWAY, calls in flight finish. Returns at the latest
/// `shutdown_grace` after GOAWAY, whatever peers do.
///
/// # Errors
/// Only before the first connection: see [`Error`].
pub async fn serve<S, F>(
    listener: std::net::TcpListener,
    options: Options,
    parts: Parts<F>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error>
where
    S: Service,
    F: Fn() -> S + Send + Sync + 'static,
{
    let Parts {
        facade,
        mut ready,
        serving,
        sinks,
        started,
    } = parts;
    let metrics = Arc::clone(&sinks.metrics);
    let tls = match &options.tls {
        Some(files) => Some(Arc::new(tls::Tls::load(files.clone(), &metrics)?)),
        None => None,
    };
    let health = health::Health::new(serving).await;
    let routes = health.routes(options.reflection);
    let limits = edge::Limits {
        in_flight: FairLimit::new(options.max_in_flight),
        auxiliary: Arc::new(Semaphore::new(options.max_connections)),
    };
    let cut = CancellationToken::new();
    let facade = Arc::new(facade);
    let mut workers = Vec::with_capacity(options.workers);
    for index in 0..options.workers.max(1) {
        let (facade, routes, limits, tls) = (
            Arc::clone(&facade),
            routes.clone(),
            limits.clone(),
            tls.clone(),
        );
        let (timeout, reflection, timings) =
            (options.timeout, options.reflection, options.timings.clone());
        let (cut, sinks) = (cut.child_token(), Arc::clone(&sinks));
        let shared = move || connection::Shared {
            edge: edge::Edge {
                tasks: facade(),
                auxiliary: routes,
                reflection,
                timeout,
                limits,
                cut,
                sinks,
            },
            tls,
            timings,
        };
        workers.push(
            worker::Worker::start(index, shared)
                .await
                .map_err(Error::Worker)?,
        );
    }
    listener.set_nonblocking(true).map_err(Error::Listener)?;
    let listener = TcpListener::from_std(listener).map_err(Error::Listener)?;
    let tracker = TaskTracker::new();
    let door = accept::Door {
        workers,
        connections: Arc::new(Semaphore::new(options.max_connections)),
        metrics,
        tracker: tracker.clone(),
    };

    started();
    let first = *ready.borrow_and_update();
    health.set(first).await;
    tokio::select! {
        biased;
        () = shutdown => {}
        never = door.open(&listener) => match never {},
        never = health.follow(ready) => match never {},
        never = tls::follow(tls.as_deref()) => match never {},
    }

    health.set(false).await;
    tokio::select! {
        never = door.open(&listener) => match never {},
        () = sleep(options.drain_delay) => {}
    }
    let connections = Arc::clone(&door.connections);
    let workers = door.close(listener);
    workers.iter().for_each(worker::Worker::go_away);
    let end = Instant::now() + options.shutdown_grace;
    // Calls that outlive the grace are told so in its last moments, and the exit comes before its end.
    let farewell = (options.shutdown_grace / 10).min(MAX_FAREWELL);
    health.end_watches().await;
    tracker.close();
    if timeout_at(end - farewell, tracker.wait()).await.is_err() {
        tracing::warn!(
            connections = options.max_connections - connections.available_permits(),
            calls = limits.in_flight.held(),
            "cut off at the end of the shutdown grace"
        );
        cut.cancel();
        let _ = timeout_at(end - farewell / 2, tracker.wait()).await;
    }
    // A worker ends at once unless something on it blocks, which must not hold up the exit.
    let stopping = join_all(workers.into_iter().map(worker::Worker::stop));
    let _ = timeout_at(end - farewell / 4, stopping).await;
    Ok(())
}
