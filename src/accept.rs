//! Listens for TCP connections and accepts them, and keeps a listener going while the process lacks descriptors or memory.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use rustix::io::Errno;
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};

/// The longest accept queue; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The pause after the first failed accept; it doubles up to [`MAX_PAUSE`] with each further failure in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Failures are logged once per interval.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Listens on an address. `[::]` accepts IPv4 too, regardless of the system's default. If the kernel has no IPv6, it becomes 0.0.0.0.
///
/// # Errors
/// The error of the system.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let every_address = address.ip() == Ipv6Addr::UNSPECIFIED;
    match bind(address, every_address) {
        Err(error) if every_address && is_without_ipv6(&error) => {
            bind((Ipv4Addr::UNSPECIFIED, address.port()).into(), false)
        }
        bound => bound,
    }
}

fn bind(address: SocketAddr, dual_stack: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if dual_stack {
        socket.set_only_v6(false)?;
    }
    // A restart does not wait for old connections of the port.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether the kernel was built or started without IPv6.
fn is_without_ipv6(error: &io::Error) -> bool {
    let error = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(error, Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

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
                Ok((stream, peer)) => return (stream, without_mapping(peer)),
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

/// The address of a peer: `10.0.0.1` instead of `::ffff:10.0.0.1`, as a listener for both protocols sees it.
pub fn without_mapping(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
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
