//! The response of a call: its status on the wire, and the body, which finishes the call's record with the last byte.
//!
//! Health and reflection are services of the gRPC library. Their statuses arrive encoded and are decoded here to add details.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body::Frame;
use tokio::time::{Sleep, sleep_until};
use tonic::{Code, Status};

use super::{
    message, stream,
    watch_body::{OpenWatch, WatchBody},
};
use crate::{
    call::Call,
    credentials::Owner,
    deadline::Deadline,
    error::Error,
    reason::Reason,
    status::{self, Failure},
    watch::WatchStream,
};

/// Carries the request id, on success and failure.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const GRPC_STATUS: &str = "grpc-status";
const GRPC_CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
/// The longest DATA frame, in bytes: bounds what a client that stops reading keeps in memory after its stream has ended.
pub(super) const MAX_FRAME_BYTES: usize = 16 * 1024;
/// How long after its deadline a reply may still be read.
const READ_SLACK: Duration = Duration::from_secs(1);

/// The body of every response.
#[derive(Default)]
pub(super) enum ReplyBody {
    /// No body: the headers are the whole response.
    #[default]
    Empty,
    /// The text of a response to a request that is not gRPC.
    Text(&'static str),
    /// The message and the trailers of a unary success.
    Message {
        /// The rest of the message, prefix included.
        data: Bytes,
        /// Finished with the trailers.
        call: Box<Call>,
    },
    /// The messages and the trailers of a watch.
    Watch(Box<WatchBody>),
    /// Health and reflection.
    Auxiliary {
        /// The body of the library's response.
        body: tonic::body::Body,
        /// When the stream ends, if the caller set a deadline.
        until: Option<Pin<Box<Sleep>>>,
        /// Finished with the trailers.
        call: Box<Call>,
    },
}

/// The plain HTTP response to a request that is not gRPC.
pub(super) fn not_grpc(
    mut call: Box<Call>,
    status: StatusCode,
    text: &'static str,
) -> Response<ReplyBody> {
    call.record.reason = Some(Reason::InvalidRequest);
    call.record.code = Some(Code::Unknown);
    stream::set_read_deadline(call.deadline.at() + READ_SLACK);
    let mut response = Response::new(ReplyBody::Text(text));
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
pub(super) fn failure(mut call: Box<Call>, error: &Error) -> Response<ReplyBody> {
    let failure = Failure::from_error(error);
    let mut response: Response<ReplyBody> = finish(&failure, &mut call).into_http();
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id_value(&call));
    if failure.code == Code::Unimplemented {
        let accepted = HeaderValue::from_static(message::ACCEPTED_ENCODINGS);
        headers.insert("grpc-accept-encoding", accepted);
    }
    response
}

/// The response to a successful unary call; `message` includes the prefix.
pub(super) fn unary(call: Box<Call>, message: Bytes) -> Response<ReplyBody> {
    let headers = success_headers(&call);
    stream::set_read_deadline(call.deadline.at() + READ_SLACK);
    let mut response = Response::new(ReplyBody::Message {
        data: message,
        call,
    });
    *response.headers_mut() = headers;
    response
}

/// The response of a watch; `ending` resolves with the error that ends it from outside.
pub(super) fn watch(
    mut call: Box<Call>,
    watch: WatchStream,
    ending: BoxFuture<'static, Error>,
    open: OpenWatch,
) -> Response<ReplyBody> {
    call.record.progress = Some(Arc::clone(watch.progress()));
    let headers = success_headers(&call);
    let body = WatchBody::new(call, watch, ending, open);
    let mut response = Response::new(ReplyBody::Watch(Box::new(body)));
    *response.headers_mut() = headers;
    response
}

/// The headers of a successful call of the task service.
fn success_headers(call: &Call) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    headers.insert(REQUEST_ID, id_value(call));
    if let Some(id) = status::upstream_id_value(&call.record.facts()) {
        headers.insert("x-upstream-request-id", id);
    }
    headers
}

/// The response of health or reflection; `until` ends its stream.
pub(super) fn auxiliary(
    mut call: Box<Call>,
    response: Response<tonic::body::Body>,
    until: Option<Deadline>,
) -> Response<ReplyBody> {
    let (mut head, body) = response.into_parts();
    head.headers.insert(REQUEST_ID, id_value(&call));
    if head.headers.contains_key(GRPC_STATUS) {
        complete(&mut head.headers, &mut call);
        return Response::from_parts(head, ReplyBody::Empty);
    }
    if let Some(deadline) = until {
        stream::set_read_deadline(deadline.at() + READ_SLACK);
    }
    let until = until.map(|deadline| Box::pin(sleep_until(deadline.at())));
    Response::from_parts(head, ReplyBody::Auxiliary { body, until, call })
}

/// Finishes a call with the status in `headers`, which the library has encoded, and adds details to a failure.
fn complete(headers: &mut HeaderMap, call: &mut Call) {
    match Status::from_header_map(headers) {
        Some(status) if status.code() != Code::Ok => {
            let failure = Failure::from_library(status.code(), status.message());
            write_trailers(&failure, headers, call);
        }
        Some(_) => call.record.code = Some(Code::Ok),
        None => call.record.code = Some(Code::Unknown),
    }
}

/// Finishes a call with this failure, and returns its status.
fn finish(failure: &Failure<'_>, call: &mut Call) -> Status {
    if let Some(owner) = failure.rejected_owner() {
        call.record.credential_rejected(owner == Owner::Server);
    }
    call.record.reason = Some(failure.reason);
    call.record.code = Some(failure.code);
    failure.to_status(&call.record.request_id, call.caller_remaining())
}

/// Finishes a call with this failure, whose status it writes to `headers`.
pub(super) fn write_trailers(failure: &Failure<'_>, headers: &mut HeaderMap, call: &mut Call) {
    finish(failure, call)
        .add_header(headers)
        .expect("code, message and details are valid header values");
}

/// Finishes a call with OK.
pub(super) fn ok_trailers(call: &mut Call) -> HeaderMap {
    call.record.code = Some(Code::Ok);
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
}

fn id_value(call: &Call) -> HeaderValue {
    let mut id = HeaderValue::from_str(&call.record.request_id)
        .expect("request ids hold letters, digits, . _ -");
    // Marked sensitive only to keep it out of the HPACK tables: each id is new and would evict headers that repeat (RFC 7541,
    // section 6.2.3).
    id.set_sensitive(true);
    id
}

impl http_body::Body for ReplyBody {
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
                let frame = data.split_to(data.len().min(MAX_FRAME_BYTES));
                call.record.bytes += frame.len() as u64;
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            Self::Message { call, .. } => Frame::trailers(ok_trailers(call)),
            Self::Watch(watch) => {
                let frame = std::task::ready!(watch.poll_frame(context));
                if frame.is_data() {
                    return Poll::Ready(Some(Ok(frame)));
                }
                frame
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
                                call.record.bytes += data.len() as u64;
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
