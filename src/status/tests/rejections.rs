use http::HeaderValue;

use super::*;

#[test]
fn every_documented_code_comes_out_with_its_code_and_reason() {
    let table = include_str!("../../../tests/fixtures/errors/expected.tsv");

    for line in table.lines().skip(1) {
        let columns: Vec<_> = line.split('\t').collect();
        let body = format!(r#"{{"error_code":"{}","error_msg":"m"}}"#, columns[0]);

        let status = answered(columns[1].parse().unwrap(), &body);

        let details = check(&status);
        let code = format!("{:?}", status.code());
        assert_eq!(code.to_uppercase(), columns[2].replace('_', ""), "{line}");
        assert_eq!(info(&status).0, columns[3], "{line}");
        assert_eq!(
            metadata(&status, "upstreamCode").as_deref(),
            Some(columns[0])
        );
        assert_eq!(metadata(&status, "httpStatus").as_deref(), Some(columns[1]));
        let wait = details.retry_info().and_then(|info| info.retry_delay);
        let expected = columns[6].parse().ok().map(Duration::from_secs);
        assert_eq!(wait, expected, "{line}");
        let service = match &columns[0][..1] {
            "D" => "RDS",
            "A" => "APIGW",
            _ => "IAM",
        };
        assert_eq!(
            metadata(&status, "upstreamService").as_deref(),
            Some(service)
        );
    }
}

#[test]
fn an_answer_in_full_carries_all_that_is_known() {
    let mut headers = HeaderMap::new();
    headers.insert("x-request-id", HeaderValue::from_static("u-1"));
    let body = br#"{"error_code":"IAM.0002","error_msg":"no right","encoded_authorization_message":"opaque"}"#;

    let status = status_of(&answered_to(Owner::Server, 403, &headers, body));

    check(&status);
    let expected = [
        ("upstreamService", "IAM"),
        ("upstreamCode", "IAM.0002"),
        ("httpStatus", "403"),
        ("upstreamRequestId", "u-1"),
        ("credentialOwner", "server"),
        ("encodedAuthorizationMessage", "opaque"),
    ];
    let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(
        info(&status),
        ("PERMISSION_DENIED".to_owned(), HashMap::from(expected))
    );
    let id = status.metadata().get("x-upstream-request-id").unwrap();
    assert_eq!(id, "u-1");
    assert!(id.is_sensitive(), "no place in the table of headers");
    assert_eq!(status.message(), "no right");
}

#[test]
fn a_missing_thing_is_named() {
    let cases = [
        (400, "DBS.200543", "task", "workflow-1"),
        (404, "DBS.200002", "instance", "instance-1"),
        (400, "IAM.1109", "project", "project-1"),
        (404, "DBS.290002", "resource", "DBS.290002"),
    ];

    for (http_status, code, kind, name) in cases {
        let status = answered(http_status, &format!(r#"{{"error_code":"{code}"}}"#));

        let resource = status
            .get_details_resource_info()
            .expect("NOT_FOUND names it");
        assert_eq!(
            (
                resource.resource_type.as_str(),
                resource.resource_name.as_str()
            ),
            (kind, name)
        );
    }
    check(&answered(404, ""));
}

#[test]
fn a_throttled_call_names_the_subject_when_upstream_does() {
    let cases = [
        (
            r#"{"error_code":"APIGW.0308","error_msg":"policy user over ratelimit,limit:60,time:1 minute"}"#,
            "user",
        ),
        (
            r#"{"error_code":"APIGW.0308","error_msg":"policy ip over ratelimit,limit:60,time:1 minute"}"#,
            "ip",
        ),
        ("", ""),
    ];

    for (body, subject) in cases {
        let status = answered(429, body);

        let quota = status.get_details_quota_failure().expect("always with 429");
        assert_eq!(quota.violations.len(), 1);
        assert_eq!(quota.violations[0].subject, subject);
        assert_eq!(
            status.metadata().get("grpc-retry-pushback-ms").unwrap(),
            "60000"
        );
    }
}

#[test]
fn a_credential_failure_says_whose_credential_it_was() {
    let body = br#"{"error_code":"APIGW.0301","error_msg":"verify aksk signature fail"}"#;

    let caller = status_of(&answered_to(Owner::Caller, 401, &HeaderMap::new(), body));
    let server = status_of(&answered_to(Owner::Server, 401, &HeaderMap::new(), body));

    assert_eq!(
        metadata(&caller, "credentialOwner").as_deref(),
        Some("caller")
    );
    assert_eq!(
        metadata(&server, "credentialOwner").as_deref(),
        Some("server")
    );
    assert_ne!(caller.message(), server.message());
}
