//! Reads and decodes the request message of a unary call, within a size limit, and encodes its reply.
//!
//! gRPC over HTTP/2 frames a message as one flag byte, four bytes of length, and the message. The reader of the gRPC library is not
//! used: it accepts a second message in a unary call and rejects a large one with `OUT_OF_RANGE`.

use std::io::Read as _;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use prost::Message;
use tonic::Code;

use crate::{error::Error, status, task::Task};

/// The longest message of a request, compressed or not, in bytes.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// The longest message of a reply, in bytes: what gRPC clients accept by default.
const MAX_REPLY_BYTES: usize = 4 * 1024 * 1024;
/// The length of the frame prefix, in bytes.
const PREFIX: usize = 5;

const TOO_LONG: Error = Error::Protocol(
    Code::ResourceExhausted,
    "the request message is over the limit of 64 KiB: send only the fields of the proto",
);
const UNREADABLE: Error = Error::Protocol(Code::Internal, status::UNREADABLE_REQUEST);

/// The supported encodings of a request message, as `grpc-accept-encoding` lists them.
pub(super) const ACCEPTED_ENCODINGS: &str = "gzip,identity";

/// Reads the body to its end and returns the one message in it, prefix included.
///
/// # Errors
/// [`Error::Protocol`]: `RESOURCE_EXHAUSTED` for a message over [`MAX_BYTES`], CANCELLED if the client disconnects, INTERNAL for no
/// message, more than one, or an incomplete one.
pub(super) async fn read<B>(mut body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let mut message = Bytes::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return Err(Error::Protocol(Code::Cancelled, "the client disconnected"));
        };
        // gRPC ignores request trailers.
        let Ok(data) = frame.into_data() else {
            continue;
        };
        message = join(message, data);
        if let Some(length) = announced_length(&message) {
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
    match announced_length(&message) {
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

/// Decodes a message that [`read`] returned. The `headers` name its compression.
///
/// # Errors
/// [`Error::Protocol`]: UNIMPLEMENTED for an unknown encoding, `RESOURCE_EXHAUSTED` for a message that expands to more than
/// [`MAX_BYTES`], INTERNAL for one that is not protobuf.
pub(super) fn decode<M: Message + Default>(
    headers: &HeaderMap,
    message: Bytes,
) -> Result<M, Error> {
    let is_gzip = match headers.get("grpc-encoding").map(|value| value.as_bytes()) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => {
            return Err(Error::Protocol(
                Code::Unimplemented,
                status::UNKNOWN_ENCODING,
            ));
        }
    };
    let payload = &message[PREFIX..];
    let decoded = match (message[0], is_gzip) {
        (0, _) => M::decode(payload),
        (1, true) => M::decode(&*decompress(payload)?),
        // A compressed message without an encoding, or an undefined flag.
        _ => return Err(UNREADABLE),
    };
    decoded.map_err(|_| UNREADABLE)
}

/// Appends `data`. Copies only if the message arrives in more than one frame, which small ones never do.
fn join(message: Bytes, data: Bytes) -> Bytes {
    if message.is_empty() {
        return data;
    }
    let mut joined = BytesMut::from(message);
    joined.extend_from_slice(&data);
    joined.freeze()
}

/// The length that the prefix announces, once the prefix is complete.
fn announced_length(message: &Bytes) -> Option<usize> {
    let mut prefix = message.get(1..PREFIX)?;
    Some(prefix.get_u32() as usize)
}

/// Decompresses at most [`MAX_BYTES`].
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

/// Encodes the reply with its prefix, uncompressed.
///
/// # Errors
/// [`Error::Protocol`]: `RESOURCE_EXHAUSTED` for a reply longer than clients accept.
pub(super) fn encode(reply: &Task) -> Result<Bytes, Error> {
    let length = reply.encoded_len();
    if length > MAX_REPLY_BYTES {
        return Err(Error::Protocol(
            Code::ResourceExhausted,
            "the reply is over the limit of 4 MiB that gRPC clients accept",
        ));
    }
    let mut bytes = prefixed(length);
    reply.encode(&mut bytes);
    Ok(bytes.freeze())
}

/// Adds the prefix to an encoded message in two parts.
pub(super) fn join_parts([first, second]: &[Bytes; 2]) -> Bytes {
    let mut bytes = prefixed(first.len() + second.len());
    bytes.put_slice(first);
    bytes.put_slice(second);
    bytes.freeze()
}

/// A buffer for a message of this length, with its prefix.
fn prefixed(length: usize) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(length as u32);
    bytes
}
