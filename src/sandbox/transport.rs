//! Serves one connection: with hyper for valid responses, with the bare socket for all others.

use std::{error::Error as _, future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{sleep, timeout},
};

use super::SharedState;

/// Longest time until the end of a request's head, including idle time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause before each dribbled byte.
const DRIBBLE: Duration = Duration::from_millis(250);

/// Longest time to dribble a response.
const DRIBBLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause before a reset, so that the client reads the bytes sent before it, which the reset may discard.
const BEFORE_RESET: Duration = Duration::from_millis(50);

/// A response that is not valid HTTP.
#[derive(Debug, Clone, Copy)]
pub(super) enum Break {
    /// RST instead of a response.
    Reset,
    /// FIN instead of a response.
    Close,
    /// FIN before `Content-Length` bytes of body.
    CutBody,
    /// RST before `Content-Length` bytes of body.
    ResetBody,
    /// FIN before the last chunk.
    CutChunked,
    /// A chunk with an invalid size.
    BadChunk,
    /// Not HTTP.
    Garbage,
    /// Two different `Content-Length`.
    TwoLengths,
    /// 103, then the normal response.
    EarlyHints,
    /// 101 as the final response.
    SwitchingProtocols,
    /// The head, byte by byte.
    DribbleHead,
    /// The body, byte by byte.
    DribbleBody,
    /// Over 1 MiB without `Content-Length`.
    HugeChunked,
}

/// What to write to the bare socket, and how to close it. An error, because a service that returns an error makes hyper release
/// the connection without a response.
#[derive(Debug, thiserror::Error)]
#[error("the scenario takes over the connection")]
pub(super) struct Script {
    at_once: Bytes,
    dribbled: Bytes,
    reset: bool,
}

impl Break {
    /// The script for a normal response with this body.
    pub(super) fn script(self, body: &str) -> Script {
        const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
        // Shorter than the text before the instance id, so it ends at a character boundary.
        let part = &body[..16];
        let at_once = match self {
            Self::Reset | Self::Close | Self::DribbleHead => String::new(),
            Self::CutBody | Self::ResetBody => {
                format!("{OK}Content-Length: {}\r\n\r\n{part}", body.len())
            }
            Self::CutChunked => format!(
                "{OK}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{part}\r\n",
                part.len()
            ),
            Self::BadChunk => {
                format!("{OK}Transfer-Encoding: chunked\r\n\r\nxyz\r\n{body}\r\n0\r\n\r\n")
            }
            Self::Garbage => "\u{1}\u{2}220 this is not HTTP\r\n\r\n".to_owned(),
            Self::TwoLengths => format!(
                "{OK}Content-Length: {}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len(),
                part.len()
            ),
            Self::EarlyHints => format!(
                "HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n{OK}Content-Length: {}\r\n\r\n{body}",
                body.len()
            ),
            Self::SwitchingProtocols => {
                "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
                    .to_owned()
            }
            Self::DribbleBody => format!("{OK}Content-Length: {}\r\n\r\n", body.len()),
            Self::HugeChunked => {
                let filler = " ".repeat(64 * 1024);
                let chunk = format!("{:x}\r\n{filler}\r\n", filler.len());
                format!(
                    "{OK}Transfer-Encoding: chunked\r\n\r\n{}{:x}\r\n{body}\r\n0\r\n\r\n",
                    chunk.repeat(17),
                    body.len()
                )
            }
        };
        let dribbled = match self {
            Self::DribbleHead => format!("{OK}Content-Length: {}\r\n\r\n{body}", body.len()),
            Self::DribbleBody => body.to_owned(),
            _ => String::new(),
        };
        Script {
            at_once: at_once.into(),
            dribbled: dribbled.into(),
            reset: matches!(self, Self::Reset | Self::ResetBody),
        }
    }
}

/// Serves one connection until either side ends it.
pub(super) async fn serve(stream: TcpStream, shared: Arc<SharedState>) {
    let service = service_fn(|request| Box::pin(super::handle(Arc::clone(&shared), request)));
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let outcome = poll_fn(|context| connection.poll_without_shutdown(context)).await;
    let mut stream = connection.into_parts().io.into_inner();
    // Errors are ignored, because the client may close the connection at any time.
    if let Some(script) = outcome
        .as_ref()
        .err()
        .and_then(|error| error.source()?.downcast_ref::<Script>())
        && !matches!(
            timeout(DRIBBLE_TIMEOUT, run_script(script, &mut stream)).await,
            Ok(Ok(()))
        )
    {
        return;
    }
    let _ = stream.shutdown().await;
}

async fn run_script(script: &Script, stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(&script.at_once).await?;
    for byte in &script.dribbled {
        sleep(DRIBBLE).await;
        stream.write_all(&[*byte]).await?;
    }
    if script.reset {
        if !script.at_once.is_empty() {
            sleep(BEFORE_RESET).await;
        }
        stream.set_zero_linger()?;
        // The error skips the shutdown, so dropping the socket sends RST.
        return Err(std::io::ErrorKind::ConnectionReset.into());
    }
    Ok(())
}
