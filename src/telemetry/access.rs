//! The access log: one line per call. It bypasses `tracing` because its cost is part of every call.

use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use tonic::Code;
use tracing::Level;

use super::{
    context::Context,
    line::Line,
    metrics::CallerFault,
    record::{Facts, Record},
    trace::ServerSpan,
    writer::Writer,
};
use crate::{code, method::Method, options::OutputFormat, reason::Reason};

/// The target of access lines in `RUST_LOG`: `access=off` hides all of them, `access=error` those at level INFO.
pub(super) const TARGET: &str = "access";

/// The target of access lines of health checks, which can be hidden on their own. A filter for [`TARGET`] also applies to it.
pub(super) const HEALTH_TARGET: &str = "access::health";

/// Longest text that a peer chooses, in bytes.
const MAX_PEER_TEXT: usize = 128;

/// Writes access lines. Clones write to the same log.
#[derive(Debug, Clone)]
pub struct Access {
    format: OutputFormat,
    writer: Writer,
}

impl Access {
    /// An access log that drops every line, for tests and benchmarks.
    pub fn off() -> Self {
        // Closed at once by its guard.
        let (writer, _) = Writer::new(std::io::sink(), Counter::default());
        Self::new(OutputFormat::Text, writer)
    }

    /// An access log in this format.
    pub(super) fn new(format: OutputFormat, writer: Writer) -> Self {
        Self { format, writer }
    }

    /// Writes one line unless the filter hides it. Never blocks.
    pub(super) fn write(&self, record: &Record, code: Code, took: Duration, facts: &Facts) {
        let caller_fault = record.caller_fault(code, facts);
        let level = level(record.method, code, record.reason, caller_fault);
        // Separate call sites, because each caches the filter's decision for its own target and level.
        let shown = match (target(record.method), level) {
            (HEALTH_TARGET, Level::ERROR) => {
                tracing::enabled!(target: HEALTH_TARGET, Level::ERROR)
            }
            (HEALTH_TARGET, _) => tracing::enabled!(target: HEALTH_TARGET, Level::INFO),
            (_, Level::ERROR) => tracing::enabled!(target: TARGET, Level::ERROR),
            _ => tracing::enabled!(target: TARGET, Level::INFO),
        };
        if shown {
            let now = Timestamp::now();
            self.writer
                .write(&render(self.format, now, level, record, code, took, facts));
        }
    }
}

fn target(method: Method) -> &'static str {
    match method {
        Method::HealthCheck | Method::HealthWatch => HEALTH_TARGET,
        _ => TARGET,
    }
}

/// ERROR if the server or upstream is at fault, else INFO.
fn level(
    method: Method,
    code: Code,
    reason: Option<Reason>,
    caller_fault: Option<CallerFault>,
) -> Level {
    match code {
        _ if caller_fault.is_some() => Level::INFO,
        // The caller is at fault with any code, for example for a request that is not gRPC.
        _ if reason == Some(Reason::InvalidRequest) => Level::INFO,
        // Normal ends of a long watch.
        _ if method == Method::WatchTaskDetail
            && matches!(reason, Some(Reason::WatchExpired | Reason::ShuttingDown)) =>
        {
            Level::INFO
        }
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Level::ERROR,
        // A missing upstream API is the operator's problem; an unknown method is the caller's.
        Code::Unimplemented if reason == Some(Reason::UpstreamApiNotFound) => Level::ERROR,
        _ => Level::INFO,
    }
}

fn render(
    format: OutputFormat,
    now: Timestamp,
    level: Level,
    record: &Record,
    code: Code,
    took: Duration,
    facts: &Facts,
) -> String {
    let mut line = Line::new(format, now, level, target(record.method), "rpc");
    line.text("request_id", &limited(record.request_id.as_bytes()));
    // The call's own span if traces are exported, else the caller's span.
    let caller = match (&record.span, &record.traceparent) {
        (None, Some(value)) => Context::from_traceparent(value),
        _ => None,
    };
    let span = record.span.as_deref().map(ServerSpan::context);
    if let Some(trace) = span.or(caller.as_ref()) {
        line.text("trace_id", &format!("{:032x}", trace.trace_id));
        line.text("span_id", &format!("{:016x}", trace.span_id));
    }
    line.text("grpc_method", record.method.full_name());
    line.text("grpc_code", code::go_name(code));
    if let Some(reason) = record.reason {
        line.text("reason", reason.as_str());
    }
    line.plain("duration_ms", Milliseconds(took));
    // u64, because dividing and printing 128 bits costs several times as much.
    line.plain("deadline_ms", record.timeout.as_millis() as u64);
    line.plain("attempts", facts.attempts);
    if let Some(status) = facts.http_status {
        line.plain("upstream_status", status);
    }
    if let Some(code) = &facts.upstream_code {
        line.text("upstream_code", &limited(code.as_bytes()));
    }
    if let Some(id) = &facts.upstream_request_id {
        line.text("upstream_request_id", &limited(id.as_bytes()));
    }
    line.text("peer", &record.peer.text);
    if let Some(agent) = &record.user_agent {
        line.text("user_agent", &limited(agent.as_bytes()));
    }
    if let Some([a, b, c, d, e, f]) = record.token_hash {
        let number = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        line.text("caller", &format!("{number:012x}"));
    }
    if let Some(id) = &record.project_id {
        line.text("project_id", id);
    }
    if record.method == Method::WatchTaskDetail {
        line.plain("messages", record.messages);
    }
    line.plain("bytes", record.bytes);
    line.finish()
}

/// Milliseconds with three decimals.
struct Milliseconds(Duration);

impl std::fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = self.0.as_micros() as u64;
        write!(f, "{}.{:03}", micros / 1000, micros % 1000)
    }
}

/// At most [`MAX_PEER_TEXT`] bytes of printable ASCII; any other byte becomes `?`.
pub(super) fn limited(text: &[u8]) -> std::borrow::Cow<'_, str> {
    let text = &text[..text.len().min(MAX_PEER_TEXT)];
    let printable = |b: &u8| (b' '..=b'~').contains(b);
    match std::str::from_utf8(text) {
        Ok(unchanged) if text.iter().all(printable) => unchanged.into(),
        _ => text
            .iter()
            .map(|b| if printable(b) { char::from(*b) } else { '?' })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::HeaderValue;
    use prometheus_client::metrics::counter::Counter;
    use tracing::subscriber::with_default;

    use super::*;
    use crate::telemetry::{
        log,
        metrics::Metrics,
        record::{Peer, Sinks},
        repeats::Repeats,
        writer::tests::Recorder,
    };

    const METHOD: Method = Method::GetTaskDetail;
    const TOOK: Duration = Duration::from_micros(12_345);

    fn record(access: &Access, headers: &[(&'static str, &[u8])]) -> Record {
        record_of(METHOD, access, headers)
    }

    fn record_of(method: Method, access: &Access, headers: &[(&'static str, &[u8])]) -> Record {
        let sinks = Arc::new(Sinks {
            metrics: Metrics::new(),
            access: access.clone(),
            tracer: None,
        });
        let headers = headers
            .iter()
            .map(|(name, value)| {
                (
                    name.parse().unwrap(),
                    HeaderValue::from_bytes(value).unwrap(),
                )
            })
            .collect();
        let peer = Arc::new(Peer::new("127.0.0.1:4711".parse().unwrap()));
        let id = "request-1".to_owned();
        Record::start(&sinks, method, id, Duration::from_secs(30), peer, &headers)
    }

    fn now() -> Timestamp {
        "2026-02-03T03:04:05.678Z".parse().unwrap()
    }

    #[test]
    fn json_line_has_every_field() {
        let traceparent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let headers: [(_, &[u8]); 2] = [
            ("traceparent", traceparent),
            ("user-agent", b"grpc-go/1.80"),
        ];
        let mut record = record(&Access::off(), &headers);
        record.token_hash = Some([0x0a; 6]);
        record.project_id = Some("project-1".to_owned());
        record.reason = Some(Reason::TaskNotFound);
        let facts = Facts {
            attempts: 2,
            http_status: Some(404),
            upstream_code: Some("DBS.200543".to_owned()),
            upstream_request_id: Some("abc123".to_owned()),
            ..Facts::default()
        };

        let text = render(
            OutputFormat::Json,
            now(),
            Level::INFO,
            &record,
            Code::NotFound,
            TOOK,
            &facts,
        );

        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "ts": "2026-02-03T03:04:05.678Z", "level": "INFO", "target": "access", "msg": "rpc",
            "request_id": "request-1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7",
            "grpc_method": "huaweicloud.rds.task.v1.TaskService/GetTaskDetail",
            "grpc_code": "NotFound", "reason": "TASK_NOT_FOUND",
            "duration_ms": 12.345, "deadline_ms": 30000, "attempts": 2,
            "upstream_status": 404, "upstream_code": "DBS.200543", "upstream_request_id": "abc123",
            "peer": "127.0.0.1:4711", "user_agent": "grpc-go/1.80",
            "caller": "0a0a0a0a0a0a", "project_id": "project-1", "bytes": 0,
        });
        assert_eq!(object, expected);
    }

    #[test]
    fn text_line_omits_unknown_fields() {
        let mut record = record(&Access::off(), &[]);
        record.bytes += 87;

        assert_eq!(
            render(
                OutputFormat::Text,
                now(),
                Level::INFO,
                &record,
                Code::Ok,
                TOOK,
                &Facts::default()
            ),
            "2026-02-03T03:04:05.678Z INFO access: rpc request_id=request-1 \
             grpc_method=huaweicloud.rds.task.v1.TaskService/GetTaskDetail grpc_code=OK duration_ms=12.345 \
             deadline_ms=30000 attempts=0 peer=127.0.0.1:4711 bytes=87\n"
        );
    }

    #[test]
    fn user_agent_is_truncated_and_reduced_to_printable_ascii() {
        let mut agent = b"a\t\"[31m\xff".to_vec();
        agent.extend([b'x'; 1000]);
        let record = record(&Access::off(), &[("user-agent", &agent)]);

        let line = render(
            OutputFormat::Json,
            now(),
            Level::INFO,
            &record,
            Code::Ok,
            TOOK,
            &Facts::default(),
        );

        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        let shown = object["user_agent"].as_str().unwrap();
        assert!(shown.starts_with("a?\"[31m?xxx"), "{shown}");
        assert_eq!(shown.len(), MAX_PEER_TEXT);
    }

    #[test]
    fn only_server_and_upstream_errors_are_logged_at_error() {
        let errors: Vec<Code> = (0..17)
            .map(Code::from)
            .filter(|code| level(METHOD, *code, None, None) == Level::ERROR)
            .collect();

        assert_eq!(
            errors,
            [
                Code::Unknown,
                Code::DeadlineExceeded,
                Code::Internal,
                Code::Unavailable,
                Code::DataLoss
            ]
        );
        let cases = [
            (
                Code::Unimplemented,
                Reason::UpstreamApiNotFound,
                Level::ERROR,
            ),
            (Code::Unknown, Reason::InvalidRequest, Level::INFO),
            (Code::Internal, Reason::InvalidRequest, Level::INFO),
            (Code::Internal, Reason::Internal, Level::ERROR),
        ];
        for (code, reason, expected) in cases {
            assert_eq!(
                level(METHOD, code, Some(reason), None),
                expected,
                "{code:?} {reason:?}"
            );
        }
    }

    #[test]
    fn normal_ends_of_a_watch_are_logged_at_info() {
        let cases = [
            (Code::Unavailable, Reason::WatchExpired, Level::INFO),
            (Code::Unavailable, Reason::ShuttingDown, Level::INFO),
            (
                Code::DeadlineExceeded,
                Reason::DeadlineExceeded,
                Level::ERROR,
            ),
            (
                Code::DeadlineExceeded,
                Reason::UpstreamTimeout,
                Level::ERROR,
            ),
            (Code::Unavailable, Reason::UpstreamReset, Level::ERROR),
        ];
        for (code, reason, expected) in cases {
            assert_eq!(
                level(Method::WatchTaskDetail, code, Some(reason), None),
                expected,
                "{code:?} {reason:?}"
            );
        }
    }

    #[test]
    fn filter_selects_access_lines_by_target_and_level() {
        // The number of lines of calls, and of health checks.
        let cases = [
            ("info", 2, 2),
            ("error", 1, 1),
            ("warn,access=info", 2, 2),
            ("info,access=off", 0, 0),
            ("access=error", 1, 1),
            ("info,access::health=error", 2, 1),
            ("info,access::health=off", 2, 0),
            ("warn,access=info,access::health=warn", 2, 1),
            ("off", 0, 0),
        ];

        for (filter, calls, checks) in cases {
            let recorder = Recorder::default();
            let (writer, flush) = Writer::new(recorder.clone(), Counter::default());
            let repeats = Repeats::new(Counter::default());
            let filter_set = log::filter(filter).unwrap();
            let subscriber =
                log::subscriber(OutputFormat::Text, filter_set, writer.clone(), repeats);
            let access = Access::new(OutputFormat::Text, writer);
            with_default(subscriber, || {
                record(&access, &[]).code = Some(Code::NotFound);
                record(&access, &[]).code = Some(Code::Internal);
                record_of(Method::HealthCheck, &access, &[]).code = Some(Code::Ok);
                record_of(Method::HealthWatch, &access, &[]).code = Some(Code::Internal);
            });
            drop(flush);
            let text = recorder.text();
            let count = |target: &str| text.matches(&format!(" {target}: rpc ")).count();
            assert_eq!(count(TARGET), calls, "{filter}");
            assert_eq!(count(HEALTH_TARGET), checks, "{filter}");
        }
    }
}
