//! One connection from its acceptance to its end: TLS, preface, HTTP/2, age, drain. Every wait in it is bounded.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::server::TlsStream;

use super::{
    Timings,
    edge::{self, Edge},
    preface::{self, Greeted},
    stream::Streams,
    tls::Tls,
};
use crate::{caller::Caller, rpc::Service, telemetry::Peer};

/// Streams of one connection at once; the excess gets `REFUSED_STREAM`, which a client may repeat.
const MAX_STREAMS: u32 = 100;
/// All headers of one request, as HTTP/2 counts them, in bytes; more is answered with HTTP 431.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// A whole message of the largest size fits, so a well-behaved caller never waits for a window.
const STREAM_WINDOW: u32 = 128 * 1024;
/// Bounds what one connection can make us hold in unread request bytes.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Streams that the peer resets before we saw them, after which the connection ends with `ENHANCE_YOUR_CALM`. A caller
/// may cancel all it has open in one go, so no lower than [`MAX_STREAMS`].
const MAX_RESET_STREAMS: usize = MAX_STREAMS as usize;
/// Streams that we reset for the peer's faults, with the same end.
const MAX_FAULTY_STREAMS: usize = 256;
/// Streams beside the task service that each connection has in any case: a health check, and one that watches.
const OWN_STREAMS: usize = 2;
/// What a connection that has not said its preface is still given once a drain has begun: enough for bytes under way.
const LAST_CALL: Duration = Duration::from_millis(200);

/// What connections have to know of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Calls are taken.
    Serve,
    /// GOAWAY: calls in flight finish, no connection outlives them.
    GoAway,
}

/// What all connections of one worker share.
pub(super) struct Shared<S> {
    pub(super) edge: Edge<S>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) timings: Timings,
}

/// Serves one connection to its end. `false` when it never became one: handshake or preface failed or took too long.
pub(super) async fn serve<S: Service>(
    socket: std::net::TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared<S>>,
    phase: watch::Receiver<Phase>,
) -> bool {
    let Ok(socket) = TcpStream::from_std(socket) else {
        return false;
    };
    let connection = Caller::Connection(fastrand::u64(..));
    match &shared.tls {
        None => greet_and_serve(socket, peer, connection, &shared, phase).await,
        Some(tls) => {
            // In boxes, here and below, which the rest of the connection's life does not keep.
            let handshake = Box::pin(timeout(
                shared.timings.handshake_timeout,
                tls.handshake(socket),
            ));
            match before_drain(handshake, phase.clone()).await {
                Some(Ok(Some(io))) => {
                    let caller = client_certificate(&io).unwrap_or(connection);
                    greet_and_serve(io, peer, caller, &shared, phase).await
                }
                _ => false,
            }
        }
    }
}

async fn greet_and_serve<S: Service, I>(
    io: I,
    peer: SocketAddr,
    caller: Caller,
    shared: &Arc<Shared<S>>,
    phase: watch::Receiver<Phase>,
) -> bool
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let greeting = Box::pin(timeout(shared.timings.preface_timeout, preface::read(io)));
    match before_drain(greeting, phase.clone()).await {
        Some(Ok(Some(io))) => {
            http2(io, peer, caller, shared, phase).await;
            true
        }
        _ => false,
    }
}

/// The caller that a client certificate stands for.
fn client_certificate(io: &TlsStream<TcpStream>) -> Option<Caller> {
    let (_, tls) = io.get_ref();
    let certificate = tls.peer_certificates()?.first()?;
    let digest = digest::digest(&digest::SHA256, certificate);
    digest
        .as_ref()
        .first_chunk()
        .copied()
        .map(Caller::Certificate)
}

/// `event`, unless a drain leaves it behind.
async fn before_drain<F: Future>(event: F, mut phase: watch::Receiver<Phase>) -> Option<F::Output> {
    tokio::select! {
        biased;
        output = event => Some(output),
        () = async { go_away(&mut phase).await; sleep(LAST_CALL).await } => None,
    }
}

/// Waits for the GOAWAY of a drain. A sender that is gone means that the process is ending, so it counts too.
async fn go_away(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::GoAway).await;
}

async fn http2<S: Service, I>(
    io: Greeted<I>,
    peer: SocketAddr,
    caller: Caller,
    shared: &Arc<Shared<S>>,
    mut phase: watch::Receiver<Phase>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let timings = &shared.timings;
    let connection = Arc::new(edge::Connection {
        peer: Arc::new(Peer::new(peer)),
        caller,
        auxiliary: Arc::new(Semaphore::new(OWN_STREAMS)),
    });
    let service = service_fn(|request| {
        let (shared, connection) = (Arc::clone(shared), Arc::clone(&connection));
        // In a box, because each future on its way would hold it once more, and every call pays for moving it.
        let request = Box::new(request);
        async move { Ok::<_, Infallible>(shared.edge.answer(&connection, request).await) }
    });
    let mut connection = pin!(
        http2::Builder::new(Streams)
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_pending_accept_reset_streams(MAX_RESET_STREAMS)
            .max_local_error_reset_streams(MAX_FAULTY_STREAMS)
            .keep_alive_interval(timings.keepalive_interval)
            .keep_alive_timeout(timings.keepalive_timeout)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(io), service)
    );
    let ages = !timings.max_connection_age.is_zero();
    let mut age = pin!(sleep(with_jitter(timings.max_connection_age)));
    let mut draining = false;
    let mut old = false;
    loop {
        tokio::select! {
            biased;
            // An error is the peer's doing or its network's; the calls that it cost are counted as theirs.
            _ = connection.as_mut() => return,
            () = go_away(&mut phase), if !draining => {
                connection.as_mut().graceful_shutdown();
                draining = true;
            }
            () = age.as_mut(), if ages => {
                if old {
                    return;
                }
                connection.as_mut().graceful_shutdown();
                old = true;
                age.as_mut().reset(Instant::now() + timings.max_connection_age_grace);
            }
        }
    }
}

/// `age`, longer or shorter by up to a tenth, so that connections opened together do not end together.
fn with_jitter(age: Duration) -> Duration {
    age.mul_f64(0.9 + 0.2 * fastrand::f64())
}
