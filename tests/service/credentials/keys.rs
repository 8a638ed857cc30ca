use std::time::Duration;

use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use super::{
    FETCHED, Folder, SANDBOX_KEY, distinct_request, failures_of, metadata, metadata_service, ready,
};
use crate::support::{
    Program, Sandbox, Step, Upstream, eventually, example, example_request, reply,
};

const WRONG_KEY: [(&str, &str); 2] = [
    ("HUAWEICLOUD_SDK_AK", "SANDBOXACCESSKEY"),
    ("HUAWEICLOUD_SDK_SK", "not-the-secret-key"),
];

fn with_key(url: &str, key: &[(&str, &str)]) -> Program {
    Program::start(&["--endpoint", url, "--credentials", "env"], key)
}

/// The gateway's rejection of a signature.
fn rejection(what: &str, headers: &[(&str, &str)]) -> Vec<Step> {
    let body = format!(
        r#"{{"error_msg":"Incorrect IAM authentication information: {what}","error_code":"APIGW.0301","request_id":"r"}}"#
    );
    reply(401, headers, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_with_a_key_that_was_never_accepted_sends_one_request_and_then_none() {
    let sandbox = Sandbox::start();
    let program = with_key(&sandbox.url(), &WRONG_KEY);

    let failures = failures_of(&program, 200).await;
    let later = program.failure(example_request()).await;

    assert_eq!(sandbox.count("task_requests").await, 1);
    assert_eq!(
        sandbox.count("bad_signatures").await,
        1,
        "four replicas with it are short of the gateway's lock"
    );
    assert_eq!(failures.len(), 200);
    let (rejected, locked): (Vec<_>, Vec<_>) = failures
        .into_iter()
        .partition(|failure| failure.reason == "CREDENTIAL_REJECTED");
    assert_eq!(rejected.len(), 1);
    for failure in rejected {
        assert_eq!(failure.code, Code::Unauthenticated);
        assert_eq!(failure.metadata["credentialOwner"], "server");
        assert_eq!(failure.retry_delay, None);
    }
    for failure in locked.into_iter().chain([later]) {
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, "CREDENTIAL_LOCKED")
        );
        assert_eq!(failure.metadata["credentialOwner"], "server");
        let delay = failure.retry_delay.expect("the lock ends");
        assert!((240..=300).contains(&delay.as_secs()), "{delay:?}");
        assert!(failure.pushback_ms.is_some());
    }
}

/// Health and `/readyz`, which must agree.
async fn is_serving(program: &Program) -> bool {
    let request = HealthCheckRequest::default();
    let reply = program.health().await.check(request).await;
    let status = reply.expect("health replies").into_inner().status();
    let readyz = program.admin("/readyz").await.0;
    assert_eq!(status == ServingStatus::Serving, readyz == 200, "{readyz}");
    status == ServingStatus::Serving
}

async fn until_serving(program: &Program, expected: bool) {
    eventually("health and readiness change", async || {
        let readyz = program.admin("/readyz").await.0;
        (readyz == 200) == expected
    })
    .await;
    assert_eq!(is_serving(program).await, expected);
}

#[tokio::test]
async fn while_a_wrong_key_rests_the_program_is_not_serving() {
    let sandbox = Sandbox::start();
    let program = with_key(&sandbox.url(), &WRONG_KEY);
    assert!(is_serving(&program).await, "the key has not been used yet");

    let first = program.failure(example_request()).await;
    until_serving(&program, false).await;
    let later = program.failure(example_request()).await;

    assert_eq!(first.reason, "CREDENTIAL_REJECTED");
    assert_eq!(later.reason, "CREDENTIAL_LOCKED");
    assert!(!is_serving(&program).await);
    assert_eq!(sandbox.count("bad_signatures").await, 1);
}

#[tokio::test]
async fn another_key_in_the_profile_file_ends_the_rest() {
    let sandbox = Sandbox::start();
    let folder = Folder::new();
    let profile = folder.file("profile", "[basic]\nak=SANDBOXACCESSKEY\nsk=wrong\n");
    let program = Program::start(
        &["--endpoint", &sandbox.url(), "--credentials", "profile"],
        &[("HUAWEICLOUD_SDK_CREDENTIALS_FILE", &profile)],
    );
    ready(&program).await;
    let rejected = program.failure(example_request()).await;
    until_serving(&program, false).await;

    folder.file(
        "profile",
        "[basic]\nak=SANDBOXACCESSKEY\nsk=sandbox-secret-key\n",
    );
    until_serving(&program, true).await;
    let called = program.call(example_request()).await;

    assert_eq!(rejected.reason, "CREDENTIAL_REJECTED");
    assert!(called.is_ok(), "{called:?}");
    assert!(is_serving(&program).await);
}

#[tokio::test]
async fn while_a_key_rests_that_was_accepted_before_the_program_keeps_serving() {
    let upstream = Upstream::start(|request| match request.number {
        0 => example(),
        _ => rejection("verify aksk signature fail", &[]),
    })
    .await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);
    program.call(distinct_request()).await.expect("accepted");

    let mut reasons = Vec::new();
    for _ in 0..4 {
        reasons.push(program.failure(distinct_request()).await.reason);
        assert!(is_serving(&program).await, "{reasons:?}");
    }

    assert_eq!(reasons[..3], ["CREDENTIAL_REJECTED"; 3]);
    assert_eq!(reasons[3], "CREDENTIAL_LOCKED");
}

#[tokio::test]
async fn the_gateways_own_lock_stops_all_calls_with_the_key() {
    let lock = rejection("AK access failed to reach the limit", &[]);
    let upstream = Upstream::always(lock).await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);

    let first = program.failure(example_request()).await;
    let later = failures_of(&program, 20).await;

    assert_eq!(upstream.requests().len(), 1);
    assert_eq!(later.len(), 20);
    for failure in later.into_iter().chain([first]) {
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, "CREDENTIAL_LOCKED")
        );
        let delay = failure.retry_delay.expect("the lock ends");
        assert!((290..=300).contains(&delay.as_secs()), "{delay:?}");
    }
}

#[tokio::test]
async fn a_call_with_a_rejected_signature_is_never_retried() {
    for status in [401, 403] {
        let upstream = Upstream::start(move |_| {
            let body = r#"{"error_msg":"verify aksk signature fail","error_code":"APIGW.0301"}"#;
            reply(status, &[], body)
        })
        .await;
        let program = with_key(&upstream.url(), &SANDBOX_KEY);

        let failure = program.failure(example_request()).await;

        assert_eq!(upstream.requests().len(), 1, "{status}");
        assert_eq!(
            failure.metadata["credentialOwner"], "server",
            "{status}: {failure:?}"
        );
    }
}

#[tokio::test]
async fn each_attempt_is_signed_separately() {
    let upstream = Upstream::start(|request| match request.number {
        0 => reply(503, &[("retry-after", "1")], ""),
        _ => example(),
    })
    .await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);

    let reply = program.call(example_request()).await;

    assert!(reply.is_ok(), "{reply:?}");
    let requests = upstream.requests();
    assert_eq!(requests.len(), 2);
    for header in ["x-sdk-date", "authorization"] {
        let [first, second] = [0, 1].map(|number| requests[number].header(header));
        assert!(first.is_some() && second.is_some(), "{header}");
        assert_ne!(first, second, "{header}");
    }
    assert!(
        requests
            .iter()
            .all(|request| request.header("x-auth-token").is_none())
    );
}

#[tokio::test]
async fn repeated_attempts_carry_good_signatures() {
    let sandbox = Sandbox::start();
    let program = with_key(&sandbox.url(), &SANDBOX_KEY);
    let mut request = example_request();
    request.instance_id = "flaky-2".into();

    let reply = program.call(request).await;

    assert!(reply.is_ok(), "{reply:?}");
    assert_eq!(sandbox.count("task_requests").await, 3);
    assert_eq!(sandbox.count("bad_signatures").await, 0);
}

#[tokio::test]
async fn a_clock_within_the_window_needs_no_repeat_and_one_beyond_it_a_single_one() {
    let cases = [
        (14, 1),
        (-14, 1),
        (16, 2),
        (-16, 2),
        (24 * 60, 2),
        (-24 * 60, 2),
    ];

    for (minutes, requests) in cases {
        let sandbox = Sandbox::start();
        sandbox
            .set(&format!("clock?offset-seconds={}", minutes * 60))
            .await;
        let program = with_key(&sandbox.url(), &SANDBOX_KEY);

        let first = program.call(example_request()).await;
        let sent_first = sandbox.count("task_requests").await;
        let second = program.call(example_request()).await;

        assert!(first.is_ok(), "{minutes} min: {first:?}");
        assert!(second.is_ok(), "{minutes} min: {second:?}");
        assert_eq!(sent_first, requests, "{minutes} min");
        assert_eq!(
            sandbox.count("task_requests").await,
            requests + 1,
            "{minutes} min: the offset is remembered"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_under_a_hundred_calls_fails_none_of_them() {
    let sandbox = Sandbox::start();
    let program = with_key(&sandbox.url(), &SANDBOX_KEY);
    program
        .call(example_request())
        .await
        .expect("the key proves itself");

    for minutes in [20, -20, 0] {
        sandbox
            .set(&format!("clock?offset-seconds={}", minutes * 60))
            .await;

        assert_eq!(failures_of(&program, 100).await, [], "{minutes} min");
        assert_eq!(
            failures_of(&program, 10).await,
            [],
            "{minutes} min, after it"
        );
    }
}

#[tokio::test]
async fn a_date_that_does_not_help_is_a_clock_skew_of_the_facade() {
    let wrong_date = rejection(
        "signature expired",
        &[("date", "Sun, 06 Nov 1994 08:49:37 GMT")],
    );
    let upstream = Upstream::always(wrong_date).await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);

    let failure = program.failure(example_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unauthenticated, "CLOCK_SKEW")
    );
    assert_eq!(failure.metadata["credentialOwner"], "server");
    assert_eq!(
        upstream.requests().len(),
        1,
        "a time more than a day off is not believed"
    );
}

#[tokio::test]
async fn a_wrong_key_with_a_wrong_clock_stays_short_of_the_gateways_lock() {
    let sandbox = Sandbox::start();
    sandbox.set("clock?offset-seconds=1200").await;
    let program = with_key(&sandbox.url(), &WRONG_KEY);

    let failures = failures_of(&program, 50).await;

    assert_eq!(failures.len(), 50);
    assert_eq!(sandbox.count("bad_signatures").await, 1);
    assert_eq!(
        sandbox.count("task_requests").await,
        2,
        "one call corrects the clock for all"
    );
    let count = |reason| failures.iter().filter(|f| f.reason == reason).count();
    // The call that corrected the clock signs again, and another call may have used the key before it.
    let skewed = count("CLOCK_SKEW");
    assert!(skewed <= 1, "{skewed}");
    assert!(skewed + count("CREDENTIAL_REJECTED") <= 2);
    assert!(count("CREDENTIAL_LOCKED") >= 48);
}

#[tokio::test]
async fn a_fresh_temporary_key_that_is_wrong_is_guarded_like_any_other() {
    let wrong = r#"{"credential":{"access":"SANDBOXACCESSKEY","secret":"wrong","securitytoken":"sandbox-security-token","expires_at":"2100-01-01T00:00:00.000000Z"}}"#;
    let sandbox = Sandbox::start();
    let service = metadata_service(move |_| reply(200, &[], wrong)).await;
    let (url, metadata_url) = (sandbox.url(), service.url());
    let program = Program::start(&metadata("metadata", &url, &metadata_url), &[]);

    let failures = failures_of(&program, 100).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let later = failures_of(&program, 10).await;

    assert_eq!((failures.len(), later.len()), (100, 10));
    assert_eq!(sandbox.count("bad_signatures").await, 1);
}

#[tokio::test]
async fn a_rejected_temporary_key_is_replaced_at_once_and_not_when_its_life_is_over() {
    let service = metadata_service(|request| {
        let access = match request.number {
            1 => "FIRST",
            _ => "SECOND",
        };
        let key = format!(
            r#"{{"credential":{{"access":"{access}","secret":"s","securitytoken":"t","expires_at":"2100-01-01T00:00:00.000000Z"}}}}"#
        );
        reply(200, &[], key)
    })
    .await;
    let upstream = Upstream::start(|request| match request.header("authorization") {
        Some(signature) if signature.contains("Access=SECOND,") => example(),
        _ => rejection("verify aksk signature fail", &[]),
    })
    .await;
    let (url, metadata_url) = (upstream.url(), service.url());
    let program = Program::start(&metadata("metadata", &url, &metadata_url), &[]);

    let rejected = program.failure(example_request()).await;
    service.wait_for_requests(3).await;
    eventually("the second key is there", async || {
        program.metric(FETCHED).await >= 2.0
    })
    .await;
    let later = program.call(example_request()).await;

    assert_eq!(
        rejected.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert!(later.is_ok(), "{later:?}");
    assert_eq!(upstream.requests().len(), 2, "no call is retried");
}

#[tokio::test]
async fn a_throttle_window_also_holds_for_calls_that_waited_for_the_key() {
    let upstream = Upstream::always(reply(429, &[("retry-after", "300")], "")).await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);

    let failures = failures_of(&program, 100).await;

    assert!(failures.iter().all(|failure| failure.reason == "THROTTLED"));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_key_without_evidence_does_not_let_one_callers_hanging_instance_block_others() {
    let upstream = Upstream::start(|request| match request.line.contains("hangs") {
        true => vec![Step::Hold],
        false => example(),
    })
    .await;
    let program = with_key(&upstream.url(), &SANDBOX_KEY);
    let mut hanging = program.client().await;
    let hangs = tokio::spawn(async move {
        let mut request = example_request();
        request.instance_id = "hangs".to_owned();
        let _ = hanging.get_task_detail(request).await;
    });
    upstream.wait_for_requests(1).await;

    let reply = program.call(example_request()).await;

    assert!(reply.is_ok(), "{reply:?}");
    hangs.abort();
}

#[tokio::test]
async fn a_wrong_date_that_corrected_the_clock_is_dropped_at_the_next_expired_signature() {
    let ahead = jiff::Timestamp::now() + Duration::from_secs(20 * 60);
    let wrong_date = ahead.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let upstream = Upstream::start(move |request| match request.number {
        // A proxy's date, and then a reply that does not show that the offset is wrong.
        0 => rejection("signature expired", &[("date", &wrong_date)]),
        1 => reply(503, &[], ""),
        2 => rejection("signature expired", &[]),
        _ => example(),
    })
    .await;
    let url = upstream.url();
    let program = Program::start(
        &[
            "--endpoint",
            &url,
            "--credentials",
            "env",
            "--max-attempts",
            "1",
        ],
        &SANDBOX_KEY,
    );

    let first = program.call(example_request()).await;
    let second = program.call(example_request()).await;

    assert!(second.is_ok(), "{first:?} {second:?}");
}
