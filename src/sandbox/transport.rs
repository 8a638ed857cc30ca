//! One connection: hyper's HTTP/1.1 server as long as the answers are HTTP, the bare socket for everything else.

use std::{error::Error as _, future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{sleep, timeout},
};

use super::Shared;

/// For the head of a request, waiting for it on a kept connection included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two dribbled bytes, and for all of them.
const DRIBBLE: Duration = Duration::from_millis(250);
const DRIBBLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a client has to read what came before a reset: the reset itself may overtake it otherwise.
const BEFORE_RESET: Duration = Duration::from_millis(50);

/// An answer that no HTTP library would send.
#[derive(Debug, Clone, Copy)]
pub(super) enum Break {
    /// RST in place of an answer.
    Reset,
    /// FIN in place of an answer.
    Close,
    /// FIN before the body's end, as `Content-Length` tells it.
    CutBody,
    /// RST before the body's end.
    ResetBody,
    /// FIN before the last chunk.
    CutChunked,
    /// A chunk whose size is no number.
    BadChunk,
    /// Not HTTP.
    Garbage,
    /// Two different `Content-Length`.
    TwoLengths,
    /// 103, then the normal answer.
    EarlyHints,
    /// 101 as the final answer.
    SwitchingProtocols,
    /// The head, byte by byte.
    DribbleHead,
    /// The body, byte by byte.
    DribbleBody,
    /// Over 1 MiB without `Content-Length`.
    HugeChunked,
}

/// What is written to the bare socket, and how it ends. Travels as the error of hyper's service, since that is how a
/// service makes hyper let go of a connection without a word.
#[derive(Debug, thiserror::Error)]
#[error("the scenario takes over the connection")]
pub(super) struct Script {
    at_once: Bytes,
    dribbled: Bytes,
    reset: bool,
}

impl Break {
    /// The bytes to write, where `body` is the body of the normal answer.
    pub(super) fn script(self, body: &str) -> Script {
        const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
        // Up to the instance id, which is ASCII.
        let part = &body[..16];
        let at_once = match self {
            Self::Reset | Self::Close | Self::DribbleHead => String::new(),
            Self::CutBody | Self::ResetBody => {
                format!("{OK}Content-Length: {}\r\n\r\n{part}", body.len())
            }
            Self::CutChunked => format!(
                "{OK}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n",
                body.len()
            ),
            Self::BadChunk => {
                format!("{OK}Transfer-Encoding: chunked\r\n\r\nxyz\r\n{body}\r\n0\r\n\r\n")
            }
            Self::Garbage => "\u{1}\u{2}220 this is no HTTP\r\n\r\n".to_owned(),
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
pub(super) async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request| Box::pin(super::handle(Arc::clone(&shared), request)));
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let outcome = poll_fn(|context| connection.poll_without_shutdown(context)).await;
    let mut stream = connection.into_parts().io.into_inner();
    // The peer may be gone at any moment, which is its own business: what cannot be written is not written.
    if let Some(script) = outcome
        .as_ref()
        .err()
        .and_then(|error| error.source()?.downcast_ref::<Script>())
        && !matches!(
            timeout(DRIBBLE_TIMEOUT, play(script, &mut stream)).await,
            Ok(Ok(()))
        )
    {
        return;
    }
    let _ = stream.shutdown().await;
}

async fn play(script: &Script, stream: &mut TcpStream) -> std::io::Result<()> {
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
        // Without the FIN of a shutdown: dropping the socket now sends RST.
        return Err(std::io::ErrorKind::ConnectionReset.into());
    }
    Ok(())
}
