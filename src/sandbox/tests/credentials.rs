//! Tokens issued by IAM, and the metadata service.

use super::*;

const PASSWORD_BODY: &str = r#"{"auth":{"identity":{"methods":["password"],"password":{"user":{"name":"sandbox-user","password":"sandbox-password","domain":{"name":"sandbox-domain"}}}},"scope":{"project":{"name":"cn-north-4"}}}}"#;

fn token_request(sandbox: &TestSandbox, body: String) -> reqwest::RequestBuilder {
    sandbox
        .client
        .post(sandbox.url("/v3/auth/tokens"))
        .header("Content-Type", "application/json;charset=utf8")
        .body(body)
}

async fn issue(sandbox: &TestSandbox) -> String {
    let response = token_request(sandbox, PASSWORD_BODY.to_owned())
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    response.headers()["x-subject-token"]
        .to_str()
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn issued_token_has_the_documented_format_and_is_accepted() {
    let sandbox = start().await;
    let request = token_request(&sandbox, PASSWORD_BODY.to_owned());

    let response = request.send().await.unwrap();

    assert_eq!(response.status(), 201);
    let token = response.headers()["x-subject-token"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(token.starts_with("MII") && token.len() > 3000, "{token}");
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    let token_body = &body["token"];
    assert_eq!(token_body["project"]["name"], "cn-north-4");
    assert_eq!(token_body["project"]["domain"]["name"], DOMAIN);
    assert_eq!(token_body["user"]["name"], USER);
    assert!(!token_body["catalog"].as_array().unwrap().is_empty());
    let time = |name: &str| token_body[name].as_str().unwrap().to_owned();
    for name in ["issued_at", "expires_at"] {
        assert_eq!(
            time(name).len(),
            "2026-02-04T03:04:05.678000Z".len(),
            "{name}"
        );
    }
    let at = |name: &str| time(name).parse::<jiff::Timestamp>().unwrap();
    assert_eq!(
        at("expires_at").duration_since(at("issued_at")).as_hours(),
        24
    );
    assert_eq!(
        sandbox
            .task_request_with(&token, EXAMPLE_INSTANCE_ID)
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

#[tokio::test]
async fn nocatalog_omits_the_catalog() {
    let sandbox = start().await;
    let request = sandbox
        .client
        .post(sandbox.url("/v3/auth/tokens?nocatalog=true"))
        .body(PASSWORD_BODY);

    let (status, body) = send(request).await;

    assert_eq!(status, 201);
    assert_eq!(body["token"]["catalog"], serde_json::json!([]));
}

#[tokio::test]
async fn invalid_token_requests_get_a_keystone_error() {
    let sandbox = start().await;
    let cases = [
        ("wrong password", "sandbox-password", "other", 401),
        ("wrong user", "sandbox-user", "other", 401),
        ("wrong domain", "sandbox-domain", "other", 401),
        ("empty password", "sandbox-password", "", 400),
        ("other method", r#"["password"]"#, r#"["totp"]"#, 400),
        ("no user", "\"user\"", "\"person\"", 400),
        ("empty project", r#"{"name":"cn-north-4"}"#, "{}", 400),
        ("no JSON", "{", "", 400),
    ];

    for (case, from, to, status) in cases {
        let request = token_request(&sandbox, PASSWORD_BODY.replace(from, to));
        let (got, body) = send(request).await;

        assert_eq!(got, status, "{case}");
        assert_eq!(body["error"]["code"], status, "{case}");
        assert!(body["error"]["message"].is_string(), "{case}");
        assert!(body["error"]["title"].is_string(), "{case}");
    }
    assert_eq!(sandbox.count("token_requests").await, cases.len() as u64);
}

#[tokio::test]
async fn revoked_expired_and_unscoped_tokens_are_rejected() {
    let sandbox = start().await;
    let revoked = issue(&sandbox).await;
    sandbox.control("/sandbox/revoke-tokens").await;
    sandbox.control("/sandbox/token-life?seconds=-1").await;
    let expired = issue(&sandbox).await;
    sandbox.control("/sandbox/token-life?seconds=60").await;
    let good = issue(&sandbox).await;
    let unscoped = PASSWORD_BODY.replace(r#","scope":{"project":{"name":"cn-north-4"}}"#, "");
    let response = token_request(&sandbox, unscoped).send().await.unwrap();
    let unscoped = response.headers()["x-subject-token"].to_str().unwrap();

    for (case, token, status, code) in [
        ("revoked", revoked.as_str(), 401, Value::from("APIGW.0307")),
        ("expired", expired.as_str(), 401, Value::from("APIGW.0307")),
        ("unscoped", unscoped, 401, Value::from("APIGW.0301")),
        ("issued since", good.as_str(), 200, Value::Null),
        ("always good", TOKEN, 200, Value::Null),
    ] {
        let (got, body) = send(sandbox.task_request_with(token, EXAMPLE_INSTANCE_ID)).await;
        assert_eq!((got, &body["error_code"]), (status, &code), "{case}");
    }
}

#[tokio::test]
async fn injected_errors_are_returned_the_given_number_of_times() {
    let sandbox = start().await;
    let mut seen = Vec::new();

    for status in [503, 429] {
        sandbox
            .control(&format!("/sandbox/fail-iam?status={status}&times=2"))
            .await;
        sandbox
            .control(&format!("/sandbox/fail-metadata?status={status}&times=1"))
            .await;
        for _ in 0..3 {
            let request = token_request(&sandbox, PASSWORD_BODY.to_owned());
            seen.push(request.send().await.unwrap().status().as_u16());
        }
        for _ in 0..2 {
            let request = sandbox
                .client
                .get(sandbox.url("/openstack/latest/securitykey"));
            seen.push(request.send().await.unwrap().status().as_u16());
        }
    }

    assert_eq!(seen, [503, 503, 201, 503, 200, 429, 429, 201, 429, 200]);
}

#[tokio::test]
async fn hardened_mode_requires_a_metadata_token() {
    let sandbox = start().await;
    sandbox.control("/sandbox/hardened?on=true").await;
    let put = |life: &str| {
        sandbox
            .client
            .put(sandbox.url("/meta-data/latest/api/token"))
            .header("X-Metadata-Token-Ttl-Seconds", life)
    };
    let key = |token: &str| {
        sandbox
            .client
            .get(sandbox.url("/openstack/latest/securitykey"))
            .header("X-Metadata-Token", token)
            .send()
    };

    let token = put("21600").send().await.unwrap().text().await.unwrap();

    assert_eq!(key(&token).await.unwrap().status(), 200);
    assert_eq!(key("other").await.unwrap().status(), 401);
    let without = sandbox
        .client
        .get(sandbox.url("/openstack/latest/securitykey"));
    assert_eq!(without.send().await.unwrap().status(), 401);
    for life in ["0", "21601", "soon"] {
        assert_eq!(put(life).send().await.unwrap().status(), 400, "{life}");
    }
    sandbox.control("/sandbox/clock?offset-seconds=21601").await;
    assert_eq!(key(&token).await.unwrap().status(), 401);
    assert_eq!(sandbox.count("key_requests").await, 4);
    assert_eq!(sandbox.count("metadata_token_requests").await, 4);
}

#[tokio::test]
async fn temporary_key_has_the_documented_format() {
    let sandbox = start().await;
    sandbox.control("/sandbox/key-life?seconds=3600").await;

    let body = sandbox.get("/openstack/latest/securitykey").await;

    let credential = body["credential"].as_object().unwrap();
    let names: Vec<_> = credential.keys().map(String::as_str).collect();
    assert_eq!(names, ["access", "expires_at", "secret", "securitytoken"]);
    let end: jiff::Timestamp = credential["expires_at"].as_str().unwrap().parse().unwrap();
    let left = end.duration_since(jiff::Timestamp::now()).as_secs();
    assert!((3500..=3600).contains(&left), "{left}");
}
