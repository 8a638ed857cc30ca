use std::time::Duration;

use tonic::Code;

use super::{failure_for, raw};
use crate::support::{Program, Step, Upstream, answer, example, example_request};

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
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port")
        .local_addr()
        .expect("an address");
    // Replies to a handshake as a web server without TLS does.
    let plain = Upstream::always([answer(400, &[], ""), vec![Step::Close]].concat()).await;
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
