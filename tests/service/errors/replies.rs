use std::time::Duration;

use tonic::Code;

use super::{failure_for, raw};
use crate::support::{Failure, Program, Step, Upstream, example, example_request, reply};

#[tokio::test]
async fn every_http_status_maps_to_its_code_and_reason() {
    let error = r#"{"error_code":"X.1","error_msg":"said so"}"#;
    let cases = [
        (201, Code::Internal, "UPSTREAM_UNEXPECTED_STATUS"),
        (204, Code::Internal, "UPSTREAM_UNEXPECTED_STATUS"),
        (206, Code::Internal, "UPSTREAM_UNEXPECTED_STATUS"),
        (301, Code::Internal, "UPSTREAM_REDIRECT"),
        (307, Code::Internal, "UPSTREAM_REDIRECT"),
        (304, Code::Internal, "UPSTREAM_REDIRECT"),
        (400, Code::InvalidArgument, "UPSTREAM_INVALID_ARGUMENT"),
        (401, Code::Unauthenticated, "CREDENTIAL_REJECTED"),
        (402, Code::FailedPrecondition, "PRECONDITION_FAILED"),
        (403, Code::PermissionDenied, "PERMISSION_DENIED"),
        (404, Code::NotFound, "RESOURCE_NOT_FOUND"),
        (405, Code::Unimplemented, "UPSTREAM_API_NOT_FOUND"),
        (406, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (407, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (408, Code::Unavailable, "UPSTREAM_UNAVAILABLE"),
        (409, Code::Aborted, "INSTANCE_BUSY"),
        (410, Code::NotFound, "RESOURCE_NOT_FOUND"),
        (411, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (412, Code::FailedPrecondition, "PRECONDITION_FAILED"),
        (413, Code::ResourceExhausted, "QUOTA_EXHAUSTED"),
        (414, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (415, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (417, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (418, Code::Unknown, "UPSTREAM_UNKNOWN"),
        (422, Code::InvalidArgument, "UPSTREAM_INVALID_ARGUMENT"),
        (423, Code::FailedPrecondition, "PRECONDITION_FAILED"),
        (425, Code::Unavailable, "UPSTREAM_UNAVAILABLE"),
        (428, Code::FailedPrecondition, "PRECONDITION_FAILED"),
        (429, Code::ResourceExhausted, "THROTTLED"),
        (431, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (451, Code::PermissionDenied, "PERMISSION_DENIED"),
        (494, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (500, Code::Internal, "UPSTREAM_INTERNAL"),
        (501, Code::Unimplemented, "UPSTREAM_API_NOT_FOUND"),
        (502, Code::Unavailable, "UPSTREAM_UNAVAILABLE"),
        (503, Code::Unavailable, "UPSTREAM_UNAVAILABLE"),
        (504, Code::DeadlineExceeded, "UPSTREAM_TIMEOUT"),
        (505, Code::Internal, "UPSTREAM_REJECTED_REQUEST"),
        (520, Code::Unknown, "UPSTREAM_UNKNOWN"),
        (999, Code::Unknown, "UPSTREAM_UNKNOWN"),
    ];
    let upstream = Upstream::start(move |request| {
        let status = request
            .line
            .split('/')
            .nth(4)
            .and_then(|id| id.parse().ok())
            .expect("the id is a status");
        reply(status, &[("location", "http://127.0.0.1:1/")], error)
    })
    .await;
    let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);
    let mut client = program.client().await;

    for (number, (status, code, reason)) in cases.into_iter().enumerate() {
        let mut request = example_request();
        request.instance_id = status.to_string();
        // The identity is throttled after the 429, so that row uses a separate token.
        let failure = Failure::from_status(
            &client
                .get_task_detail(request)
                .await
                .expect_err("an error status"),
        );
        if status == 429 {
            break;
        }

        assert_eq!(failure.code_and_reason(), (code, reason), "{status}");
        assert_eq!(
            failure.metadata.get("httpStatus"),
            Some(&status.to_string()),
            "{status}"
        );
        assert_eq!(failure.domain, "rds-task-facade", "{status}");
        assert_eq!(
            upstream.requests().len(),
            number + 1,
            "{status} causes one request"
        );
    }
    for (status, code, reason) in cases.into_iter().skip_while(|(status, ..)| *status != 429) {
        let failure = failure_for(reply(status, &[], error)).await;
        assert_eq!(failure.code_and_reason(), (code, reason), "{status}");
    }
}

#[tokio::test]
async fn a_404_with_a_page_instead_of_an_api_reply_is_unimplemented() {
    let cases = [
        ("<html>not here</html>", Code::Unimplemented),
        (r#"["x"]"#, Code::Unimplemented),
        ("", Code::NotFound),
        ("{}", Code::NotFound),
        (
            r#"{"error_code":"APIGW.0101","error_msg":"m"}"#,
            Code::Unimplemented,
        ),
        (
            r#"{"error_code":"DBS.200045","error_msg":"m"}"#,
            Code::NotFound,
        ),
    ];

    for (body, code) in cases {
        assert_eq!(
            failure_for(reply(404, &[], body)).await.code,
            code,
            "{body}"
        );
    }
}

#[tokio::test]
async fn the_content_of_an_error_page_is_not_passed_on() {
    for status in [400, 403, 404, 500, 502] {
        let page = "<html><h1>secret-of-the-page</h1></html>";

        let failure = failure_for(reply(status, &[("content-type", "text/html")], page)).await;

        assert!(
            !format!("{failure:?}").contains("secret-of-the-page"),
            "{status}: {failure:?}"
        );
        assert!(!failure.message.is_empty(), "{status}");
    }
}

#[tokio::test]
async fn throttling_comes_with_retry_info_pushback_and_quota_failure() {
    let text = "The throttling threshold has been reached: policy user over ratelimit,limit:200,time:1 minute";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0308","request_id":"r-1"}}"#);
    let cases: [(&[(&str, &str)], u64); 5] = [
        (&[], 60),
        (&[("retry-after", "7")], 7),
        (&[("retry-after", "-1")], 60),
        (&[("retry-after", "1000000000")], 300),
        (&[("retry-after", "soon")], 60),
    ];

    for (headers, seconds) in cases {
        let failure = failure_for(reply(429, headers, &body)).await;

        assert_eq!(
            failure.code_and_reason(),
            (Code::ResourceExhausted, "THROTTLED"),
            "{headers:?}"
        );
        assert_eq!(failure.message, text);
        assert_eq!(
            failure.retry_delay,
            Some(Duration::from_secs(seconds)),
            "{headers:?}"
        );
        assert_eq!(failure.pushback_ms, Some(seconds * 1000), "{headers:?}");
        assert_eq!(failure.quota_subjects.len(), 1, "{headers:?}");
        assert_eq!(
            failure.metadata.get("upstreamService").map(String::as_str),
            Some("APIGW")
        );
        assert_eq!(
            failure
                .metadata
                .get("upstreamRequestId")
                .map(String::as_str),
            Some("r-1")
        );
    }
}

#[tokio::test]
async fn a_missing_task_is_named() {
    let body = r#"{"error_code":"DBS.200543","error_msg":"Task does not exist."}"#;

    let failure = failure_for(reply(400, &[("x-request-id", "r-9")], body)).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::NotFound, "TASK_NOT_FOUND")
    );
    assert_eq!(failure.message, "Task does not exist.");
    let (_, name) = failure.resource.expect("ResourceInfo");
    assert_eq!(name, example_request().workflow_id);
    assert_eq!(
        failure.metadata.get("upstreamCode").map(String::as_str),
        Some("DBS.200543")
    );
    assert_eq!(
        failure.metadata.get("credentialOwner").map(String::as_str),
        Some("server")
    );
}

#[tokio::test]
async fn a_200_without_a_task_is_never_ok() {
    let malformed = (Code::Internal, "UPSTREAM_MALFORMED_RESPONSE");
    let big = format!(r#"{{"job_id":"{}"}}"#, "x".repeat(1 << 20));
    let deep = format!(
        r#"{{"x":{}{},"job_id":"j""#,
        "[".repeat(100_000),
        "]".repeat(99_999)
    );
    let cases: Vec<(&str, Vec<u8>, _)> = vec![
        ("empty", b"".to_vec(), malformed),
        ("null", b"null".to_vec(), malformed),
        ("array", b"[{\"job_id\":\"j\"}]".to_vec(), malformed),
        ("text", b"\"job_id\"".to_vec(), malformed),
        ("empty object", b"{}".to_vec(), malformed),
        (
            "only unknown fields",
            b"{\"jobId\":\"j\"}".to_vec(),
            malformed,
        ),
        ("html", b"<html>login</html>".to_vec(), malformed),
        ("cut short", b"{\"job_id\":\"j\"".to_vec(), malformed),
        (
            "trailing garbage",
            b"{\"job_id\":\"j\"} x".to_vec(),
            malformed,
        ),
        (
            "byte order mark",
            b"\xef\xbb\xbf{\"job_id\":\"j\"}".to_vec(),
            malformed,
        ),
        ("not a number", b"{\"job_id\":NaN}".to_vec(), malformed),
        (
            "invalid UTF-8",
            b"{\"job_id\":\"\xff\"}".to_vec(),
            malformed,
        ),
        (
            "lone surrogate",
            b"{\"job_id\":\"\\ud800\"}".to_vec(),
            malformed,
        ),
        (
            "duplicate key",
            b"{\"job_id\":\"a\",\"job_id\":\"b\"}".to_vec(),
            malformed,
        ),
        ("unclosed depth", deep.into_bytes(), malformed),
        (
            "too large",
            big.into_bytes(),
            (Code::Internal, "UPSTREAM_RESPONSE_TOO_LARGE"),
        ),
        (
            "known error",
            b"{\"error_code\":\"DBS.200543\",\"error_msg\":\"m\"}".to_vec(),
            (Code::NotFound, "TASK_NOT_FOUND"),
        ),
        (
            "unknown error",
            b"{\"error_code\":\"DBS.9\",\"error_msg\":\"m\",\"job_id\":\"j\"}".to_vec(),
            (Code::Unknown, "UPSTREAM_UNKNOWN"),
        ),
        (
            "error object without a code",
            b"{\"error_code\":null,\"error_msg\":\"m\"}".to_vec(),
            malformed,
        ),
    ];

    for (case, body, expected) in cases {
        let failure = failure_for(reply(200, &[], body)).await;

        assert_eq!(failure.code_and_reason(), expected, "{case}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_without_a_length_is_not_read_to_its_end() {
    let mut steps = raw("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..40 {
        steps.push(Step::Send(
            format!("10000\r\n{}\r\n", "x".repeat(0x10000)).into_bytes(),
        ));
    }
    steps.push(Step::Hold);
    let upstream = Upstream::always(steps).await;
    let program = Program::over(&upstream.url(), &[]);

    let failure = program.failure(example_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Internal, "UPSTREAM_RESPONSE_TOO_LARGE")
    );
    upstream.wait_for_closed(1).await;
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn an_unrequested_content_encoding_is_malformed() {
    let failure = failure_for(reply(
        200,
        &[("content-encoding", "gzip")],
        r#"{"job_id":"j"}"#,
    ))
    .await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Internal, "UPSTREAM_MALFORMED_RESPONSE")
    );
}

#[tokio::test]
async fn the_content_type_of_a_reply_does_not_matter() {
    for headers in [&[][..], &[("content-type", "text/plain")]] {
        let upstream = Upstream::always(reply(200, headers, r#"{"job_id":"j"}"#)).await;
        let program = Program::over(&upstream.url(), &[]);

        assert!(program.call(example_request()).await.is_ok(), "{headers:?}");
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = Upstream::always(example()).await;
    let location = format!("{}/steal", elsewhere.url());

    for status in [301, 302, 303, 307, 308] {
        let failure = failure_for(reply(status, &[("location", &location)], "")).await;

        assert_eq!(
            failure.code_and_reason(),
            (Code::Internal, "UPSTREAM_REDIRECT"),
            "{status}"
        );
        assert!(!format!("{failure:?}").contains("steal"), "{status}");
    }
    assert_eq!(elsewhere.connections().opened, 0);
}
