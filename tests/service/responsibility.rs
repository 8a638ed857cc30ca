use bytes::Bytes;
use serde_json::Value;
use tonic::Code;

use crate::support::{
    Connection, Program, Step, Upstream, example_request,
    raw::{framed, headers},
    reply, within,
};

const DEADLINE: &str = "rds_caller_faults_total{cause=\"deadline\"}";
const HTTP: &str = "rds_caller_faults_total{cause=\"http\"}";
const OF_CALLERS: &str = "rds_credential_rejected_total{owner=\"caller\"}";
const OF_SERVER: &str = "rds_credential_rejected_total{owner=\"server\"}";

#[tokio::test]
async fn a_deadline_that_the_caller_made_too_short_is_no_error_of_the_server() {
    let collector = Upstream::always(reply(200, &[], "")).await;
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let (url, collector_url) = (upstream.url(), collector.url());
    let start = |timeout: &str| {
        let args = [
            "--endpoint",
            &url,
            "--credentials",
            "token",
            "--timeout",
            timeout,
        ];
        let env = [
            ("RDS_TASK_FACADE_TOKEN", "t"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", collector_url.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ];
        Program::start(&args, &env)
    };
    let (patient, hasty) = (start("60s"), start("100ms"));
    // Deadline of the call, if any, and whether the caller is responsible.
    let cases = [
        (&patient, Some("1n"), true),
        (&patient, Some("100m"), true),
        (&patient, Some("2499m"), true),
        (&patient, Some("2600m"), false),
        (&hasty, None, false),
        (&hasty, Some("5S"), false),
        (&hasty, Some("50m"), true),
    ];

    for (number, (program, deadline, is_callers)) in cases.into_iter().enumerate() {
        let id = format!("call-{number}");
        let case = format!("{deadline:?} {is_callers}");
        let before = (
            program.metric(DEADLINE).await,
            program.handled("DeadlineExceeded").await,
        );
        let mut request = headers().header("x-request-id", &id);
        if let Some(deadline) = deadline {
            request = request.header("grpc-timeout", deadline);
        }
        let connection = Connection::open(program.grpc).await;

        let raw = connection
            .exchange(request, framed(&example_request()))
            .await;

        let status = raw.expect("a reply").status().expect("a status");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{case}");
        let level = if is_callers { "INFO" } else { "ERROR" };
        assert_eq!(program.access_line(&id)["level"], level, "{case}");
        let after = (
            program.metric(DEADLINE).await,
            program.handled("DeadlineExceeded").await,
        );
        assert_eq!(
            after.0 - before.0,
            f64::from(u8::from(is_callers)),
            "{case}"
        );
        assert_eq!(after.1 - before.1, 1.0, "{case}");
        let span = span(&collector, &id).await;
        assert_eq!(span.contains("error.type"), !is_callers, "{case}: {span}");
    }
}

/// The exported request with the span of the call, and no other span of a call: the calls are made one after the other.
async fn span(collector: &Upstream, request_id: &str) -> String {
    within("the span", async {
        for count in 1.. {
            collector.wait_for_requests(count).await;
            let received = collector.requests();
            // The span of a cancelled attempt has an error of its own.
            let spans = received
                .iter()
                .flat_map(|request| request.body.split("TaskService/GetTaskDetail"));
            let spans: Vec<&str> = spans.collect();
            if let Some(found) = spans.iter().find(|text| text.contains(request_id)) {
                let end = found.find("task-center-detail").unwrap_or(found.len());
                return found[..end].to_owned();
            }
        }
        unreachable!("the loop has no end")
    })
    .await
}

#[tokio::test]
async fn a_request_that_is_never_complete_is_the_callers_fault() {
    let program = Program::sandboxed(&["--timeout", "200ms"]);
    let stalled = program.metric(DEADLINE).await;
    let socket = tokio::net::TcpStream::connect(program.grpc)
        .await
        .expect("it listens");
    let (mut send, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = headers()
        .header("x-request-id", "stalled")
        .body(())
        .expect("a request");

    let (reply, mut body) = send.send_request(request, false).expect("a stream");
    body.send_data(Bytes::from_static(&[0, 0]), false)
        .expect("data");
    let _ = within("the reply", reply).await;

    let line = program.access_line("stalled");
    assert_eq!(
        (&line["level"], &line["reason"]),
        (&Value::from("INFO"), &Value::from("DEADLINE_EXCEEDED"))
    );
    assert_eq!(program.metric(DEADLINE).await - stalled, 1.0);
}

#[tokio::test]
async fn a_deadline_without_any_attempt_is_the_callers_if_the_caller_chose_it() {
    let iam = Upstream::always(vec![Step::Hold]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let password = folder.path().join("password");
    std::fs::write(&password, "p").expect("a file");
    let args = [
        "--endpoint",
        "http://127.0.0.1:9",
        "--credentials",
        "iam",
        "--iam-endpoint",
        &iam.url(),
        "--iam-user",
        "u",
        "--iam-domain",
        "d",
        "--iam-project",
        "p",
        "--iam-password-file",
        &password.display().to_string(),
    ];
    let program = Program::start(&args, &[]);

    let connection = Connection::open(program.grpc).await;
    let raw = connection.call_within("2600m", &example_request()).await;

    let status = raw.expect("a reply").status().expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(program.metric(DEADLINE).await, 1.0);
}

#[tokio::test]
async fn requests_that_are_not_grpc_do_not_count_as_calls_of_the_task_service() {
    let program = Program::sandboxed(&[]);
    let connection = Connection::open(program.grpc).await;

    for kind in ["application/json", "text/html", "application/grpc-web"] {
        let mut request = headers();
        request.headers_mut().expect("valid").remove("content-type");
        let request = request
            .header("content-type", kind)
            .header("x-request-id", "the-request");
        let raw = connection
            .exchange(request, framed(&example_request()))
            .await;
        assert_eq!(raw.expect("a response").http_status, 415, "{kind}");
    }

    let line = program.access_line("the-request");
    assert_eq!(
        (&line["level"], &line["grpc_method"]),
        (&Value::from("INFO"), &Value::from("other"))
    );
    assert_eq!(program.metric(HTTP).await, 3.0);
    assert_eq!(program.handled("Unknown").await, 0.0);
    let other = "grpc_server_handled_total{grpc_type=\"other\",grpc_service=\"other\",grpc_method=\"other\",grpc_code=\"Unknown\"}";
    assert_eq!(program.metric(other).await, 3.0);
}

#[tokio::test]
async fn calls_with_a_rejected_credential_are_counted_by_its_owner() {
    let upstream = Upstream::always(reply(401, &[], "")).await;
    let url = upstream.url();
    let own = Program::over(&url, &[]);
    let callers = Program::start(&["--endpoint", &url, "--credentials", "caller"], &[]);
    let key = [
        ("HUAWEICLOUD_SDK_AK", "AKAKAKAKAKAKAKAKAKAK"),
        ("HUAWEICLOUD_SDK_SK", "sksksksksksksk"),
    ];
    let bad_key = reply(
        401,
        &[],
        r#"{"error_code":"APIGW.0301","error_msg":"Incorrect IAM authentication information: verify aksk signature fail"}"#,
    );
    let gateway = Upstream::always(bad_key).await;
    let signed = Program::start(
        &["--endpoint", &gateway.url(), "--credentials", "env"],
        &key,
    );

    for _ in 0..3 {
        let _ = own.call(example_request()).await;
        let _ = signed.call(example_request()).await;
        let _ = callers
            .call_with(example_request(), &[("x-auth-token", "t")])
            .await;
    }
    // Malformed: rejected by the facade. Missing: nothing to reject.
    let _ = callers
        .call_with(example_request(), &[("x-auth-token", "a b")])
        .await;
    let _ = callers.call(example_request()).await;

    for (program, of_callers, of_server) in
        [(&own, 0.0, 3.0), (&callers, 4.0, 0.0), (&signed, 0.0, 3.0)]
    {
        let counted = (
            program.metric(OF_CALLERS).await,
            program.metric(OF_SERVER).await,
        );
        assert_eq!(counted, (of_callers, of_server), "{:#?}", program.logs());
    }
    // Wrong once, then resting.
    assert_eq!(gateway.requests().len(), 1);
}

#[tokio::test]
async fn health_checks_can_be_hidden_without_hiding_calls() {
    let args = ["--sandbox"];
    for (filter, expected) in [("info", true), ("info,access::health=error", false)] {
        let program = Program::start(&args, &[("RUST_LOG", filter)]);
        let checked = crate::support::program::run(
            &["health", "--target", &format!("http://{}", program.grpc)],
            &[],
        );
        assert_eq!(checked.0, 0, "{checked:?}");
        let called = program
            .call_with(example_request(), &[("x-request-id", "the-call")])
            .await;
        called.expect("a task");

        assert_eq!(
            program.access_line("the-call")["target"],
            "access",
            "{filter}"
        );
        let is_check = |line: &String| line.contains("\"target\":\"access::health\"");
        assert_eq!(program.logs().iter().any(is_check), expected, "{filter}");
    }
}
