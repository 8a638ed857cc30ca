//! One connection: TLS, preface, HTTP/2, age, drain. Every wait in it is bounded.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, error::Elapsed, sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::{
    edge::{self, Edge},
    preface::{self, Replay},
    reply,
    request_body::RequestBody,
    stream::Streams,
};
use crate::{
    caller::Caller,
    rpc::Service,
    telemetry::{Peer, metrics::Refusal},
};

/// Concurrent streams of one connection; further ones get `REFUSED_STREAM`, which is safe to retry. Proxies put the calls of many
/// clients on one connection.
const MAX_STREAMS: u32 = 1024;
/// Concurrent watches of one connection, fewer than its streams, so that watches never block its unary calls and health checks.
const MAX_WATCHES: usize = 768;
/// All header fields of one request, as HTTP/2 counts them, in bytes; the HTTP library replies to more with HTTP 431, which gRPC clients
/// report as UNKNOWN. The edge rejects less than that with a status. Method, scheme, authority and path are included.
const MAX_HEADER_BYTES: u32 = (64 + 2) * 1024;
/// Fits a message of the maximum size, so a well-behaved client never waits for a window update.
const STREAM_WINDOW: u32 = 128 * 1024;
/// Bounds the unread request bytes of one connection.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of a reply that wait in one stream for a client that does not read its connection; at most one frame more.
const SEND_BUFFER: usize = 2 * reply::MAX_FRAME_BYTES;
/// Streams that the client may reset before they are accepted; beyond that the connection ends with `ENHANCE_YOUR_CALM`. Not
/// below [`MAX_STREAMS`], because a client may cancel all its streams at once.
const MAX_REMOTE_RESETS: usize = MAX_STREAMS as usize;
/// Streams that the server may reset for protocol errors of the client; beyond that the connection ends likewise.
const MAX_LOCAL_RESETS: usize = 256;
/// Auxiliary streams that every connection may open regardless of other connections: a health check and a health watch.
const RESERVED_AUXILIARY_STREAMS: usize = 2;
/// The time that a connection without a complete preface has left once a drain has begun: enough for bytes in transit.
const DRAIN_PREFACE_TIMEOUT: Duration = Duration::from_millis(200);

/// Serves one connection to its end.
///
/// # Errors
/// [`Refusal`] when it ends before HTTP/2.
pub(super) async fn serve<S: Service>(
    socket: std::net::TcpStream,
    peer: SocketAddr,
    edge: Arc<Edge<S>>,
) -> Result<(), Refusal> {
    let socket = TcpStream::from_std(socket).map_err(|_| Refusal::Closed)?;
    let connection = Caller::Connection(fastrand::u64(..));
    match &edge.shared.tls {
        None => read_preface_and_serve(socket, peer, connection, &edge).await,
        Some(tls) => {
            // Boxed, as is the preface below, to free its memory for the rest of the connection's life.
            let handshake = Box::pin(timeout(
                edge.shared.options.timings.handshake_timeout,
                tls.handshake(socket, peer),
            ));
            let io = before_drain(handshake, &edge.shared.go_away).await?;
            let caller = client_certificate(&io).unwrap_or(connection);
            read_preface_and_serve(io, peer, caller, &edge).await
        }
    }
}

async fn read_preface_and_serve<S: Service, I>(
    io: I,
    peer: SocketAddr,
    caller: Caller,
    edge: &Arc<Edge<S>>,
) -> Result<(), Refusal>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limit = edge.shared.options.timings.preface_timeout;
    let preface = Box::pin(timeout(limit, preface::read(io)));
    let io = before_drain(preface, &edge.shared.go_away).await?;
    serve_http2(io, peer, caller, edge).await;
    Ok(())
}

/// The caller that the client certificate identifies, if any.
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

/// Awaits `event`, but not beyond [`DRAIN_PREFACE_TIMEOUT`] after the GOAWAY of a drain.
async fn before_drain<T>(
    event: impl Future<Output = Result<Result<T, Refusal>, Elapsed>>,
    go_away: &CancellationToken,
) -> Result<T, Refusal> {
    tokio::select! {
        biased;
        output = event => output.unwrap_or(Err(Refusal::Timeout)),
        () = async { go_away.cancelled().await; sleep(DRAIN_PREFACE_TIMEOUT).await } => Err(Refusal::Timeout),
    }
}

async fn serve_http2<S: Service, I>(
    io: Replay<I>,
    peer: SocketAddr,
    caller: Caller,
    edge: &Arc<Edge<S>>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let timings = &edge.shared.options.timings;
    let go_away = &edge.shared.go_away;
    let aged = CancellationToken::new();
    let connection = Arc::new(edge::Connection {
        peer: Arc::new(Peer::new(peer)),
        caller,
        auxiliary: Arc::new(Semaphore::new(RESERVED_AUXILIARY_STREAMS)),
        watches: Arc::new(Semaphore::new(MAX_WATCHES)),
        aged: aged.clone(),
    });
    let service = service_fn(|request: Request<Incoming>| {
        let (edge, connection) = (Arc::clone(edge), Arc::clone(&connection));
        // Boxed, because each future that it passes through would hold a copy, and every call would pay for moving it.
        let request = Box::new(request.map(|body| RequestBody::new(body, &edge.shared.discarded)));
        async move { Ok::<_, Infallible>(edge.handle(&connection, request).await) }
    });
    let streams = Streams {
        go_away: Arc::new(go_away.clone()),
    };
    let mut connection = pin!(
        http2::Builder::new(streams)
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(MAX_REMOTE_RESETS)
            .max_local_error_reset_streams(MAX_LOCAL_RESETS)
            .keep_alive_interval(timings.keepalive_interval)
            .keep_alive_timeout(timings.keepalive_timeout)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(io), service)
    );
    let has_max_age = !timings.max_connection_age.is_zero();
    let mut age = pin!(sleep(with_jitter(timings.max_connection_age)));
    let mut draining = false;
    let mut is_old = false;
    loop {
        tokio::select! {
            biased;
            // An error comes from the client or the network; the calls that it ends are counted as cancelled.
            _ = connection.as_mut() => return,
            () = go_away.cancelled(), if !draining => {
                connection.as_mut().graceful_shutdown();
                draining = true;
            }
            () = age.as_mut(), if has_max_age => {
                if is_old {
                    return;
                }
                connection.as_mut().graceful_shutdown();
                aged.cancel();
                is_old = true;
                age.as_mut().reset(Instant::now() + timings.max_connection_age_grace);
            }
        }
    }
}

/// `age`, longer or shorter by up to 10 %, so that connections opened together do not end together.
fn with_jitter(age: Duration) -> Duration {
    age.mul_f64(0.9 + 0.2 * fastrand::f64())
}
