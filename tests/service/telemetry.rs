use std::process::Command;

use rds_task_facade::pb::{GetTaskDetailRequest, WatchTaskDetailRequest};
use serde_json::{Value, json};

use crate::support::{
    Connection, Program, Step, Upstream,
    canary::assert_no_canary_shown,
    example, example_request,
    program::{PROGRAM, run},
    raw::{framed, headers},
    reply, within,
};

/// Text that must not alter a log line: line breaks, terminal escapes, another JSON object.
const FORGERY: &str = "x\r\n{\"level\":\"ERROR\",\"msg\":\"forged\"}\u{1b}[2J\u{202e}\u{2028}\u{9b}\0\"},{\"forged\":\"";

/// Similar bytes that HTTP allows in a header.
const IN_A_HEADER: &[u8] = b"x\t\\\"}{\"msg\":\"forged\"\xc2\x9b\xff\x80 [2J";

fn forging_upstream(status: u16) -> Vec<Step> {
    let body = json!({"error_code": FORGERY, "error_msg": FORGERY, "encoded_authorization_message": FORGERY});
    let mut head = format!("HTTP/1.1 {status} {{\"forged\":1}}\r\nx-request-id: ").into_bytes();
    head.extend_from_slice(IN_A_HEADER);
    let body = body.to_string();
    head.extend_from_slice(format!("\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes());
    vec![Step::Send(head)]
}

#[tokio::test]
async fn neither_callers_nor_upstream_can_forge_a_log_line() {
    let collector = Upstream::always(reply(200, &[], "")).await;
    let upstream = Upstream::start(|request| match request.number % 3 {
        0 => forging_upstream(400),
        1 => forging_upstream(200),
        _ => vec![Step::Send(
            format!("HTTP/1.1 {FORGERY}\r\n\r\n").into_bytes(),
        )],
    })
    .await;
    let collector_url = collector.url();
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "t"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector_url.as_str()),
        ("RUST_LOG", "trace"),
    ];
    let url = upstream.url();
    let program = Program::start(
        &[
            "--endpoint",
            &url,
            "--credentials",
            "token",
            "--max-attempts",
            "1",
        ],
        &env,
    );
    let connection = Connection::open(program.grpc).await;
    let fields = [
        "user-agent",
        "x-request-id",
        "traceparent",
        "tracestate",
        "b3",
        "x-b3-traceid",
        "x-b3-spanid",
        "grpc-timeout",
        "grpc-encoding",
        "content-type",
        "x-forwarded-for",
        "x-forwarded-client-cert",
    ];

    let mut calls = 0;
    for field in fields {
        for _ in 0..3 {
            let mut request = headers();
            request.headers_mut().expect("valid headers").remove(field);
            let mut message = example_request();
            message.workflow_name = Some(format!("name-{calls}"));
            let done = connection
                .exchange(request.header(field, IN_A_HEADER), framed(&message))
                .await;
            done.unwrap_or_else(|error| panic!("{field}: {error}"));
            calls += 1;
        }
    }
    for field in 1..=4 {
        let mut message = example_request();
        let text = FORGERY.to_owned();
        match field {
            1 => message.project_id = text,
            2 => message.instance_id = text,
            3 => message.workflow_id = text,
            _ => message.workflow_name = Some(text),
        }
        let done = connection.exchange(headers(), framed(&message)).await;
        done.expect("a reply");
        calls += 1;
    }
    let marked = headers().header("x-request-id", "the-last");
    let done = connection
        .exchange(marked, framed(&example_request()))
        .await;
    done.expect("a reply");
    program.access_line("the-last");

    let lines = program.logs();
    let mut access = 0;
    for line in &lines {
        let object: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(object.is_object(), "{line}");
        assert_ne!(object["msg"], "forged", "{line}");
        assert!(object.get("forged").is_none(), "{line}");
        let is_unsafe = |c: char| c.is_control() || matches!(c, '\u{202e}' | '\u{2028}');
        assert!(!line.contains(is_unsafe), "{line:?}");
        access += usize::from(object["target"] == "access");
    }
    assert_eq!(access, calls + 1, "one line for each call: {lines:#?}");
}

#[tokio::test]
async fn no_span_log_line_or_printed_setting_contains_a_secret() {
    let collector = Upstream::always(reply(200, &[], "")).await;
    let echo = |request: &crate::support::upstream::Received| {
        let echo = format!("canary {:?} {}", request.headers, request.body);
        let body = json!({"error_code": "APIGW.0301", "error_msg": echo});
        reply(401, &[], body.to_string())
    };
    let upstream = Upstream::start(echo).await;
    let (url, collector_url) = (upstream.url(), collector.url());
    let key = [
        ("HUAWEICLOUD_SDK_AK", "canary-ak"),
        ("HUAWEICLOUD_SDK_SK", "canary-sk"),
        ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "canary-st"),
    ];
    for source in ["caller", "token", "env"] {
        let before = collector.requests().len();
        let mut env = vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", collector_url.as_str()),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "authorization=Bearer%20canary",
            ),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("RUST_LOG", "trace"),
        ];
        match source {
            "token" => env.push(("RDS_TASK_FACADE_TOKEN", "canary-token")),
            "env" => env.extend(key),
            _ => {}
        }
        let args = [
            "--endpoint",
            &url,
            "--credentials",
            source,
            "--propagate-trace-upstream",
        ];
        let (_, printed, _) = run(&[&["serve"], &args[..], &["--print-config"]].concat(), &env);
        let program = Program::start(&args, &env);
        let mut request = example_request();
        request.workflow_name = Some("canary-workflow".into());
        let metadata = [
            ("x-auth-token", "canary-of-the-caller"),
            ("authorization", "Basic canary"),
            ("x-request-id", "the-call"),
            ("baggage", "canary=1"),
        ];

        let rejected = program.call_with(request, &metadata).await;

        assert!(rejected.is_err(), "{source}");
        // Both spans come in one request or in two.
        collector.wait_for_requests(before + 1).await;
        program.access_line("the-call");
        for received in &collector.requests()[before..] {
            assert_eq!(received.header("authorization"), Some("Bearer canary"));
            assert!(
                !received.body.contains("canary"),
                "{source}: {}",
                received.body
            );
            assert!(
                received.body.contains("the-call") || received.body.contains("task-center-detail")
            );
        }
        assert!(
            printed.contains("# OTEL_EXPORTER_OTLP_HEADERS: set"),
            "{printed}"
        );
        let shown = [
            program.logs().concat(),
            printed,
            program.admin("/metrics").await.1,
        ]
        .concat();
        assert!(!shown.contains("canary"), "{source}: {shown}");
    }
}

#[tokio::test]
async fn the_start_line_is_short_and_contains_version_addresses_and_what_is_not_a_default() {
    let program = Program::sandboxed(&["--max-attempts", "2"]);

    let line = program.wait_for_log(|line| line["msg"] == "serving");

    assert_eq!(line["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(line["listen"], program.grpc.to_string());
    assert_eq!(line["metrics_listen"], program.admin.to_string());
    let config = line["config"].as_str().expect("a text");
    for setting in [" sandbox=true", " max-attempts=2", " credentials=token"] {
        assert!(config.contains(setting), "{setting}: {config}");
    }
    assert!(!config.contains(" timeout="), "a default: {config}");
    assert!(line.to_string().len() < 500, "{line}");
}

#[tokio::test]
async fn the_log_suggests_a_first_call_to_the_sandbox_that_succeeds() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rds-task-facade");
    std::os::unix::fs::symlink(PROGRAM, path).expect("a link");
    let cases: [&[&str]; 3] = [
        &[],
        &["--credentials", "caller"],
        &["--allow-project", "mine"],
    ];

    for args in cases {
        let program = Program::sandboxed(args);
        let suggested = |part: &str| {
            let line = program.wait_for_log(|line| {
                let text = line["msg"].as_str().unwrap_or_default();
                text.starts_with("try in another terminal: ") && text.contains(part)
            });
            let text = line["msg"].as_str().unwrap_or_default().to_owned();
            text.trim_start_matches("try in another terminal: ")
                .to_owned()
        };
        let command = suggested("rds-task-facade call");
        let folder = folder.path().to_owned();
        let called = tokio::task::spawn_blocking(move || {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", &command]).env("PATH", folder).output()
        });
        let called = called.await.expect("no panic").expect("a shell");
        assert!(called.status.success(), "{args:?}: {called:?}");
        let grpcurl = suggested("grpcurl -plaintext");
        assert!(grpcurl.contains(&program.grpc.to_string()), "{grpcurl}");
        assert!(grpcurl.ends_with("TaskService/GetTaskDetail"), "{grpcurl}");
    }
}

#[tokio::test]
async fn a_sampling_decision_without_ids_begins_a_trace_that_obeys_it() {
    let upstream = Upstream::always(example()).await;
    let args = [
        "--endpoint",
        &upstream.url(),
        "--credentials",
        "token",
        "--propagate-trace-upstream",
        "true",
    ];
    // No collector listens there: the decision is visible in the trace context that upstream receives.
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "token"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
    ];
    let program = Program::start(&args, &env);
    let cases = [
        ("b3", "0", "00"),
        ("b3", "d", "01"),
        ("b3", "1", "01"),
        ("x-b3-sampled", "0", "00"),
        ("x-b3-sampled", "true", "01"),
        ("x-b3-flags", "1", "01"),
    ];

    for (name, value, flags) in cases {
        let result = program.call_with(example_request(), &[(name, value)]).await;

        assert!(result.is_ok(), "{name}: {value}: {result:?}");
        let request = upstream.requests().pop().expect("a request");
        let traceparent = request.header("traceparent").expect("a trace context");
        assert!(
            traceparent.ends_with(&format!("-{flags}")),
            "{name}: {value}: {traceparent}"
        );
    }
}

#[tokio::test]
async fn the_access_line_shows_the_project_and_a_hash_of_the_callers_token() {
    let program = Program::sandboxed(&["--credentials", "caller", "--allow-project", "mine"]);
    let line = async |id: &str, token: &str, project: &str| {
        let request = GetTaskDetailRequest {
            project_id: project.to_owned(),
            ..example_request()
        };
        let metadata = [("x-request-id", id), ("x-auth-token", token)];
        let _ = program.call_with(request, &metadata).await;
        program.access_line(id)
    };

    let accepted = line("accepted", "sandbox-token", "mine").await;
    let again = line("again", "sandbox-token", "theirs").await;
    let other = line("other", "canary-token", "mine").await;
    let malformed = line("malformed", "two words", "no/project").await;

    let caller = accepted["caller"].as_str().expect("a hash");
    let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    assert!(caller.len() == 12 && caller.bytes().all(is_hex), "{caller}");
    assert_eq!(again["caller"], caller);
    assert_ne!(other["caller"], caller);
    assert_eq!(malformed.get("caller"), None);
    assert_eq!(accepted["project_id"], "mine");
    assert_eq!(again["reason"], "PROJECT_NOT_ALLOWED");
    assert_eq!(again["project_id"], "theirs");
    assert_eq!(malformed.get("project_id"), None);
    assert_no_canary_shown("caller", &program).await;
}

#[tokio::test]
async fn a_watch_and_calls_with_the_facades_own_credential_show_the_project_only() {
    let program = Program::sandboxed(&[]);
    let request = WatchTaskDetailRequest {
        project_id: "mine".to_owned(),
        instance_id: "finished".to_owned(),
        workflow_id: "w".to_owned(),
        ..WatchTaskDetailRequest::default()
    };
    let mut client = program.client().await;
    let mut request = tonic::Request::new(request);
    let id = "watch".parse().expect("metadata");
    request.metadata_mut().insert("x-request-id", id);
    let mut stream = client
        .watch_task_detail(request)
        .await
        .expect("a watch")
        .into_inner();
    while within("a message", stream.message())
        .await
        .expect("OK")
        .is_some()
    {}

    let line = program.access_line("watch");
    assert_eq!(line["project_id"], "mine");
    assert_eq!(line.get("caller"), None);
}
