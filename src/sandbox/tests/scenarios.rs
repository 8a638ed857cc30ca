//! The magic instance ids.

use std::{collections::HashSet, time::Instant};

use super::*;

#[test]
fn the_manual_lists_exactly_the_scenarios() {
    let manual = include_str!("../../../docs/sandbox.md");
    let (_, table) = manual.split_once("<!-- scenarios -->").unwrap();
    let (table, _) = table.split_once("<!-- /scenarios -->").unwrap();
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();

    let expected: Vec<_> = SCENARIOS
        .iter()
        .map(|row| {
            format!(
                "| `{}` | {} | {} |",
                row.instance_id, row.description, row.grpc
            )
        })
        .collect();

    assert_eq!(rows, expected);
}

#[test]
fn instance_ids_are_valid_and_unique_and_outcomes_well_formed() {
    let mut seen = HashSet::new();

    for row in SCENARIOS {
        let id = row.instance_id;
        assert!(seen.insert(id), "{id} is there twice");
        assert!((1..=64).contains(&id.len()), "{id}");
        assert!(
            id.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)),
            "{id}"
        );
        let words: Vec<_> = row.grpc.split(" / ").collect();
        assert!(row.grpc == "OK" || words.len() == 2, "{id}: {}", row.grpc);
    }
}

#[tokio::test]
async fn a_scenario_named_after_a_status_answers_with_it() {
    let running = start().await;
    let numbered = SCENARIOS.iter().filter_map(|row| {
        let number = row.instance_id.strip_prefix("status-")?.get(..3)?;
        Some((row.instance_id, number.parse::<u16>().unwrap()))
    });
    let mut count = 0;

    for (id, expected) in numbered.chain([("status-299", 299), ("status-599", 599)]) {
        let answer = running.ask(id).send().await.unwrap();

        assert_eq!(answer.status(), expected, "{id}");
        assert_eq!(
            answer.headers().contains_key("location"),
            matches!(expected, 301 | 302 | 303 | 307 | 308),
            "{id}"
        );
        count += 1;
    }
    assert!(count > 40, "{count}");
}

#[tokio::test]
async fn a_scenario_named_after_a_code_answers_with_status_code_and_text() {
    let running = start().await;
    let mut count = 0;

    for row in SCENARIOS {
        let Some((head, text)) = row.description.split_once(": ") else {
            continue;
        };
        let status: u16 = head["HTTP ".len()..][..3].parse().unwrap();
        let code = head.rsplit(", ").next().unwrap();
        let answer = running.ask(row.instance_id).send().await.unwrap();

        assert_eq!(answer.status(), status, "{}", row.instance_id);
        assert_eq!(
            answer.headers().contains_key("retry-after"),
            row.instance_id == "throttled-retry-after"
        );
        let body: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        assert_eq!(body["error_code"], code, "{}", row.instance_id);
        assert_eq!(body["error_msg"], text, "{}", row.instance_id);
        assert_eq!(
            body.get("request_id").is_some(),
            code.starts_with("APIGW"),
            "{}",
            row.instance_id
        );
        count += 1;
    }
    assert!(count > 25, "{count}");
}

#[tokio::test]
async fn good_answers_are_json_objects_for_the_task_that_was_asked() {
    let running = start().await;

    for row in SCENARIOS.iter().filter(|row| row.grpc == "OK") {
        if row.instance_id.starts_with("flaky") {
            continue;
        }
        let (status, body) = exchange(running.ask(row.instance_id)).await;

        assert_eq!(status, 200, "{}", row.instance_id);
        let asked = body["job_id"] == EXAMPLE_WORKFLOW_ID && body["instance_id"] == row.instance_id;
        assert_eq!(
            asked,
            row.instance_id != "other-instance",
            "{}",
            row.instance_id
        );
    }
}

#[tokio::test]
async fn bodies_that_are_no_task_are_as_described() {
    let running = start().await;
    let cases: [(&str, u16, &str, &str); 9] = [
        ("error-200", 200, "application/json", r#""DBS.200543""#),
        ("html-200", 200, "text/html", "<html>"),
        ("html-502", 502, "text/html", "502 Bad Gateway"),
        ("status-404-html", 404, "text/html", "<html>"),
        (
            "malformed-json",
            200,
            "application/json",
            r#"{"instance_id":"malformed-json","#,
        ),
        ("json-array", 200, "application/json", "[]"),
        ("json-null", 200, "application/json", "null"),
        ("json-empty-object", 200, "application/json", "{}"),
        ("wrong-content-type", 200, "text/plain", r#""job_id""#),
    ];

    for (id, status, content_type, part) in cases {
        let answer = running.ask(id).send().await.unwrap();
        assert_eq!(answer.status(), status, "{id}");
        assert_eq!(answer.headers()["content-type"], content_type, "{id}");
        let body = answer.text().await.unwrap();
        assert!(body.contains(part), "{id}: {body}");
    }
    for id in ["empty-body", "status-404-empty"] {
        assert_eq!(
            running.ask(id).send().await.unwrap().text().await.unwrap(),
            "",
            "{id}"
        );
    }
    for (id, has_length) in [("huge", true), ("huge-chunked", false)] {
        let answer = running.ask(id).send().await.unwrap();
        assert_eq!(answer.content_length().is_some(), has_length, "{id}");
        assert!(answer.bytes().await.unwrap().len() > 1024 * 1024, "{id}");
    }
    let gzip = running.ask("gzip").send().await.unwrap();
    assert_eq!(gzip.headers()["content-encoding"], "gzip");
    assert_eq!(gzip.bytes().await.unwrap()[..2], [31, 139]);
}

#[tokio::test]
async fn broken_answers_break_where_they_say_and_need_no_credential() {
    let running = start().await;

    for id in ["reset", "close", "garbage", "two-lengths"] {
        assert!(running.ask_with("other", id).send().await.is_err(), "{id}");
    }
    for id in ["cut-body", "cut-chunked", "reset-body", "bad-chunk"] {
        let answer = running.ask_with("other", id).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{id}");
        assert!(answer.bytes().await.is_err(), "{id}");
    }
    let head = running
        .ask_with("other", "dribble-body")
        .send()
        .await
        .unwrap();
    assert_eq!(head.status(), 200);
    assert!(head.content_length().is_some());
    assert_eq!(running.count("task_requests").await, 9);
}

#[tokio::test]
async fn a_reset_is_a_reset_and_a_close_is_none() {
    for (id, reset) in [("reset", true), ("close", false)] {
        let running = start().await;
        let address = running.base.trim_start_matches("http://");
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!(
            "POST {} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
            task_path(id)
        );
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes())
            .await
            .unwrap();

        let read = tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await;

        match read {
            Err(error) => assert!(
                reset && error.kind() == io::ErrorKind::ConnectionReset,
                "{id}: {error}"
            ),
            Ok(length) => assert!(!reset && length == 0, "{id}"),
        }
    }
}

#[tokio::test]
async fn a_flaky_task_fails_so_often_for_each_workflow_id() {
    let running = start().await;
    let mut seen = Vec::new();

    for workflow_id in ["a", "b"] {
        for _ in 0..4 {
            let body = format!(r#"{{"workflow_id":"{workflow_id}"}}"#);
            let answer = running.ask("flaky-2").body(body).send().await.unwrap();
            seen.push(answer.status().as_u16());
        }
    }

    assert_eq!(seen, [503, 503, 200, 200, 503, 503, 200, 200]);
    assert_eq!(running.ask("flaky-0").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_slow_answer_comes_late_and_its_credential_was_judged_early() {
    let running = start().await;
    let began = Instant::now();

    let (good, bad) = tokio::join!(
        running.ask("slow-300").send(),
        running.ask_with("other", "slow-300").send()
    );

    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(good.unwrap().status(), 200);
    assert_eq!(bad.unwrap().status(), 401);
    let too_slow = running.ask("slow-60001").send().await.unwrap();
    assert_eq!(
        too_slow.status(),
        400,
        "no scenario: the task is unknown there"
    );
}

#[tokio::test]
async fn a_client_that_hangs_up_is_no_longer_in_flight() {
    let running = start().await;
    let waiting = tokio::spawn(running.ask("slow-60000").send());
    let until = async |expected| {
        while running.count("task_requests_in_flight").await != expected {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), until(1)).await.unwrap();

    waiting.abort();

    timeout(Duration::from_secs(10), until(0)).await.unwrap();
}
