use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use rds_task_facade::pb::{GetTaskDetailRequest, task_service_client::TaskServiceClient};
use tokio::task::JoinSet;
use tonic::{Code, Request, Status, transport::Channel};

use crate::support::{
    Connection, Failure, Program, Step, Upstream, answer, example, example_request,
};

fn with_token(token: &str, request: GetTaskDetailRequest) -> Request<GetTaskDetailRequest> {
    let mut request = Request::new(request);
    request
        .metadata_mut()
        .insert("x-auth-token", token.parse().expect("ASCII"));
    request
}

fn slow_example() -> Vec<Step> {
    let mut steps = vec![Step::Wait(Duration::from_millis(500))];
    steps.extend(example());
    steps
}

/// Starts one call and hands back the task that waits for it.
async fn begin(
    calls: &mut JoinSet<Result<String, Status>>,
    mut client: TaskServiceClient<Channel>,
    request: impl tonic::IntoRequest<GetTaskDetailRequest> + Send + 'static,
) {
    calls.spawn(async move {
        client
            .get_task_detail(request)
            .await
            .map(|reply| reply.into_inner().job_id)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_equal_calls_over_ten_connections_cause_one_upstream_call() {
    // It answers when all are waiting: the script runs before the first byte of the answer, on a thread of its own.
    let (all_wait, waiting) = std::sync::mpsc::channel::<()>();
    let waiting = std::sync::Mutex::new(waiting);
    let upstream = Upstream::start(move |_| {
        let waiting = waiting.lock().expect("no panic under the lock");
        // A second upstream call finds nobody who tells it to go on, and is counted below.
        let _ = tokio::task::block_in_place(|| waiting.recv());
        example()
    })
    .await;
    let program = Program::over(&upstream.url(), &["--attempt-timeout", "30s"]);
    let mut calls = JoinSet::new();

    for _ in 0..10 {
        let client = program.client().await;
        for _ in 0..100 {
            begin(&mut calls, client.clone(), example_request()).await;
        }
    }
    while program.metric("rds_coalesced_calls_total").await < 999.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(all_wait);
    let answers = calls.join_all().await;

    assert_eq!(answers.len(), 1000);
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(upstream.requests().len(), 1);
    assert_eq!(program.metric("rds_coalesced_calls_total").await, 999.0);
}

#[tokio::test]
async fn questions_that_differ_in_anything_are_not_merged() {
    let upstream = Upstream::always(slow_example()).await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );
    let client = program.client().await;
    let base = example_request();
    let other = |change: fn(&mut GetTaskDetailRequest)| {
        let mut request = base.clone();
        change(&mut request);
        request
    };
    let requests = [
        with_token("ann", base.clone()),
        with_token("bob", base.clone()),
        with_token("ann", other(|r| r.project_id = "p".into())),
        with_token("ann", other(|r| r.instance_id = "i".into())),
        with_token("ann", other(|r| r.workflow_id = "w".into())),
        with_token("ann", other(|r| r.workflow_name = Some(String::new()))),
        with_token("ann", other(|r| r.workflow_name = None)),
    ];
    let mut calls = JoinSet::new();

    for request in requests {
        begin(&mut calls, client.clone(), request).await;
    }
    let answers = calls.join_all().await;

    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(upstream.requests().len(), 7);
    assert_eq!(program.metric("rds_coalesced_calls_total").await, 0.0);
}

#[tokio::test]
async fn the_shared_work_goes_on_while_anyone_waits_and_stops_when_nobody_does() {
    let upstream = Upstream::start(|request| {
        if request.number == 0 {
            slow_example()
        } else {
            vec![Step::Hold]
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let mut leader = JoinSet::new();
    let mut followers = JoinSet::new();

    begin(&mut leader, program.client().await, example_request()).await;
    upstream.wait_for_requests(1).await;
    begin(&mut followers, program.client().await, example_request()).await;
    while program.metric("rds_coalesced_calls_total").await < 1.0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    leader.abort_all();
    let followed = followers.join_all().await;

    assert!(followed[0].is_ok(), "{followed:?}");
    assert_eq!(upstream.requests().len(), 1);

    let mut alone = JoinSet::new();
    begin(&mut alone, program.client().await, example_request()).await;
    upstream.wait_for_requests(2).await;
    let closed_before = upstream.connections().closed;
    alone.abort_all();
    upstream.wait_for_closed(closed_before + 1).await;
}

#[tokio::test]
async fn each_waiter_has_its_own_deadline_and_the_work_that_of_the_longest() {
    let upstream = Upstream::always(slow_example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let client = program.client().await;
    let hasty = Connection::open(program.grpc).await;
    let mut second = JoinSet::new();

    let first = tokio::spawn(async move { hasty.call_within("150m", &example_request()).await });
    upstream.wait_for_requests(1).await;
    begin(&mut second, client, example_request()).await;
    let first = first
        .await
        .expect("no panic")
        .expect("an answer")
        .status()
        .expect("a status");
    let second = second.join_all().await;

    assert_eq!(first.code(), Code::DeadlineExceeded);
    assert!(second[0].is_ok(), "{second:?}");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn an_error_is_shared_like_an_answer() {
    let upstream = Upstream::always(
        [
            vec![Step::Wait(Duration::from_millis(300))],
            answer(403, &[], r#"{"error_code":"DBS.200044","error_msg":"m"}"#),
        ]
        .concat(),
    )
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let client = program.client().await;
    let mut calls = JoinSet::new();

    for _ in 0..20 {
        begin(&mut calls, client.clone(), example_request()).await;
    }
    let answers = calls.join_all().await;

    assert!(answers.iter().all(|answer| {
        answer
            .as_ref()
            .is_err_and(|e| e.code() == Code::PermissionDenied)
    }));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn answers_and_missing_tasks_are_kept_for_the_ttl_and_other_errors_are_not() {
    let upstream = Upstream::start(|request| match request.line.split('/').nth(4) {
        Some("missing") => answer(400, &[], r#"{"error_code":"DBS.200543","error_msg":"m"}"#),
        Some("busy") => answer(409, &[], r#"{"error_code":"DBS.200047","error_msg":"m"}"#),
        _ => example(),
    })
    .await;
    let program = Program::over(&upstream.url(), &["--cache-ttl", "400ms"]);
    let mut client = program.client().await;
    let of = |instance: &str| GetTaskDetailRequest {
        instance_id: instance.into(),
        ..example_request()
    };

    for instance in ["there", "missing", "busy"] {
        let _ = client.get_task_detail(of(instance)).await;
        let _ = client.get_task_detail(of(instance)).await;
    }
    let within = upstream.requests().len();
    tokio::time::sleep(Duration::from_millis(450)).await;
    let _ = client.get_task_detail(of("there")).await;
    let _ = client.get_task_detail(of("missing")).await;

    assert_eq!(within, 1 + 1 + 2);
    assert_eq!(upstream.requests().len(), within + 2);
    assert_eq!(program.metric("rds_cache_hits_total").await, 2.0);
}

#[tokio::test]
async fn nothing_is_kept_by_default() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let mut client = program.client().await;

    for _ in 0..3 {
        client
            .get_task_detail(example_request())
            .await
            .expect("an answer");
    }

    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn a_throttled_identity_is_held_back_and_others_are_not() {
    let upstream = Upstream::start(|request| match request.header("x-auth-token") {
        Some("ann") => answer(429, &[("retry-after", "2")], ""),
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
    let held = Failure::of(
        &client
            .get_task_detail(with_token("ann", other))
            .await
            .expect_err("held back"),
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
        delay > Duration::from_secs(1) && delay <= Duration::from_secs(2),
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
async fn a_retry_does_not_go_out_in_a_window_that_another_call_has_learnt_of() {
    let upstream = Upstream::start(|request| match request.number {
        0 => answer(503, &[("retry-after", "1")], ""),
        _ => answer(429, &[("retry-after", "30")], ""),
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let mut retrying = JoinSet::new();
    begin(&mut retrying, program.client().await, example_request()).await;
    while program
        .metrics()
        .await
        .iter()
        .all(|(series, _)| !series.starts_with("rds_upstream_retries_total"))
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut other = example_request();
    other.workflow_id = "other".into();
    program.call(other).await.expect_err("429");

    let retried = retrying.join_all().await.remove(0).expect_err("held back");

    let failure = Failure::of(&retried);
    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    assert!(failure.retry_delay.expect("RetryInfo") > Duration::from_secs(20));
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(program.metric("rds_throttled_calls_total").await, 1.0);
}

#[tokio::test]
async fn a_kept_answer_is_given_even_while_its_identity_is_throttled() {
    let upstream = Upstream::start(|request| match request.number {
        0 => example(),
        _ => answer(429, &[("retry-after", "30")], ""),
    })
    .await;
    let program = Program::over(&upstream.url(), &["--cache-ttl", "1h"]);
    let mut other = example_request();
    other.workflow_id = "other".into();
    program.call(example_request()).await.expect("an answer");
    program.call(other).await.expect_err("429");

    let again = program.call(example_request()).await;

    assert!(again.is_ok(), "{again:?}");
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(program.metric("rds_throttled_calls_total").await, 0.0);
}

#[tokio::test]
async fn pollers_of_few_tasks_cause_as_many_upstream_calls_as_the_ttl_allows() {
    const CALLERS: usize = 100;
    const ROUNDS: usize = 15;
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &["--cache-ttl", "500ms"]);
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(program.client().await);
    }
    let mut callers = JoinSet::new();

    let started = Instant::now();
    for caller in 0..CALLERS {
        let mut client = clients[caller % 5].clone();
        callers.spawn(async move {
            for _ in 0..ROUNDS {
                let mut request = example_request();
                request.workflow_id = format!("task-{}", caller % 3);
                client.get_task_detail(request).await.expect("an answer");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    callers.join_all().await;

    // Each of the three tasks once, and again each time an answer has become too old.
    let windows = started.elapsed().as_millis() as usize / 500 + 1;
    assert!(upstream.requests().len() <= 3 * windows);
    let (merged, kept) = (
        program.metric("rds_coalesced_calls_total").await,
        program.metric("rds_cache_hits_total").await,
    );
    let asked = upstream.requests().len() as f64;
    assert_eq!(asked + merged + kept, (CALLERS * ROUNDS) as f64);
}

#[tokio::test]
async fn throttling_by_address_holds_everyone_back() {
    let text = "The throttling threshold has been reached: policy ip over ratelimit,limit:200,time:1 minute";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0308"}}"#);
    let upstream = Upstream::always(answer(429, &[], &body)).await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );
    let mut client = program.client().await;

    for token in ["ann", "bob"] {
        let failure = Failure::of(
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
async fn the_local_rate_paces_calls_that_fit_and_refuses_the_others_at_once() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &["--upstream-rate", "2/1s"]);
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
        begin(&mut calls, client.clone(), distinct(number, "10S")).await;
    }
    upstream.wait_for_requests(2).await;
    let refused = Failure::of(
        &client
            .clone()
            .get_task_detail(distinct(9, "200m"))
            .await
            .expect_err("no room"),
    );
    let refused_after = started.elapsed();
    let answers = calls.join_all().await;
    let took = started.elapsed();

    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert!(
        took >= Duration::from_millis(900),
        "four calls at two a second: {took:?}"
    );
    assert_eq!(
        refused.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    assert!(
        refused_after < Duration::from_millis(900),
        "{refused_after:?}"
    );
    assert_eq!(upstream.requests().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_never_sees_the_answer_of_another_credential() {
    // The answer names the token and the task that were asked with.
    let upstream = Upstream::start(|request| {
        let token = request.header("x-auth-token").unwrap_or_default();
        let task = request.body.split('"').nth(3).unwrap_or_default();
        let mut steps = vec![Step::Wait(Duration::from_millis(request.number as u64 % 7))];
        steps.extend(answer(
            200,
            &[],
            format!(r#"{{"job_id":"{token}/{task}"}}"#),
        ));
        steps
    })
    .await;
    let args = [
        "--endpoint",
        &upstream.url(),
        "--credentials",
        "caller",
        "--cache-ttl",
        "20ms",
    ];
    let program = Program::start(&args, &[]);
    let clients = Arc::new([
        program.client().await,
        program.client().await,
        program.client().await,
    ]);
    let mut calls = JoinSet::new();

    for number in 0..600usize {
        let mut client = clients[number % 3].clone();
        let (token, task) = (
            format!("token-{}", number % 5),
            format!("task-{}", (number / 5) % 4),
        );
        calls.spawn(async move {
            let mut request = example_request();
            request.workflow_id = task.clone();
            let call = client.get_task_detail(with_token(&token, request));
            if number % 11 == 0 {
                // Some leave at once or soon.
                let _ = tokio::time::timeout(Duration::from_millis(number as u64 % 4), call).await;
                return None;
            }
            let got = call.await.expect("an answer").into_inner().job_id;
            Some((got, format!("{token}/{task}")))
        });
        if number % 50 == 49 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let answers = calls.join_all().await;

    let seen: HashSet<_> = answers.into_iter().flatten().collect();
    for (got, wanted) in &seen {
        assert_eq!(got, wanted);
    }
    assert_eq!(seen.len(), 20);
    assert!(upstream.requests().len() < 545, "some were merged or kept");
}
