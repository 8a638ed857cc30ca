//! The RDS call.

use super::*;

#[tokio::test]
async fn example_task_gets_the_documented_response() {
    let sandbox = start().await;

    let response = sandbox
        .task_request(EXAMPLE_INSTANCE_ID)
        .send()
        .await
        .unwrap();

    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.headers()["x-request-id"].len(), 32);
    assert_eq!(
        response.text().await.unwrap(),
        r#"{"instance_id":"1ffc4167903840cb93a3da56d28c14fdin01","instance_name":"rds-mysql-2","job_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","job_name":"CreateMysqlSingleHAInstance"}"#
    );
}

#[tokio::test]
async fn the_running_task_starts_at_its_first_look_and_takes_two_minutes() {
    let sandbox = start().await;
    let mut seen = Vec::new();

    for offset in [1000, 1060, 1090, 1500] {
        sandbox
            .control(&format!("/sandbox/clock?offset-seconds={offset}"))
            .await;
        let request = sandbox
            .task_request(EXAMPLE_INSTANCE_ID)
            .body(r#"{"workflow_id":"running-task"}"#);
        let (status, task) = send(request).await;
        assert_eq!(status, 200);
        seen.push(task);
    }

    let field = |name| seen.iter().map(move |task: &Value| &task[name]);
    let statuses: Vec<_> = field("status").collect();
    assert_eq!(statuses, ["Running", "Running", "Running", "Completed"]);
    let process: Vec<_> = field("process")
        .map(|value| value.as_str().unwrap())
        .collect();
    assert!(process[0].parse::<u32>().unwrap() < 50, "{process:?}");
    assert!(process[1].parse::<u32>().unwrap() >= 50, "{process:?}");
    assert!(field("created_at").all(|created_at| *created_at == seen[0]["created_at"]));
    assert_ne!(seen[3]["update_at"], seen[0]["update_at"]);
}

#[tokio::test]
async fn invalid_requests_get_the_documented_error() {
    let sandbox = start().await;
    let post = |path: &str, body: &'static str| {
        sandbox
            .client
            .post(sandbox.url(path))
            .header("X-Auth-Token", TOKEN)
            .header("Content-Type", "application/json")
            .body(body)
    };
    let example = task_path(EXAMPLE_INSTANCE_ID);
    let other_instance = task_path("2ffc4167903840cb93a3da56d28c14fdin01");
    let cases = [
        (
            "unknown task",
            post(&example, r#"{"workflow_id":"x"}"#),
            400,
            "DBS.200543",
        ),
        (
            "task of another instance",
            post(&other_instance, EXAMPLE_BODY),
            400,
            "DBS.200543",
        ),
        ("no object", post(&example, "[]"), 400, "DBS.200001"),
        ("no JSON", post(&example, "workflow_id"), 400, "DBS.200001"),
        ("no body", post(&example, ""), 400, "DBS.200001"),
        ("no id", post(&example, "{}"), 400, "DBS.200001"),
        (
            "empty id",
            post(&example, r#"{"workflow_id":""}"#),
            400,
            "DBS.200001",
        ),
        (
            "number as id",
            post(&example, r#"{"workflow_id":1}"#),
            400,
            "DBS.200001",
        ),
        (
            "null as name",
            post(&example, r#"{"workflow_id":"x","workflow_name":null}"#),
            400,
            "DBS.200001",
        ),
        (
            "slash at the end",
            post(&format!("{example}/"), EXAMPLE_BODY),
            404,
            "APIGW.0101",
        ),
        (
            "other path",
            post("/v3/p/instances/i/tasks", EXAMPLE_BODY),
            404,
            "APIGW.0101",
        ),
        (
            "empty project",
            post("/v3//instances/i/task-center-detail", EXAMPLE_BODY),
            404,
            "APIGW.0101",
        ),
        (
            "other method",
            sandbox.client.get(sandbox.url(&example)),
            404,
            "APIGW.0101",
        ),
        (
            "no content type",
            sandbox
                .client
                .post(sandbox.url(&example))
                .header("X-Auth-Token", TOKEN),
            415,
            "DBS.000415",
        ),
        (
            "too large",
            sandbox
                .task_request(EXAMPLE_INSTANCE_ID)
                .body(vec![b' '; MAX_BODY_BYTES + 1]),
            413,
            "APIGW.0201",
        ),
    ];

    for (case, request, status, code) in cases {
        let response = request.send().await.unwrap();

        assert_eq!(response.status(), status, "{case}");
        for header in ["x-request-id", "date", "content-type"] {
            assert!(response.headers().contains_key(header), "{case}: {header}");
        }
        let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        assert_eq!(body["error_code"], code, "{case}");
    }
}
