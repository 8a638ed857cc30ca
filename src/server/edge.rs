//! The checks and limits of a call before its handler runs, in this order:
//!
//! ```text
//! record -> method, content type -> metadata -> deadline -> permit -> message -> handler -> reply
//! ```

use std::{convert::Infallible, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as HttpMethod, Request, Response, StatusCode, Uri,
    header,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, service::Routes};
use tower_service::Service as _;

use super::{
    Options, message,
    reply::{self, REQUEST_ID, ReplyBody},
    request_body::{Discarded, RequestBody},
    tls::Tls,
    watch_body::{OpenWatch, WatchDrain},
};
use crate::{
    call::Call,
    caller::Caller,
    deadline::{Deadline, parse_grpc_timeout},
    error::Error,
    fair_limit::FairLimit,
    method::Method,
    rpc::Service,
    status,
    task::Task,
    telemetry::{Peer, Record, Sinks},
    watch::WatchStream,
};

/// The longest delay after which a client may continue a watch that the server ended.
const MAX_WATCH_RETRY: Duration = Duration::from_secs(2);
/// The longest metadata of a request in bytes, counted as HTTP/2 does: name, value and 32 for each field.
const MAX_METADATA_BYTES: usize = 32 * 1024;
/// Longer metadata is copied, because each field of it keeps the buffer alive in which all fields arrived, and that is twice as long.
const COPIED_METADATA_BYTES: usize = 4 * 1024;
const METADATA_TOO_LONG: Error = Error::Protocol(
    Code::ResourceExhausted,
    "the metadata is over the limit of 32 KiB: send fewer or shorter fields",
);

/// What all calls of one connection share.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: Arc<Peer>,
    /// The caller of the calls that carry no token.
    pub(super) caller: Caller,
    /// The permits for auxiliary streams that are reserved for this connection.
    pub(super) auxiliary: Arc<Semaphore>,
    /// The permits for watches of this connection.
    pub(super) watches: Arc<Semaphore>,
    /// Cancelled when the connection has reached its age.
    pub(super) aged: CancellationToken,
}

/// What all calls of one worker share.
pub(super) struct Edge<S> {
    pub(super) service: S,
    /// Cancelled shortly before the end of the shutdown grace period. Of this worker, because each call registers with it.
    pub(super) cut_off: CancellationToken,
    pub(super) shared: Arc<Shared>,
}

/// What all workers share.
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) tls: Option<Tls>,
    /// Health and, if it is on, reflection.
    pub(super) routes: Routes,
    /// One permit per connection.
    pub(super) connections: Arc<Semaphore>,
    /// Permits for unary calls of the task service.
    pub(super) in_flight: Arc<FairLimit>,
    /// Permits for watches.
    pub(super) watches: Arc<FairLimit>,
    /// Spreads the ends of watches during a drain.
    pub(super) watch_drain: Arc<WatchDrain>,
    /// Permits for auxiliary streams (health, reflection) beyond those that are reserved for each connection.
    pub(super) auxiliary_permits: Arc<Semaphore>,
    pub(super) discarded: Arc<Discarded>,
    /// Cancelled when a drain sends GOAWAY.
    pub(super) go_away: CancellationToken,
    pub(super) sinks: Arc<Sinks>,
}

impl<S: Service> Edge<S> {
    /// Replies to one request of any kind.
    pub(super) async fn handle(
        &self,
        connection: &Connection,
        mut request: Box<Request<RequestBody>>,
    ) -> Response<ReplyBody> {
        let options = &self.shared.options;
        let headers = request.headers();
        let not_grpc = not_grpc(&request);
        let method = match not_grpc {
            Some(_) => Method::Other,
            None => Method::from_path(request.uri().path()),
        };
        let caller_timeout = caller_timeout(headers);
        let call = self.begin(connection, method, caller_timeout.ok().flatten(), headers);

        if let Some((status, text)) = not_grpc {
            return reply::not_grpc(call, status, text);
        }
        let bytes = metadata_bytes(headers);
        if bytes > MAX_METADATA_BYTES {
            return reply::failure(call, &METADATA_TOO_LONG);
        }
        if bytes >= COPIED_METADATA_BYTES {
            copy_head(&mut request);
        }
        if let Err(text) = caller_timeout {
            return reply::failure(call, &Error::Protocol(Code::InvalidArgument, text));
        }
        let until = match method {
            Method::GetTaskDetail => return self.unary(call, request).await,
            Method::WatchTaskDetail => {
                // Boxed, because it is larger than all that a unary call needs.
                return Box::pin(self.watch(call, connection, request)).await;
            }
            Method::HealthCheck => Some(call.deadline),
            // A stream ends with the caller's deadline, not with the server's maximum.
            Method::HealthWatch => call.caller_deadline,
            Method::Reflection if options.reflection => call.caller_deadline,
            Method::Reflection | Method::Other => {
                let error = Error::Protocol(Code::Unimplemented, status::UNKNOWN_METHOD);
                return reply::failure(call, &error);
            }
        };
        self.auxiliary(call, connection, until, request).await
    }

    /// Starts a call with its deadlines and its record. Not part of `handle`, whose future would hold the record twice, also during a
    /// watch of hours.
    fn begin(
        &self,
        connection: &Connection,
        method: Method,
        caller_timeout: Option<Duration>,
        headers: &HeaderMap,
    ) -> Box<Call> {
        let options = &self.shared.options;
        let caller = match self.service.token_hash(headers) {
            Some(hash) => Caller::Token(hash),
            None => connection.caller,
        };
        let limit = match method {
            // Less up to a fifth at random, so that watches that began together do not end together.
            Method::WatchTaskDetail => {
                let part = 1.0 - 0.2 * fastrand::f64();
                options.max_watch_duration.mul_f64(part)
            }
            _ => options.timeout,
        };
        let timeout = caller_timeout.map_or(limit, |timeout| timeout.min(limit));
        let mut record = Record::start(
            &self.shared.sinks,
            method,
            request_id(headers),
            timeout,
            Arc::clone(&connection.peer),
            headers,
        );
        if caller_timeout == Some(timeout) {
            record.is_callers_deadline = true;
        }
        if let Caller::Token(hash) = &caller {
            record.token_hash = hash.first_chunk().copied();
        }
        let caller_deadline = caller_timeout.map(Deadline::after);
        let limit = Deadline::after(limit);
        Box::new(Call {
            deadline: caller_deadline.map_or(limit, |callers| callers.min(limit)),
            caller_deadline,
            caller,
            record,
            fair_permit: None,
            permit: None,
        })
    }

    /// A unary call of the task service.
    async fn unary(
        &self,
        mut call: Box<Call>,
        request: Box<Request<RequestBody>>,
    ) -> Response<ReplyBody> {
        let Some(permit) = self.shared.in_flight.try_acquire(call.caller) else {
            return reply::failure(call, &Error::Overloaded);
        };
        call.fair_permit = Some(permit);
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
        mut request: Box<Request<RequestBody>>,
    ) -> Result<Arc<Task>, Error> {
        let deadline = call.deadline;
        let message = deadline
            .bound(message::read(request.body_mut()))
            .await
            .map_err(|_| {
                call.record.is_callers_deadline = true;
                Error::DeadlineExceeded
            })??;
        if deadline.remaining().is_zero() {
            return Err(Error::DeadlineExceeded);
        }
        let metadata = request.headers();
        let message = message::decode(metadata, message)?;
        let work = self.service.get_task_detail(call, metadata, message);
        // Pinned, because each function that takes a future stores it again.
        let work = pin!(AssertUnwindSafe(work).catch_unwind());
        let work = pin!(deadline.bound(work));
        match self.cut_off.run_until_cancelled(work).await {
            Some(Ok(Ok(result))) => result,
            Some(Ok(Err(_))) => Err(self.panicked()),
            Some(Err(_)) => Err(Error::DeadlineExceeded),
            None => Err(Error::ShuttingDown { retry_after: None }),
        }
    }

    /// A watch of a task. Its stream outlives this function, with all that can end it.
    async fn watch(
        &self,
        mut call: Box<Call>,
        connection: &Connection,
        request: Box<Request<RequestBody>>,
    ) -> Response<ReplyBody> {
        let permit = Arc::clone(&connection.watches).try_acquire_owned();
        let fair_permit = self.shared.watches.try_acquire(call.caller);
        let (Ok(permit), Some(fair_permit)) = (permit, fair_permit) else {
            return reply::failure(call, &Error::Overloaded);
        };
        (call.fair_permit, call.permit) = (Some(fair_permit), Some(permit));
        let metrics = Arc::clone(&self.shared.sinks.metrics);
        let mut open = OpenWatch::new(metrics);
        let mut ending = self.watch_ending(&call, connection);
        let started = self.start_watch(&mut call, request);
        let started = tokio::select! {
            biased;
            // First, so that it wakes the stream's task whenever that waits, even if the reply is never read.
            error = &mut ending => Err(error),
            started = started => started,
        };
        match started {
            Ok(stream) => reply::watch(call, stream, ending, open),
            Err(error) => {
                open.end(&error, false, &mut call);
                reply::failure(call, &error)
            }
        }
    }

    /// Reads the message and runs the handler, which returns after the first poll.
    async fn start_watch(
        &self,
        call: &mut Call,
        mut request: Box<Request<RequestBody>>,
    ) -> Result<WatchStream, Error> {
        let message = Deadline::after(self.shared.options.timeout)
            .bound(message::read(request.body_mut()))
            .await
            .map_err(|_| {
                call.record.is_callers_deadline = true;
                Error::DeadlineExceeded
            })??;
        let metadata = request.headers();
        let message = message::decode(metadata, message)?;
        let work = self.service.watch_task_detail(call, metadata, message);
        let result = AssertUnwindSafe(work).catch_unwind().await;
        result.unwrap_or_else(|_| Err(self.panicked()))
    }

    /// Resolves with the error that ends a watch from outside.
    fn watch_ending(&self, call: &Call, connection: &Connection) -> BoxFuture<'static, Error> {
        let retry_after = MAX_WATCH_RETRY.mul_f64(fastrand::f64());
        let expired = Error::WatchExpired { retry_after };
        let draining = Error::ShuttingDown {
            retry_after: Some(retry_after),
        };
        let (deadline, caller_deadline) = (call.deadline, call.caller_deadline);
        let aged = connection.aged.clone();
        let (go_away, cut_off) = (self.shared.go_away.clone(), self.cut_off.clone());
        let watch_drain = Arc::clone(&self.shared.watch_drain);
        Box::pin(async move {
            tokio::select! {
                () = sleep_until(deadline.at()) => match caller_deadline {
                    Some(callers) if callers <= deadline => Error::DeadlineExceeded,
                    _ => expired,
                },
                () = aged.cancelled() => expired,
                () = async { go_away.cancelled().await; watch_drain.wait().await } => draining,
                () = cut_off.cancelled() => draining,
            }
        })
    }

    /// A call of health or reflection, which the limit of calls in flight does not cover. `until` ends its stream.
    async fn auxiliary(
        &self,
        mut call: Box<Call>,
        connection: &Connection,
        until: Option<Deadline>,
        request: Box<Request<RequestBody>>,
    ) -> Response<ReplyBody> {
        let Some(permit) = self.auxiliary_permit(connection) else {
            return reply::failure(call, &Error::Overloaded);
        };
        call.permit = Some(permit);
        let response = AssertUnwindSafe(self.shared.routes.clone().call(*request)).catch_unwind();
        // Boxed, because it is larger than all that a call of the task service needs.
        match Box::pin(call.deadline.bound(response)).await {
            Ok(Ok(Ok::<_, Infallible>(response))) => reply::auxiliary(call, response, until),
            Ok(Err(_)) => reply::failure(call, &self.panicked()),
            Err(_) => reply::failure(call, &Error::DeadlineExceeded),
        }
    }

    /// Counts a panic of a handler.
    fn panicked(&self) -> Error {
        self.shared.sinks.metrics.panics.inc();
        Error::Internal
    }

    /// A permit for an auxiliary stream: one that is reserved for the connection, so that other connections cannot block its health
    /// checks, or else a shared one.
    fn auxiliary_permit(&self, connection: &Connection) -> Option<OwnedSemaphorePermit> {
        [&connection.auxiliary, &self.shared.auxiliary_permits]
            .into_iter()
            .find_map(|permits| Arc::clone(permits).try_acquire_owned().ok())
    }
}

/// The HTTP status and text for a request that is not gRPC.
fn not_grpc(request: &Request<RequestBody>) -> Option<(StatusCode, &'static str)> {
    if request.method() != HttpMethod::POST {
        return Some((StatusCode::METHOD_NOT_ALLOWED, "gRPC calls use POST\n"));
    }
    let text = "the content type must be application/grpc or application/grpc+proto\n";
    (!is_grpc(request.headers())).then_some((StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
}

/// The size of the metadata, without the fields that HTTP/2 uses for method, scheme, authority and path (RFC 9113, section 6.5.2).
fn metadata_bytes(headers: &HeaderMap) -> usize {
    let field_bytes =
        |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 32;
    headers.iter().map(field_bytes).sum()
}

/// Replaces path and metadata by copies that share no memory with the received ones.
fn copy_head<B>(request: &mut Request<B>) {
    let path = Uri::try_from(request.uri().path());
    let fields = request.headers().iter().filter_map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_str().as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    });
    *request.headers_mut() = fields.collect();
    *request.uri_mut() = path.unwrap_or_default();
}

/// The caller's `grpc-timeout`, if any, or an error message.
fn caller_timeout(headers: &HeaderMap) -> Result<Option<Duration>, &'static str> {
    let mut values = headers.get_all("grpc-timeout").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err("grpc-timeout: send it only once");
    }
    parse_grpc_timeout(value.as_bytes()).map(Some).ok_or(
        "grpc-timeout: must be 1 to 8 digits and a unit (H, M, S, m, u or n), for example 5S",
    )
}

/// Whether the content type is gRPC with protobuf ("gRPC over HTTP/2", section "Requests"). gRPC-Web and other message encodings are
/// not supported.
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
