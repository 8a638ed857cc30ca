//! Every metric by name, in one list. Label sets are closed and all series exist from the start, so a rate is never absent
//! and no caller can add a series. The values of a label are the variants of an enum in `snake_case`.

use std::{
    array,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Metric, Registry},
};
use strum::{VariantArray as _, VariantNames};
use tonic::Code;

use crate::{
    code,
    method::Method,
    reason::Reason,
    supervise::{Restarts, Task},
};

/// How one upstream attempt ended, as the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum AttemptOutcome {
    /// A complete reply, with any status.
    #[strum(serialize = "answer")]
    Reply,
    /// No complete reply: name lookup, connection, TLS, reset, truncation or protocol error.
    TransportError,
    /// The attempt outlived `--attempt-timeout`. When a call's own deadline passes, its attempt is `Cancelled`.
    Timeout,
    /// Dropped because no call waits for it any more.
    Cancelled,
}

/// Why a call failed that the caller alone is responsible for, as the label `cause`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum CallerFault {
    /// The caller's deadline left no time for a reply.
    Deadline,
    /// The request is not gRPC.
    Http,
}

/// How a poll of a watched task ended, as the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum PollOutcome {
    /// The task's text differs from the previous poll.
    Changed,
    /// It does not.
    Unchanged,
    /// An error, or an unknown task.
    Failed,
    /// A throttle window or the rate limiter rejected the poll, or RDS replied with 429.
    Throttled,
}

/// A message of a watch, as the label `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum WatchMessage {
    /// With the task.
    State,
    /// Without it.
    Heartbeat,
}

/// Why a watch ended, as the label `cause`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum WatchEnd {
    /// The task is over.
    Over,
    /// The caller's deadline passed.
    Deadline,
    /// The caller ended the call or disconnected.
    Cancelled,
    /// The watch or its connection reached its age.
    Expired,
    /// The server drains.
    Drain,
    /// An error that a retry may not help.
    Error,
    /// Transient errors for five minutes.
    Stale,
    /// The client did not read.
    Unread,
}

/// What a request to the quota store is for, as the label `operation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum StoreOperation {
    /// Admits an attempt: throttle windows, the rest of the key, the rate.
    Admit,
    /// Admits a poll: a result of another replica, the rate.
    Poll,
    /// Looks for the result of another replica.
    Share,
    /// Stores a result.
    Publish,
    /// Stores a throttle window.
    Throttle,
    /// Stores evidence about a key.
    Key,
    /// Counts the replicas.
    Heartbeat,
}

/// How a request to the quota store ended, as the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum StoreOutcome {
    /// With a reply that was used.
    Ok,
    /// No reply within the time that a call waits.
    Timeout,
    /// No connection, or a reply of another form than expected.
    Error,
    /// Not sent: the store is down, the call has no time left, or too many writes are waiting.
    Skipped,
    /// The entry in the reply was not used: not authentic, too long, too old, or from another version.
    Rejected,
}

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "snake_case")]
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

/// The label names and values of one series.
type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The series of one method, so that a call looks up no labels.
#[derive(Debug)]
struct MethodSeries {
    started: Counter,
    handled: [Counter; 17],
    seconds: Histogram,
}

/// Counts something in a gauge until it is dropped.
#[derive(Debug)]
pub struct Counted(Gauge);

impl Counted {
    /// Increments the gauge.
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// All metrics of one process, and the registry that prints them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Indexed by [`Method`].
    calls: Vec<MethodSeries>,
    /// Indexed by [`AttemptOutcome`], then as [`STATUS_CLASSES`].
    attempts: [[Counter; STATUS_CLASSES.len()]; AttemptOutcome::VARIANTS.len()],
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
    /// Calls of `GetTaskDetail` that were slow only because they waited for the rate limiter.
    pub paced: Counter,
    /// Indexed by [`Reason`].
    failed: [Counter; Reason::VARIANTS.len()],
    /// Replies about another instance than requested.
    pub mismatched_replies: Counter,
    credential_expiry: Gauge<f64, AtomicU64>,
    credential_refresh: [Counter; 2],
    /// The caller's credential, the facade's own.
    credential_rejected: [Counter; 2],
    /// Indexed by [`CallerFault`].
    caller_faults: [Counter; CallerFault::VARIANTS.len()],
    tls_certificate_expiry: Gauge<f64, AtomicU64>,
    /// Open watches.
    pub watches: Gauge,
    /// The limit on open watches.
    pub watches_limit: Gauge,
    /// Tasks with a poller.
    pub watched_tasks: Gauge,
    /// Indexed by [`PollOutcome`].
    watch_polls: [Counter; PollOutcome::VARIANTS.len()],
    /// Indexed by [`WatchMessage`].
    watch_messages: [Counter; WatchMessage::VARIANTS.len()],
    /// States that a newer one replaced before a watch had room for it.
    pub watch_states_skipped: Counter,
    /// Indexed by [`WatchEnd`].
    watch_ends: [Counter; WatchEnd::VARIANTS.len()],
    /// Open gRPC connections.
    pub connections: Gauge,
    /// Indexed by [`Refusal`].
    connections_refused: [Counter; Refusal::VARIANTS.len()],
    /// Caught panics.
    pub panics: Counter,
    /// Background tasks restarted after a panic.
    pub background: Restarts,
    /// Log lines dropped because the pipe was blocked.
    pub log_lines_dropped: Counter,
    /// Repeated WARN and ERROR lines that were not written.
    pub log_lines_suppressed: Counter,
    /// 1 while the circuit breaker rejects calls.
    pub circuit_open: Gauge,
    /// Instances whose calls are rejected because attempts for them keep failing.
    pub circuit_open_instances: Gauge,
    /// 1 while calls use the quota store.
    pub store_up: Gauge,
    /// Replicas last seen in the quota store; 0 before that.
    pub store_replicas: Gauge,
    /// Indexed by [`StoreOperation`], then by [`StoreOutcome`].
    store_requests: [[Counter; StoreOutcome::VARIANTS.len()]; StoreOperation::VARIANTS.len()],
    store_seconds: Histogram,
    /// Spans the collector accepted.
    pub spans_exported: Counter,
    /// Spans dropped because the queue was full, and because their export failed.
    pub spans_dropped: [Counter; 2],
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
        let store_seconds = Histogram::new(STORE_BUCKETS);
        r.register(
            "quota_store_request_duration_seconds",
            "Duration of a request to the quota store",
            store_seconds.clone(),
        );
        let reasons: Vec<_> = Reason::VARIANTS
            .iter()
            .copied()
            .map(Reason::as_str)
            .collect();
        let metrics = Self {
            calls: call_series(r),
            attempts: attempt_series(r),
            attempt_seconds: seconds,
            retries: counters(
                r,
                "rds_upstream_retries",
                "Upstream attempts after the first",
                "reason",
                &RETRY_REASONS.map(Reason::as_str),
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
            paced: register(
                r,
                "rds_paced_calls",
                "Calls of GetTaskDetail over 2.5 s, of which less without the wait for the rate limiter",
            ),
            failed: counters(
                r,
                "rds_failed_calls",
                "Calls and watches that failed, by reason",
                "reason",
                &reasons,
            ),
            mismatched_replies: register(
                r,
                "rds_upstream_mismatched_replies",
                "Replies of RDS about another instance than requested",
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
                "outcome",
                &["success", "failure"],
            ),
            credential_rejected: counters(
                r,
                "rds_credential_rejected",
                "Calls that failed because the credential was rejected or is locked",
                "owner",
                &["caller", "server"],
            ),
            caller_faults: counters(
                r,
                "rds_caller_faults",
                "Calls with an error code that the caller alone is responsible for",
                "cause",
                CallerFault::VARIANTS,
            ),
            tls_certificate_expiry: register(
                r,
                "tls_certificate_expiry_timestamp_seconds",
                "When the listener's certificate expires; 0 without TLS",
            ),
            watches: register(r, "rds_watches", "Open watches"),
            watches_limit: register(r, "rds_watches_limit", "Limit on open watches"),
            watched_tasks: register(r, "rds_watched_tasks", "Tasks that are polled for watches"),
            watch_polls: counters(
                r,
                "rds_watch_polls",
                "Polls of watched tasks",
                "outcome",
                PollOutcome::VARIANTS,
            ),
            watch_messages: counters(
                r,
                "rds_watch_messages",
                "Messages of watches",
                "kind",
                WatchMessage::VARIANTS,
            ),
            watch_states_skipped: register(
                r,
                "rds_watch_states_skipped",
                "States that a newer one replaced before they were sent",
            ),
            watch_ends: counters(
                r,
                "rds_watch_ended",
                "Watches that ended",
                "cause",
                WatchEnd::VARIANTS,
            ),
            connections: register(r, "grpc_server_connections", "Open gRPC connections"),
            connections_refused: counters(
                r,
                "grpc_server_connections_refused",
                "Connections closed before HTTP/2",
                "reason",
                Refusal::VARIANTS,
            ),
            panics: register(r, "panics", "Panics caught"),
            background: Restarts(counters(
                r,
                "background_task_restarts",
                "Background tasks restarted after a panic",
                "task",
                Task::VARIANTS,
            )),
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
            store_up: register(r, "quota_store_up", "1 while calls use the quota store"),
            store_replicas: register(
                r,
                "quota_store_replicas",
                "Replicas that share the quota store, as last seen; 0 before that",
            ),
            store_requests: store_series(r),
            store_seconds,
            spans_exported: register(r, "trace_spans_exported", "Spans the collector accepted"),
            spans_dropped: counters(
                r,
                "trace_spans_dropped",
                "Spans that did not reach the collector",
                "reason",
                &["queue_full", "export_failed"],
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

    /// Counts a failed call or watch by its reason.
    pub fn call_failed(&self, reason: Reason) {
        self.failed[reason as usize].inc();
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

    /// Counts a poll of a watched task.
    pub fn watch_poll(&self, outcome: PollOutcome) {
        self.watch_polls[outcome as usize].inc();
    }

    /// Counts a message of a watch.
    pub fn watch_message(&self, kind: WatchMessage) {
        self.watch_messages[kind as usize].inc();
    }

    /// Counts the end of a watch.
    pub fn watch_ended(&self, cause: WatchEnd) {
        self.watch_ends[cause as usize].inc();
    }

    /// Counts a connection that was closed before HTTP/2.
    pub fn connection_refused(&self, reason: Refusal) {
        self.connections_refused[reason as usize].inc();
    }

    /// Counts a fetch of a credential.
    pub fn credential_refreshed(&self, success: bool) {
        self.credential_refresh[usize::from(!success)].inc();
    }

    /// Counts a call whose credential, the facade's own or the caller's, was rejected or is locked.
    pub fn credential_rejected(&self, is_own: bool) {
        self.credential_rejected[usize::from(is_own)].inc();
    }

    /// Counts a call that failed because of the caller alone.
    pub fn caller_fault(&self, fault: CallerFault) {
        self.caller_faults[fault as usize].inc();
    }

    /// Counts a request to the quota store.
    pub fn store_request(&self, operation: StoreOperation, outcome: StoreOutcome, took: Duration) {
        self.store_requests[operation as usize][outcome as usize].inc();
        self.store_seconds.observe(took.as_secs_f64());
    }

    /// Counts a request to the quota store that was not sent.
    pub fn store_skipped(&self, operation: StoreOperation) {
        self.store_requests[operation as usize][StoreOutcome::Skipped as usize].inc();
    }

    /// Counts an entry of the quota store that was not used.
    pub fn store_rejected(&self, operation: StoreOperation) {
        self.store_requests[operation as usize][StoreOutcome::Rejected as usize].inc();
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

/// Up to 50 ms, the longest that a call waits for the quota store, and beyond for writes.
const STORE_BUCKETS: [f64; 10] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0,
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
        let kind = ("grpc_type", method.kind());
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

fn attempt_series(
    r: &mut Registry,
) -> [[Counter; STATUS_CLASSES.len()]; AttemptOutcome::VARIANTS.len()] {
    let family: Family<Labels<2>, Counter> =
        register(r, "rds_upstream_requests", "Upstream attempts");
    array::from_fn(|outcome| {
        let outcome = ("outcome", AttemptOutcome::VARIANTS[outcome]);
        STATUS_CLASSES.map(|class| family.get_or_create_owned(&[outcome, ("status_class", class)]))
    })
}

fn store_series(
    r: &mut Registry,
) -> [[Counter; StoreOutcome::VARIANTS.len()]; StoreOperation::VARIANTS.len()] {
    let family: Family<Labels<2>, Counter> =
        register(r, "quota_store_requests", "Requests to the quota store");
    array::from_fn(|operation| {
        let operation = ("operation", StoreOperation::VARIANTS[operation]);
        array::from_fn(|outcome| {
            let outcome = ("outcome", StoreOutcome::VARIANTS[outcome]);
            family.get_or_create_owned(&[operation, outcome])
        })
    })
}

/// Registers a metric without labels, or a family with labels.
fn register<M: Metric + Clone + Default>(r: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    r.register(name, help, metric.clone());
    metric
}

/// Registers a counter with a label and creates the series of its values.
fn counters<const SERIES: usize>(
    r: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: &[&'static str],
) -> [Counter; SERIES] {
    let family: Family<Labels<1>, Counter> = register(r, name, help);
    array::from_fn(|index| family.get_or_create_owned(&[(label, values[index])]))
}
