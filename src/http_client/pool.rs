//! The connections of one worker that wait for their next request.
//!
//! A response decides whether its connection is used again, so a connection comes back only after its response has been interpreted. Each
//! has a maximum age, after which a new connection looks the name up again: without it, busy connections would never reach an address that
//! the name has moved to. Ages are jittered, so that connections opened together are not replaced together.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;

/// The mean maximum age of a connection.
pub(super) const MAX_AGE: Duration = Duration::from_secs(60);

/// Ages are between 90 % and 110 % of [`MAX_AGE`].
const JITTER: f64 = 0.1;

/// Shorter than the keep-alive of common gateways (60 s and more), so that the client closes idle connections before they do.
const MAX_IDLE: Duration = Duration::from_secs(20);

/// When all responses for this long had a status of 500 or above or did not arrive in time, idle connections are closed: the peer behind them
/// may have been replaced. While other responses arrive, only the connections of those responses are closed.
const FAILING: Duration = Duration::from_secs(1);

/// Idle connections are also closed when a new connection delivers the first other response after such a status, but not more often than
/// this, because a single instance may have caused the status.
const CLEAR_INTERVAL: Duration = Duration::from_secs(10);

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) sender: SendRequest<Full<Bytes>>,
    /// Whether it has delivered a response.
    pub(super) is_used: bool,
    opened: Instant,
    expires: Instant,
}

impl Connection {
    pub(super) fn new(sender: SendRequest<Full<Bytes>>, max_age: Duration) -> Self {
        let opened = Instant::now();
        Self {
            sender,
            is_used: false,
            opened,
            expires: opened + jittered(max_age),
        }
    }
}

fn jittered(age: Duration) -> Duration {
    age.mul_f64(1.0 + JITTER * (2.0 * fastrand::f64() - 1.0))
}

#[derive(Debug)]
pub(super) struct Pool {
    /// Limit on idle connections.
    max_idle: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The most recently used connection is last, and used first.
    idle: Vec<(Connection, Instant)>,
    is_closing: bool,
    /// The first response with a status of 500 or above since the last other response. All idle connections are older.
    failing_since: Option<Instant>,
    cleared: Option<Instant>,
}

impl Pool {
    pub(super) fn new(max_idle: usize) -> Arc<Self> {
        Arc::new(Self {
            max_idle,
            state: Mutex::default(),
        })
    }

    /// A connection that is open, neither too old nor idle for too long.
    pub(super) async fn take(&self) -> Option<Connection> {
        loop {
            let (mut connection, since) = self.state.lock().pop()?;
            let is_fresh = Instant::now() < connection.expires && since.elapsed() < MAX_IDLE;
            // Fails if the peer has closed the connection.
            if is_fresh && connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection for the next request.
    pub(super) fn keep(self: &Arc<Self>, mut connection: Connection) {
        connection.is_used = true;
        let mut state = self.state.lock();
        let failing_since = state.failing_since.take();
        if failing_since.is_some_and(|since| since < connection.opened)
            && state
                .cleared
                .is_none_or(|at| at.elapsed() >= CLEAR_INTERVAL)
        {
            state.cleared = Some(Instant::now());
            state.idle.clear();
        }
        if state.idle.len() < self.max_idle {
            state.idle.push((connection, Instant::now()));
        }
        if !state.is_closing {
            state.is_closing = true;
            tokio::spawn(close_idle(Arc::downgrade(self)));
        }
    }

    /// Closes all idle connections.
    pub(super) fn clear(&self) {
        self.state.lock().idle.clear();
    }

    /// Records a response with a status of 500 or above or one that did not arrive in time, or a connection that broke although it was used
    /// before.
    pub(super) fn failed(&self) {
        self.state
            .lock()
            .failing_since
            .get_or_insert_with(Instant::now);
    }
}

impl State {
    fn pop(&mut self) -> Option<(Connection, Instant)> {
        if self
            .failing_since
            .is_some_and(|since| since.elapsed() >= FAILING)
        {
            self.idle.clear();
        }
        self.idle.pop()
    }
}

/// Closes connections that are idle for too long, until none is left.
async fn close_idle(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(MAX_IDLE / 4).await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        let mut state = pool.state.lock();
        state.idle.retain(|(connection, since)| {
            !connection.sender.is_closed() && since.elapsed() < MAX_IDLE
        });
        if state.idle.is_empty() {
            state.is_closing = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maximum_ages_are_spread_over_54_to_66_seconds() {
        let ages: Vec<_> = (0..1000).map(|_| jittered(MAX_AGE)).collect();

        let (youngest, oldest) = (ages.iter().min().unwrap(), ages.iter().max().unwrap());
        assert!(*youngest >= Duration::from_secs(54) && *oldest <= Duration::from_secs(66));
        assert!(
            *oldest - *youngest > Duration::from_secs(10),
            "{youngest:?} to {oldest:?}"
        );
    }
}
