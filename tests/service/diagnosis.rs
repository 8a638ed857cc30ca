use rds_task_facade::pb::GetTaskDetailRequest;
use serde_json::Value;
use tonic::Code;

use crate::support::{
    Failure, Program, Step, Upstream,
    certificates::{Authority, Pair},
    eventually, example, example_request, reply,
};

/// The message of the WARN line of an attempt without a complete reply.
const NO_REPLY: &str = "no complete reply from RDS";

/// A TLS alert with this description, as a whole record.
fn alert(description: u8) -> Vec<Step> {
    vec![
        Step::Send(vec![0x15, 3, 3, 0, 2, 2, description]),
        Step::Close,
    ]
}

fn send(bytes: &str) -> Vec<Step> {
    vec![Step::Send(bytes.as_bytes().to_vec()), Step::Close]
}

/// A failure without a reply: how it is provoked, and what caller and operator see of it.
struct Case {
    endpoint: String,
    args: Vec<String>,
    reason: &'static str,
    /// Part of the message for the caller.
    message: &'static str,
    /// Part of the cause in the log.
    cause: &'static str,
    attempts: u64,
}

impl Case {
    fn new(
        endpoint: &str,
        reason: &'static str,
        message: &'static str,
        cause: &'static str,
    ) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            args: Vec::new(),
            reason,
            message,
            cause,
            attempts: 3,
        }
    }

    fn with(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag, value].map(str::to_owned));
        self
    }

    fn once(self) -> Self {
        Self {
            attempts: 1,
            ..self
        }
    }

    async fn check(self) {
        let name = format!("{} {:?}", self.reason, self.cause);
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let program = Program::over(&self.endpoint, &args);
        let request = GetTaskDetailRequest {
            instance_id: "canary-instance".to_owned(),
            ..example_request()
        };

        let result = program
            .call_with(request, &[("x-request-id", "the-call")])
            .await;

        let failure = Failure::from_status(&result.expect_err(&name));
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unavailable, self.reason),
            "{name}"
        );
        assert!(
            failure.message.contains(self.message),
            "{name}: {}",
            failure.message
        );
        let access = program.access_line("the-call");
        assert_eq!(access["attempts"], self.attempts, "{name}");
        let lines = no_reply_lines(&program);
        assert_eq!(lines.len(), 1, "{name}: {lines:?}");
        assert_eq!(lines[0]["level"], "WARN", "{name}");
        assert_eq!(lines[0]["reason"], self.reason, "{name}");
        let cause = lines[0]["cause"].as_str().expect("a text");
        assert!(cause.contains(self.cause), "{name}: {cause}");
        let log = program.logs().join("\n");
        assert!(!log.contains("canary"), "{name}: {log}");
    }
}

fn no_reply_lines(program: &Program) -> Vec<Value> {
    let lines = program.logs().into_iter();
    let lines = lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok());
    lines.filter(|line| line["msg"] == NO_REPLY).collect()
}

/// The URL of a port without a listener.
async fn closed(scheme: &str) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    format!("{scheme}://localhost:{port}")
}

#[tokio::test]
async fn the_cause_of_each_missing_reply_is_logged_once_and_named_to_the_caller() {
    let first = "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"job_id\":";
    let reset = Upstream::always(vec![Step::Reset]).await;
    let silent = Upstream::always(vec![Step::Close]).await;
    let truncated = Upstream::always(send(first)).await;
    let garbage = Upstream::always(send("canary garbage\r\n\r\n")).await;
    let chunk = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\ncanary\r\n";
    let chunk = Upstream::always(send(chunk)).await;
    let cases = [
        Case::new(
            &closed("http").await,
            "UPSTREAM_CONNECT",
            "no connection to the RDS endpoint",
            "Connection refused",
        ),
        Case::new(
            "https://rds.invalid",
            "UPSTREAM_DNS",
            "does not resolve",
            "failed to lookup address",
        ),
        Case::new(
            &reset.url(),
            "UPSTREAM_RESET",
            "closed before a reply",
            "reset",
        ),
        Case::new(
            &silent.url(),
            "UPSTREAM_RESET",
            "closed before a reply",
            "connection closed before message completed",
        ),
        Case::new(
            &truncated.url(),
            "UPSTREAM_TRUNCATED",
            "incomplete",
            "end of file before message length reached",
        ),
        Case::new(
            &garbage.url(),
            "UPSTREAM_PROTOCOL",
            "violates HTTP",
            "invalid HTTP",
        ),
        Case::new(
            &chunk.url(),
            "UPSTREAM_PROTOCOL",
            "violates HTTP",
            "chunk size",
        ),
    ];

    for case in cases {
        case.check().await;
    }
}

#[tokio::test]
async fn the_message_about_tls_names_the_kind_of_the_cause_and_nothing_is_retried() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ca = authority.write(folder.path(), "ca");
    let other_ca = stranger.write(folder.path(), "other");
    let https =
        async |pair: Pair| Upstream::always_over_tls(pair.server(), reply(200, &[], "")).await;
    let good = https(Pair::for_server(&authority, "localhost")).await;
    let expired = https(Pair::expired_of_server(&authority, "localhost")).await;
    let elsewhere = https(Pair::for_server(&authority, "elsewhere.test")).await;
    let client = https(Pair::for_client(&authority)).await;
    let plain = Upstream::always(send("HTTP/1.1 400 Bad Request\r\n\r\n")).await;
    let handshake_failure = Upstream::always(alert(40)).await;
    let protocol_version = Upstream::always(alert(70)).await;
    let internal_error = Upstream::always(alert(80)).await;
    let tls = |upstream: &Upstream, message, cause| {
        let endpoint = format!("https://localhost:{}", upstream.address.port());
        Case::new(&endpoint, "UPSTREAM_TLS", message, cause).once()
    };
    let cases = [
        tls(&good, "--upstream-ca", "UnknownIssuer"),
        // An authority of the same name with another key.
        tls(&good, "is invalid", "BadSignature").with("--upstream-ca", &other_ca),
        tls(&expired, "has expired", "expired").with("--upstream-ca", &ca),
        tls(&elsewhere, "another name", "elsewhere.test").with("--upstream-ca", &ca),
        tls(&client, "is invalid", "invalid peer certificate").with("--upstream-ca", &ca),
        tls(&plain, "does not speak TLS", "InvalidContentType"),
        tls(
            &handshake_failure,
            "no TLS version and cipher",
            "HandshakeFailure",
        ),
        tls(
            &protocol_version,
            "no TLS version and cipher",
            "ProtocolVersion",
        ),
        tls(&internal_error, "the server's log", "InternalError"),
    ];

    for case in cases {
        case.check().await;
    }
}

#[tokio::test]
async fn a_rejection_of_the_proxy_is_named_as_such_and_a_407_is_not_retried() {
    let proxy = async |steps| Upstream::always(steps).await;
    let login = proxy(send(
        "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
    ))
    .await;
    let forbidden = proxy(reply(403, &[], "canary page")).await;
    let gateway = proxy(reply(502, &[], "")).await;
    let garbage = proxy(send("canary\r\n\r\n")).await;
    let silent = proxy(vec![Step::Close]).await;
    let through = |proxy: String, message, cause| {
        let proxy = proxy.replace("http://", "http://user:canary-password@");
        let endpoint = "https://rds.invalid";
        Case::new(endpoint, "UPSTREAM_CONNECT", message, cause).with("--upstream-proxy", &proxy)
    };
    let rejected = "proxy rejected the connection";
    let cases = [
        through(login.url(), "proxy requires another login", "HTTP 407").once(),
        through(forbidden.url(), rejected, "proxy rejected CONNECT"),
        through(gateway.url(), rejected, "proxy rejected CONNECT"),
        through(garbage.url(), rejected, "proxy rejected CONNECT"),
        through(silent.url(), rejected, "unexpected end of file"),
        through(
            closed("http").await,
            "no connection to the server's proxy",
            "Connection refused",
        ),
    ];

    for case in cases {
        case.check().await;
    }
    assert_eq!(login.requests().len(), 1);
}

#[tokio::test]
async fn the_cause_of_a_failed_export_is_logged_with_a_hint_about_the_port() {
    let (hint, https) = ("4318", "use https");
    let settings = Step::Send(vec![0, 0, 0, 4, 0, 0, 0, 0, 0]);
    let grpc = Upstream::always(vec![settings, Step::Close]).await;
    let closing = Upstream::always(vec![Step::Close]).await;
    let tls = Upstream::always(alert(10)).await;
    let tls_grpc = Upstream::always(alert(120)).await;
    let plain = Upstream::always(send("HTTP/1.1 400 Bad Request\r\n\r\n")).await;
    let denied = Upstream::always(reply(401, &[], "canary")).await;
    let overloaded = Upstream::always(reply(503, &[], "canary")).await;
    let silent = Upstream::always(vec![Step::Hold]).await;
    let with_tls = |upstream: &Upstream| upstream.url().replace("http:", "https:");
    let cases: [(String, &str, &[&str]); 9] = [
        (grpc.url(), "invalid HTTP version", &[hint, https]),
        (closing.url(), "connection closed", &[hint, https]),
        (tls.url(), "invalid HTTP version", &[hint, https]),
        (with_tls(&tls_grpc), "NoApplicationProtocol", &[hint]),
        (with_tls(&plain), "InvalidContentType", &[]),
        (closed("http").await, "Connection refused", &[]),
        (denied.url(), "HTTP 401", &[]),
        (overloaded.url(), "HTTP 503", &[]),
        (silent.url(), "does not reply", &[]),
    ];

    for (endpoint, cause, hints) in cases {
        let env = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=canary"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ];
        let program = Program::start(&["--sandbox"], &env);

        let _ = program.call(example_request()).await;

        let message = "spans cannot be exported";
        let logged = async || program.logs().iter().any(|line| line.contains(message));
        eventually("the warning", logged).await;
        let line = program.wait_for_log(|line| line["msg"] == message);
        let error = line["error"].as_str().expect("a text");
        assert!(error.contains(cause), "{cause}: {error}");
        for part in [hint, https] {
            assert_eq!(
                error.contains(part),
                hints.contains(&part),
                "{cause}: {error}"
            );
        }
        assert!(!program.logs().concat().contains("canary"), "{error}");
    }
}

#[tokio::test]
async fn a_flood_of_one_kind_of_failure_hides_no_other_kind() {
    let upstream = Upstream::start(|request| match request.number % 2 {
        _ if request.line.contains("the-last") => send("garbage\r\n\r\n"),
        // Successes in between keep the breaker closed.
        0 => example(),
        _ => vec![Step::Close],
    })
    .await;
    let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);

    for number in 0..200 {
        let request = GetTaskDetailRequest {
            instance_id: format!("instance-{number}"),
            ..example_request()
        };
        let _ = program.call(request).await;
    }
    let request = GetTaskDetailRequest {
        instance_id: "the-last".to_owned(),
        ..example_request()
    };
    let last = program.failure(request).await;

    assert_eq!(last.reason, "UPSTREAM_PROTOCOL");
    program.wait_for_log(|line| line["msg"] == NO_REPLY && line["reason"] == "UPSTREAM_PROTOCOL");
    let lines = no_reply_lines(&program);
    let count = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    assert_eq!(count("UPSTREAM_PROTOCOL"), 1, "{lines:?}");
    assert!(count("UPSTREAM_RESET") >= 1, "{lines:?}");
}
