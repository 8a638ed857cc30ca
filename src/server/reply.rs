//! The way out of a call: its status on the wire, and the body that ends the call's record when its last byte is handed over.
//!
//! Health and reflection are services of the gRPC library, whose statuses arrive encoded: only theirs are decoded here, to add
//! details.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body::Frame;
use tokio::time::{Sleep, sleep_until};
use tonic::{Code, Status};

use super::{message, stream};
use crate::{
    call::Call,
    deadline::Deadline,
    error::Error,
    reason::Reason,
    status::{self, Failure},
};

/// The reply's id header, on success and failure alike.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const GRPC_STATUS: &str = "grpc-status";
const GRPC_CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
/// The longest DATA frame, in bytes: what a reader that has stopped can keep in memory after its stream is over.
const PIECE: usize = 16 * 1024;
/// How long after its deadline a reply may still be read.
const READ_SLACK: Duration = Duration::from_secs(1);

/// The body of every response.
#[derive(Debug, Default)]
pub(super) enum Reply {
    /// Nothing: the headers are the whole response.
    #[default]
    Empty,
    /// A line for a person whose request is not gRPC.
    Text(&'static str),
    /// The message and the trailers of a unary success.
    Message {
        /// What is left of the message, prefix included.
        data: Bytes,
        /// Ends with the trailers.
        call: Box<Call>,
    },
    /// Health and reflection.
    Auxiliary {
        /// What the library's service sends.
        body: tonic::body::Body,
        /// When the stream ends, if its caller set a deadline.
        until: Option<Pin<Box<Sleep>>>,
        /// Ends with the trailers.
        call: Box<Call>,
    },
}

/// A plain HTTP response to a request that is not gRPC.
pub(super) fn not_grpc(
    mut call: Box<Call>,
    status: StatusCode,
    text: &'static str,
) -> Response<Reply> {
    call.record.fail(Reason::InvalidRequest);
    call.record.finish(Code::Unknown);
    stream::read_by(call.deadline.at() + READ_SLACK);
    let mut response = Response::new(Reply::Text(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id_value(&call));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    response
}

/// The response to a failed call: headers only.
pub(super) fn failure(mut call: Box<Call>, error: &Error) -> Response<Reply> {
    let failure = Failure::from_error(error);
    call.record.fail(failure.reason);
    call.record.finish(failure.code);
    let mut response: Response<Reply> = failure
        .to_status(call.record.request_id(), call.caller_remaining())
        .into_http();
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id_value(&call));
    if failure.code == Code::Unimplemented {
        let accepted = HeaderValue::from_static(message::ACCEPTED_ENCODINGS);
        headers.insert("grpc-accept-encoding", accepted);
    }
    response
}

/// The response to a successful unary call, its message with the prefix.
pub(super) fn unary(call: Box<Call>, message: Bytes) -> Response<Reply> {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    headers.insert(REQUEST_ID, id_value(&call));
    if let Some(id) = status::upstream_id_value(&call.record.facts()) {
        headers.insert("x-upstream-request-id", id);
    }
    stream::read_by(call.deadline.at() + READ_SLACK);
    let mut response = Response::new(Reply::Message {
        data: message,
        call,
    });
    *response.headers_mut() = headers;
    response
}

/// The response of health or reflection; `until` ends its stream.
pub(super) fn auxiliary(
    mut call: Box<Call>,
    response: Response<tonic::body::Body>,
    until: Option<Deadline>,
) -> Response<Reply> {
    let (mut head, body) = response.into_parts();
    head.headers.insert(REQUEST_ID, id_value(&call));
    if head.headers.contains_key(GRPC_STATUS) {
        complete(&mut head.headers, &mut call);
        return Response::from_parts(head, Reply::Empty);
    }
    if let Some(deadline) = until {
        stream::read_by(deadline.at() + READ_SLACK);
    }
    let until = until.map(|deadline| Box::pin(sleep_until(deadline.at())));
    Response::from_parts(head, Reply::Auxiliary { body, until, call })
}

/// Ends a call with the status in `headers`, which the library has encoded already. A failed one gets its details here.
fn complete(headers: &mut HeaderMap, call: &mut Call) {
    let Some(status) = Status::from_header_map(headers) else {
        return call.record.finish(Code::Unknown);
    };
    if status.code() == Code::Ok {
        return call.record.finish(Code::Ok);
    }
    let failure = Failure::from_library(status.code(), status.message());
    write_trailers(&failure, headers, call);
}

/// Ends a call with this failure.
fn write_trailers(failure: &Failure<'_>, headers: &mut HeaderMap, call: &mut Call) {
    call.record.fail(failure.reason);
    call.record.finish(failure.code);
    failure
        .to_status(call.record.request_id(), call.caller_remaining())
        .add_header(headers)
        .expect("code, message and details are valid header values");
}

fn id_value(call: &Call) -> HeaderValue {
    let mut id = HeaderValue::from_str(call.record.request_id())
        .expect("request ids hold letters, digits, . _ -");
    // Not secret, but never repeated: each would take an entry of both sides' HPACK tables and evict headers that do repeat
    // (RFC 7541, section 6.2.3).
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
            Self::Message { data, call } if !data.is_empty() => {
                let piece = data.split_to(data.len().min(PIECE));
                call.record.sent(piece.len());
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            Self::Message { call, .. } => {
                call.record.finish(Code::Ok);
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
                Frame::trailers(trailers)
            }
            Self::Auxiliary { body, until, call } => {
                let mut trailers = HeaderMap::new();
                if until
                    .as_mut()
                    .is_some_and(|timer| timer.as_mut().poll(context).is_ready())
                {
                    let failure = Failure::from_error(&Error::DeadlineExceeded);
                    write_trailers(&failure, &mut trailers, call);
                } else {
                    match std::task::ready!(Pin::new(body).poll_frame(context)) {
                        Some(Ok(frame)) => match frame.into_data() {
                            Ok(data) => {
                                call.record.sent(data.len());
                                return Poll::Ready(Some(Ok(Frame::data(data))));
                            }
                            Err(frame) => {
                                trailers = frame.into_trailers().unwrap_or_default();
                                complete(&mut trailers, call);
                            }
                        },
                        Some(Err(status)) => {
                            let failure = Failure::from_library(status.code(), status.message());
                            write_trailers(&failure, &mut trailers, call);
                        }
                        None => complete(&mut trailers, call),
                    }
                }
                Frame::trailers(trailers)
            }
        };
        *self = Self::Empty;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Empty)
    }
}
