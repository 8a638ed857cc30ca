//! What is counted and told about each RPC, exactly once, however it ends.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, header};
use tokio::time::Instant;
use tonic::Code;

use super::limit::Place;
use crate::{
    rpc::Call,
    telemetry::{
        Peer, Tracer,
        {method::Method, metrics::Metrics},
    },
};

/// Takes one [`Record`] per RPC. It is called on the workers and must not block.
pub type Access = Arc<dyn Fn(&Record<'_>) + Send + Sync>;

/// One RPC that is over.
#[derive(Debug)]
pub struct Record<'a> {
    /// Which RPC.
    pub method: Method,
    /// The code on the wire. Unknown where only an HTTP status was sent: a gRPC client reads 405 and 415 as that.
    pub code: Code,
    /// Request id, deadline, and what the upstream work showed.
    pub call: &'a Call,
    /// From the headers to the end.
    pub took: Duration,
    /// What the caller's `grpc-timeout` said, where it was well-formed.
    pub caller_timeout: Option<Duration>,
    /// The other end of the connection.
    pub peer: &'a Peer,
    /// `user-agent` as sent; at most 16 KiB of any bytes a header may hold.
    pub user_agent: Option<&'a HeaderValue>,
    /// `traceparent` as sent.
    pub traceparent: Option<&'a HeaderValue>,
    /// Bytes of reply messages handed to HTTP/2, their prefixes included.
    pub bytes: usize,
}

/// What all RPCs of a process report to.
#[derive(Clone)]
pub(super) struct Sinks {
    pub(super) metrics: Arc<Metrics>,
    pub(super) access: Access,
    pub(super) tracer: Option<Arc<Tracer>>,
}

/// One RPC under way. Dropping it counts and tells it, as Cancelled unless [`Rpc::end`] was called before.
pub(super) struct Rpc {
    pub(super) call: Arc<Call>,
    pub(super) caller_timeout: Option<Duration>,
    sinks: Arc<Sinks>,
    method: Method,
    started: Instant,
    peer: Arc<Peer>,
    user_agent: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    code: Option<Code>,
    bytes: usize,
    /// Given back when the RPC is over, its answer read or given up.
    place: Option<Place>,
}

impl Rpc {
    /// Counts the start.
    pub(super) fn start(
        sinks: &Arc<Sinks>,
        method: Method,
        call: Call,
        caller_timeout: Option<Duration>,
        peer: Arc<Peer>,
        headers: &HeaderMap,
    ) -> Self {
        sinks.metrics.rpc_started(method);
        Self {
            call: Arc::new(call),
            caller_timeout,
            sinks: Arc::clone(sinks),
            method,
            started: Instant::now(),
            peer,
            user_agent: headers.get(header::USER_AGENT).cloned(),
            traceparent: headers.get("traceparent").cloned(),
            code: None,
            bytes: 0,
            place: None,
        }
    }

    /// Keeps a place of a limit until the RPC is over.
    pub(super) fn hold(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Notes bytes of the reply that were handed over.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes;
    }

    /// Notes the code that was handed over; nothing after it changes how the RPC is counted.
    pub(super) fn end(&mut self, code: Code) {
        self.code = Some(code);
    }

    /// Counts a caught panic.
    pub(super) fn panicked(&self) {
        self.sinks.metrics.panics.inc();
    }
}

impl Drop for Rpc {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let took = self.started.elapsed();
        self.sinks.metrics.rpc_handled(self.method, code, took);
        (self.sinks.access)(&Record {
            method: self.method,
            code,
            call: &self.call,
            took,
            caller_timeout: self.caller_timeout,
            peer: &self.peer,
            user_agent: self.user_agent.as_ref(),
            traceparent: self.traceparent.as_ref(),
            bytes: self.bytes,
        });
    }
}

impl fmt::Debug for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rpc")
            .field("method", &self.method)
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}
