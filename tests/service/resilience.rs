use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tonic::Code;

use crate::support::{
    Connection, Failure, Program, Step, Upstream, eventually, example, example_request, reply,
};

const RETRIES: &str = "rds_upstream_retries_total";

/// An upstream that fails the first `failures` requests with `steps` and then replies.
async fn recovering(failures: usize, steps: Vec<Step>) -> Upstream {
    Upstream::start(move |request| {
        if request.number < failures {
            steps.clone()
        } else {
            example()
        }
    })
    .await
}

#[tokio::test]
async fn transient_failures_are_recovered_by_a_retry() {
    let cut = Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"job".to_vec());
    let cases = [
        ("close", vec![Step::Close], "UPSTREAM_RESET"),
        ("reset", vec![Step::Reset], "UPSTREAM_RESET"),
        ("truncation", vec![cut, Step::Close], "UPSTREAM_TRUNCATED"),
        (
            "garbage",
            vec![Step::Send(b"garbage\r\n\r\n".to_vec())],
            "UPSTREAM_PROTOCOL",
        ),
        ("silence", vec![Step::Hold], "UPSTREAM_TIMEOUT"),
        ("408", reply(408, &[], ""), "UPSTREAM_UNAVAILABLE"),
        ("425", reply(425, &[], ""), "UPSTREAM_UNAVAILABLE"),
        ("500", reply(500, &[], ""), "UPSTREAM_INTERNAL"),
        ("502", reply(502, &[], ""), "UPSTREAM_UNAVAILABLE"),
        ("503", reply(503, &[], ""), "UPSTREAM_UNAVAILABLE"),
        ("504", reply(504, &[], ""), "UPSTREAM_TIMEOUT"),
    ];

    for (case, steps, reason) in cases {
        let upstream = recovering(1, steps).await;
        let program = Program::over(&upstream.url(), &["--attempt-timeout", "2s"]);

        let result = program.call(example_request()).await;

        assert!(result.is_ok(), "{case}: {result:?}");
        assert_eq!(upstream.requests().len(), 2, "{case}");
        assert_eq!(
            program
                .metric(&format!("{RETRIES}{{reason=\"{reason}\"}}"))
                .await,
            1.0,
            "{case}"
        );
    }
}

#[tokio::test]
async fn each_http_status_is_attempted_as_often_as_documented() {
    let cases = [
        (400, 1),
        (401, 1),
        (403, 1),
        (404, 1),
        (409, 1),
        (429, 1),
        (500, 2),
        (501, 1),
        (503, 3),
        (504, 2),
        (302, 1),
        (201, 1),
    ];

    for (status, attempts) in cases {
        let upstream = Upstream::always(reply(status, &[], "")).await;
        let program = Program::over(&upstream.url(), &[]);

        program
            .call(example_request())
            .await
            .expect_err("an error status");

        assert_eq!(upstream.requests().len(), attempts, "{status}");
    }
}

#[tokio::test]
async fn an_unreadable_200_and_a_timeout_in_the_body_are_not_retried() {
    let half = Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"job".to_vec());

    for (case, steps) in [
        ("unreadable", reply(200, &[], "<html>")),
        ("half a body", vec![half, Step::Hold]),
    ] {
        let upstream = Upstream::always(steps).await;
        let program = Program::over(&upstream.url(), &["--attempt-timeout", "2s"]);

        program.call(example_request()).await.expect_err("no task");

        assert_eq!(upstream.requests().len(), 1, "{case}");
    }
}

#[tokio::test]
async fn a_response_head_over_the_limit_is_not_retried() {
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(200));
    let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(3_000_000));

    for (case, head) in [("many headers", many), ("a long one", long)] {
        let upstream = Upstream::always(vec![Step::Send(head.into_bytes()), Step::Hold]).await;
        let program = Program::over(&upstream.url(), &[]);

        let failure = program.failure(example_request()).await;

        let expected = (Code::Unavailable, "UPSTREAM_PROTOCOL");
        assert_eq!(failure.code_and_reason(), expected, "{case}");
        assert_eq!(upstream.requests().len(), 1, "{case}");
    }
}

#[tokio::test]
async fn retry_after_is_respected_within_the_deadline_and_returned_beyond_it() {
    let upstream = recovering(1, reply(503, &[("retry-after", "1")], "")).await;
    let program = Program::over(&upstream.url(), &[]);

    let started = Instant::now();
    program.call(example_request()).await.expect("recovered");
    let waited = started.elapsed();
    let slow = Upstream::always(reply(503, &[("retry-after", "60")], "")).await;
    let program = Program::over(&slow.url(), &[]);
    let started = Instant::now();
    let failure = Failure::from_status(
        &program
            .call_within(Duration::from_secs(25))
            .await
            .expect_err("no time"),
    );
    let replied_after = started.elapsed();

    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    assert_eq!(
        failure.code_and_reason(),
        (Code::Unavailable, "UPSTREAM_UNAVAILABLE")
    );
    assert_eq!(failure.retry_delay, Some(Duration::from_secs(60)));
    assert!(replied_after < Duration::from_secs(10), "{replied_after:?}");
}

#[tokio::test]
async fn the_callers_deadline_ends_the_call_and_its_upstream_request() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &[]);
    let connection = Connection::open(program.grpc).await;

    let started = Instant::now();
    let ended = connection
        .call_within("2S", &example_request())
        .await
        .expect("a reply");
    let took = started.elapsed();
    let failure = Failure::from_status(&ended.status().expect("a status"));

    assert_eq!(
        failure.code_and_reason(),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
    );
    assert!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(10),
        "{took:?}"
    );
    upstream.wait_for_closed(1).await;
    assert_eq!(program.handled("DeadlineExceeded").await, 1.0);
    let line = program.access_line(&failure.request_id.expect("an id"));
    assert_eq!(
        (line["grpc_code"].as_str(), line["attempts"].as_u64()),
        (Some("DeadlineExceeded"), Some(1))
    );
}

#[tokio::test]
async fn the_timeout_bounds_a_call_without_a_deadline_or_with_a_longer_one() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::over(&upstream.url(), &["--timeout", "150ms"]);

    let without = program.failure(example_request()).await;
    let longer = Failure::from_status(
        &program
            .call_within(Duration::from_secs(99_999_999))
            .await
            .expect_err("too slow"),
    );

    for failure in [without, longer] {
        assert_eq!(
            failure.code_and_reason(),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
        );
    }
}

#[tokio::test]
async fn the_deadline_ends_a_call_whose_other_timeout_passes_before_the_program_gets_cpu_time() {
    for (scheme, limit) in [
        ("http", "--attempt-timeout"),
        ("https", "--connect-timeout"),
    ] {
        let upstream = Upstream::always(vec![Step::Hold]).await;
        let url = upstream.url().replace("http", scheme);
        let program = Program::over(&url, &["--timeout", "500ms", limit, "600ms"]);
        let mut client = program.client().await;
        let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
        upstream.wait_for_requests(1).await;

        program.signal("STOP");
        // Both times have passed then, however long this takes.
        tokio::time::sleep(Duration::from_secs(1)).await;
        program.signal("CONT");

        let status = call.await.expect("no panic").expect_err("no reply");
        let failure = Failure::from_status(&status);
        assert_eq!(
            failure.code_and_reason(),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            "{limit}"
        );
    }
}

#[tokio::test]
async fn an_expired_deadline_causes_no_upstream_request() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);

    for timeout in ["0m", "1n", "0H"] {
        let connection = Connection::open(program.grpc).await;
        let ended = connection.call_within(timeout, &example_request()).await;
        let status = ended.expect("a reply").status().expect("a status");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{timeout}");
    }

    assert_eq!(upstream.connections().opened, 0);
}

#[tokio::test]
async fn a_cancelled_call_ends_the_upstream_request_and_is_counted_once() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &[]);
    let mut client = program.client().await;

    let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
    upstream.wait_for_requests(1).await;
    call.abort();
    upstream.wait_for_closed(1).await;

    program.wait_for_log(|line| line["grpc_code"] == "Canceled");
    assert_eq!(program.handled("Canceled").await, 1.0);
    assert_eq!(program.metric("rds_upstream_in_flight").await, 0.0);
    assert_eq!(
        program
            .metric("rds_upstream_requests_total{outcome=\"cancelled\",status_class=\"none\"}")
            .await,
        1.0
    );
}

#[tokio::test]
async fn a_stale_pooled_connection_is_replaced() {
    // Replies once on the first connection, and closes it on the next request.
    let upstream = Upstream::start(|request| {
        if request.number == 1 {
            vec![Step::Close]
        } else {
            example()
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let mut client = program.client().await;

    let results = [
        client.get_task_detail(example_request()).await,
        client.get_task_detail(example_request()).await,
    ];

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(upstream.connections().opened, 2);
}

#[tokio::test]
async fn the_retry_budget_bounds_the_requests_to_a_failing_upstream() {
    let upstream = Upstream::start(|request| {
        // Neither status counts for the breaker, so only the budget limits retries.
        if request.number.is_multiple_of(2) {
            reply(408, &[], "")
        } else {
            reply(425, &[], "")
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &["--retry-budget", "20"]);
    let mut client = program.client().await;
    let calls = 100;

    for number in 0..calls {
        let mut request = example_request();
        request.workflow_id = format!("w-{number}");
        client
            .get_task_detail(request)
            .await
            .expect_err("408 or 425");
    }

    let attempts = upstream.requests().len();
    assert!(attempts > calls, "{attempts}");
    assert!(attempts <= calls + 10 + calls / 5, "{attempts}");
}

#[tokio::test]
async fn the_breaker_opens_rejects_calls_and_closes_after_a_successful_probe() {
    let healthy = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&healthy);
    let upstream = Upstream::start(move |_| {
        if seen.load(Ordering::Relaxed) {
            example()
        } else {
            reply(503, &[], "")
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);
    let mut client = program.client().await;
    for _ in 0..20 {
        client
            .get_task_detail(example_request())
            .await
            .expect_err("503");
    }

    let open = Failure::from_status(
        &client
            .get_task_detail(example_request())
            .await
            .expect_err("breaker open"),
    );
    let requests = upstream.requests().len();
    healthy.store(true, Ordering::Relaxed);
    eventually("calls succeed again", async || {
        client.get_task_detail(example_request()).await.is_ok()
    })
    .await;

    assert_eq!(open.code_and_reason(), (Code::Unavailable, "CIRCUIT_OPEN"));
    assert!(
        open.retry_delay
            .is_some_and(|delay| !delay.is_zero() && delay <= Duration::from_secs(5))
    );
    assert_eq!(requests, 8);
}

#[tokio::test]
async fn error_replies_do_not_open_the_breaker() {
    for status in [400, 401, 403, 404, 409, 500] {
        let upstream = Upstream::always(reply(
            status,
            &[],
            r#"{"error_code":"DBS.1","error_msg":"m"}"#,
        ))
        .await;
        let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);
        let mut client = program.client().await;

        for _ in 0..30 {
            client
                .get_task_detail(example_request())
                .await
                .expect_err("an error status");
        }

        assert_eq!(upstream.requests().len(), 30, "{status}");
    }
}

#[tokio::test]
async fn calls_beyond_the_limit_fail_at_once_and_the_program_stays_ready() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &["--max-in-flight", "3"]);
    let client = program.client().await;
    let mut calls = JoinSet::new();
    for number in 0..3 {
        let mut client = client.clone();
        let mut request = example_request();
        request.workflow_id = format!("w-{number}");
        calls.spawn(async move { client.get_task_detail(request).await });
    }
    upstream.wait_for_requests(3).await;

    let rejected = program.failure(example_request()).await;
    let (ready, _) = program.admin("/readyz").await;

    assert_eq!(
        rejected.code_and_reason(),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    assert!(rejected.retry_delay.is_some());
    assert!(
        calls.try_join_next().is_none(),
        "the calls within the limit still wait"
    );
    assert_eq!(ready, 200);
    assert_eq!(upstream.requests().len(), 3);
    calls.abort_all();
}
