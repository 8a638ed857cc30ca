//! The HTTP/2 preface: the first 24 bytes of a connection. They are read before the HTTP library sees the connection, to bound the
//! time that they may take and to close a connection of another protocol in an orderly way.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use crate::telemetry::metrics::Refusal;

/// RFC 9113, section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const NOT_HTTP2: &[u8] = b"HTTP/1.1 505 HTTP Version Not Supported\r\n\
    content-type: text/plain\r\ncontent-length: 40\r\nconnection: close\r\n\r\n\
    This port speaks gRPC over HTTP/2 only.\n";

/// The beginnings of HTTP/1.1 requests; only their clients can read [`NOT_HTTP2`].
const HTTP1: [&[u8]; 7] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"PATCH ",
    b"DELETE ",
    b"OPTIONS ",
];

/// A connection that replays the preface, which has been read already, to the HTTP library.
#[derive(Debug)]
pub(super) struct Replay<I> {
    io: I,
    replayed: usize,
}

/// Reads the preface. Another protocol gets a reply first if it is HTTP/1.1.
///
/// # Errors
/// [`Refusal`] when the peer closes the connection or speaks another protocol.
pub(super) async fn read<I>(mut io: I) -> Result<Replay<I>, Refusal>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let mut bytes = [0; PREFACE.len()];
    let mut have = 0;
    while have < PREFACE.len() {
        let read = io.read(&mut bytes[have..]).await;
        let count = read.map_err(|_| Refusal::Closed)?;
        if count == 0 {
            return Err(Refusal::Closed);
        }
        have += count;
        if bytes[..have] != PREFACE[..have] {
            let http1 = HTTP1.iter().any(|start| bytes.starts_with(start));
            close(io, if http1 { NOT_HTTP2 } else { b"" }).await;
            return Err(Refusal::Protocol);
        }
    }
    Ok(Replay { io, replayed: 0 })
}

/// Sends `reply` and waits up to 500 ms for the peer to close: closing with unread bytes would reset the connection, and the peer
/// could lose the reply.
async fn close<I: AsyncRead + AsyncWrite + Unpin>(mut io: I, reply: &[u8]) {
    const MAX_BYTES: u64 = 64 * 1024;
    let closing = async {
        io.write_all(reply).await?;
        io.shutdown().await?;
        tokio::io::copy(&mut (&mut io).take(MAX_BYTES), &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(Duration::from_millis(500), closing).await;
}

impl<I: AsyncRead + Unpin> AsyncRead for Replay<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = &PREFACE[self.replayed..];
        if rest.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        self.replayed += count;
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Replay<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
