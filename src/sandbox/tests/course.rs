//! Tasks that change with time.

use super::*;

const UNKNOWN: &str = "DBS.200543";

/// The status of the task, or the code of the error.
async fn look(sandbox: &TestSandbox, instance_id: &str) -> String {
    let (_, body) = send(sandbox.task_request(instance_id)).await;
    let word = body.get("error_code").unwrap_or(&body["status"]);
    word.as_str().unwrap_or("none").to_owned()
}

async fn task(sandbox: &TestSandbox, instance_id: &str, workflow_id: &str) -> Value {
    let body = format!(r#"{{"workflow_id":"{workflow_id}"}}"#);
    let (status, task) = send(sandbox.task_request(instance_id).body(body)).await;
    assert_eq!(status, 200, "{instance_id} {workflow_id}: {task}");
    task
}

async fn set_clock(sandbox: &TestSandbox, seconds: i64) {
    let path = format!("/sandbox/clock?offset-seconds={seconds}");
    sandbox.control(&path).await;
}

fn parts<'a>(task: &'a Value, field: &str) -> Vec<&'a str> {
    let parts = task["sub_task_list"].as_array().unwrap();
    let field = |part: &'a Value| part[field].as_str().unwrap();
    parts.iter().map(field).collect()
}

#[tokio::test]
async fn each_course_has_its_states_in_order() {
    let cases: [(&str, &[(i64, &str)]); 9] = [
        (
            "lifecycle-2000",
            &[
                (0, "Pending"),
                (100, "Pending"),
                (300, "Running"),
                (1900, "Running"),
                (2000, "Completed"),
                (100_000, "Completed"),
            ],
        ),
        ("lifecycle-0", &[(0, "Completed")]),
        (
            "fails-3000",
            &[
                (0, "Pending"),
                (400, "Running"),
                (2900, "Running"),
                (3000, "Failed"),
            ],
        ),
        (
            "canceled-1000",
            &[(0, "Pending"), (500, "Running"), (1000, "Canceled")],
        ),
        (
            "late-3",
            &[(0, UNKNOWN), (0, UNKNOWN), (0, UNKNOWN), (0, "Running")],
        ),
        ("late-0", &[(0, "Running")]),
        (
            "vanishes-1000",
            &[
                (0, "Running"),
                (900, "Running"),
                (1000, UNKNOWN),
                (2000, UNKNOWN),
            ],
        ),
        ("odd-status", &[(0, "Hibernating"), (9000, "Hibernating")]),
        ("no-status", &[(0, "none"), (9000, "none")]),
    ];
    let sandbox = start().await;

    for (id, looks) in cases {
        for (seconds, expected) in looks {
            set_clock(&sandbox, *seconds).await;
            assert_eq!(
                look(&sandbox, id).await,
                *expected,
                "{id} after {seconds} s"
            );
        }
    }
}

#[tokio::test]
async fn progress_rises_and_the_parts_follow_each_other() {
    let sandbox = start().await;
    let mut seen = Vec::new();

    for seconds in [0, 400, 600, 1300, 1700, 2500, 3000] {
        set_clock(&sandbox, seconds).await;
        seen.push(task(&sandbox, "lifecycle-3000", "w").await);
    }

    let process = |task: &Value| task["process"].as_str().unwrap().to_owned();
    let seen_process: Vec<_> = seen.iter().map(process).collect();
    assert_eq!(seen_process, ["0", "13", "20", "43", "56", "83", ""]);
    let statuses: Vec<_> = seen.iter().map(|task| parts(task, "status")).collect();
    let [done, runs, waits] = ["Completed", "Running", "Pending"];
    assert_eq!(statuses[0], [waits, waits, waits]);
    assert_eq!(statuses[1], [runs, waits, waits]);
    assert_eq!(statuses[3], [done, runs, waits]);
    assert_eq!(statuses[5], [done, done, runs]);
    assert_eq!(statuses[6], [done, done, done]);
    assert_eq!(parts(&seen[3], "percent"), ["100", "30", "0"]);
}

#[tokio::test]
async fn a_stopped_task_shows_the_part_in_which_it_stopped() {
    let sandbox = start().await;

    for (id, end) in [("fails-60", "Failed"), ("canceled-60", "Canceled")] {
        set_clock(&sandbox, 0).await;
        task(&sandbox, id, "w").await;
        set_clock(&sandbox, 60).await;
        let over = task(&sandbox, id, "w").await;

        assert_eq!(over["status"], end);
        assert_eq!(parts(&over, "status"), ["Completed", end, "Pending"]);
        assert_eq!(over["process"], "");
    }
}

#[tokio::test]
async fn a_finished_task_is_the_same_for_each_id_and_no_longer_changes() {
    let sandbox = start().await;
    let ids = [
        ("finished", "w"),
        ("lifecycle-100", "w"),
        ("completed-early", "w"),
        (EXAMPLE_INSTANCE_ID, "running-task"),
        (EXAMPLE_INSTANCE_ID, "lifecycle-100"),
    ];
    for (instance_id, workflow_id) in ids {
        task(&sandbox, instance_id, workflow_id).await;
    }
    let times = |task: &Value| [task["created_at"].clone(), task["update_at"].clone()];
    let names = |task: &Value| {
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect();
        let names: [Vec<_>; 2] = [names(task), names(&task["sub_task_list"][0])];
        names
    };
    let running = names(&task(&sandbox, "lifecycle-100", "w").await);

    for (instance_id, workflow_id) in ids {
        set_clock(&sandbox, 200).await;
        let over = task(&sandbox, instance_id, workflow_id).await;
        set_clock(&sandbox, 900).await;
        let later = task(&sandbox, instance_id, workflow_id).await;

        assert_eq!(over, later);
        assert_eq!(names(&over), running, "{instance_id}");
        assert_eq!(over["status"], "Completed", "{instance_id}");
        assert_eq!(over["process"], "", "{instance_id}");
        assert_eq!(parts(&over, "percent"), ["100"; 3], "{instance_id}");
        assert_eq!(parts(&over, "status"), ["Completed"; 3], "{instance_id}");
        assert_eq!(parts(&over, "remaining_time"), ["0"; 3], "{instance_id}");
        let [created_at, updated_at] = times(&over);
        assert_ne!(created_at, updated_at, "{instance_id}");
    }
}

#[tokio::test]
async fn a_task_completed_early_has_a_running_part_once_per_workflow_id() {
    let sandbox = start().await;

    for workflow_id in ["a", "b"] {
        let first = task(&sandbox, "completed-early", workflow_id).await;
        let second = task(&sandbox, "completed-early", workflow_id).await;

        for task in [&first, &second] {
            assert_eq!(task["status"], "Completed");
        }
        let expected = ["Completed", "Completed", "Running"];
        assert_eq!(parts(&first, "status"), expected);
        assert_eq!(parts(&second, "status"), ["Completed"; 3]);
    }
}

#[tokio::test]
async fn each_project_instance_and_workflow_id_has_its_own_clock() {
    let sandbox = start().await;
    assert_eq!(look(&sandbox, "lifecycle-50").await, "Pending");
    set_clock(&sandbox, 100).await;
    assert_eq!(look(&sandbox, "lifecycle-50").await, "Completed");

    let other_workflow = task(&sandbox, "lifecycle-50", "other").await;
    let other_project = sandbox
        .client
        .post(sandbox.url("/v3/other/instances/lifecycle-50/task-center-detail"))
        .header("X-Auth-Token", TOKEN)
        .header("Content-Type", "application/json")
        .body(EXAMPLE_BODY);
    let (_, other_project) = send(other_project).await;

    assert_eq!(other_workflow["status"], "Pending");
    assert_eq!(other_project["status"], "Pending");
    assert_eq!(look(&sandbox, "lifecycle-51").await, "Pending");
}

#[tokio::test]
async fn a_rejected_request_is_no_look() {
    let sandbox = start().await;
    for _ in 0..3 {
        let (status, _) = send(sandbox.task_request_with("wrong", "late-1")).await;
        assert_eq!(status, 401);
    }

    assert_eq!(look(&sandbox, "late-1").await, UNKNOWN);
    assert_eq!(look(&sandbox, "late-1").await, "Running");
}

#[test]
fn looks_are_bounded_and_a_watched_task_keeps_its_clock() {
    let mut state = State::new();
    let watched = ["p", "lifecycle-20", "w"];
    let first = state.look(watched);

    for number in 0..5000 {
        state.look(["p", "lifecycle-20", &number.to_string()]);
        if number % 500 == 0 {
            assert_eq!(state.look(watched).first_at, first.first_at, "{number}");
        }
    }

    assert!(state.looks.len() <= 1024, "{}", state.looks.len());
}
