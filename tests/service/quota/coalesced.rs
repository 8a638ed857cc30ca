use std::{collections::HashSet, sync::Arc, time::Duration};

use rds_task_facade::pb::GetTaskDetailRequest;
use tokio::task::JoinSet;
use tonic::Code;

use super::{begin, with_token};
use crate::support::{
    Connection, Gate, Program, Step, Upstream, eventually, example_request, gated_example, reply,
};

/// Waits until this many calls follow a leader.
async fn coalesced(program: &Program, count: f64) {
    eventually(&format!("{count} coalesced calls"), async || {
        program.metric("rds_coalesced_calls_total").await >= count
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_equal_calls_over_ten_connections_cause_one_upstream_call() {
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let program = Program::patient(&upstream.url(), &[]);
    let mut calls = JoinSet::new();

    for _ in 0..10 {
        let client = program.client().await;
        for _ in 0..100 {
            begin(&mut calls, client.clone(), example_request()).await;
        }
    }
    coalesced(&program, 999.0).await;
    gate.open();
    let results = calls.join_all().await;

    assert_eq!(results.len(), 1000);
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(upstream.requests().len(), 1);
    assert_eq!(program.metric("rds_coalesced_calls_total").await, 999.0);
}

#[tokio::test]
async fn calls_that_differ_in_anything_are_not_coalesced() {
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
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
    upstream.wait_for_requests(7).await;
    gate.open();
    let results = calls.join_all().await;

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(upstream.requests().len(), 7);
    assert_eq!(program.metric("rds_coalesced_calls_total").await, 0.0);
}

#[tokio::test]
async fn the_upstream_request_continues_while_any_caller_waits_and_is_cancelled_with_the_last() {
    let gate = Gate::default();
    let first = gated_example(&gate);
    let upstream = Upstream::start(move |request| {
        if request.number == 0 {
            first.clone()
        } else {
            vec![Step::Hold]
        }
    })
    .await;
    let program = Program::patient(&upstream.url(), &[]);
    let mut leader = JoinSet::new();
    let mut followers = JoinSet::new();

    begin(&mut leader, program.client().await, example_request()).await;
    upstream.wait_for_requests(1).await;
    begin(&mut followers, program.client().await, example_request()).await;
    coalesced(&program, 1.0).await;
    leader.abort_all();
    eventually("the leader is gone", async || {
        program.handled("Canceled").await == 1.0
    })
    .await;
    gate.open();
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
async fn each_caller_keeps_its_deadline_and_the_upstream_request_has_the_longest() {
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let program = Program::patient(&upstream.url(), &[]);
    let client = program.client().await;
    let hasty = Connection::open(program.grpc).await;
    let mut second = JoinSet::new();

    let first = tokio::spawn(async move { hasty.call_within("3S", &example_request()).await });
    upstream.wait_for_requests(1).await;
    begin(&mut second, client, example_request()).await;
    coalesced(&program, 1.0).await;
    let first = first
        .await
        .expect("no panic")
        .expect("a reply")
        .status()
        .expect("a status");
    gate.open();
    let second = second.join_all().await;

    assert_eq!(first.code(), Code::DeadlineExceeded);
    assert!(second[0].is_ok(), "{second:?}");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn an_error_is_shared_like_a_task() {
    let gate = Gate::default();
    let upstream = Upstream::always(
        [
            vec![Step::WaitFor(gate.clone())],
            reply(403, &[], r#"{"error_code":"DBS.200044","error_msg":"m"}"#),
        ]
        .concat(),
    )
    .await;
    let program = Program::patient(&upstream.url(), &[]);
    let client = program.client().await;
    let mut calls = JoinSet::new();

    for _ in 0..20 {
        begin(&mut calls, client.clone(), example_request()).await;
    }
    coalesced(&program, 19.0).await;
    gate.open();
    let results = calls.join_all().await;

    assert!(results.iter().all(|reply| {
        reply
            .as_ref()
            .is_err_and(|e| e.code() == Code::PermissionDenied)
    }));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_never_gets_the_reply_of_another_credential() {
    // The reply names the token and the task of the request.
    let upstream = Upstream::start(|request| {
        let token = request.header("x-auth-token").unwrap_or_default();
        let task = request.body.split('"').nth(3).unwrap_or_default();
        let mut steps = vec![Step::Wait(Duration::from_millis(request.number as u64 % 7))];
        steps.extend(reply(200, &[], format!(r#"{{"job_id":"{token}/{task}"}}"#)));
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
            let got = call.await.expect("a reply").into_inner().job_id;
            Some((got, format!("{token}/{task}")))
        });
        if number % 50 == 49 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let results = calls.join_all().await;

    let seen: HashSet<_> = results.into_iter().flatten().collect();
    for (got, wanted) in &seen {
        assert_eq!(got, wanted);
    }
    assert_eq!(seen.len(), 20);
    assert!(
        upstream.requests().len() < 545,
        "some were coalesced or cached"
    );
}
