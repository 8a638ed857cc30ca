//! The one message of a unary call, read whole and under a limit before anything looks into it.
//!
//! gRPC over HTTP/2 frames a message as one flag byte, four bytes of length, and the message. The gRPC library would take
//! a second message in silence and call a large one `OUT_OF_RANGE`.

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use tonic::Code;

use crate::rpc::Error;

/// The longest message of a request, compressed or not, in bytes.
pub(super) const MAX_BYTES: usize = 64 * 1024;
const PREFIX: usize = 5;

/// Reads the body to its end and returns the one message in it, prefix included.
///
/// # Errors
/// [`Error::Protocol`]: `RESOURCE_EXHAUSTED` for a message over [`MAX_BYTES`], CANCELLED when the caller went away,
/// INTERNAL for none, more than one, or half a message.
pub(super) async fn read<B>(mut body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let mut message = Bytes::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return Err(Error::Protocol(Code::Cancelled, "the caller went away"));
        };
        // Trailers of a request mean nothing in gRPC.
        let Ok(data) = frame.into_data() else {
            continue;
        };
        message = join(message, data);
        if let Some(length) = length(&message) {
            if length > MAX_BYTES {
                return Err(Error::Protocol(
                    Code::ResourceExhausted,
                    "the request message is over the limit of 64 KiB",
                ));
            }
            if message.len() > PREFIX + length {
                return Err(Error::Protocol(
                    Code::Internal,
                    "a unary call has exactly one request message; found more",
                ));
            }
        }
    }
    match length(&message) {
        Some(length) if message.len() == PREFIX + length => Ok(message),
        _ if message.is_empty() => Err(Error::Protocol(
            Code::Internal,
            "a unary call has exactly one request message; found none",
        )),
        _ => Err(Error::Protocol(
            Code::Internal,
            "the request message ends before its announced length",
        )),
    }
}

/// Copies only when a message comes in more than one piece, which small ones never do.
fn join(message: Bytes, data: Bytes) -> Bytes {
    if message.is_empty() {
        return data;
    }
    let mut joined = BytesMut::from(message);
    joined.extend_from_slice(&data);
    joined.freeze()
}

/// The announced length, once the prefix is there.
fn length(message: &Bytes) -> Option<usize> {
    let mut prefix = message.get(1..PREFIX)?;
    Some(prefix.get_u32() as usize)
}
