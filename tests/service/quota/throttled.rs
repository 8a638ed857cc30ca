use std::time::{Duration, Instant};

use rds_task_facade::pb::GetTaskDetailRequest;
use tokio::task::JoinSet;
use tonic::{Code, Request};

use super::{begin, with_token};
use crate::support::{Failure, Program, Upstream, eventually, example, example_request, reply};

#[tokio::test]
async fn a_throttle_window_applies_to_its_identity_only() {
    let upstream = Upstream::start(|request| match request.header("x-auth-token") {
        Some("ann") => reply(429, &[("retry-after", "120")], ""),
        _ => example(),
    })
    .await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );
    let mut client = program.client().await;
    client
        .get_task_detail(with_token("ann", example_request()))
        .await
        .expect_err("429");

    let mut other = example_request();
    other.workflow_id = "other".into();
    let held = Failure::from_status(
        &client
            .get_task_detail(with_token("ann", other))
            .await
            .expect_err("throttled"),
    );
    client
        .get_task_detail(with_token("bob", example_request()))
        .await
        .expect("not throttled");

    assert_eq!(
        held.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    let delay = held.retry_delay.expect("RetryInfo");
    assert!(
        delay > Duration::from_secs(60) && delay <= Duration::from_secs(120),
        "{delay:?}"
    );
    assert_eq!(held.quota_subjects.len(), 1);
    let asked: Vec<_> = upstream
        .requests()
        .iter()
        .map(|r| r.header("x-auth-token").map(str::to_owned))
        .collect();
    assert_eq!(asked, [Some("ann".to_owned()), Some("bob".to_owned())]);
    assert_eq!(program.metric("rds_throttled_calls_total").await, 1.0);
}

#[tokio::test]
async fn a_retry_respects_the_throttle_window_of_another_call() {
    let upstream = Upstream::start(|request| match request.number {
        0 => reply(503, &[("retry-after", "4")], ""),
        _ => reply(429, &[("retry-after", "120")], ""),
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let mut retrying = JoinSet::new();
    begin(&mut retrying, program.client().await, example_request()).await;
    eventually("a retry is due", async || {
        let metrics = program.metrics().await;
        metrics
            .keys()
            .any(|series| series.starts_with("rds_upstream_retries_total"))
    })
    .await;
    let mut other = example_request();
    other.workflow_id = "other".into();
    program.call(other).await.expect_err("429");

    let retried = retrying.join_all().await.remove(0).expect_err("throttled");

    let failure = Failure::from_status(&retried);
    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    assert!(failure.retry_delay.expect("RetryInfo") > Duration::from_secs(60));
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(program.metric("rds_throttled_calls_total").await, 1.0);
}

#[tokio::test]
async fn throttling_by_address_applies_to_every_identity() {
    let text = "The throttling threshold has been reached: policy ip over ratelimit,limit:200,time:1 minute";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0308"}}"#);
    let upstream = Upstream::always(reply(429, &[], &body)).await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );
    let mut client = program.client().await;

    for token in ["ann", "bob"] {
        let failure = Failure::from_status(
            &client
                .get_task_detail(with_token(token, example_request()))
                .await
                .expect_err("429"),
        );
        assert_eq!(
            failure.code_and_reason(),
            (Code::ResourceExhausted, "THROTTLED"),
            "{token}"
        );
    }

    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn the_rate_limiter_paces_calls_within_their_deadline_and_rejects_others_at_once() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &["--upstream-rate", "2/4s"]);
    let client = program.client().await;
    let distinct = |number: usize, timeout: &str| {
        let mut request = Request::new(GetTaskDetailRequest {
            workflow_id: format!("w-{number}"),
            ..example_request()
        });
        request
            .metadata_mut()
            .insert("grpc-timeout", timeout.parse().expect("ASCII"));
        request
    };
    let mut calls = JoinSet::new();

    let started = Instant::now();
    for number in 0..4 {
        begin(&mut calls, client.clone(), distinct(number, "60S")).await;
    }
    upstream.wait_for_requests(2).await;
    let rejected = Failure::from_status(
        &client
            .clone()
            .get_task_detail(distinct(9, "200m"))
            .await
            .expect_err("no room"),
    );
    let asked_before = upstream.requests().len();
    let results = calls.join_all().await;
    let took = started.elapsed();

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert!(
        took >= Duration::from_millis(3900),
        "four calls at two in four seconds: {took:?}"
    );
    assert_eq!(
        rejected.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    assert!(
        asked_before < 4,
        "rejected while others wait for their turn"
    );
    assert_eq!(upstream.requests().len(), 4);
    // The third and the fourth waited some four seconds.
    assert_eq!(program.metric("rds_paced_calls_total").await, 2.0);
    let throttled = "rds_failed_calls_total{reason=\"THROTTLED\"}";
    assert_eq!(program.metric(throttled).await, 1.0);
}
