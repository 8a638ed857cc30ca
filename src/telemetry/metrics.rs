//! Every metric by name, in one list. Label sets are closed and their series exist from the start, so a rate is never
//! absent and no caller can add a series.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};
use tonic::Code;

use crate::{code, method::Method, reason::Reason};

/// How one upstream attempt ended, as the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// A whole answer came, whatever it says.
    Answer,
    /// No complete answer: connect, TLS, reset, truncation, protocol.
    TransportError,
    /// The attempt outlived its timeout. An RPC whose deadline passes leaves its attempt, which then is `Cancelled`.
    Timeout,
    /// Nobody waited for it any more.
    Cancelled,
}

const OUTCOMES: [(AttemptOutcome, &str); 4] = [
    (AttemptOutcome::Answer, "answer"),
    (AttemptOutcome::TransportError, "transport_error"),
    (AttemptOutcome::Timeout, "timeout"),
    (AttemptOutcome::Cancelled, "cancelled"),
];

const STATUS_CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

/// Reasons for which an attempt is repeated, as the label `reason` of the retry counter.
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

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandledLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
    grpc_code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    outcome: &'static str,
    status_class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// The series of one method, looked up once.
#[derive(Debug)]
struct MethodSeries {
    started: Counter,
    handled: [Counter; 17],
    seconds: Histogram,
}

/// All metrics of one process, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    calls: Vec<MethodSeries>,
    attempts: Vec<[Counter; 6]>,
    attempt_seconds: Histogram,
    retries: Vec<(Reason, Counter)>,
    /// Upstream requests on the wire now.
    pub upstream_in_flight: Gauge,
    /// RPCs that joined an equal one in flight.
    pub coalesced: Counter,
    /// RPCs answered from the cache.
    pub cache_hits: Counter,
    /// RPCs held back by the throttle memory or the local rate.
    pub throttled: Counter,
    credential_expiry: Gauge<f64, AtomicU64>,
    credential_refresh: [Counter; 2],
    tls_certificate_expiry: Gauge<f64, AtomicU64>,
    /// gRPC connections open now.
    pub connections: Gauge,
    /// Connections that never became one: refused at the limit, failed handshake, no preface.
    pub connections_refused: Counter,
    /// Panics that were caught.
    pub panics: Counter,
    /// Log lines dropped because the pipe was blocked.
    pub log_lines_dropped: Counter,
    /// Repeated WARN and ERROR lines that were held back.
    pub log_lines_suppressed: Counter,
    /// 1 while the breaker holds calls back.
    pub circuit_open: Gauge,
    /// Instances whose calls are held back because attempts about them keep failing.
    pub circuit_open_instances: Gauge,
    /// Spans that the collector took.
    pub spans_exported: Counter,
    /// Spans dropped because the queue was full, and because no export brought them to the collector.
    pub spans_dropped: [Counter; 2],
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Registers every metric and makes every series.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::default();
        let started = Family::<MethodLabels, Counter>::default();
        let handled = Family::<HandledLabels, Counter>::default();
        let seconds = Family::<MethodLabels, Histogram>::new_with_constructor(|| {
            Histogram::new(LATENCY_BUCKETS)
        });
        let attempts = Family::<AttemptLabels, Counter>::default();
        let attempt_seconds = Histogram::new(LATENCY_BUCKETS);
        let retries = Family::<ReasonLabel, Counter>::default();
        let refresh = Family::<OutcomeLabel, Counter>::default();
        let dropped = Family::<ReasonLabel, Counter>::default();
        registry.register("grpc_server_started", "RPCs started", started.clone());
        registry.register(
            "grpc_server_handled",
            "RPCs completed, by code",
            handled.clone(),
        );
        registry.register(
            "grpc_server_handling_seconds",
            "Time from headers to the end of an RPC",
            seconds.clone(),
        );
        registry.register(
            "rds_upstream_requests",
            "Upstream attempts",
            attempts.clone(),
        );
        registry.register(
            "rds_upstream_request_duration_seconds",
            "Time of an upstream attempt",
            attempt_seconds.clone(),
        );
        registry.register(
            "rds_upstream_retries",
            "Upstream attempts after the first",
            retries.clone(),
        );
        registry.register(
            "rds_credential_refresh",
            "Fetches of a credential",
            refresh.clone(),
        );
        registry.register(
            "trace_spans_dropped",
            "Spans that did not reach the collector",
            dropped.clone(),
        );
        let info = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The running program", info);
        registry.register_collector(Box::new(super::process::Process));

        let calls = Method::all().map(|method| {
            let (grpc_type, grpc_service, grpc_method) =
                (method.kind().as_str(), method.service(), method.name());
            let labels = MethodLabels {
                grpc_type,
                grpc_service,
                grpc_method,
            };
            MethodSeries {
                started: started.get_or_create_owned(&labels),
                handled: std::array::from_fn(|index| {
                    let grpc_code = code::go_name(Code::from(index as i32));
                    handled.get_or_create_owned(&HandledLabels {
                        grpc_type,
                        grpc_service,
                        grpc_method,
                        grpc_code,
                    })
                }),
                seconds: seconds.get_or_create_owned(&labels),
            }
        });
        let attempts = OUTCOMES
            .iter()
            .map(|(_, outcome)| {
                STATUS_CLASSES.map(|status_class| {
                    attempts.get_or_create_owned(&AttemptLabels {
                        outcome,
                        status_class,
                    })
                })
            })
            .collect();
        let retries = RETRY_REASONS
            .iter()
            .map(|reason| {
                (
                    *reason,
                    retries.get_or_create_owned(&ReasonLabel {
                        reason: reason.as_str(),
                    }),
                )
            })
            .collect();
        let credential_refresh = ["success", "failure"]
            .map(|outcome| refresh.get_or_create_owned(&OutcomeLabel { outcome }));

        let spans_dropped = ["queue_full", "export_failed"]
            .map(|reason| dropped.get_or_create_owned(&ReasonLabel { reason }));

        let mut metrics = Self {
            registry,
            calls: calls.into(),
            attempts,
            attempt_seconds,
            retries,
            upstream_in_flight: Gauge::default(),
            coalesced: Counter::default(),
            cache_hits: Counter::default(),
            throttled: Counter::default(),
            credential_expiry: Gauge::default(),
            credential_refresh,
            tls_certificate_expiry: Gauge::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            panics: Counter::default(),
            log_lines_dropped: Counter::default(),
            log_lines_suppressed: Counter::default(),
            circuit_open: Gauge::default(),
            circuit_open_instances: Gauge::default(),
            spans_exported: Counter::default(),
            spans_dropped,
        };
        metrics.register_plain();
        Arc::new(metrics)
    }

    fn register_plain(&mut self) {
        let r = &mut self.registry;
        r.register(
            "rds_upstream_in_flight",
            "Upstream requests on the wire",
            self.upstream_in_flight.clone(),
        );
        r.register(
            "rds_coalesced_calls",
            "RPCs that joined an equal one in flight",
            self.coalesced.clone(),
        );
        r.register(
            "rds_cache_hits",
            "RPCs answered from the cache",
            self.cache_hits.clone(),
        );
        r.register(
            "rds_throttled_calls",
            "RPCs held back without an upstream call",
            self.throttled.clone(),
        );
        r.register(
            "rds_credential_expiry_timestamp_seconds",
            "When the fetched credential expires; 0 when none does",
            self.credential_expiry.clone(),
        );
        r.register(
            "tls_certificate_expiry_timestamp_seconds",
            "When the listener's certificate expires; 0 without TLS",
            self.tls_certificate_expiry.clone(),
        );
        r.register(
            "grpc_server_connections",
            "gRPC connections open",
            self.connections.clone(),
        );
        r.register(
            "grpc_server_connections_refused",
            "Connections refused at the limit or failed before HTTP/2",
            self.connections_refused.clone(),
        );
        r.register("panics", "Panics caught", self.panics.clone());
        r.register(
            "log_lines_dropped",
            "Log lines dropped because the pipe was blocked",
            self.log_lines_dropped.clone(),
        );
        r.register(
            "log_lines_suppressed",
            "Repeated WARN and ERROR lines that were held back",
            self.log_lines_suppressed.clone(),
        );
        r.register(
            "rds_circuit_open",
            "1 while calls are held back because RDS is down",
            self.circuit_open.clone(),
        );
        r.register(
            "rds_circuit_open_instances",
            "Instances whose calls are held back because attempts about them keep failing",
            self.circuit_open_instances.clone(),
        );
        r.register(
            "trace_spans_exported",
            "Spans that the collector took",
            self.spans_exported.clone(),
        );
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

    /// Counts one upstream attempt; `http_status` where an answer came.
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

    /// Counts a repeated attempt by the reason for it.
    pub fn upstream_retry(&self, reason: Reason) {
        if let Some((_, counter)) = self.retries.iter().find(|(known, _)| *known == reason) {
            counter.inc();
        }
    }

    /// Counts a fetch of a credential.
    pub fn credential_refreshed(&self, success: bool) {
        self.credential_refresh[usize::from(!success)].inc();
    }

    /// Notes when the fetched credential expires.
    pub fn credential_expires(&self, at: SystemTime) {
        self.credential_expiry.set(unix_seconds(at));
    }

    /// Notes when the listener's certificate expires.
    pub fn tls_certificate_expires(&self, at: SystemTime) {
        self.tls_certificate_expiry.set(unix_seconds(at));
    }

    /// The exposition in `OpenMetrics` text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a String does not fail");
        text
    }
}

/// From 1 ms, below which a call cannot have gone upstream, to 30 s, the default bound of an RPC.
const LATENCY_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
];

fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
