//! The magic instance ids.

use std::{collections::HashSet, time::Instant};

use super::super::scenarios::{Act, SCENARIOS};
use super::*;
use crate::test_support::scenarios::{Scenario, documented};

#[test]
fn every_magic_instance_id_is_documented_and_every_documented_id_is_magic() {
    let documented: HashSet<_> = documented().iter().map(|row| row.instance_id).collect();

    for (id, _) in SCENARIOS {
        assert!(documented.contains(id), "{id} is not documented");
    }
    for id in documented {
        assert!(Act::find(id).is_some(), "{id} is not magic");
    }
}

#[test]
fn instance_ids_are_valid_and_unique() {
    let mut seen = HashSet::new();

    for Scenario {
        instance_id: id,
        outcome,
        ..
    } in documented()
    {
        assert!(seen.insert(id), "{id} is listed twice");
        assert!((1..=64).contains(&id.len()), "{id}");
        assert!(
            id.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)),
            "{id}"
        );
        let words: Vec<_> = outcome.split(" / ").collect();
        assert!(outcome == "OK" || words.len() == 2, "{id}: {outcome}");
    }
    assert!(seen.len() > 110, "{}", seen.len());
}

#[tokio::test]
async fn status_scenarios_reply_with_their_status() {
    let sandbox = start().await;
    let numbered = documented().into_iter().filter_map(|row| {
        let number = row.instance_id.strip_prefix("status-")?.get(..3)?;
        Some((row.instance_id, number.parse::<u16>().unwrap()))
    });
    let mut count = 0;

    for (id, expected) in numbered.chain([("status-299", 299), ("status-599", 599)]) {
        let response = sandbox.task_request(id).send().await.unwrap();

        assert_eq!(response.status(), expected, "{id}");
        assert_eq!(
            response.headers().contains_key("location"),
            matches!(expected, 301 | 302 | 303 | 307 | 308),
            "{id}"
        );
        count += 1;
    }
    assert!(count > 40, "{count}");
}

#[tokio::test]
async fn error_code_scenarios_reply_with_status_code_and_message() {
    let sandbox = start().await;
    let mut count = 0;

    for row in documented() {
        let Some((head, text)) = row.behaviour.split_once(": ") else {
            continue;
        };
        let status: u16 = head["HTTP ".len()..][..3].parse().unwrap();
        let code = head.rsplit(", ").next().unwrap();
        let response = sandbox.task_request(row.instance_id).send().await.unwrap();

        assert_eq!(response.status(), status, "{}", row.instance_id);
        assert_eq!(
            response.headers().contains_key("retry-after"),
            row.instance_id == "throttled-retry-after"
        );
        let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
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
async fn successful_replies_are_about_the_requested_task() {
    let sandbox = start().await;

    for row in documented() {
        if row.outcome != "OK" || row.instance_id.starts_with("flaky") {
            continue;
        }
        let (status, body) = send(sandbox.task_request(row.instance_id)).await;

        assert_eq!(status, 200, "{}", row.instance_id);
        let requested =
            body["job_id"] == EXAMPLE_WORKFLOW_ID && body["instance_id"] == row.instance_id;
        assert_eq!(
            requested,
            row.instance_id != "other-instance",
            "{}",
            row.instance_id
        );
    }
}

#[tokio::test]
async fn other_bodies_match_their_description() {
    let sandbox = start().await;
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
        let response = sandbox.task_request(id).send().await.unwrap();
        assert_eq!(response.status(), status, "{id}");
        assert_eq!(response.headers()["content-type"], content_type, "{id}");
        let body = response.text().await.unwrap();
        assert!(body.contains(part), "{id}: {body}");
    }
    for id in ["empty-body", "status-404-empty"] {
        assert_eq!(
            sandbox
                .task_request(id)
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap(),
            "",
            "{id}"
        );
    }
    for (id, has_length) in [("huge", true), ("huge-chunked", false)] {
        let response = sandbox.task_request(id).send().await.unwrap();
        assert_eq!(response.content_length().is_some(), has_length, "{id}");
        assert!(response.bytes().await.unwrap().len() > 1024 * 1024, "{id}");
    }
    let gzip = sandbox.task_request("gzip").send().await.unwrap();
    assert_eq!(gzip.headers()["content-encoding"], "gzip");
    assert_eq!(gzip.bytes().await.unwrap()[..2], [31, 139]);
}

#[tokio::test]
async fn broken_responses_match_their_description_and_need_no_credential() {
    let sandbox = start().await;

    for id in ["reset", "close", "garbage", "two-lengths"] {
        assert!(
            sandbox.task_request_with("other", id).send().await.is_err(),
            "{id}"
        );
    }
    for id in ["cut-body", "cut-chunked", "reset-body", "bad-chunk"] {
        let response = sandbox.task_request_with("other", id).send().await.unwrap();
        assert_eq!(response.status(), 200, "{id}");
        assert!(response.bytes().await.is_err(), "{id}");
    }
    let head = sandbox
        .task_request_with("other", "dribble-body")
        .send()
        .await
        .unwrap();
    assert_eq!(head.status(), 200);
    assert!(head.content_length().is_some());
    assert_eq!(sandbox.count("task_requests").await, 9);
}

#[tokio::test]
async fn reset_sends_rst_and_close_sends_fin() {
    for (id, reset) in [("reset", true), ("close", false)] {
        let sandbox = start().await;
        let address = sandbox.base.trim_start_matches("http://");
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
async fn flaky_task_fails_the_given_number_of_times_per_workflow_id() {
    let sandbox = start().await;
    let mut seen = Vec::new();

    for workflow_id in ["a", "b"] {
        for _ in 0..4 {
            let body = format!(r#"{{"workflow_id":"{workflow_id}"}}"#);
            let response = sandbox
                .task_request("flaky-2")
                .body(body)
                .send()
                .await
                .unwrap();
            seen.push(response.status().as_u16());
        }
    }

    assert_eq!(seen, [503, 503, 200, 200, 503, 503, 200, 200]);
    assert_eq!(
        sandbox
            .task_request("flaky-0")
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

#[tokio::test]
async fn slow_responses_are_delayed_also_when_rejected() {
    let sandbox = start().await;
    let began = Instant::now();

    let (good, bad) = tokio::join!(
        sandbox.task_request("slow-300").send(),
        sandbox.task_request_with("other", "slow-300").send()
    );

    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(good.unwrap().status(), 200);
    assert_eq!(bad.unwrap().status(), 401);
    let too_slow = sandbox.task_request("slow-60001").send().await.unwrap();
    assert_eq!(
        too_slow.status(),
        400,
        "not a magic id: the task is unknown"
    );
}

#[tokio::test]
async fn disconnected_client_is_not_in_flight() {
    let sandbox = start().await;
    let waiting = tokio::spawn(sandbox.task_request("slow-60000").send());
    let until = async |expected| {
        while sandbox.count("task_requests_in_flight").await != expected {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), until(1)).await.unwrap();

    waiting.abort();

    timeout(Duration::from_secs(10), until(0)).await.unwrap();
}
