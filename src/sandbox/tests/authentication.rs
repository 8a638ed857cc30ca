//! Authentication at the gateway.

use http::HeaderMap;

use super::*;
use crate::sandbox::signature;

const HEADERS: &[&str] = &["content-type", "host", "x-project-id", "x-sdk-date"];

/// How a test signs the request for the example task.
struct Signing<'a> {
    access: &'a str,
    secret: &'a str,
    security_token: Option<&'a str>,
    date: String,
    signed_headers: String,
}

impl Signing<'_> {
    /// Signs with the documented key, at `offset` seconds from the system's clock.
    fn documented(offset: i64) -> Self {
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(offset);
        Signing {
            access: ACCESS_KEY_ID,
            secret: SECRET_ACCESS_KEY,
            security_token: None,
            date: now.strftime("%Y%m%dT%H%M%SZ").to_string(),
            signed_headers: HEADERS.join(";"),
        }
    }

    fn headers(&self, sandbox: &TestSandbox) -> HeaderMap {
        let mut request = Request::post(task_path(EXAMPLE_INSTANCE_ID))
            .header("content-type", "application/json")
            .header("host", sandbox.base.trim_start_matches("http://"))
            .header("x-project-id", EXAMPLE_PROJECT_ID)
            .header("x-sdk-date", &self.date);
        if let Some(token) = self.security_token {
            request = request.header("x-security-token", token);
        }
        let mut request = request
            .body(Bytes::from_static(EXAMPLE_BODY.as_bytes()))
            .unwrap();
        let signed_headers = &self.signed_headers;
        let canonical = signature::canonical_request(&request, signed_headers).unwrap();
        let signature = signature::signature(&canonical, &self.date, self.secret);
        let authorization = format!(
            "SDK-HMAC-SHA256 Access={}, SignedHeaders={signed_headers}, Signature={signature}",
            self.access
        );
        let authorization = authorization.parse().unwrap();
        request.headers_mut().insert("authorization", authorization);
        std::mem::take(request.headers_mut())
    }

    fn request(&self, sandbox: &TestSandbox) -> reqwest::RequestBuilder {
        sandbox
            .client
            .post(sandbox.url(&task_path(EXAMPLE_INSTANCE_ID)))
            .headers(self.headers(sandbox))
            .body(EXAMPLE_BODY)
    }

    /// Sends the request, and returns the status and the error message, if any.
    async fn send(&self, sandbox: &TestSandbox) -> (u16, String) {
        let (status, body) = send(self.request(sandbox)).await;
        (
            status,
            body["error_msg"].as_str().unwrap_or_default().to_owned(),
        )
    }
}

#[tokio::test]
async fn requests_without_a_valid_token_are_rejected() {
    let sandbox = start().await;
    let bare = || {
        sandbox
            .client
            .post(sandbox.url(&task_path(EXAMPLE_INSTANCE_ID)))
            .header("content-type", "application/json")
            .body(EXAMPLE_BODY)
    };
    let cases = [
        ("none", bare(), "x-auth-token not found"),
        (
            "unknown",
            bare().header("x-auth-token", "other"),
            "decrypt token fail",
        ),
        (
            "repeated",
            bare()
                .header("x-auth-token", TOKEN)
                .header("x-auth-token", TOKEN),
            "decrypt token fail",
        ),
        (
            "bearer",
            bare().header("authorization", "Bearer sandbox-token"),
            "not properly formatted",
        ),
        (
            "token and signature",
            Signing::documented(0)
                .request(&sandbox)
                .header("x-auth-token", TOKEN),
            "both",
        ),
        (
            "magic instance",
            sandbox.task_request_with("other", "status-500"),
            "decrypt token fail",
        ),
    ];

    for (case, request, message) in cases {
        let (status, body) = send(request).await;

        assert_eq!(
            (status, &body["error_code"]),
            (401, &Value::from("APIGW.0301")),
            "{case}"
        );
        let text = body["error_msg"].as_str().unwrap();
        assert!(text.contains(message), "{case}: {text}");
        assert_eq!(
            body["request_id"].as_str().map(str::len),
            Some(32),
            "{case}"
        );
    }
}

#[tokio::test]
async fn valid_signature_is_accepted_with_and_without_the_security_token() {
    let sandbox = start().await;
    let plain = Signing::documented(0);
    let with_token = Signing {
        security_token: Some(SECURITY_TOKEN),
        signed_headers: format!("{};x-security-token", HEADERS.join(";")),
        ..Signing::documented(0)
    };

    assert_eq!(plain.send(&sandbox).await.0, 200);
    assert_eq!(with_token.send(&sandbox).await.0, 200);
    assert_eq!(sandbox.count("bad_signatures").await, 0);
}

#[tokio::test]
async fn invalid_signed_requests_are_rejected() {
    let sandbox = start().await;
    let good = || Signing::documented(0);
    let cases = [
        (
            "other SK",
            Signing {
                secret: "other",
                ..good()
            },
            "verify aksk signature fail",
        ),
        (
            "unknown AK",
            Signing {
                access: "OTHERKEY",
                ..good()
            },
            "ak not exist",
        ),
        (
            "other security token",
            Signing {
                security_token: Some("other"),
                ..good()
            },
            "security token",
        ),
        (
            "no host",
            Signing {
                signed_headers: "content-type;x-sdk-date".into(),
                ..good()
            },
            "host",
        ),
        (
            "no date signed",
            Signing {
                signed_headers: "content-type;host".into(),
                ..good()
            },
            "x-sdk-date",
        ),
        (
            "no date",
            Signing {
                date: String::new(),
                ..good()
            },
            "x-sdk-date is malformed",
        ),
        (
            "date in another format",
            Signing {
                date: "2026-11-23T13:00:00Z".into(),
                ..good()
            },
            "x-sdk-date is malformed",
        ),
    ];

    for (case, signing, message) in cases {
        let (status, text) = signing.send(&sandbox).await;

        assert_eq!(status, 401, "{case}");
        assert!(text.contains(message), "{case}: {text}");
    }
    let changed_body = good().request(&sandbox).body(r#"{"workflow_id":"x"}"#);
    assert_eq!(send(changed_body).await.0, 401);
    assert_eq!(sandbox.count("bad_signatures").await, 2);
}

#[tokio::test]
async fn date_may_differ_by_14_but_not_16_minutes() {
    let sandbox = start().await;
    for (minutes, expected) in [(-16, 401), (-14, 200), (14, 200), (16, 401)] {
        assert_eq!(
            Signing::documented(minutes * 60).send(&sandbox).await.0,
            expected,
            "{minutes}"
        );
    }

    sandbox.control("/sandbox/clock?offset-seconds=960").await;

    assert_eq!(Signing::documented(0).send(&sandbox).await.0, 401);
    let response = Signing::documented(960)
        .request(&sandbox)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let date = response.headers()["date"].to_str().unwrap();
    let ahead = httpdate::parse_http_date(date).unwrap();
    let ahead = jiff::Timestamp::try_from(ahead)
        .unwrap()
        .duration_since(jiff::Timestamp::now());
    assert!((940..=980).contains(&ahead.as_secs()), "{date}");
}

#[tokio::test]
async fn five_bad_signatures_in_a_row_lock_the_key_for_five_minutes() {
    let sandbox = start().await;
    let bad = Signing {
        secret: "other",
        ..Signing::documented(0)
    };
    for _ in 0..4 {
        bad.send(&sandbox).await;
    }
    assert_eq!(
        Signing::documented(0).send(&sandbox).await.0,
        200,
        "a valid signature resets the count"
    );
    for _ in 0..5 {
        assert!(
            bad.send(&sandbox)
                .await
                .1
                .contains("verify aksk signature fail")
        );
    }

    let (status, locked) = Signing::documented(0).send(&sandbox).await;
    sandbox.control("/sandbox/clock?offset-seconds=310").await;
    let after = Signing::documented(310).send(&sandbox).await;

    assert_eq!(status, 401);
    assert!(
        locked.contains("AK access failed to reach the limit"),
        "{locked}"
    );
    assert_eq!(after.0, 200);
    assert_eq!(sandbox.count("bad_signatures").await, 9);
}

#[tokio::test]
async fn temporary_key_requires_its_security_token_and_expires() {
    let sandbox = start().await;
    let keys = sandbox.get("/openstack/latest/securitykey").await;
    let others = sandbox.get("/openstack/latest/securitykey").await;
    let text = |keys: &Value, name: &str| keys["credential"][name].as_str().unwrap().to_owned();
    let (access, secret) = (text(&keys, "access"), text(&keys, "secret"));
    let (own, other) = (text(&keys, "securitytoken"), text(&others, "securitytoken"));
    let sign = |token, offset| Signing {
        access: &access,
        secret: &secret,
        security_token: token,
        signed_headers: "host;x-sdk-date".to_owned(),
        ..Signing::documented(offset)
    };

    assert_eq!(sign(Some(&own), 0).send(&sandbox).await.0, 200);
    assert_eq!(sign(None, 0).send(&sandbox).await.0, 401);
    assert_eq!(sign(Some(&other), 0).send(&sandbox).await.0, 401);
    sandbox.control("/sandbox/clock?offset-seconds=86401").await;
    let (status, message) = sign(Some(&own), 86_401).send(&sandbox).await;
    assert_eq!(status, 401);
    assert!(message.contains("expired"), "{message}");
}
