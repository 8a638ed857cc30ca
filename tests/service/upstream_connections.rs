use std::{
    fs,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rds_task_facade::pb::{GetTaskDetailRequest, GetTaskDetailResponse};
use tokio::task::JoinSet;
use tonic::{Response, Status};
use tonic_health::pb::HealthCheckRequest;

use crate::support::{
    Failure, Gate, Program, Step, Upstream, example, example_request, gated_example, reply, within,
};

const MISMATCHED: &str = "rds_upstream_mismatched_replies_total";

/// The example request for another task.
fn request(number: usize) -> GetTaskDetailRequest {
    GetTaskDetailRequest {
        workflow_id: format!("w-{number}"),
        ..example_request()
    }
}

/// Calls about different tasks at once, on several connections.
async fn calls(
    program: &Program,
    count: usize,
) -> JoinSet<Result<Response<GetTaskDetailResponse>, Status>> {
    let mut calls = JoinSet::new();
    for connection in 0..10 {
        let client = program.client().await;
        for number in (connection..count).step_by(10) {
            let mut client = client.clone();
            calls.spawn(async move { client.get_task_detail(request(number)).await });
        }
    }
    calls
}

#[tokio::test]
async fn no_call_fails_when_the_address_moves_and_the_previous_upstream_replies_with_503() {
    let gate = Gate::default();
    let is_replaced = Arc::new(AtomicBool::new(false));
    let previous = Upstream::start({
        let (gate, is_replaced) = (gate.clone(), Arc::clone(&is_replaced));
        move |_| match is_replaced.load(Ordering::Relaxed) {
            true => reply(503, &[], ""),
            false => gated_example(&gate),
        }
    })
    .await;
    let program = Program::over(&previous.url(), &[]);
    let first = calls(&program, 20).await;
    previous.wait_for_requests(20).await;
    gate.open();
    assert!(first.join_all().await.iter().all(Result::is_ok));

    previous.stop_accepting().await;
    let next = Upstream::start_at(previous.address, |_| example()).await;
    is_replaced.store(true, Ordering::Relaxed);
    for number in 0..40 {
        // Each on a new connection to the program, so that all workers get calls.
        let ended = program.call(request(number)).await;
        assert!(ended.is_ok(), "call {number}: {ended:?}");
    }

    let retries = program.metric("rds_upstream_retries_total{reason=\"UPSTREAM_UNAVAILABLE\"}");
    assert!(next.requests().len() >= 40);
    assert!(retries.await >= 1.0);
}

#[tokio::test]
async fn idle_connections_are_closed_after_an_attempt_on_one_of_them_has_timed_out() {
    const IDLE: usize = 10;
    let gate = Gate::default();
    let has_moved = Arc::new(AtomicBool::new(false));
    let upstream = Upstream::start({
        let (gate, has_moved) = (gate.clone(), Arc::clone(&has_moved));
        move |request| match has_moved.load(Ordering::Relaxed) && request.connection < IDLE {
            true => vec![Step::Hold],
            false => gated_example(&gate),
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &["--attempt-timeout", "2s"]);
    // One connection, so that one worker gets all calls.
    let client = program.client().await;
    let calls = |numbers: Range<usize>| {
        let calls = numbers.map(|number| {
            let mut client = client.clone();
            async move { client.get_task_detail(request(number)).await }
        });
        calls.collect::<JoinSet<_>>()
    };
    let first = calls(0..IDLE);
    upstream.wait_for_requests(IDLE).await;
    gate.open();
    assert!(first.join_all().await.iter().all(Result::is_ok));

    // As if a firewall had dropped the connections.
    has_moved.store(true, Ordering::Relaxed);
    assert!(calls(0..1).join_all().await.iter().all(Result::is_ok));
    assert!(calls(0..IDLE).join_all().await.iter().all(Result::is_ok));

    let retries = program.metric("rds_upstream_retries_total{reason=\"UPSTREAM_TIMEOUT\"}");
    assert_eq!(retries.await, 1.0);
}

#[tokio::test]
async fn a_reply_about_another_instance_is_passed_on_and_its_connection_is_not_reused() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let mut client = program.client().await;
    let other = GetTaskDetailRequest {
        instance_id: "other".to_owned(),
        ..example_request()
    };

    client
        .get_task_detail(example_request())
        .await
        .expect("a reply");
    let passed_on = client.get_task_detail(other).await.expect("a reply");
    client
        .get_task_detail(example_request())
        .await
        .expect("a reply");
    client
        .get_task_detail(example_request())
        .await
        .expect("a reply");

    let requests = upstream.requests();
    let connections: Vec<_> = requests.iter().map(|request| request.connection).collect();
    assert_eq!(
        passed_on.into_inner().instance_id,
        example_request().instance_id
    );
    assert_eq!(connections, [0, 0, 1, 1]);
    assert_eq!(program.metric(MISMATCHED).await, 1.0);
    program.wait_for_log(|line| {
        let text = line["msg"].as_str().unwrap_or_default();
        line["level"] == "WARN" && text.contains("another instance")
    });
}

#[tokio::test]
async fn many_connects_at_once_start_no_thread() {
    let gate = Gate::default();
    let gated = gate.clone();
    let upstream = Upstream::start(move |_| gated_example(&gated)).await;
    let url = format!("http://localhost:{}", upstream.address.port());
    let program = Program::over(&url, &[]);
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", program.pid())).expect("it runs");
        tasks.count()
    };
    let before = threads();

    let calls = calls(&program, 200).await;
    upstream.wait_for_requests(200).await;
    let during = threads();
    gate.open();
    let ended = calls.join_all().await;

    assert!(ended.iter().all(Result::is_ok));
    assert_eq!(upstream.connections().opened, 200);
    assert_eq!(during, before);
}

/// The peak of the program's resident memory so far, in bytes.
fn peak_memory(program: &Program) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", program.pid())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok());
    kibibytes.expect("a number") << 10
}

#[tokio::test]
async fn many_large_replies_at_once_are_bounded_in_memory_and_leave_time_for_health() {
    const CALLS: usize = 40;
    let part = r#"{"sub_task_name":"a","percent":"1","executed_time":"1","status":"a","remaining_time":"1"}"#;
    let shapes = [
        ("{}", 349_000, Some("UPSTREAM_RESPONSE_TOO_LARGE")),
        ("{}", 10_000, None),
        (part, 10_000, None),
    ];
    for (part, count, reason) in shapes {
        let list = vec![part; count].join(",");
        let body = format!(
            r#"{{"instance_id":"{}","sub_task_list":[{list}]}}"#,
            example_request().instance_id
        );
        let gate = Gate::default();
        let gated = gate.clone();
        let steps = reply(200, &[], &body);
        let upstream = Upstream::start(move |_| {
            let wait = Step::WaitFor(gated.clone());
            [vec![wait], steps.clone()].concat()
        })
        .await;
        let program = Program::patient(&upstream.url(), &[]);
        let before = peak_memory(&program);
        let mut calls = calls(&program, CALLS).await;
        upstream.wait_for_requests(CALLS).await;

        gate.open();
        let mut health = program.health().await;
        let mut slowest = Duration::ZERO;
        while !calls.is_empty() {
            let asked = Instant::now();
            let check = health.check(HealthCheckRequest::default());
            within("health", check).await.expect("serving");
            slowest = slowest.max(asked.elapsed());
            while let Some(ended) = calls.try_join_next() {
                let found = ended
                    .expect("no panic")
                    .err()
                    .map(|status| Failure::from_status(&status).reason);
                assert_eq!(found.as_deref(), reason);
            }
        }
        let used = (peak_memory(&program) - before) / CALLS;

        println!(
            "{count} times {part}: {} bytes take {used} bytes; health {slowest:?}",
            body.len()
        );
        // The rest is the two connections of a call.
        let limit = 4 * body.len() + (256 << 10);
        assert!(used < limit, "{used} bytes per reply, limit {limit}");
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    }
}
