use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rds_task_facade::pb::GetTaskDetailRequest;
use tonic::Code;

use super::{FETCHED, Folder, distinct_request, failures_of, iam, metadata, ready, token_file};
use crate::{
    credentials,
    support::{
        Connection, Failure, Gate, LONGER_THAN_PATIENCE, Program, Sandbox, Step, Upstream,
        eventually, example, example_request, free_address, reply, upstream::Received,
    },
};

/// A sandbox, and the arguments of a program that gets its tokens there.
struct Iam {
    sandbox: Sandbox,
    url: String,
    folder: Folder,
    password_file: String,
}

impl Iam {
    fn new(password: &str) -> Self {
        let sandbox = Sandbox::start();
        let folder = Folder::new();
        Self {
            url: sandbox.url(),
            password_file: folder.file("password", password),
            sandbox,
            folder,
        }
    }

    fn program(&self) -> Program {
        Program::start(&iam(&self.url, &self.password_file), &[])
    }

    async fn token_requests(&self) -> u64 {
        self.sandbox.count("token_requests").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_cold_calls_over_ten_connections_cause_one_token_request() {
    let iam = Iam::new("sandbox-password");
    iam.sandbox.set("slow-credentials?ms=1500").await;
    // A thousand connections to upstream at once take their time on a busy machine.
    let patience = ["--attempt-timeout", "60s", "--timeout", "60s"];
    let args = [
        &credentials::iam(&iam.url, &iam.password_file)[..],
        &patience,
    ]
    .concat();
    let program = Program::start(&args, &[]);

    let failures = failures_of(&program, 1000).await;

    assert_eq!(failures, []);
    assert_eq!(iam.token_requests().await, 1);
    assert_eq!(iam.sandbox.count("task_requests").await, 1000);
}

#[tokio::test]
async fn a_call_waits_for_the_first_token_no_longer_than_its_own_deadline() {
    let iam = Iam::new("sandbox-password");
    iam.sandbox.set("slow-credentials?ms=6000").await;
    let program = iam.program();
    let connection = Connection::open(program.grpc).await;
    let request = distinct_request();

    let (short, long) = tokio::join!(
        connection.call_within("300m", &request),
        program.call(example_request())
    );

    let short = short.expect("a reply").status().expect("a status");
    assert_eq!(
        Failure::from_status(&short).code_and_reason(),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
    );
    assert!(long.is_ok(), "{long:?}");
    assert_eq!(iam.token_requests().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_revoked_under_a_hundred_calls_costs_one_refresh_and_no_failed_call() {
    let iam = Iam::new("sandbox-password");
    let program = iam.program();
    assert_eq!(failures_of(&program, 100).await, []);
    iam.sandbox.set("slow-credentials?ms=300").await;

    let (before, (), after) = tokio::join!(
        failures_of(&program, 100),
        iam.sandbox.set("revoke-tokens"),
        failures_of(&program, 100)
    );

    assert_eq!((before, after), (vec![], vec![]));
    assert_eq!(iam.token_requests().await, 2);
    assert_eq!(program.metric(FETCHED).await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_revoked_twice_three_seconds_apart_fails_no_call() {
    let iam = Iam::new("sandbox-password");
    let program = iam.program();
    ready(&program).await;

    for times in 1..=2 {
        let (failures, ()) =
            tokio::join!(failures_of(&program, 100), iam.sandbox.set("revoke-tokens"));
        let later = failures_of(&program, 100).await;

        assert_eq!((failures, later), (vec![], vec![]), "revoked {times} times");
        assert_eq!(iam.token_requests().await, 1 + times);
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
}

#[tokio::test]
async fn a_token_revoked_again_within_two_seconds_fails_the_call_and_is_replaced_soon_after() {
    let iam = Iam::new("sandbox-password");
    let program = iam.program();
    ready(&program).await;
    let begun = Instant::now();
    iam.sandbox.set("revoke-tokens").await;
    program.call(distinct_request()).await.expect("refreshed");

    iam.sandbox.set("revoke-tokens").await;
    let revoked_again = program.call(distinct_request()).await;
    let at_once = begun.elapsed() < Duration::from_secs(2);
    eventually("another refresh", async || {
        program.call(distinct_request()).await.is_ok()
    })
    .await;

    // A machine that took longer than that has left the time for another refresh.
    if at_once {
        let failure = Failure::from_status(&revoked_again.expect_err("no refresh so soon"));
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, "CREDENTIAL_REJECTED")
        );
        assert_eq!(failure.metadata["credentialOwner"], "server");
    }
    assert_eq!(iam.token_requests().await, 3);
}

#[tokio::test]
async fn an_upstream_that_rejects_every_token_costs_one_refresh_and_one_retry() {
    let iam = Iam::new("sandbox-password");
    let rejection = r#"{"error_code":"APIGW.0307","error_msg":"The token must be updated."}"#;
    let upstream = Upstream::always(reply(401, &[], rejection)).await;
    let upstream_url = upstream.url();
    let mut args = credentials::iam(&iam.url, &iam.password_file);
    args[1] = &upstream_url;
    let program = Program::start(&args, &[]);

    let failure = program.failure(example_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert_eq!(failure.metadata["credentialOwner"], "server");
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(iam.token_requests().await, 2);
}

/// RDS and IAM in one: IAM's first token is `token-1`.
async fn rds_and_iam(
    iam: impl Fn(usize) -> Vec<Step> + Send + Sync + 'static,
    rds: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
) -> Upstream {
    let asked = AtomicUsize::new(0);
    Upstream::start(move |request| {
        if request.line.starts_with("POST /v3/auth/tokens") {
            iam(asked.fetch_add(1, Ordering::Relaxed) + 1)
        } else {
            rds(request)
        }
    })
    .await
}

fn issue(number: usize) -> Vec<Step> {
    let token = format!("token-{number}");
    reply(201, &[("x-subject-token", &token)], "{}")
}

/// The first token, then one failure, then more tokens.
fn issue_and_fail_once(status: u16) -> impl Fn(usize) -> Vec<Step> + Send + Sync {
    move |number| match number {
        2 => reply(status, &[], ""),
        number => issue(number),
    }
}

fn token_requests(upstream: &Upstream) -> usize {
    let requests = upstream.requests();
    let is_for_token = |request: &&Received| request.line.starts_with("POST /v3/auth/tokens");
    requests.iter().filter(is_for_token).count()
}

fn foreign_request() -> GetTaskDetailRequest {
    GetTaskDetailRequest {
        project_id: FOREIGN_PROJECT.into(),
        ..distinct_request()
    }
}

const FOREIGN_PROJECT: &str = "ffffffffffffffffffffffffffffffff";
const NOT_YOUR_PROJECT: &str = r#"{"error_code":"APIGW.0301","error_msg":"Incorrect IAM authentication information: project id does not match"}"#;
const OUTDATED: &str = r#"{"error_code":"APIGW.0307","error_msg":"The token must be updated."}"#;

#[tokio::test]
async fn a_401_for_a_foreign_project_is_that_calls_own_even_if_iam_then_fails_once() {
    for status in [403, 429] {
        for body in [NOT_YOUR_PROJECT, "", "<html>"] {
            let upstream = rds_and_iam(issue_and_fail_once(status), move |request| {
                match request.line.contains(FOREIGN_PROJECT) {
                    true => reply(401, &[], body),
                    false => example(),
                }
            })
            .await;
            let url = upstream.url();
            let folder = Folder::new();
            let password_file = folder.file("password", "password");
            let program = Program::start(&iam(&url, &password_file), &[]);
            ready(&program).await;

            // Nothing shows yet that the token is good.
            let first = program.failure(foreign_request()).await;
            let later = failures_of(&program, 20).await;
            let second = program.failure(foreign_request()).await;
            let last = failures_of(&program, 20).await;

            for foreign in [first, second] {
                assert_eq!(
                    foreign.code_and_reason(),
                    (Code::Unauthenticated, "CREDENTIAL_REJECTED"),
                    "{status} {body}"
                );
                let service = foreign.metadata.get("upstreamService");
                assert_ne!(service.map(String::as_str), Some("IAM"), "{status} {body}");
            }
            assert_eq!((later, last), (vec![], vec![]), "{status} {body}");
        }
    }
}

#[tokio::test]
async fn a_401_for_a_foreign_project_fetches_no_token_while_other_calls_succeed_with_it() {
    let upstream = rds_and_iam(issue, |request| {
        match request.line.contains(FOREIGN_PROJECT) {
            true => reply(401, &[], NOT_YOUR_PROJECT),
            false => example(),
        }
    })
    .await;
    let url = upstream.url();
    let folder = Folder::new();
    let password_file = folder.file("password", "password");
    let program = Program::start(&iam(&url, &password_file), &[]);
    program.call(distinct_request()).await.expect("a task");
    let begun = Instant::now();

    for _ in 0..10 {
        program.failure(foreign_request()).await;
    }

    // A machine that took longer has let the proof get too old.
    if begun.elapsed() < Duration::from_secs(60) {
        assert_eq!(token_requests(&upstream), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_rejected_for_one_call_serves_all_others_while_iam_fails() {
    for status in [403, 429, 503] {
        let upstream = rds_and_iam(issue_and_fail_once(status), |request| {
            let is_foreign = request.line.contains(FOREIGN_PROJECT);
            match (is_foreign, request.header("x-auth-token")) {
                (true, Some("token-1")) => reply(401, &[], OUTDATED),
                _ => example(),
            }
        })
        .await;
        let url = upstream.url();
        let folder = Folder::new();
        let password_file = folder.file("password", "password");
        let program = Program::start(&iam(&url, &password_file), &[]);
        program.call(distinct_request()).await.expect("a task");

        let rejected = program.failure(foreign_request()).await;
        let others = failures_of(&program, 100).await;

        let expected = match status {
            403 => (Code::Unauthenticated, "CREDENTIAL_REJECTED"),
            _ => (Code::Unavailable, "CREDENTIAL_UNAVAILABLE"),
        };
        assert_eq!(rejected.code_and_reason(), expected, "{status}");
        assert_eq!(others, [], "{status}");
    }
}

#[tokio::test]
async fn a_401_that_comes_after_the_refresh_is_repeated_with_the_new_token_and_fetches_none() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = rds_and_iam(issue, move |request| match request.header("x-auth-token") {
        Some("token-1") if request.line.contains("straggler") => {
            [vec![Step::WaitFor(held.clone())], reply(401, &[], OUTDATED)].concat()
        }
        Some("token-1") => reply(401, &[], OUTDATED),
        _ => example(),
    })
    .await;
    let url = upstream.url();
    let folder = Folder::new();
    let password_file = folder.file("password", "password");
    let patience = ["--attempt-timeout", LONGER_THAN_PATIENCE];
    let args = [&iam(&url, &password_file)[..], &patience].concat();
    let program = Program::start(&args, &[]);
    ready(&program).await;
    let request = GetTaskDetailRequest {
        instance_id: "straggler".into(),
        ..distinct_request()
    };

    let (straggler, ()) = tokio::join!(program.call(request), async {
        upstream.wait_for_requests(2).await;
        program.call(distinct_request()).await.expect("refreshed");
        gate.open();
    });

    assert!(straggler.is_ok(), "{straggler:?}");
    assert_eq!(token_requests(&upstream), 2);
}

#[tokio::test]
async fn a_token_that_is_still_good_hides_that_iam_is_down() {
    let iam = Iam::new("sandbox-password");
    iam.sandbox.set("token-life?seconds=10").await;
    let program = iam.program();
    ready(&program).await;
    iam.sandbox.set("fail-iam?status=503&times=1").await;

    program.wait_for_log(|line| line["msg"] == "credential cannot be fetched");
    let reply = program.call(example_request()).await;

    assert!(reply.is_ok(), "{reply:?}");
    assert!(iam.token_requests().await >= 2);
}

#[tokio::test]
async fn without_a_token_calls_fail_with_a_retry_delay_until_iam_has_recovered() {
    for (status, calls) in [(500, 1), (503, 1), (429, 100)] {
        let iam = Iam::new("sandbox-password");
        iam.sandbox
            .set(&format!("fail-iam?status={status}&times=1000"))
            .await;
        let program = iam.program();
        program.wait_for_log(|line| line["msg"] == "credential cannot be fetched");
        let health = program.admin("/readyz").await.0;

        let failures = failures_of(&program, calls).await;

        assert_eq!(failures.len(), calls, "{status}");
        for failure in failures {
            assert_eq!(
                failure.code_and_reason(),
                (Code::Unavailable, "CREDENTIAL_UNAVAILABLE"),
                "{status}"
            );
            assert_eq!(failure.metadata["credentialOwner"], "server", "{status}");
            let delay = failure.retry_delay.expect("waiting helps");
            assert!(delay >= Duration::from_secs(1), "{status}: {delay:?}");
            assert!(failure.pushback_ms.is_some(), "{status}");
        }
        assert_eq!(health, 503, "{status}");
        let token_requests = iam.token_requests().await;
        assert!(
            token_requests < 15,
            "{status}: {token_requests} token requests, one by one with backoff"
        );
        assert_eq!(iam.sandbox.count("task_requests").await, 0, "{status}");

        iam.sandbox.set("fail-iam?status=500&times=0").await;
        ready(&program).await;
        assert!(program.call(example_request()).await.is_ok(), "{status}");
    }
}

#[tokio::test]
async fn the_program_starts_while_iam_is_down_and_serves_once_it_is_up() {
    let address = free_address();
    let url = format!("http://{address}");
    let folder = Folder::new();
    let password_file = folder.file("password", "sandbox-password");
    let program = Program::start(&iam(&url, &password_file), &[]);
    program.wait_for_log(|line| line["msg"] == "credential cannot be fetched");

    let early = program.failure(example_request()).await;
    let before = (
        program.admin("/readyz").await.0,
        program.admin("/livez").await.0,
    );
    let _sandbox = Sandbox::start_at(address);
    ready(&program).await;
    let late = program.call(example_request()).await;

    assert_eq!(
        early.code_and_reason(),
        (Code::Unavailable, "CREDENTIAL_UNAVAILABLE")
    );
    assert_eq!(before, (503, 200));
    assert!(late.is_ok(), "{late:?}");
}

#[tokio::test]
async fn a_rejected_password_is_not_tried_again_and_a_changed_one_is_used() {
    let iam = Iam::new("wrong-password");
    let program = iam.program();
    program.wait_for_log(|line| line["msg"] == "credential cannot be fetched");

    let failures = failures_of(&program, 50).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let token_requests = iam.token_requests().await;
    iam.folder.file("password", "sandbox-password\n");
    ready(&program).await;
    let reply = program.call(example_request()).await;

    assert_eq!(failures.len(), 50);
    for failure in failures {
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, "CREDENTIAL_REJECTED")
        );
        assert_eq!(failure.metadata["credentialOwner"], "server");
        assert_eq!(failure.metadata["upstreamService"], "IAM");
        assert_eq!(failure.metadata["httpStatus"], "401");
    }
    assert_eq!(token_requests, 1, "the wrong password went out once");
    assert!(reply.is_ok(), "{reply:?}");
    assert_eq!(iam.token_requests().await, 2);
}

#[tokio::test]
async fn a_signal_during_the_first_fetch_ends_the_program_well_before_the_grace_is_over() {
    let silent = Upstream::always(vec![Step::Hold]).await;
    let url = silent.url();
    let folder = Folder::new();
    let password_file = folder.file("password", "sandbox-password");
    let metadata = metadata("metadata", &url, &url).to_vec();

    for (number, args) in [iam(&url, &password_file), metadata].iter().enumerate() {
        let mut program = Program::start(&[args, &["--shutdown-grace", "60s"][..]].concat(), &[]);
        silent.wait_for_requests(number + 1).await;
        let ready = program.admin("/readyz").await.0;

        program.signal("TERM");
        let ended = program.wait();

        assert_eq!(ready, 503, "{args:?}");
        assert_eq!(ended.code(), Some(0), "{args:?}");
    }
}

#[tokio::test]
async fn a_rotated_token_file_is_used_without_a_restart_and_a_bad_one_changes_nothing() {
    let upstream = Upstream::always(example()).await;
    let folder = Folder::new();
    let file = folder.file("token", "first\n");
    let program = Program::start(&token_file(&upstream.url(), &file), &[]);
    let sent = async || {
        program.call(distinct_request()).await.expect("a task");
        let last = upstream.requests().pop().expect("a request");
        last.header("x-auth-token").map(str::to_owned)
    };

    let before = sent().await;
    folder.file("token", "two words\n");
    let source = format!("token file {file}");
    program.wait_for_log(|line| line["level"] == "WARN" && line["source"] == source.as_str());
    let with_bad_file = sent().await;
    folder.file("token", "second\n");
    program.wait_for_log(|line| line["generation"] == 2);
    let after = sent().await;

    assert_eq!(before.as_deref(), Some("first"));
    assert_eq!(with_bad_file.as_deref(), Some("first"));
    assert_eq!(after.as_deref(), Some("second"));
}

#[tokio::test]
async fn a_pipe_in_place_of_the_token_file_is_reported_and_the_next_file_is_used() {
    let upstream = Upstream::always(example()).await;
    let folder = Folder::new();
    let file = folder.file("token", "first");
    let program = Program::start(&token_file(&upstream.url(), &file), &[]);
    program.wait_for_log(|line| line["generation"] == 1);

    std::fs::remove_file(&file).expect("a file");
    let made = std::process::Command::new("mkfifo").arg(&file).status();
    assert!(made.expect("mkfifo is installed").success());
    program.signal("HUP");
    let warning = program.wait_for_log(|line| line["level"] == "WARN" && !line["error"].is_null());
    let with_pipe = program.call(distinct_request()).await;
    folder.file("token", "second");
    program.signal("HUP");
    program.wait_for_log(|line| line["generation"] == 2);

    assert_eq!(warning["error"], "the file cannot be read: timed out");
    assert!(with_pipe.is_ok(), "{with_pipe:?}");
}

#[tokio::test]
async fn a_rejected_token_is_replaced_at_once_by_the_new_content_of_the_file() {
    let rejection = r#"{"error_code":"APIGW.0301","error_msg":"Incorrect IAM authentication information: decrypt token fail"}"#;
    let upstream = Upstream::start(move |request| match request.header("x-auth-token") {
        Some("second") => example(),
        _ => reply(401, &[], rejection),
    })
    .await;
    let folder = Folder::new();
    let file = folder.file("token", "first");
    let program = Program::start(&token_file(&upstream.url(), &file), &[]);

    let before = program.failure(example_request()).await;
    folder.file("token", "second");
    let after = program.call(example_request()).await;

    assert_eq!(
        before.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert!(after.is_ok(), "{after:?}");
    assert_eq!(
        upstream.requests().len(),
        3,
        "without a newer token there is no retry"
    );
}
