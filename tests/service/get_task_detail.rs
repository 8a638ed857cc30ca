use rds_task_facade::pb::{GetTaskDetailRequest, GetTaskDetailResponse, SubTask, TaskState};
use tonic::Code;

use crate::support::{Failure, Program, Upstream, example, example_request, program::TOKEN, reply};

#[tokio::test]
async fn upstream_sees_exactly_the_documented_request() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let metadata = [
        ("x-auth-token", "the-callers-own"),
        ("authorization", "Bearer a-mesh-token"),
        ("cookie", "a=b"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-request-id", "from-the-caller"),
        (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ),
        ("baggage", "secret=1"),
    ];

    program
        .call_with(example_request(), &metadata)
        .await
        .expect("a reply");

    let requests = upstream.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(
        requests[0].line,
        "POST /v3/0483b6b16e954cb88930a360d2c4e663/instances/1ffc4167903840cb93a3da56d28c14fdin01/task-center-detail HTTP/1.1"
    );
    assert_eq!(
        requests[0].body,
        r#"{"workflow_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","workflow_name":"CreateMysqlSingleHAInstance"}"#
    );
    let mut headers = requests[0].headers.clone();
    headers.sort();
    let expected = [
        ("accept", "*/*"),
        ("content-length", "100"),
        ("content-type", "application/json"),
        ("host", &upstream.address.to_string()),
        (
            "user-agent",
            concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")),
        ),
        ("x-auth-token", TOKEN),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(headers, expected);
}

#[tokio::test]
async fn metadata_cannot_change_the_endpoint_path_or_identity_of_the_upstream_request() {
    let upstream = Upstream::always(example()).await;
    let elsewhere = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &["--allow-project", "another"]);
    let elsewhere_address = elsewhere.address.to_string();
    let metadata = [
        ("host", elsewhere_address.as_str()),
        ("x-forwarded-host", elsewhere_address.as_str()),
        ("x-envoy-original-dst-host", elsewhere_address.as_str()),
        ("x-endpoint", elsewhere_address.as_str()),
        ("x-region", "cn-north-4"),
        ("x-project-id", "another"),
        ("x-domain-id", "another"),
        ("x-http-method-override", "DELETE"),
        ("x-original-url", "/v3/another/instances"),
        ("x-envoy-original-path", "/v3/another/instances"),
        (
            "x-forwarded-client-cert",
            "By=spiffe://mesh/facade;URI=spiffe://mesh/admin",
        ),
    ];

    let rejected = program
        .call_with(example_request(), &metadata)
        .await
        .expect_err("the project of the request counts");
    let allowed = GetTaskDetailRequest {
        project_id: "another".to_owned(),
        ..example_request()
    };
    program
        .call_with(allowed, &metadata)
        .await
        .expect("a reply");

    assert_eq!(
        Failure::from_status(&rejected).code_and_reason(),
        (Code::PermissionDenied, "PROJECT_NOT_ALLOWED")
    );
    let [request] = &upstream.requests()[..] else {
        panic!("one request: {:?}", upstream.requests());
    };
    assert_eq!(
        request.line,
        "POST /v3/another/instances/1ffc4167903840cb93a3da56d28c14fdin01/task-center-detail HTTP/1.1"
    );
    let address = upstream.address.to_string();
    assert_eq!(request.header("host"), Some(&*address));
    for (name, _) in &metadata[1..] {
        assert_eq!(request.header(name), None, "{name}");
    }
    assert_eq!(elsewhere.connections().opened, 0);
}

#[tokio::test]
async fn the_workflow_name_is_sent_only_if_the_caller_set_it() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);

    for name in [None, Some(""), Some("a \"quoted\" \u{4e2d}\u{6587} name")] {
        let request = GetTaskDetailRequest {
            workflow_name: name.map(str::to_owned),
            ..example_request()
        };
        program.call(request).await.expect("a reply");
    }

    let bodies: Vec<_> = upstream
        .requests()
        .into_iter()
        .map(|request| request.body)
        .collect();
    assert_eq!(
        bodies,
        [
            r#"{"workflow_id":"102772a9-31fa-4129-b9f8-7638e2792f3b"}"#,
            r#"{"workflow_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","workflow_name":""}"#,
            "{\"workflow_id\":\"102772a9-31fa-4129-b9f8-7638e2792f3b\",\"workflow_name\":\"a \\\"quoted\\\" \u{4e2d}\u{6587} name\"}",
        ]
    );
}

#[tokio::test]
async fn every_known_field_of_the_upstream_reply_is_passed_on_unchanged() {
    let body = r#"{
        "instance_id": "i", "instance_name": "n", "job_id": "j", "job_name": "m",
        "created_at": "2025-12-09T08:09:10+0800", "update_at": "", "process": 60, "status": "Running",
        "unknown": {"deep": [1, 2, {"er": null}]},
        "sub_task_list": [
            {"sub_task_name": "a", "percent": 1e2, "executed_time": "3", "status": "Pending", "remaining_time": null, "show_detail": true},
            {"show_detail": "false", "status": ["not text"]}
        ]
    }"#;
    let upstream = Upstream::always(reply(200, &[], body)).await;
    let program = Program::over(&upstream.url(), &[]);

    let reply = program
        .call(example_request())
        .await
        .expect("a reply")
        .into_inner();

    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        reply,
        GetTaskDetailResponse {
            instance_id: "i".into(),
            instance_name: "n".into(),
            job_id: "j".into(),
            job_name: "m".into(),
            created_at: text("2025-12-09T08:09:10+0800"),
            update_at: text(""),
            process: text("60"),
            status: text("Running"),
            state: TaskState::Running.into(),
            progress_percent: Some(60),
            create_time: Some(prost_types::Timestamp {
                seconds: 1_765_238_950,
                nanos: 0,
            }),
            update_time: None,
            sub_task_list: vec![
                SubTask {
                    sub_task_name: text("a"),
                    percent: text("1e2"),
                    executed_time: text("3"),
                    status: text("Pending"),
                    remaining_time: None,
                    show_detail: Some(true),
                    state: TaskState::Pending.into(),
                    progress_percent: Some(100),
                },
                SubTask {
                    show_detail: Some(false),
                    ..SubTask::default()
                },
            ],
        }
    );
}

#[tokio::test]
async fn absent_and_null_fields_stay_empty_or_unset() {
    let upstream = Upstream::always(reply(
        200,
        &[],
        r#"{"job_id":"j","job_name":null,"status":null}"#,
    ))
    .await;
    let program = Program::over(&upstream.url(), &[]);

    let reply = program
        .call(example_request())
        .await
        .expect("a reply")
        .into_inner();

    let expected = GetTaskDetailResponse {
        job_id: "j".into(),
        ..GetTaskDetailResponse::default()
    };
    assert_eq!(reply, expected);
}

#[tokio::test]
async fn all_violations_are_reported_together_before_any_upstream_work() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let request = GetTaskDetailRequest {
        project_id: String::new(),
        instance_id: "a/../b".into(),
        workflow_id: "w".repeat(129),
        workflow_name: Some("line\nbreak".into()),
    };

    let failure = program.failure(request).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::InvalidArgument, "INVALID_REQUEST")
    );
    let fields: Vec<_> = failure
        .violations
        .iter()
        .map(|(field, _)| field.as_str())
        .collect();
    assert_eq!(
        fields,
        ["project_id", "instance_id", "workflow_id", "workflow_name"]
    );
    assert_eq!(upstream.connections().opened, 0);
}

#[tokio::test]
async fn the_callers_token_is_passed_on_and_a_missing_or_malformed_one_is_rejected() {
    let upstream = Upstream::always(example()).await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );

    program
        .call_with(example_request(), &[("x-auth-token", "MIItoken")])
        .await
        .expect("a reply");
    let cases: [(&[_], _); 5] = [
        (&[], "CREDENTIAL_MISSING"),
        (
            &[
                ("x-forwarded-client-cert", "URI=spiffe://mesh/admin"),
                ("x-request-id", "trusted"),
            ],
            "CREDENTIAL_MISSING",
        ),
        (&[("authorization", "Bearer x")], "CREDENTIAL_MISSING"),
        (
            &[("x-auth-token", "a"), ("x-auth-token", "b")],
            "CREDENTIAL_REJECTED",
        ),
        (&[("x-auth-token", "a b")], "CREDENTIAL_REJECTED"),
    ];
    for (metadata, reason) in cases {
        let failure = Failure::from_status(
            &program
                .call_with(example_request(), metadata)
                .await
                .expect_err("rejected"),
        );
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, reason),
            "{metadata:?}"
        );
        assert_eq!(
            failure.metadata.get("credentialOwner").map(String::as_str),
            Some("caller"),
            "{metadata:?}"
        );
    }

    let tokens: Vec<_> = upstream
        .requests()
        .iter()
        .map(|r| r.header("x-auth-token").map(str::to_owned))
        .collect();
    assert_eq!(tokens, [Some("MIItoken".to_owned())]);
}

#[tokio::test]
async fn projects_that_are_not_allowed_are_rejected_before_any_upstream_work() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(
        &upstream.url(),
        &["--allow-project", "one", "--allow-project", "two"],
    );
    let of = |project: &str| GetTaskDetailRequest {
        project_id: project.into(),
        ..example_request()
    };

    program.call(of("two")).await.expect("an allowed project");
    let failure = program.failure(of("three")).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::PermissionDenied, "PROJECT_NOT_ALLOWED")
    );
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn request_ids_are_echoed_or_generated_and_the_upstream_id_is_returned() {
    let upstream = Upstream::start(|request| match request.number {
        0 => reply(
            200,
            &[("X-Request-Id", "up-1")],
            crate::support::upstream::EXAMPLE,
        ),
        _ => reply(
            404,
            &[("X-Request-Id", "up-2")],
            r#"{"error_code":"DBS.200045","error_msg":"m"}"#,
        ),
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);

    let result = program
        .call_with(example_request(), &[("x-request-id", "mine.1_a-B")])
        .await
        .expect("a reply");
    let rejected = program
        .call_with(example_request(), &[("x-request-id", "not mine\\n")])
        .await
        .expect_err("instance not found");

    let id = |metadata: &tonic::metadata::MetadataMap, name: &str| {
        metadata
            .get(name)
            .map(|value| value.to_str().expect("ASCII").to_owned())
    };
    assert_eq!(
        id(result.metadata(), "x-request-id").as_deref(),
        Some("mine.1_a-B")
    );
    assert_eq!(
        id(result.metadata(), "x-upstream-request-id").as_deref(),
        Some("up-1")
    );
    let generated = id(rejected.metadata(), "x-request-id").expect("a generated id");
    assert!(
        generated.len() >= 16 && generated.bytes().all(|b| b.is_ascii_alphanumeric()),
        "{generated}"
    );
    assert_eq!(
        id(rejected.metadata(), "x-upstream-request-id").as_deref(),
        Some("up-2")
    );
    assert_eq!(Failure::from_status(&rejected).request_id, Some(generated));
    assert_eq!(
        Failure::from_status(&rejected)
            .metadata
            .get("upstreamRequestId")
            .map(String::as_str),
        Some("up-2")
    );
}
