//! The way in of a call: every check and limit that it passes before its handler sees it, in order, and none twice.
//!
//! ```text
//! record -> method, content type -> deadline -> permit -> message -> handler -> reply
//! ```

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use http::{HeaderMap, Method as HttpMethod, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{Code, service::Routes};
use tower_service::Service as _;

use super::{
    message,
    reply::{self, REQUEST_ID, Reply},
};
use crate::{
    call::{Call, Permit},
    caller::Caller,
    deadline::{Deadline, parse_grpc_timeout},
    error::Error,
    fair_limit::FairLimit,
    method::Method,
    pb::GetTaskDetailResponse,
    rpc::Service,
    telemetry::{Peer, Record, Sinks},
};

/// The permits that all workers share.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Unary calls of the task service.
    pub(super) in_flight: Arc<FairLimit>,
    /// Auxiliary streams (health, reflection, requests that are not gRPC), beyond those that each connection has for itself.
    pub(super) auxiliary: Arc<Semaphore>,
}

/// What all calls of one connection share.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: Arc<Peer>,
    /// Who calls, if calls carry no token of their own.
    pub(super) caller: Caller,
    /// The permits for auxiliary streams that no other connection can take.
    pub(super) auxiliary: Arc<Semaphore>,
}

/// What all calls of one worker share.
#[derive(Clone)]
pub(super) struct Edge<S> {
    pub(super) tasks: S,
    /// Health and, unless it is off, reflection.
    pub(super) auxiliary: Routes,
    pub(super) reflection: bool,
    /// Upper bound of one unary call.
    pub(super) timeout: Duration,
    pub(super) limits: Limits,
    /// Cancelled shortly before the end of the shutdown grace period.
    pub(super) cut: CancellationToken,
    pub(super) sinks: Arc<Sinks>,
}

impl<S: Service> Edge<S> {
    /// Answers one request, whatever it is.
    pub(super) async fn answer(
        &self,
        connection: &Connection,
        request: Box<Request<Incoming>>,
    ) -> Response<Reply> {
        let own = &connection.auxiliary;
        let headers = request.headers();
        let caller = match self.tasks.token_hash(headers) {
            Some(hash) => Caller::Token(hash),
            None => connection.caller,
        };
        let method = Method::from_path(request.uri().path());
        let caller_timeout = caller_timeout(headers);
        let timeout = match caller_timeout {
            Ok(Some(timeout)) => timeout.min(self.timeout),
            _ => self.timeout,
        };
        let record = Record::start(
            &self.sinks,
            method,
            request_id(headers),
            timeout,
            Arc::clone(&connection.peer),
            headers,
        );
        let caller_deadline = caller_timeout.ok().flatten().map(Deadline::after);
        let deadline = Deadline::after(timeout);
        let call = Box::new(Call::new(deadline, caller_deadline, caller, record));

        if request.method() != HttpMethod::POST {
            let text = "gRPC calls use POST\n";
            let status = StatusCode::METHOD_NOT_ALLOWED;
            return self.not_grpc(call, own, request, status, text).await;
        }
        if !is_grpc(headers) {
            let text = "the content type must be application/grpc or application/grpc+proto\n";
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return self.not_grpc(call, own, request, status, text).await;
        }
        if let Err(text) = caller_timeout {
            return reply::failure(call, &Error::Protocol(Code::InvalidArgument, text));
        }
        match method {
            Method::GetTaskDetail => self.unary(call, request).await,
            Method::HealthCheck => {
                let until = Some(call.deadline);
                self.auxiliary(call, own, until, request).await
            }
            // A stream ends with the caller's deadline, not with the server's maximum.
            Method::HealthWatch => {
                let until = call.caller_deadline;
                self.auxiliary(call, own, until, request).await
            }
            Method::Reflection if self.reflection => {
                let until = call.caller_deadline;
                self.auxiliary(call, own, until, request).await
            }
            Method::Reflection | Method::Other => {
                let error = Error::Protocol(Code::Unimplemented, "unknown service or method");
                reply::failure(call, &error)
            }
        }
    }

    /// A unary call of the task service.
    async fn unary(&self, mut call: Box<Call>, request: Box<Request<Incoming>>) -> Response<Reply> {
        let Some(permit) = self.limits.in_flight.try_acquire(call.caller) else {
            return reply::failure(call, &Error::Overloaded);
        };
        call.hold(Permit::InFlight(permit));
        let result = self.get_task_detail(&mut call, request).await;
        match result.and_then(|message| message::encode(&message)) {
            Ok(message) => reply::unary(call, message),
            Err(error) => reply::failure(call, &error),
        }
    }

    /// Reads the message and runs the handler, within the deadline.
    async fn get_task_detail(
        &self,
        call: &mut Call,
        mut request: Box<Request<Incoming>>,
    ) -> Result<GetTaskDetailResponse, Error> {
        let deadline = call.deadline;
        let message = deadline
            .bound(message::read(request.body_mut()))
            .await
            .map_err(|_| Error::DeadlineExceeded)??;
        if deadline.remaining().is_zero() {
            return Err(Error::DeadlineExceeded);
        }
        let metadata = request.headers();
        let message = message::decode(metadata, &message)?;
        let work = self.tasks.get_task_detail(call, metadata, message);
        let work = deadline.bound(AssertUnwindSafe(work).catch_unwind());
        match self.cut.run_until_cancelled(work).await {
            Some(Ok(Ok(result))) => result,
            Some(Ok(Err(_))) => {
                self.sinks.metrics.panics.inc();
                Err(Error::Internal)
            }
            Some(Err(_)) => Err(Error::DeadlineExceeded),
            None => Err(Error::ShuttingDown),
        }
    }

    /// Health and reflection: outside the limit of calls in flight. `until` ends their streams.
    async fn auxiliary(
        &self,
        mut call: Box<Call>,
        own: &Arc<Semaphore>,
        until: Option<Deadline>,
        request: Box<Request<Incoming>>,
    ) -> Response<Reply> {
        let Some(permit) = self.auxiliary_permit(own) else {
            return reply::failure(call, &Error::Overloaded);
        };
        call.hold(Permit::Auxiliary(permit));
        let answer = AssertUnwindSafe(self.auxiliary.clone().call(*request)).catch_unwind();
        // In a box, because it is larger than everything that a call of the task service needs.
        match Box::pin(call.deadline.bound(answer)).await {
            Ok(Ok(Ok::<_, Infallible>(response))) => reply::auxiliary(call, response, until),
            Ok(Err(_)) => {
                self.sinks.metrics.panics.inc();
                reply::failure(call, &Error::Internal)
            }
            Err(_) => reply::failure(call, &Error::DeadlineExceeded),
        }
    }

    /// Answers a request that is not gRPC. Reads its body first if a permit is free, because many HTTP clients ignore a response
    /// until they have sent everything.
    async fn not_grpc(
        &self,
        mut call: Box<Call>,
        own: &Arc<Semaphore>,
        request: Box<Request<Incoming>>,
        status: StatusCode,
        text: &'static str,
    ) -> Response<Reply> {
        if let Some(permit) = self.auxiliary_permit(own) {
            call.hold(Permit::Auxiliary(permit));
            let mut rest = Limited::new(request.into_body(), message::MAX_BYTES);
            let end = async { while let Some(Ok(_)) = rest.frame().await {} };
            // A body that is too long or too slow is answered before its end.
            let _ = call.deadline.bound(end).await;
        }
        reply::not_grpc(call, status, text)
    }

    /// A permit for an auxiliary stream: one of the connection's own, so that no other connection can take health away from it, or
    /// one of those that all connections share.
    fn auxiliary_permit(&self, own: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        [own, &self.limits.auxiliary]
            .into_iter()
            .find_map(|permits| Arc::clone(permits).try_acquire_owned().ok())
    }
}

/// The caller's `grpc-timeout`, if any, or what is wrong with it.
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

/// Whether the content type is gRPC with protobuf: gRPC over HTTP/2, section "Requests". gRPC-Web has a type of its own
/// and is not supported, nor are other encodings of the message.
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
