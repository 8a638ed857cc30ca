//! The gRPC server: accept loop, TLS, limits, drain, and the checks and the reply of every call.
//!
//! It uses the generated types, `Status`, health and reflection of tonic, but not tonic's server, which lacks guarantees that callers
//! rely on here: `DEADLINE_EXCEEDED` as the reply to an expired deadline, a drain of bounded length, a maximum connection age that
//! spares calls in flight, bounded handshakes, a connection limit, certificate reload.
//!
//! ```text
//! main thread: accept loop, health, certificates, drain      accept.rs health.rs tls.rs mod.rs
//!   | each socket goes to the worker with the fewest connections
//! worker thread, one runtime each                            worker.rs
//!   connection: TLS -> preface -> HTTP/2 -> age, GOAWAY       connection.rs preface.rs stream.rs
//!     call: checks, deadline, permit, message -> handler      edge.rs message.rs request_body.rs
//!           <- status, body, record                           reply.rs watch_body.rs
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
mod request_body;
mod stream;
#[cfg(test)]
mod tests;
pub mod tls;
mod watch_body;
mod worker;

use std::{fmt, io, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;

pub use options::{Options, Timings};

use self::{
    accept::Acceptor,
    edge::{Edge, Shared},
    health::HealthState,
    request_body::Discarded,
    tls::Tls,
    watch_body::WatchDrain,
    worker::Worker,
};
use crate::{fair_limit::FairLimit, rpc::Service, supervise::Task, telemetry::Sinks};

/// Cap of the part of the shutdown grace that is reserved for replies to calls that are cut off, and for ending the workers.
const MAX_CUT_OFF_TIME: Duration = Duration::from_millis(500);

/// The longest time over which a drain spreads the ends of watches, so that their clients do not return to other replicas at once.
const MAX_WATCH_DRAIN: Duration = Duration::from_secs(10);

/// Why the server did not start.
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

/// The gRPC server: its listener and its workers, started and not yet accepting connections.
pub struct Server<S> {
    listener: TcpListener,
    acceptor: Acceptor<S>,
    health: HealthState,
    cut_off: CancellationToken,
}

impl<S> fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl<S: Service> Server<S> {
    /// Loads the certificates and starts one worker for each of `services`. `serving` always holds the health status, for
    /// `/readyz`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn start(
        listener: std::net::TcpListener,
        options: Options,
        services: Vec<S>,
        serving: watch::Sender<bool>,
        sinks: Arc<Sinks>,
    ) -> Result<Self, Error> {
        let tls = match &options.tls {
            Some(files) => Some(Tls::load(files.clone(), &sinks.metrics)?),
            None => None,
        };
        let health = HealthState::new(serving).await;
        let watch_drain = (options.shutdown_grace / 2).min(MAX_WATCH_DRAIN);
        sinks.metrics.watches_limit.set(options.max_watches as i64);
        let shared = Arc::new(Shared {
            tls,
            routes: health.routes(options.reflection),
            connections: Arc::new(Semaphore::new(options.max_connections)),
            in_flight: FairLimit::new(options.max_in_flight),
            watches: FairLimit::new(options.max_watches),
            watch_drain: WatchDrain::new(watch_drain),
            auxiliary_permits: Arc::new(Semaphore::new(options.max_connections)),
            discarded: Arc::new(Discarded::new(options.timings.late_data_timeout)),
            go_away: CancellationToken::new(),
            options,
            sinks,
        });
        let cut_off = CancellationToken::new();
        let start_worker = |(index, service)| {
            let edge = Edge {
                service,
                cut_off: cut_off.child_token(),
                shared: Arc::clone(&shared),
            };
            Worker::start(index, edge)
        };
        let workers: io::Result<Vec<_>> =
            services.into_iter().enumerate().map(start_worker).collect();
        let acceptor = Acceptor {
            workers: workers.map_err(Error::Worker)?,
            shared,
        };
        listener.set_nonblocking(true).map_err(Error::Listener)?;
        Ok(Self {
            listener: TcpListener::from_std(listener).map_err(Error::Listener)?,
            acceptor,
            health,
            cut_off,
        })
    }

    /// Serves until `shutdown`, then drains: `NOT_SERVING`, `drain_delay`, GOAWAY, calls in flight finish. Returns at most
    /// `shutdown_grace` after GOAWAY, even if clients misbehave. `ready` holds whether the first credential is available.
    pub async fn run(self, mut ready: watch::Receiver<bool>, shutdown: impl Future<Output = ()>) {
        let Self {
            listener,
            acceptor,
            health,
            cut_off,
        } = self;
        let shared = Arc::clone(&acceptor.shared);
        let options = &shared.options;
        let is_ready = *ready.borrow_and_update();
        health.set(is_ready).await;
        let background = &shared.sinks.metrics.background;
        let accept = || acceptor.accept_from(&listener);
        let follow_ready = || health.follow(ready.clone());
        let follow_files = || tls::follow(shared.tls.as_ref());
        tokio::select! {
            biased;
            () = shutdown => {}
            never = background.supervise(Task::Accept, accept) => match never {},
            never = background.supervise(Task::Health, follow_ready) => match never {},
            never = background.supervise(Task::Certificates, follow_files) => match never {},
        }

        health.set(false).await;
        tokio::select! {
            never = acceptor.accept_from(&listener) => match never {},
            () = sleep(options.drain_delay) => {}
        }
        acceptor.close(listener);
        let workers = acceptor.workers;
        shared.go_away.cancel();
        shared.discarded.cancel();
        let end = Instant::now() + options.shutdown_grace;
        // Calls that outlive the grace period get a reply in its last moments, and the exit comes before its end.
        let cut_off_time = (options.shutdown_grace / 10).min(MAX_CUT_OFF_TIME);
        health.end_watches().await;
        let drained = || join_all(workers.iter().map(Worker::drained));
        if timeout_at(end - cut_off_time, drained()).await.is_err() {
            tracing::warn!(
                connections = options.max_connections - shared.connections.available_permits(),
                calls = shared.in_flight.held(),
                "cut off at the end of the shutdown grace"
            );
            cut_off.cancel();
            let _ = timeout_at(end - cut_off_time / 2, drained()).await;
        }
        // A worker ends at once unless something on it blocks, which must not delay the exit.
        let stopping = join_all(workers.into_iter().map(Worker::stop));
        let _ = timeout_at(end - cut_off_time / 4, stopping).await;
    }
}
