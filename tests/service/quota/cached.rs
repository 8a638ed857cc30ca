use std::time::{Duration, Instant};

use rds_task_facade::pb::GetTaskDetailRequest;
use tokio::task::JoinSet;

use crate::support::{Program, Upstream, eventually, example, example_request, reply};

/// Replies with a task, an unknown task, or a busy instance, depending on the instance id.
async fn by_instance() -> Upstream {
    Upstream::start(|request| match request.line.split('/').nth(4) {
        Some("missing") => reply(400, &[], r#"{"error_code":"DBS.200543","error_msg":"m"}"#),
        Some("busy") => reply(409, &[], r#"{"error_code":"DBS.200047","error_msg":"m"}"#),
        _ => example(),
    })
    .await
}

fn request_for(instance: &str) -> GetTaskDetailRequest {
    GetTaskDetailRequest {
        instance_id: instance.into(),
        ..example_request()
    }
}

#[tokio::test]
async fn tasks_and_missing_tasks_are_cached_and_other_errors_are_not() {
    let upstream = by_instance().await;
    let program = Program::over(&upstream.url(), &["--cache-ttl", "1h"]);
    let mut client = program.client().await;

    for instance in ["there", "missing", "busy"] {
        let _ = client.get_task_detail(request_for(instance)).await;
        let _ = client.get_task_detail(request_for(instance)).await;
    }

    assert_eq!(upstream.requests().len(), 1 + 1 + 2);
    assert_eq!(program.metric("rds_cache_hits_total").await, 2.0);
}

#[tokio::test]
async fn a_cache_entry_expires_after_the_ttl_and_not_before() {
    let upstream = by_instance().await;
    let ttl = Duration::from_millis(400);
    let program = Program::over(&upstream.url(), &["--cache-ttl", "400ms"]);
    let mut client = program.client().await;

    for instance in ["there", "missing"] {
        let before = upstream.requests().len();
        let started = Instant::now();
        eventually("the cache entry has expired", async || {
            let _ = client.get_task_detail(request_for(instance)).await;
            upstream.requests().len() == before + 2
        })
        .await;
        assert!(started.elapsed() >= ttl, "{instance}");
    }
}

#[tokio::test]
async fn nothing_is_cached_by_default() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let mut client = program.client().await;

    for _ in 0..3 {
        client
            .get_task_detail(example_request())
            .await
            .expect("a reply");
    }

    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn a_cache_entry_is_used_even_while_its_identity_is_throttled() {
    let upstream = Upstream::start(|request| match request.number {
        0 => example(),
        _ => reply(429, &[("retry-after", "30")], ""),
    })
    .await;
    let program = Program::over(&upstream.url(), &["--cache-ttl", "1h"]);
    let mut other = example_request();
    other.workflow_id = "other".into();
    program.call(example_request()).await.expect("a reply");
    program.call(other).await.expect_err("429");

    let again = program.call(example_request()).await;

    assert!(again.is_ok(), "{again:?}");
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(program.metric("rds_throttled_calls_total").await, 0.0);
}

#[tokio::test]
async fn pollers_of_few_tasks_cause_at_most_one_upstream_request_per_task_and_ttl() {
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
                client.get_task_detail(request).await.expect("a reply");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    callers.join_all().await;

    // One request for each of the three tasks, and another one after each expiry.
    let windows = started.elapsed().as_millis() as usize / 500 + 1;
    assert!(upstream.requests().len() <= 3 * windows);
    let (coalesced, cached) = (
        program.metric("rds_coalesced_calls_total").await,
        program.metric("rds_cache_hits_total").await,
    );
    let requests = upstream.requests().len() as f64;
    assert_eq!(requests + coalesced + cached, (CALLERS * ROUNDS) as f64);
}
