//! The way out of an RPC: its status on the wire, and the body that counts the RPC when its last byte is handed over.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::time::{Sleep, sleep_until};
use tonic::{Code, Status};

use super::{record::Rpc, stream};
use crate::{deadline::Deadline, reason::Reason, rpc::Error, status};

/// The reply's id header, on success and failure alike.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const GRPC_STATUS: &str = "grpc-status";
/// A stopped reader keeps at most one such piece of a reply in memory after its stream is over, in bytes.
const PIECE: usize = 16 * 1024;
/// How long after its deadline an answer may still be read.
const READ_SLACK: Duration = Duration::from_secs(1);

/// The body of every response.
#[derive(Debug, Default)]
pub(super) enum Reply {
    /// Nothing: the headers say it all.
    #[default]
    Empty,
    /// A line for a person who has sent something that is no gRPC call.
    Text(&'static str),
    /// The message and the trailers of a unary success.
    Message {
        /// What is left of the message, prefix included.
        data: Bytes,
        /// Sent after the message.
        trailers: HeaderMap,
        /// Ends with the trailers.
        rpc: Box<Rpc>,
    },
    /// Health and reflection.
    Stream {
        /// What the library's service sends.
        body: tonic::body::Body,
        /// The point in time at which the stream ends, where there is one.
        until: Option<Pin<Box<Sleep>>>,
        /// Ends with the trailers.
        rpc: Box<Rpc>,
    },
}

/// A plain HTTP answer to something that is no gRPC call.
pub(super) fn not_grpc(
    mut rpc: Box<Rpc>,
    status: StatusCode,
    text: &'static str,
) -> Response<Reply> {
    rpc.call.failed(Reason::InvalidRequest);
    rpc.end(Code::Unknown);
    stream::read_by(rpc.call.deadline.at() + READ_SLACK);
    let mut response = Response::new(Reply::Text(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id_value(&rpc));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    response
}

/// The answer to a failed RPC: headers only.
pub(super) fn failure(mut rpc: Box<Rpc>, error: &Error) -> Response<Reply> {
    rpc.call.failed(status::reason(error));
    let status = status::of_error(error, &rpc.call.request_id);
    rpc.end(status.code());
    let mut response: Response<Reply> = status.into_http();
    response.headers_mut().insert(REQUEST_ID, id_value(&rpc));
    response
}

/// The answer of the generated task service.
pub(super) fn unary(mut rpc: Box<Rpc>, response: Response<tonic::body::Body>) -> Response<Reply> {
    let (mut head, mut body) = response.into_parts();
    head.headers.insert(REQUEST_ID, id_value(&rpc));
    if head.headers.contains_key(GRPC_STATUS) {
        rpc.end(completed(&mut head.headers, &rpc));
        return Response::from_parts(head, Reply::Empty);
    }
    let mut data = Bytes::new();
    let mut trailers = HeaderMap::new();
    // Ready at once: the reply is encoded from memory.
    while let Some(Some(Ok(frame))) = body.frame().now_or_never() {
        match frame.into_data() {
            Ok(piece) => data = piece,
            Err(frame) => {
                // The end, also where the library would go on to hand out half of a failed encoding.
                trailers = frame.into_trailers().unwrap_or_default();
                break;
            }
        }
    }
    if data.is_empty() {
        // The reply is over the size limit or cannot be encoded; the library says so in the trailers.
        head.headers.extend(trailers);
        rpc.end(completed(&mut head.headers, &rpc));
        return Response::from_parts(head, Reply::Empty);
    }
    stream::read_by(rpc.call.deadline.at() + READ_SLACK);
    Response::from_parts(
        head,
        Reply::Message {
            data,
            trailers,
            rpc,
        },
    )
}

/// The answer of health or reflection; `until` ends its stream.
pub(super) fn streaming(
    mut rpc: Box<Rpc>,
    response: Response<tonic::body::Body>,
    until: Option<Deadline>,
) -> Response<Reply> {
    let (mut head, body) = response.into_parts();
    head.headers.insert(REQUEST_ID, id_value(&rpc));
    if head.headers.contains_key(GRPC_STATUS) {
        rpc.end(completed(&mut head.headers, &rpc));
        return Response::from_parts(head, Reply::Empty);
    }
    if let Some(deadline) = until {
        stream::read_by(deadline.at() + READ_SLACK);
    }
    let until = until.map(|deadline| Box::pin(sleep_until(deadline.at())));
    Response::from_parts(head, Reply::Stream { body, until, rpc })
}

/// Gives a failed status in `headers` its details where it has none, as the library's own, and returns its code.
fn completed(headers: &mut HeaderMap, rpc: &Rpc) -> Code {
    let Some(status) = Status::from_header_map(headers) else {
        return Code::Unknown;
    };
    if status.code() == Code::Ok || !status.details().is_empty() {
        return status.code();
    }
    let status = status::complete(status.code(), status.message(), &rpc.call.request_id);
    rpc.call.failed(Reason::InvalidRequest);
    status
        .add_header(headers)
        .expect("code, sentence and details of ours are header values");
    status.code()
}

fn id_value(rpc: &Rpc) -> HeaderValue {
    let mut id = HeaderValue::from_str(&rpc.call.request_id)
        .expect("request ids hold letters, digits, . _ -");
    // Not secret, but no two are alike: each would take a place in both sides' tables of known headers and push out those
    // that do come again (RFC 7541, section 6.2.3).
    id.set_sensitive(true);
    id
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = match &mut *self {
            Self::Empty => return Poll::Ready(None),
            Self::Text(text) => Frame::data(Bytes::from_static(text.as_bytes())),
            Self::Message { data, rpc, .. } if !data.is_empty() => {
                let piece = data.split_to(data.len().min(PIECE));
                rpc.sent(piece.len());
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            Self::Message { trailers, rpc, .. } => {
                rpc.end(Code::Ok);
                Frame::trailers(std::mem::take(trailers))
            }
            Self::Stream { body, until, rpc } => {
                let passed = until
                    .as_mut()
                    .is_some_and(|timer| timer.as_mut().poll(context).is_ready());
                let next = if passed {
                    Some(Err(status::of_error(
                        &Error::DeadlineExceeded,
                        &rpc.call.request_id,
                    )))
                } else {
                    std::task::ready!(Pin::new(body).poll_frame(context))
                };
                match next {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => {
                            rpc.sent(data.len());
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                        Err(frame) => last(frame.into_trailers().unwrap_or_default(), rpc),
                    },
                    Some(Err(status)) => {
                        let mut trailers = HeaderMap::new();
                        status
                            .add_header(&mut trailers)
                            .expect("a status of ours is made of valid header values");
                        last(trailers, rpc)
                    }
                    None => last(HeaderMap::new(), rpc),
                }
            }
        };
        *self = Self::Empty;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

/// The trailers that end a stream.
fn last(mut trailers: HeaderMap, rpc: &mut Rpc) -> Frame<Bytes> {
    let code = completed(&mut trailers, rpc);
    rpc.end(code);
    Frame::trailers(trailers)
}
