//! Accepts TCP connections, and keeps a listener going while the process lacks descriptors or memory.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};

/// The pause after the first failed accept; it doubles up to [`MAX_PAUSE`] with each further failure in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Failures are logged once per interval.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Accepts the connections of one listener.
#[derive(Debug)]
pub struct Accept {
    purpose: &'static str,
    logged: Option<Instant>,
}

impl Accept {
    /// For a listener with this purpose, which log lines name.
    pub fn new(purpose: &'static str) -> Self {
        Self {
            purpose,
            logged: None,
        }
    }

    /// The next connection. The future may be dropped.
    pub async fn next(&mut self, listener: &TcpListener) -> (TcpStream, SocketAddr) {
        let mut pause = FIRST_PAUSE;
        loop {
            match listener.accept().await {
                Ok(accepted) => return accepted,
                Err(error) if is_connection_error(&error) => {}
                // Out of descriptors or memory. The waiting connection stays in the queue, so without a pause this loop would take a
                // whole core.
                Err(error) => {
                    if self.logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                        let purpose = self.purpose;
                        tracing::error!(%error, purpose, "cannot accept connections; retrying");
                        self.logged = Some(Instant::now());
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }
}

/// Whether a failed accept concerns one connection only, which ended before it was accepted.
pub fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}
