//! Every metric by name, in one list. Label sets are closed and all series exist from the start, so a rate is never absent
//! and no caller can add a series.

use std::{
    array, fmt,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Metric, Registry},
};
use tonic::Code;

use crate::{code, method::Method, reason::Reason};

/// How one upstream attempt ended, as the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// A complete reply, with any status.
    Reply,
    /// No complete reply: name lookup, connection, TLS, reset, truncation or protocol error.
    TransportError,
    /// The attempt outlived `--attempt-timeout`. When a call's own deadline passes, its attempt is `Cancelled`.
    Timeout,
    /// Dropped because no call waits for it any more.
    Cancelled,
}

/// In the order of [`AttemptOutcome`].
const OUTCOMES: [&str; 4] = ["answer", "transport_error", "timeout", "cancelled"];

const STATUS_CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

/// Reasons for a retry, as the label `reason` of the retry counter.
const RETRY_REASONS: [Reason; 10] = [
    Reason::UpstreamDns,
    Reason::UpstreamConnect,
    Reason::UpstreamReset,
    Reason::UpstreamTruncated,
    Reason::UpstreamProtocol,
    Reason::UpstreamTimeout,
    Reason::UpstreamUnavailable,
    Reason::UpstreamInternal,
    Reason::CredentialRejected,
    Reason::ClockSkew,
];

/// Why the server closed a connection before HTTP/2, as the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many connections are open as `--max-connections` and the descriptors of the process allow.
    Limit,
    /// The client closed the connection before it sent anything complete, as TCP checks do.
    Closed,
    /// The client was silent or slow, or the server drains.
    Timeout,
    /// The TLS handshake failed.
    Tls,
    /// The client does not offer h2 by ALPN.
    Alpn,
    /// The client does not speak HTTP/2.
    Protocol,
}

/// In the order of [`Refusal`].
const REFUSALS: [&str; 6] = ["limit", "closed", "timeout", "tls", "alpn", "protocol"];

/// The label names and values of one series.
type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The series of one method, so that a call looks up no labels.
#[derive(Debug)]
struct MethodSeries {
    started: Counter,
    handled: [Counter; 17],
    seconds: Histogram,
}

/// All metrics of one process, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    /// Indexed by [`Method`].
    calls: Vec<MethodSeries>,
    /// Indexed by [`AttemptOutcome`], then as [`STATUS_CLASSES`].
    attempts: [[Counter; STATUS_CLASSES.len()]; OUTCOMES.len()],
    attempt_seconds: Histogram,
    /// Indexed as [`RETRY_REASONS`].
    retries: [Counter; RETRY_REASONS.len()],
    /// Upstream requests in flight.
    pub upstream_in_flight: Gauge,
    /// Calls that joined an identical one in flight.
    pub coalesced: Counter,
    /// Calls served from the cache.
    pub cache_hits: Counter,
    /// Calls rejected by a throttle window or the rate limiter.
    pub throttled: Counter,
    credential_expiry: Gauge<f64, AtomicU64>,
    credential_refresh: [Counter; 2],
    tls_certificate_expiry: Gauge<f64, AtomicU64>,
    /// Open gRPC connections.
    pub connections: Gauge,
    /// Indexed by [`Refusal`].
    connections_refused: [Counter; REFUSALS.len()],
    /// Caught panics.
    pub panics: Counter,
    /// Log lines dropped because the pipe was blocked.
    pub log_lines_dropped: Counter,
    /// Repeated WARN and ERROR lines that were not written.
    pub log_lines_suppressed: Counter,
    /// 1 while the circuit breaker rejects calls.
    pub circuit_open: Gauge,
    /// Instances whose calls are rejected because attempts for them keep failing.
    pub circuit_open_instances: Gauge,
    /// Spans the collector accepted.
    pub spans_exported: Counter,
    /// Spans dropped because the queue was full, and because their export failed.
    pub spans_dropped: [Counter; 2],
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Registers every metric and creates every series.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::default();
        let r = &mut registry;
        let info = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "The running program", info);
        r.register_collector(Box::new(super::process::Process));
        let seconds = latency_histogram();
        r.register(
            "rds_upstream_request_duration_seconds",
            "Duration of an upstream attempt",
            seconds.clone(),
        );
        let metrics = Self {
            calls: call_series(r),
            attempts: attempt_series(r),
            attempt_seconds: seconds,
            retries: counters(
                r,
                "rds_upstream_retries",
                "Upstream attempts after the first",
                RETRY_REASONS.map(|reason| [("reason", reason.as_str())]),
            ),
            upstream_in_flight: register(
                r,
                "rds_upstream_in_flight",
                "Upstream requests in flight",
            ),
            coalesced: register(
                r,
                "rds_coalesced_calls",
                "Calls that joined an identical one in flight",
            ),
            cache_hits: register(r, "rds_cache_hits", "Calls served from the cache"),
            throttled: register(
                r,
                "rds_throttled_calls",
                "Calls rejected by a throttle window or the rate limiter",
            ),
            credential_expiry: register(
                r,
                "rds_credential_expiry_timestamp_seconds",
                "When the fetched credential expires; 0 if no fetched credential expires",
            ),
            credential_refresh: counters(
                r,
                "rds_credential_refresh",
                "Fetches of a credential",
                ["success", "failure"].map(|outcome| [("outcome", outcome)]),
            ),
            tls_certificate_expiry: register(
                r,
                "tls_certificate_expiry_timestamp_seconds",
                "When the listener's certificate expires; 0 without TLS",
            ),
            connections: register(r, "grpc_server_connections", "Open gRPC connections"),
            connections_refused: counters(
                r,
                "grpc_server_connections_refused",
                "Connections closed before HTTP/2",
                REFUSALS.map(|reason| [("reason", reason)]),
            ),
            panics: register(r, "panics", "Panics caught"),
            log_lines_dropped: register(
                r,
                "log_lines_dropped",
                "Log lines dropped because the pipe was blocked",
            ),
            log_lines_suppressed: register(
                r,
                "log_lines_suppressed",
                "Repeated WARN and ERROR lines that were not written",
            ),
            circuit_open: register(
                r,
                "rds_circuit_open",
                "1 while the circuit breaker rejects calls because RDS is down",
            ),
            circuit_open_instances: register(
                r,
                "rds_circuit_open_instances",
                "Instances whose calls are rejected because attempts for them keep failing",
            ),
            spans_exported: register(r, "trace_spans_exported", "Spans the collector accepted"),
            spans_dropped: counters(
                r,
                "trace_spans_dropped",
                "Spans that did not reach the collector",
                ["queue_full", "export_failed"].map(|reason| [("reason", reason)]),
            ),
            registry,
        };
        Arc::new(metrics)
    }

    /// Counts the start of a call.
    pub fn call_started(&self, method: Method) {
        self.calls[method as usize].started.inc();
    }

    /// Counts the end of a call, exactly once for each start.
    pub fn call_handled(&self, method: Method, code: Code, took: Duration) {
        let series = &self.calls[method as usize];
        series.handled[code as usize].inc();
        series.seconds.observe(took.as_secs_f64());
    }

    /// Counts one upstream attempt; `http_status` is `None` without a reply.
    pub fn upstream_attempt(
        &self,
        outcome: AttemptOutcome,
        http_status: Option<u16>,
        took: Duration,
    ) {
        let class = http_status.map_or(5, |status| usize::from(status / 100).clamp(1, 5) - 1);
        self.attempts[outcome as usize][class].inc();
        self.attempt_seconds.observe(took.as_secs_f64());
    }

    /// Counts a retry by its reason.
    pub fn upstream_retry(&self, reason: Reason) {
        if let Some(index) = RETRY_REASONS.iter().position(|known| *known == reason) {
            self.retries[index].inc();
        }
    }

    /// Counts a connection that was closed before HTTP/2.
    pub fn connection_refused(&self, reason: Refusal) {
        self.connections_refused[reason as usize].inc();
    }

    /// Counts a fetch of a credential.
    pub fn credential_refreshed(&self, success: bool) {
        self.credential_refresh[usize::from(!success)].inc();
    }

    /// Records when the fetched credential expires.
    pub fn credential_expires(&self, at: SystemTime) {
        self.credential_expiry.set(unix_seconds(at));
    }

    /// Records when the listener's certificate expires.
    pub fn tls_certificate_expires(&self, at: SystemTime) {
        self.tls_certificate_expiry.set(unix_seconds(at));
    }

    /// All metrics as `OpenMetrics` text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a String does not fail");
        text
    }
}

/// From 1 ms, the least that a call to RDS takes, to 30 s, the default of `--timeout`.
const LATENCY_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
];

fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

fn latency_histogram() -> Histogram {
    Histogram::new(LATENCY_BUCKETS)
}

fn call_series(r: &mut Registry) -> Vec<MethodSeries> {
    let started: Family<Labels<3>, Counter> = register(r, "grpc_server_started", "Calls started");
    let handled: Family<Labels<4>, Counter> =
        register(r, "grpc_server_handled", "Calls completed, by code");
    let seconds = Family::<Labels<3>, Histogram>::new_with_constructor(latency_histogram);
    r.register(
        "grpc_server_handling_seconds",
        "Time from the headers to the end of a call",
        seconds.clone(),
    );
    let series = |method: Method| {
        let kind = ("grpc_type", method.kind().as_str());
        let service = ("grpc_service", method.service());
        let name = ("grpc_method", method.name());
        MethodSeries {
            started: started.get_or_create_owned(&[kind, service, name]),
            handled: array::from_fn(|code| {
                let code = ("grpc_code", code::go_name(Code::from(code as i32)));
                handled.get_or_create_owned(&[kind, service, name, code])
            }),
            seconds: seconds.get_or_create_owned(&[kind, service, name]),
        }
    };
    Method::all().into_iter().map(series).collect()
}

fn attempt_series(r: &mut Registry) -> [[Counter; STATUS_CLASSES.len()]; OUTCOMES.len()] {
    let family: Family<Labels<2>, Counter> =
        register(r, "rds_upstream_requests", "Upstream attempts");
    OUTCOMES.map(|outcome| {
        STATUS_CLASSES.map(|class| {
            family.get_or_create_owned(&[("outcome", outcome), ("status_class", class)])
        })
    })
}

/// Registers a metric without labels, or a family with labels.
fn register<M: Metric + Clone + Default>(r: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    r.register(name, help, metric.clone());
    metric
}

/// Registers a counter with labels and creates its series.
fn counters<const N: usize, const SERIES: usize>(
    r: &mut Registry,
    name: &str,
    help: &str,
    labels: [Labels<N>; SERIES],
) -> [Counter; SERIES] {
    let family: Family<Labels<N>, Counter> = register(r, name, help);
    labels.map(|labels| family.get_or_create_owned(&labels))
}
