//! The access line: one per RPC. It does not pass through `tracing`, because every call pays for it.

use std::{net::SocketAddr, time::Duration};

use jiff::Timestamp;
use tonic::Code;
use tracing::Level;

use super::{
    context::Context,
    line::{Line, Style},
    writer::Writer,
};
use crate::{code, reason::Reason};

/// The target of access lines, for `RUST_LOG`: `access=off` hides them all, `access=error` those of callers' faults.
pub(super) const TARGET: &str = "access";

/// Longest text of a peer's choice in the line.
const MAX_PEER_TEXT: usize = 128;

/// What one RPC looked like from outside.
#[derive(Debug, Clone, Copy)]
pub struct AccessLine<'a> {
    /// Our `x-request-id`.
    pub request_id: &'a str,
    /// Our own span where traces are exported, else the caller's.
    pub trace: Option<&'a Context>,
    /// `Method::name` of the RPC.
    pub grpc_method: &'static str,
    /// The final code.
    pub grpc_code: Code,
    /// `ErrorInfo.reason` of a failure.
    pub reason: Option<Reason>,
    /// From headers to the end.
    pub duration: Duration,
    /// The time the RPC was given: the caller's timeout or our own, whichever was shorter.
    pub deadline: Duration,
    /// Upstream attempts.
    pub attempts: u32,
    /// HTTP status of the last upstream answer.
    pub upstream_status: Option<u16>,
    /// The vendor's error code in it.
    pub upstream_code: Option<&'a str>,
    /// The vendor's request id in it.
    pub upstream_request_id: Option<&'a str>,
    /// The other end of the connection.
    pub peer: Option<&'a Peer>,
    /// The caller's `user-agent`, as it came.
    pub user_agent: Option<&'a [u8]>,
    /// Bytes of the reply's body.
    pub bytes: u64,
}

/// The other end of a connection. Its text is made once, not for each line.
#[derive(Debug)]
pub struct Peer {
    address: SocketAddr,
    text: String,
}

impl Peer {
    /// The peer at `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            text: address.to_string(),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Writes access lines. Clones write to the same log.
#[derive(Debug, Clone)]
pub struct Access {
    style: Style,
    writer: Writer,
}

impl Access {
    /// Access lines that look like `style`.
    pub(super) fn new(style: Style, writer: Writer) -> Self {
        Self { style, writer }
    }

    /// Writes one line, unless the filter hides it. Never waits.
    pub fn write(&self, line: &AccessLine<'_>) {
        let level = level(line.grpc_code, line.reason);
        // Each of the two remembers the filter's verdict, so asking is one load.
        let shown = match level {
            Level::ERROR => tracing::enabled!(target: TARGET, Level::ERROR),
            _ => tracing::enabled!(target: TARGET, Level::INFO),
        };
        if shown {
            self.writer
                .write(&render(self.style, Timestamp::now(), level, line));
        }
    }
}

/// ERROR when the server or upstream is at fault, INFO when the caller is or nobody.
fn level(code: Code, reason: Option<Reason>) -> Level {
    match code {
        // What no gRPC client sends, whatever code answers it, is the caller's fault.
        _ if reason == Some(Reason::InvalidRequest) => Level::INFO,
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Level::ERROR,
        // A caller may ask for a method that never was; an upstream without the API is the operator's to mend.
        Code::Unimplemented if reason == Some(Reason::UpstreamApiNotFound) => Level::ERROR,
        _ => Level::INFO,
    }
}

fn render(style: Style, now: Timestamp, level: Level, rpc: &AccessLine<'_>) -> String {
    let mut line = Line::new(style, now, level, TARGET, "rpc");
    line.text("request_id", &limited(rpc.request_id.as_bytes()));
    if let Some(trace) = rpc.trace {
        line.text("trace_id", &format!("{:032x}", trace.trace_id));
        line.text("span_id", &format!("{:016x}", trace.span_id));
    }
    line.text("grpc_method", rpc.grpc_method);
    line.text("grpc_code", code::go_name(rpc.grpc_code));
    if let Some(reason) = rpc.reason {
        line.text("reason", reason.as_str());
    }
    line.plain("duration_ms", Milliseconds(rpc.duration));
    // Dividing and printing 128 bits costs several times as much.
    line.plain("deadline_ms", rpc.deadline.as_millis() as u64);
    line.plain("attempts", rpc.attempts);
    if let Some(status) = rpc.upstream_status {
        line.plain("upstream_status", status);
    }
    if let Some(code) = rpc.upstream_code {
        line.text("upstream_code", &limited(code.as_bytes()));
    }
    if let Some(id) = rpc.upstream_request_id {
        line.text("upstream_request_id", &limited(id.as_bytes()));
    }
    if let Some(peer) = rpc.peer {
        line.text("peer", &peer.text);
    }
    if let Some(agent) = rpc.user_agent {
        line.text("user_agent", &limited(agent));
    }
    line.plain("bytes", rpc.bytes);
    line.finish()
}

/// Milliseconds with the microseconds as decimals.
struct Milliseconds(Duration);

impl std::fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = self.0.as_micros() as u64;
        write!(f, "{}.{:03}", micros / 1000, micros % 1000)
    }
}

/// At most [`MAX_PEER_TEXT`] bytes of visible ASCII and blanks; anything else becomes `?`.
pub(super) fn limited(text: &[u8]) -> std::borrow::Cow<'_, str> {
    let text = &text[..text.len().min(MAX_PEER_TEXT)];
    let sound = |b: &u8| (b' '..=b'~').contains(b);
    match std::str::from_utf8(text) {
        Ok(sound_text) if text.iter().all(sound) => sound_text.into(),
        _ => text
            .iter()
            .map(|b| if sound(b) { char::from(*b) } else { '?' })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use prometheus_client::metrics::counter::Counter;
    use tracing::subscriber::with_default;

    use super::*;
    use crate::telemetry::{LogFormat, log, repeats::Repeats, writer::tests::Kept};

    const JSON: Style = Style {
        format: LogFormat::Json,
        colour: false,
    };
    const TEXT: Style = Style {
        format: LogFormat::Text,
        colour: false,
    };

    static TRACE: Context = Context {
        trace_id: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
        span_id: 0x00f0_67aa_0ba9_02b7,
        sampled: true,
        trace_state: String::new(),
    };

    static PEER: LazyLock<Peer> = LazyLock::new(|| Peer::new("127.0.0.1:4711".parse().unwrap()));

    fn full() -> AccessLine<'static> {
        AccessLine {
            request_id: "request-1",
            trace: Some(&TRACE),
            grpc_method: "huaweicloud.rds.task.v1.TaskService/GetTaskDetail",
            grpc_code: Code::NotFound,
            reason: Some(Reason::TaskNotFound),
            duration: Duration::from_micros(12_345),
            deadline: Duration::from_secs(30),
            attempts: 2,
            upstream_status: Some(404),
            upstream_code: Some("DBS.200543"),
            upstream_request_id: Some("abc123"),
            peer: Some(&PEER),
            user_agent: Some(b"grpc-go/1.80"),
            bytes: 0,
        }
    }

    fn empty() -> AccessLine<'static> {
        AccessLine {
            trace: None,
            grpc_code: Code::Ok,
            reason: None,
            attempts: 0,
            upstream_status: None,
            upstream_code: None,
            upstream_request_id: None,
            peer: None,
            user_agent: None,
            bytes: 87,
            ..full()
        }
    }

    fn now() -> Timestamp {
        "2026-02-03T03:04:05.678Z".parse().unwrap()
    }

    #[test]
    fn the_json_line_carries_every_field_under_its_name() {
        let text = render(JSON, now(), Level::INFO, &full());

        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "ts": "2026-02-03T03:04:05.678Z", "level": "INFO", "target": "access", "msg": "rpc",
            "request_id": "request-1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7",
            "grpc_method": "huaweicloud.rds.task.v1.TaskService/GetTaskDetail",
            "grpc_code": "NotFound", "reason": "TASK_NOT_FOUND",
            "duration_ms": 12.345, "deadline_ms": 30000, "attempts": 2,
            "upstream_status": 404, "upstream_code": "DBS.200543", "upstream_request_id": "abc123",
            "peer": "127.0.0.1:4711", "user_agent": "grpc-go/1.80", "bytes": 0,
        });
        assert_eq!(object, expected);
    }

    #[test]
    fn the_text_line_leaves_out_what_there_was_not() {
        assert_eq!(
            render(TEXT, now(), Level::INFO, &empty()),
            "2026-02-03T03:04:05.678Z INFO access: rpc request_id=request-1 \
             grpc_method=huaweicloud.rds.task.v1.TaskService/GetTaskDetail grpc_code=OK duration_ms=12.345 \
             deadline_ms=30000 attempts=0 bytes=87\n"
        );
    }

    #[test]
    fn what_a_peer_sends_is_short_and_plain() {
        let mut agent = b"a\n\"\x1b[31m\xff".to_vec();
        agent.extend([b'x'; 1000]);
        let line = AccessLine {
            user_agent: Some(&agent),
            ..empty()
        };

        let object: serde_json::Value =
            serde_json::from_str(&render(JSON, now(), Level::INFO, &line)).unwrap();

        let shown = object["user_agent"].as_str().unwrap();
        assert!(shown.starts_with("a?\"?[31m?xxx"), "{shown}");
        assert_eq!(shown.len(), MAX_PEER_TEXT);
    }

    #[test]
    fn only_faults_of_server_and_upstream_are_errors() {
        let errors: Vec<Code> = (0..17)
            .map(Code::from)
            .filter(|code| level(*code, None) == Level::ERROR)
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
            assert_eq!(level(code, Some(reason)), expected, "{code:?} {reason:?}");
        }
    }

    #[test]
    fn the_filter_shows_and_hides_access_lines_by_their_target() {
        let cases = [
            ("info", 2),
            ("error", 1),
            ("warn,access=info", 2),
            ("info,access=off", 0),
            ("access=error", 1),
            ("off", 0),
        ];

        for (filter, expected) in cases {
            let kept = Kept::default();
            let (writer, flush) = Writer::new(kept.clone(), Counter::default());
            let repeats = Repeats::new(Counter::default());
            let filter_set = log::filter(filter).unwrap();
            let subscriber = log::subscriber(TEXT, filter_set, writer.clone(), repeats);
            let access = Access::new(TEXT, writer);
            with_default(subscriber, || {
                access.write(&full());
                access.write(&AccessLine {
                    grpc_code: Code::Internal,
                    ..full()
                });
            });
            drop(flush);
            assert_eq!(kept.text().lines().count(), expected, "{filter}");
        }
    }
}
