use std::time::{Duration, SystemTime};

use tonic::Code;

use crate::support::{Connection, Failure, Program, Step, Upstream, example_request, reply};

const ERROR: &str = r#"{"error_code":"X.1","error_msg":"text of RDS"}"#;

/// A program without retries and its scripted upstream.
struct Setting {
    upstream: Upstream,
    program: Program,
}

impl Setting {
    async fn always(steps: Vec<Step>) -> Self {
        let upstream = Upstream::always(steps).await;
        let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);
        Self { upstream, program }
    }

    async fn failure(&self) -> Failure {
        self.program.failure(example_request()).await
    }
}

#[tokio::test]
async fn an_undocumented_http_status_maps_like_its_class() {
    let unexpected = (Code::Internal, "UPSTREAM_UNEXPECTED_STATUS");
    let redirect = (Code::Internal, "UPSTREAM_REDIRECT");
    let unknown = (Code::Unknown, "UPSTREAM_UNKNOWN");
    let cases = [
        (202, unexpected),
        (203, unexpected),
        (226, unexpected),
        (299, unexpected),
        (300, redirect),
        (302, redirect),
        (303, redirect),
        (308, redirect),
        (399, redirect),
        (424, unknown),
        (426, unknown),
        (499, unknown),
        (507, unknown),
        (511, unknown),
        (599, unknown),
        (600, unknown),
        (799, unknown),
    ];

    for (status, expected) in cases {
        let setting = Setting::always(reply(status, &[], ERROR)).await;

        let failure = setting.failure().await;

        assert_eq!(failure.code_and_reason(), expected, "{status}");
        assert_eq!(setting.upstream.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn without_an_error_object_the_http_status_decides_and_no_upstream_code_is_set() {
    let cases = [
        (400, Code::InvalidArgument),
        (401, Code::Unauthenticated),
        (403, Code::PermissionDenied),
        (409, Code::Aborted),
        (413, Code::ResourceExhausted),
        (429, Code::ResourceExhausted),
        (500, Code::Internal),
        (503, Code::Unavailable),
        (504, Code::DeadlineExceeded),
    ];

    for (status, code) in cases {
        for body in [
            "",
            "<html>",
            "[]",
            r#"{"error_code":""}"#,
            r#"{"error_code":null}"#,
        ] {
            let failure = Setting::always(reply(status, &[], body))
                .await
                .failure()
                .await;

            assert_eq!(failure.code, code, "{status} {body}");
            assert_eq!(
                failure.metadata.get("upstreamCode"),
                None,
                "{status} {body}"
            );
            assert!(!failure.message.is_empty(), "{status} {body}");
        }
    }
}

#[tokio::test]
async fn retry_after_of_a_reply_becomes_retry_info_where_a_retry_can_help() {
    let in_two_minutes = httpdate::fmt_http_date(now() + Duration::from_secs(120));
    let yesterday = httpdate::fmt_http_date(now() - Duration::from_secs(86_400));
    let seconds = |number| Some(Duration::from_secs(number));
    let cases: [(u16, &[&str], Option<Duration>); 17] = [
        (429, &["7"], seconds(7)),
        (429, &["0"], seconds(60)),
        (429, &[&yesterday], seconds(60)),
        (429, &["-1"], seconds(60)),
        (429, &["1e9"], seconds(60)),
        (429, &[""], seconds(60)),
        (429, &["3", "9"], seconds(9)),
        (503, &["7"], seconds(7)),
        (503, &["1000000000"], seconds(300)),
        (503, &[], None),
        (503, &["soon"], None),
        (502, &["7"], seconds(7)),
        (413, &["7"], seconds(7)),
        (413, &[], None),
        (400, &["7"], None),
        (404, &["7"], None),
        (500, &["7"], None),
    ];

    for (status, values, expected) in cases {
        let headers: Vec<_> = values.iter().map(|value| ("retry-after", *value)).collect();
        let failure = Setting::always(reply(status, &headers, ERROR))
            .await
            .failure()
            .await;

        assert_eq!(failure.retry_delay, expected, "{status} {values:?}");
        let pushback = expected.map(|wait| wait.as_millis() as u64);
        assert_eq!(failure.pushback_ms, pushback, "{status} {values:?}");
        assert_eq!(failure.quota_subjects.is_empty(), status != 429, "{status}");
    }
    for status in [413, 429, 503] {
        let dated = reply(status, &[("retry-after", &in_two_minutes)], ERROR);
        let wait = Setting::always(dated).await.failure().await.retry_delay;
        let wait = wait.expect("a wait");
        assert!(wait > Duration::from_secs(100), "{status} {wait:?}");
        assert!(wait <= Duration::from_secs(120), "{status} {wait:?}");
    }
}

#[expect(clippy::disallowed_methods, reason = "HTTP dates are wall-clock times")]
fn now() -> SystemTime {
    SystemTime::now()
}

#[tokio::test]
async fn message_and_details_of_hostile_replies_stay_within_their_limits_without_control_characters()
 {
    let long = "ä".repeat(100_000);
    let cases = [
        ("long text", long.as_str()),
        ("control characters", r"a\u0000b\nc\u001b[31md"),
        ("percent", "100 % of %0a%0d"),
    ];

    for (case, text) in cases {
        let body =
            format!(r#"{{"error_code":"DBS.200543","error_msg":"{text}","request_id":"{text}"}}"#);
        let setting = Setting::always(reply(400, &[("x-request-id", "r-1")], body)).await;
        let failure = setting.failure().await;

        assert_eq!(failure.reason, "TASK_NOT_FOUND", "{case}");
        assert!(failure.message.chars().count() <= 256, "{case}");
        assert!(
            !failure.message.contains(char::is_control),
            "{case}: {failure:?}"
        );
        assert!(failure.details_bytes <= 4096, "{case}: {failure:?}");
        for value in failure.metadata.values() {
            assert!(
                value.len() <= 256 && !value.contains(char::is_control),
                "{case}: {value}"
            );
        }
    }
}

#[tokio::test]
async fn a_rejected_credential_gets_a_message_of_the_facade_and_its_owner() {
    let body = r#"{"error_code":"APIGW.0301","error_msg":"Incorrect IAM authentication information: header x-auth-token canary"}"#;
    let setting = Setting::always(reply(401, &[], body)).await;

    let failure = setting.failure().await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert!(!format!("{failure:?}").contains("canary"), "{failure:?}");
    let owner = failure.metadata.get("credentialOwner");
    assert_eq!(owner.map(String::as_str), Some("server"));
    assert_eq!(setting.program.admin("/readyz").await.0, 200);
}

#[tokio::test]
async fn each_failure_has_one_error_info_and_the_same_request_id_in_details_and_metadata() {
    let kinds = [
        ("error reply", reply(500, &[], ERROR)),
        ("closed connection", vec![Step::Close]),
    ];

    for (case, steps) in kinds {
        let setting = Setting::always(steps).await;
        let connection = Connection::open(setting.program.grpc).await;
        let ended = connection.call_within("5S", &example_request()).await;
        let raw = ended.expect("a reply");
        let status = raw.status().expect("a status");

        let id = raw
            .headers
            .get("x-request-id")
            .or(raw.trailers.get("x-request-id"));
        let in_details = Failure::from_status(&status).request_id;
        assert_eq!(
            id.and_then(|id| id.to_str().ok()),
            in_details.as_deref(),
            "{case}"
        );
        let kind = b"type.googleapis.com/google.rpc.ErrorInfo";
        let infos = status
            .details()
            .windows(kind.len())
            .filter(|window| window == kind);
        assert_eq!(infos.count(), 1, "{case}");
    }
}
