use std::time::Duration;

use tonic::Code;

use super::{failure_for, raw};
use crate::support::{Program, Step, Upstream, example, example_request, free_address, reply};

#[tokio::test]
async fn incomplete_replies_have_distinct_reasons() {
    let unavailable = |reason: &'static str| (Code::Unavailable, reason);
    let head = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"job";
    let cases = [
        (
            "closes after the request",
            vec![Step::Close],
            unavailable("UPSTREAM_RESET"),
        ),
        (
            "resets after the request",
            vec![Step::Reset],
            unavailable("UPSTREAM_RESET"),
        ),
        (
            "head breaks off",
            [raw("HTTP/1.1 200 OK\r\ncon"), vec![Step::Close]].concat(),
            unavailable("UPSTREAM_RESET"),
        ),
        (
            "body breaks off",
            [raw(head), vec![Step::Close]].concat(),
            unavailable("UPSTREAM_TRUNCATED"),
        ),
        (
            "resets in the body",
            [
                raw(head),
                vec![Step::Wait(Duration::from_millis(50)), Step::Reset],
            ]
            .concat(),
            unavailable("UPSTREAM_TRUNCATED"),
        ),
        (
            "chunked without an end",
            [
                raw("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"job"),
                vec![Step::Close],
            ]
            .concat(),
            unavailable("UPSTREAM_TRUNCATED"),
        ),
        (
            "bad chunk size",
            raw("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "garbage",
            raw("SSH-2.0-OpenSSH_9.2\r\n\r\n"),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "status 000",
            raw("HTTP/1.1 000 X\r\ncontent-length: 0\r\n\r\n"),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "two lengths",
            raw("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "negative length",
            raw("HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}"),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "too many headers",
            raw(&format!(
                "HTTP/1.1 200 OK\r\n{}\r\n",
                "a: b\r\n".repeat(2000)
            )),
            unavailable("UPSTREAM_PROTOCOL"),
        ),
        (
            "never replies",
            vec![Step::Hold],
            (Code::DeadlineExceeded, "UPSTREAM_TIMEOUT"),
        ),
        (
            "body stops",
            [raw(head), vec![Step::Hold]].concat(),
            (Code::DeadlineExceeded, "UPSTREAM_TIMEOUT"),
        ),
        (
            "switches protocols",
            raw("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"),
            (Code::Internal, "UPSTREAM_UNEXPECTED_STATUS"),
        ),
        (
            "length too small",
            raw("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{\"job_id\":\"j\"}"),
            (Code::Internal, "UPSTREAM_MALFORMED_RESPONSE"),
        ),
    ];

    for (case, steps, expected) in cases {
        assert_eq!(
            failure_for(steps).await.code_and_reason(),
            expected,
            "{case}"
        );
    }
}

#[tokio::test]
async fn a_reply_that_arrives_too_slowly_ends_at_the_attempt_timeout() {
    let dribble = |text: &str| -> Vec<Step> {
        text.bytes()
            .flat_map(|byte| {
                [
                    Step::Send(vec![byte]),
                    Step::Wait(Duration::from_millis(200)),
                ]
            })
            .collect()
    };
    let head = dribble("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n");
    let body = [
        raw("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n"),
        dribble("{\"job_id\":\"j\"}"),
    ]
    .concat();

    for (case, steps) in [("head", head), ("body", body)] {
        let failure = failure_for(steps).await;

        assert_eq!(
            failure.code_and_reason(),
            (Code::DeadlineExceeded, "UPSTREAM_TIMEOUT"),
            "{case}"
        );
    }
}

#[tokio::test]
async fn informational_responses_are_skipped() {
    let flood = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n".repeat(200);
    let upstream =
        Upstream::always([raw("HTTP/1.1 100 Continue\r\n\r\n"), raw(&flood), example()].concat())
            .await;
    let program = Program::over(&upstream.url(), &[]);

    assert!(program.call(example_request()).await.is_ok());
}

#[tokio::test]
async fn chunked_encoding_wins_over_content_length() {
    let upstream = Upstream::always(raw(
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\ne\r\n{\"job_id\":\"j\"}\r\n0\r\n\r\n",
    ))
    .await;
    let program = Program::over(&upstream.url(), &[]);

    let reply = program.call(example_request()).await.expect("a reply");

    assert_eq!(reply.into_inner().job_id, "j");
}

#[tokio::test]
async fn connection_errors_have_distinct_reasons() {
    let closed = free_address();
    // Replies to a handshake as a web server without TLS does.
    let plain = Upstream::always([reply(400, &[], ""), vec![Step::Close]].concat()).await;
    let cases = [
        (format!("http://{closed}"), "UPSTREAM_CONNECT"),
        (format!("https://{}", plain.address), "UPSTREAM_TLS"),
        ("https://name.invalid".to_owned(), "UPSTREAM_DNS"),
    ];

    for (endpoint, reason) in cases {
        let program = Program::over(&endpoint, &["--max-attempts", "1"]);

        let failure = program.failure(example_request()).await;

        assert_eq!(
            failure.code_and_reason(),
            (Code::Unavailable, reason),
            "{endpoint}"
        );
    }
}

#[tokio::test]
async fn a_reply_with_header_lines_that_break_the_grammar_is_read_at_the_first_attempt() {
    let lines = [
        "set-cookie: a=b\u{1}c",
        "x-folded: one\r\n two",
        "x-blank : before the colon",
        "no colon at all",
        "x-bad\u{7f}name: v",
    ];

    for line in lines {
        let reply =
            format!("HTTP/1.1 200 OK\r\n{line}\r\ncontent-length: 14\r\n\r\n{{\"job_id\":\"j\"}}");
        let upstream = Upstream::always(raw(&reply)).await;
        let program = Program::over(&upstream.url(), &[]);

        let result = program.call(example_request()).await;

        let task = result.unwrap_or_else(|failure| panic!("{line:?}: {failure:?}"));
        assert_eq!(task.into_inner().job_id, "j", "{line:?}");
        assert_eq!(upstream.requests().len(), 1, "{line:?}");
    }
}

#[tokio::test]
async fn replies_that_cannot_be_parsed_do_not_open_the_breaker() {
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(200));
    for reply in [many.as_str(), "SSH-2.0-OpenSSH_9.2\r\n\r\n"] {
        let upstream = Upstream::always(raw(reply)).await;
        let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);

        for _ in 0..30 {
            let failure = program.failure(example_request()).await;
            assert_eq!(failure.reason, "UPSTREAM_PROTOCOL");
        }

        assert_eq!(upstream.requests().len(), 30, "{reply:.20}");
    }
}

/// Replies whose framing does not end: the connection is closed or reset after the last byte.
fn without_end(status: u16, body: &str) -> Vec<(String, Vec<Step>)> {
    let head = format!("HTTP/1.1 {status} X\r\n");
    let long = format!("{head}content-length: 4096\r\n\r\n{body}");
    let chunked = format!(
        "{head}transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n",
        body.len()
    );
    // So that the client has read the body before the reset discards unread bytes.
    let reset = vec![Step::Wait(Duration::from_millis(200)), Step::Reset];
    let case = |name, steps: [Vec<Step>; 2]| (format!("{status} {body}: {name}"), steps.concat());
    vec![
        case("closed", [raw(&long), vec![Step::Close]]),
        case("closed chunked", [raw(&chunked), vec![Step::Close]]),
        case("reset", [raw(&long), reset]),
    ]
}

#[tokio::test]
async fn a_complete_object_counts_even_if_the_framing_does_not_end() {
    let errors = [
        (
            400,
            r#"{"error_code":"DBS.200543","error_msg":"x"}"#,
            "TASK_NOT_FOUND",
        ),
        (
            403,
            r#"{"error_code":"DBS.200010","error_msg":"x"}"#,
            "PERMISSION_DENIED",
        ),
        (
            409,
            r#"{"error_code":"DBS.200316","error_msg":"x"}"#,
            "PRECONDITION_FAILED",
        ),
        (
            429,
            r#"{"error_code":"APIGW.0308","error_msg":"policy user over ratelimit,limit:9,time:2 minute"}"#,
            "THROTTLED",
        ),
    ];
    for (status, body, reason) in errors {
        for (case, steps) in without_end(status, body) {
            let failure = failure_for(steps).await;

            assert_eq!(failure.reason, reason, "{case}");
            if status == 429 {
                assert_eq!(
                    failure.retry_delay,
                    Some(Duration::from_secs(120)),
                    "{case}"
                );
            }
        }
    }
    for (case, steps) in without_end(200, r#"{"job_id":"j"}"#) {
        let upstream = Upstream::always(steps).await;
        let program = Program::over(&upstream.url(), &[]);

        let reply = program.call(example_request()).await;

        let task = reply.unwrap_or_else(|failure| panic!("{case}: {failure:?}"));
        assert_eq!(task.into_inner().job_id, "j", "{case}");
        assert_eq!(upstream.requests().len(), 1, "{case}");
    }
}

#[tokio::test]
async fn a_cut_off_error_is_truncated_where_its_meaning_is_in_the_body() {
    let cases = [
        (400, (Code::Unavailable, "UPSTREAM_TRUNCATED"), 3),
        (403, (Code::Unavailable, "UPSTREAM_TRUNCATED"), 3),
        (404, (Code::Unavailable, "UPSTREAM_TRUNCATED"), 3),
        (409, (Code::Unavailable, "UPSTREAM_TRUNCATED"), 3),
        (401, (Code::Unauthenticated, "CREDENTIAL_REJECTED"), 1),
        (410, (Code::NotFound, "RESOURCE_NOT_FOUND"), 1),
        (429, (Code::ResourceExhausted, "THROTTLED"), 1),
        (500, (Code::Internal, "UPSTREAM_INTERNAL"), 2),
        (503, (Code::Unavailable, "UPSTREAM_UNAVAILABLE"), 3),
    ];

    for (status, expected, attempts) in cases {
        for (case, steps) in without_end(status, r#"{"error_code":"DBS.2005"#) {
            let upstream = Upstream::always(steps).await;
            let program = Program::over(&upstream.url(), &[]);

            let failure = program.failure(example_request()).await;

            assert_eq!(failure.code_and_reason(), expected, "{case}");
            assert_eq!(upstream.requests().len(), attempts, "{case}");
        }
    }
}

#[tokio::test]
async fn an_error_whose_body_stalls_is_a_timeout_where_its_meaning_is_in_the_body() {
    for (status, expected) in [
        (404, (Code::DeadlineExceeded, "UPSTREAM_TIMEOUT")),
        (410, (Code::NotFound, "RESOURCE_NOT_FOUND")),
    ] {
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: 100\r\n\r\n{{\"error");
        let failure = failure_for([raw(&head), vec![Step::Hold]].concat()).await;

        assert_eq!(failure.code_and_reason(), expected, "{status}");
    }
}
