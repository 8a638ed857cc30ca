//! The one message of a unary call: read whole and under a limit, then decoded; and its reply, encoded.
//!
//! gRPC over HTTP/2 frames a message as one flag byte, four bytes of length, and the message. The gRPC library's own reader accepts a
//! second message of a unary call and answers a large one with `OUT_OF_RANGE`.

use std::io::Read as _;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use prost::Message;
use tonic::Code;

use crate::error::Error;

/// The longest message of a request, compressed or not, in bytes.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// The longest message of a reply, in bytes: what gRPC clients accept by default.
const MAX_REPLY_BYTES: usize = 4 * 1024 * 1024;
const PREFIX: usize = 5;

const TOO_LONG: Error = Error::Protocol(
    Code::ResourceExhausted,
    "the request message is over the limit of 64 KiB",
);
const UNREADABLE: Error = Error::Protocol(
    Code::Internal,
    "the request cannot be decoded: send one protobuf message as the proto defines it",
);

/// The encodings of a request that are read; sent to a client that uses another one.
pub(super) const ACCEPTED_ENCODINGS: &str = "gzip,identity";

/// Reads the body to its end and returns the one message in it, prefix included.
///
/// # Errors
/// [`Error::Protocol`]: `RESOURCE_EXHAUSTED` for a message over [`MAX_BYTES`], CANCELLED when the caller went away, INTERNAL for no
/// message, more than one, or half a message.
pub(super) async fn read<B>(mut body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let mut message = Bytes::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return Err(Error::Protocol(Code::Cancelled, "the caller went away"));
        };
        // Trailers of a request have no meaning in gRPC.
        let Ok(data) = frame.into_data() else {
            continue;
        };
        message = join(message, data);
        if let Some(length) = length(&message) {
            if length > MAX_BYTES {
                return Err(TOO_LONG);
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

/// Decodes a message that [`read`] returned. `headers` say how it is compressed.
///
/// # Errors
/// [`Error::Protocol`]: UNIMPLEMENTED for an unknown encoding, `RESOURCE_EXHAUSTED` for a message that expands to more than
/// [`MAX_BYTES`], INTERNAL for one that is not protobuf.
pub(super) fn decode<M: Message + Default>(
    headers: &HeaderMap,
    message: &Bytes,
) -> Result<M, Error> {
    let is_gzip = match headers.get("grpc-encoding").map(|value| value.as_bytes()) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => {
            return Err(Error::Protocol(
                Code::Unimplemented,
                "the message encoding is not supported: send the message uncompressed or as grpc-accept-encoding says",
            ));
        }
    };
    let payload = &message[PREFIX..];
    let decoded = match (message[0], is_gzip) {
        (0, _) => M::decode(payload),
        (1, true) => M::decode(&*decompress(payload)?),
        // A compressed message without an encoding, or a flag that does not exist.
        _ => return Err(UNREADABLE),
    };
    decoded.map_err(|_| UNREADABLE)
}

/// Copies only if a message arrives in more than one piece, which small ones never do.
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

/// Stops at the limit, whatever the compressed bytes expand to.
fn decompress(compressed: &[u8]) -> Result<Vec<u8>, Error> {
    let mut message = Vec::new();
    GzDecoder::new(compressed)
        .take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut message)
        .map_err(|_| UNREADABLE)?;
    if message.len() > MAX_BYTES {
        return Err(TOO_LONG);
    }
    Ok(message)
}

/// The reply with its prefix, uncompressed.
///
/// # Errors
/// [`Error::Protocol`]: `RESOURCE_EXHAUSTED` for a reply that is longer than clients accept.
pub(super) fn encode(reply: &impl Message) -> Result<Bytes, Error> {
    let length = reply.encoded_len();
    if length > MAX_REPLY_BYTES {
        return Err(Error::Protocol(
            Code::ResourceExhausted,
            "the reply is over the limit of 4 MiB that gRPC clients accept",
        ));
    }
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(length as u32);
    reply.encode(&mut bytes).expect("the buffer grows");
    Ok(bytes.freeze())
}
