//! An RPC's way in: every check and limit that it passes before its service sees it, in order, and nothing twice.
//!
//! ```text
//! started -> request id -> method, content type -> deadline -> place in flight -> whole message -> service -> reply
//! ```

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use http::{HeaderMap, Method as HttpMethod, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tonic::{Code, codec::CompressionEncoding, service::Routes};
use tower_service::Service as _;

use super::{
    limit::{Limit, Place},
    message,
    record::{Rpc, Sinks},
    reply::{self, REQUEST_ID, Reply},
};
use crate::{
    deadline::{Deadline, parse_grpc_timeout},
    pb::task_service_server::{TaskService, TaskServiceServer},
    rpc::{Call, Error},
    telemetry::{Peer, method::Method},
};

/// The longest message of a reply, in bytes: what gRPC clients accept by default.
const MAX_REPLY_BYTES: usize = 4 * 1024 * 1024;

/// What all workers share.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// RPCs of the task service.
    pub(super) in_flight: Arc<Limit>,
    /// Streams beside the task service, beyond those that each connection has of its own.
    pub(super) beside: Arc<Limit>,
}

/// What all RPCs of one worker share.
#[derive(Clone)]
pub(super) struct Edge<S> {
    task: TaskServiceServer<S>,
    /// Health and, unless it is off, reflection.
    support: Routes,
    reflection: bool,
    timeout: Duration,
    limits: Limits,
    /// Cancelled shortly before the end of the shutdown grace.
    cut: CancellationToken,
    sinks: Arc<Sinks>,
}

impl<S: TaskService> Edge<S> {
    /// The way to `service`.
    pub(super) fn new(
        service: S,
        support: Routes,
        reflection: bool,
        timeout: Duration,
        limits: Limits,
        cut: CancellationToken,
        sinks: Sinks,
    ) -> Self {
        Self {
            task: TaskServiceServer::new(service)
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(message::MAX_BYTES)
                .max_encoding_message_size(MAX_REPLY_BYTES),
            support,
            reflection,
            timeout,
            limits,
            cut,
            sinks: Arc::new(sinks),
        }
    }

    /// Answers one RPC, whatever it is. `own` are the places that its connection has beside the task service.
    pub(super) async fn answer(
        &self,
        peer: Arc<Peer>,
        own: &Arc<Limit>,
        request: Box<Request<Incoming>>,
    ) -> Response<Reply> {
        let headers = request.headers();
        let method = Method::of_path(request.uri().path());
        let caller_timeout = caller_timeout(headers);
        let timeout = caller_timeout.as_ref().ok().copied().flatten();
        let deadline =
            Deadline::after(timeout.map_or(self.timeout, |timeout| timeout.min(self.timeout)));
        let tracer = self.sinks.tracer.as_ref();
        let span = tracer.map(|tracer| tracer.server_span(headers));
        let call = Call::new(deadline, request_id(headers), span);
        let rpc = Box::new(Rpc::start(
            &self.sinks,
            method,
            call,
            timeout,
            peer,
            headers,
        ));

        if request.method() != HttpMethod::POST {
            let text = "gRPC calls use POST\n";
            let place = self.place_beside(own);
            return not_grpc(rpc, place, request, StatusCode::METHOD_NOT_ALLOWED, text).await;
        }
        if !is_grpc(headers) {
            let text = "the content type must be application/grpc or application/grpc+proto\n";
            let place = self.place_beside(own);
            return not_grpc(
                rpc,
                place,
                request,
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                text,
            )
            .await;
        }
        if let Err(text) = caller_timeout {
            return reply::failure(rpc, &Error::Protocol(Code::InvalidArgument, text));
        }
        match method {
            Method::GetTaskDetail => self.task(rpc, request).await,
            Method::HealthCheck | Method::HealthWatch => {
                self.support(rpc, method, own, request).await
            }
            Method::Reflection if self.reflection => self.support(rpc, method, own, request).await,
            Method::Reflection | Method::Other => {
                let error = Error::Protocol(Code::Unimplemented, "unknown service or method");
                reply::failure(rpc, &error)
            }
        }
    }

    /// A place beside the task service: one of the connection's own, so that nobody can take health from others, or one
    /// of those that all share.
    fn place_beside(&self, own: &Arc<Limit>) -> Option<Place> {
        own.try_take().or_else(|| self.limits.beside.try_take())
    }

    /// The task service: with a place in flight, within the deadline.
    async fn task(
        &self,
        mut rpc: Box<Rpc>,
        mut request: Box<Request<Incoming>>,
    ) -> Response<Reply> {
        let Some(place) = self.limits.in_flight.try_take() else {
            return reply::failure(rpc, &Error::Overloaded);
        };
        rpc.hold(place);
        let deadline = rpc.call.deadline;
        let message = match deadline.bound(message::read(request.body_mut())).await {
            Ok(Ok(message)) => message,
            Ok(Err(error)) => return reply::failure(rpc, &error),
            Err(_) => return reply::failure(rpc, &Error::DeadlineExceeded),
        };
        if deadline.remaining().is_zero() {
            return reply::failure(rpc, &Error::DeadlineExceeded);
        }
        request.extensions_mut().insert(Arc::clone(&rpc.call));
        let request = request.map(|_| Full::new(message));
        let answer = AssertUnwindSafe(self.task.clone().call(request)).catch_unwind();
        let Some(answered) = self.cut.run_until_cancelled(deadline.bound(answer)).await else {
            return reply::failure(rpc, &Error::ShuttingDown);
        };
        match answered {
            Ok(Ok(Ok::<_, Infallible>(response))) => reply::unary(rpc, response),
            Ok(Err(_)) => {
                rpc.panicked();
                reply::failure(rpc, &Error::Internal)
            }
            Err(_) => reply::failure(rpc, &Error::DeadlineExceeded),
        }
    }

    /// Health and reflection: outside the limit of calls in flight. Their streams end with the caller's deadline, not with
    /// ours.
    async fn support(
        &self,
        mut rpc: Box<Rpc>,
        method: Method,
        own: &Arc<Limit>,
        request: Box<Request<Incoming>>,
    ) -> Response<Reply> {
        let Some(place) = self.place_beside(own) else {
            return reply::failure(rpc, &Error::Overloaded);
        };
        rpc.hold(place);
        let deadline = rpc.call.deadline;
        let until = match method {
            Method::HealthCheck => Some(deadline),
            _ => rpc.caller_timeout.map(Deadline::after),
        };
        let answer = AssertUnwindSafe(self.support.clone().call(*request)).catch_unwind();
        // In a box, because it is larger than all that a call of the task service needs.
        match Box::pin(deadline.bound(answer)).await {
            Ok(Ok(Ok::<_, Infallible>(response))) => reply::streaming(rpc, response, until),
            Ok(Err(_)) => {
                rpc.panicked();
                reply::failure(rpc, &Error::Internal)
            }
            Err(_) => reply::failure(rpc, &Error::DeadlineExceeded),
        }
    }
}

/// Says what is wrong with something that is no gRPC call, after its end where there is a place for that: many clients
/// read no answer before.
async fn not_grpc(
    mut rpc: Box<Rpc>,
    place: Option<Place>,
    request: Box<Request<Incoming>>,
    status: StatusCode,
    text: &'static str,
) -> Response<Reply> {
    if let Some(place) = place {
        rpc.hold(place);
        let mut rest = Limited::new(request.into_body(), message::MAX_BYTES);
        let end = async { while let Some(Ok(_)) = rest.frame().await {} };
        // Too much of it, or too slow: the answer comes nevertheless.
        let _ = rpc.call.deadline.bound(end).await;
    }
    reply::not_grpc(rpc, status, text)
}

/// The caller's `grpc-timeout`, if there is one; what is wrong with it where it is malformed.
fn caller_timeout(headers: &HeaderMap) -> Result<Option<Duration>, &'static str> {
    let mut values = headers.get_all("grpc-timeout").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err("grpc-timeout: may be given once only");
    }
    parse_grpc_timeout(value.as_bytes())
        .map(Some)
        .ok_or("grpc-timeout: must be 1 to 8 digits and one of H, M, S, m, u, n")
}

/// Whether the content type is gRPC with protobuf: gRPC over HTTP/2, section "Requests". gRPC-Web has a type of its own,
/// and other encodings of the message are not spoken here.
fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return false;
    };
    let essence = value
        .as_bytes()
        .split(|byte| *byte == b';')
        .next()
        .unwrap_or_default();
    let essence = essence.trim_ascii_end();
    essence.eq_ignore_ascii_case(b"application/grpc")
        || essence.eq_ignore_ascii_case(b"application/grpc+proto")
}

/// The caller's `x-request-id` if it is one of `[A-Za-z0-9._-]{1,128}`, else 128 random bits in hex.
fn request_id(headers: &HeaderMap) -> String {
    let mut values = headers.get_all(REQUEST_ID).iter();
    if let (Some(value), None) = (values.next(), values.next()) {
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        if let Ok(id) = value.to_str()
            && (1..=128).contains(&id.len())
            && id.as_bytes().iter().all(allowed)
        {
            return id.to_owned();
        }
    }
    format!("{:032x}", fastrand::u128(..))
}
