//! The subcommand `watch`.

use std::process::{Command, Stdio};

use crate::support::{
    Gate, Program, Sandbox, Step, Upstream, eventually,
    program::{PROGRAM, run},
    reply, within,
};

const FAST: [&str; 4] = ["--watch-interval", "20ms", "--watch-rate", "off"];

const IDS: [&str; 6] = [
    "--project-id",
    "p",
    "--instance-id",
    "i",
    "--workflow-id",
    "w",
];

fn task(status: &str, process: &str) -> Vec<Step> {
    let body = format!(
        r#"{{"job_id":"j","job_name":"Restore","status":"{status}","process":"{process}"}}"#
    );
    reply(200, &[], body)
}

/// An upstream that replies with one element after the other, and then with the last one again.
async fn sequence(replies: Vec<Vec<Step>>) -> Upstream {
    Upstream::start(move |request| replies[request.number.min(replies.len() - 1)].clone()).await
}

/// Runs `watch` for the test's task against a program. Returns its exit code and its output.
async fn watch(target: &str, args: &[&str]) -> (i32, String, String) {
    let args = [&["watch", "--target", target], &IDS[..], args].concat();
    let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    let running = tokio::task::spawn_blocking(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        run(&args, &[])
    });
    within("the end of watch", running).await.expect("no panic")
}

/// Waits until the program has sent this many states.
async fn sent(program: &Program, count: f64) {
    let series = "rds_watch_messages_total{kind=\"state\"}";
    eventually("states", async || program.metric(series).await >= count).await;
}

#[tokio::test]
async fn the_exit_code_is_the_outcome_of_the_task() {
    for (status, expected) in [("Completed", 0), ("Failed", 3), ("Canceled", 3)] {
        let gate = Gate::default();
        let last = [vec![Step::WaitFor(gate.clone())], task(status, "")].concat();
        let upstream = sequence(vec![task("Running", "40%"), last]).await;
        let program = Program::patient(&upstream.url(), &FAST);
        let target = format!("http://{}", program.grpc);

        let watching = tokio::spawn(async move { watch(&target, &[]).await });
        sent(&program, 1.0).await;
        gate.open();
        let (code, out, err) = watching.await.expect("no panic");

        assert_eq!(code, expected, "{err}");
        let printed: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(printed["status"], status);
        assert_eq!(err.lines().next(), Some("Restore: running 40 %"));
        assert!(!err.contains('\u{1b}'), "{err}");
    }
}

#[tokio::test]
async fn json_prints_each_state_once_across_streams() {
    let gate = Gate::default();
    let second = Gate::default();
    let upstream = sequence(vec![
        task("Pending", "0"),
        [vec![Step::WaitFor(second.clone())], task("Running", "50")].concat(),
        [vec![Step::WaitFor(gate.clone())], task("Completed", "")].concat(),
    ])
    .await;
    let flags = [
        &FAST[..],
        &["--max-watch-duration", "3s", "--attempt-timeout", "60s"],
    ]
    .concat();
    let program = Program::over(&upstream.url(), &flags);
    let target = format!("http://{}", program.grpc);

    let watching = tokio::spawn(async move { watch(&target, &["--output", "json"]).await });
    sent(&program, 1.0).await;
    second.open();
    let expired = "rds_watch_ended_total{cause=\"expired\"}";
    eventually("a second stream", async || {
        program.metric(expired).await >= 1.0 && program.metric("rds_watches").await == 1.0
    })
    .await;
    gate.open();
    let (code, out, err) = watching.await.expect("no panic");

    assert_eq!(code, 0, "{err}");
    let states: Vec<String> = out
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            line["status"].as_str().expect("a status").to_owned()
        })
        .collect();
    assert_eq!(states, ["Pending", "Running", "Completed"]);
    assert!(err.contains("UNAVAILABLE: the watch has reached"), "{err}");
    assert!(err.contains("; continuing in "), "{err}");
}

#[tokio::test]
async fn errors_that_another_call_cannot_help_end_the_command() {
    let unknown = r#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;
    let upstream = sequence(vec![reply(404, &[], unknown)]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let target = format!("http://{}", program.grpc);

    let (code, out, err) = watch(&target, &[]).await;
    let (unreachable, _, advice) = watch("http://127.0.0.1:1", &[]).await;
    let (usage, ..) = watch(&target, &["--output", "xml"]).await;

    assert_eq!((code, out.as_str(), unreachable, usage), (1, "", 1, 2));
    assert!(err.contains("NOT_FOUND: The task does not exist."), "{err}");
    assert!(advice.contains("cannot connect to"), "{advice}");
}

#[tokio::test]
async fn the_time_limit_holds_with_any_server() {
    let upstream = sequence(vec![task("Running", "1")]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let target = format!("http://{}", program.grpc);
    let silent = Upstream::always(vec![Step::Hold]).await;

    for target in [&target, &silent.url()] {
        let (code, out, err) = watch(target, &["--timeout", "500ms"]).await;

        assert_eq!((code, out.as_str()), (4, ""), "{target}: {err}");
        assert!(err.contains("the task is not over after 500ms"), "{err}");
    }
}

#[tokio::test]
async fn sigint_ends_the_command_with_130() {
    let upstream = sequence(vec![task("Running", "1")]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let target = format!("http://{}", program.grpc);
    let mut child = Command::new(PROGRAM)
        .args([&["watch", "--target", &target], &IDS[..]].concat())
        .env_clear()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    upstream.wait_for_requests(2).await;

    let killed = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();

    assert!(killed.expect("kill runs").success());
    let code = tokio::task::spawn_blocking(move || child.wait());
    let code = within("the end of watch", code).await.expect("no panic");
    assert_eq!(code.expect("a status").code(), Some(130));
}

#[tokio::test]
async fn the_command_waits_for_a_task_that_rds_does_not_know_yet() {
    let unknown = r#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;
    let gate = Gate::default();
    let last = [vec![Step::WaitFor(gate.clone())], task("Completed", "")].concat();
    let upstream = sequence(vec![reply(404, &[], unknown), last]).await;
    let program = Program::patient(&upstream.url(), &FAST);
    let target = format!("http://{}", program.grpc);

    let watching = tokio::spawn(async move { watch(&target, &["--allow-missing"]).await });
    let heartbeats = "rds_watch_messages_total{kind=\"heartbeat\"}";
    eventually("a heartbeat", async || {
        program.metric(heartbeats).await >= 1.0
    })
    .await;
    gate.open();
    let (code, _, err) = watching.await.expect("no panic");

    assert_eq!(code, 0, "{err}");
    assert_eq!(err.lines().next(), Some("RDS does not know the task yet"));
}

#[tokio::test]
async fn without_ids_the_command_follows_a_task_of_the_sandbox() {
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let args = [&["--endpoint", &url, "--credentials", "token"], &FAST[..]].concat();
    let program = Program::start(&args, &[("RDS_TASK_FACADE_TOKEN", "sandbox-token")]);
    let target = format!("http://{}", program.grpc);

    let watching = tokio::task::spawn_blocking(move || run(&["watch", "--target", &target], &[]));
    sent(&program, 1.0).await;
    sandbox.set("clock?offset-seconds=10").await;
    sent(&program, 2.0).await;
    sandbox.set("clock?offset-seconds=30").await;
    let (code, out, err) = within("the end of watch", watching)
        .await
        .expect("no panic");

    assert_eq!(code, 0, "{err}");
    assert!(out.contains("\"TASK_STATE_SUCCEEDED\""), "{out}");
    let lines: Vec<&str> = err.lines().collect();
    let first = lines.first().copied().unwrap_or_default();
    assert!(first.starts_with("RestoreMysqlInstance: pending"), "{err}");
    assert!(err.contains("part 2 of 3"), "{err}");
    let last = lines.last().copied();
    assert_eq!(last, Some("RestoreMysqlInstance: succeeded"), "{err}");
}
