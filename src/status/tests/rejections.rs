use http::HeaderValue;

use super::*;

#[test]
fn every_documented_error_code_maps_to_its_grpc_code_and_reason() {
    let table = include_str!("../../../tests/fixtures/errors/expected.tsv");

    for line in table.lines().skip(1) {
        let columns: Vec<_> = line.split('\t').collect();
        let body = format!(r#"{{"error_code":"{}","error_msg":"m"}}"#, columns[0]);

        let status = status_of_reply(columns[1].parse().unwrap(), &body);

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
fn a_complete_error_reply_sets_every_detail() {
    let mut headers = HeaderMap::new();
    headers.insert("x-request-id", HeaderValue::from_static("u-1"));
    let body = br#"{"error_code":"IAM.0002","error_msg":"no right","encoded_authorization_message":"opaque"}"#;

    let status = status_of(&rejection_for(Owner::Server, 403, &headers, body));

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
    assert!(id.is_sensitive(), "kept out of the HPACK table");
    assert_eq!(status.message(), "no right");
}

#[test]
fn a_missing_resource_is_named() {
    let cases = [
        (400, "DBS.200543", "task", "workflow-1"),
        (404, "DBS.200002", "instance", "instance-1"),
        (400, "IAM.1109", "project", "project-1"),
        (404, "DBS.290002", "resource", "DBS.290002"),
    ];

    for (http_status, code, kind, name) in cases {
        let status = status_of_reply(http_status, &format!(r#"{{"error_code":"{code}"}}"#));

        let resource = status
            .get_details_resource_info()
            .expect("NOT_FOUND has ResourceInfo");
        assert_eq!(
            (
                resource.resource_type.as_str(),
                resource.resource_name.as_str()
            ),
            (kind, name)
        );
    }
    check(&status_of_reply(404, ""));
}

#[test]
fn a_throttled_call_names_the_subject_if_rds_does() {
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
        let status = status_of_reply(429, body);

        let quota = status
            .get_details_quota_failure()
            .expect("every 429 has QuotaFailure");
        assert_eq!(quota.violations.len(), 1);
        assert_eq!(quota.violations[0].subject, subject);
        assert_eq!(
            status.metadata().get("grpc-retry-pushback-ms").unwrap(),
            "60000"
        );
    }
}

#[test]
fn a_rejected_credential_names_its_owner() {
    let body = br#"{"error_code":"APIGW.0301","error_msg":"verify aksk signature fail"}"#;

    let caller = status_of(&rejection_for(Owner::Caller, 401, &HeaderMap::new(), body));
    let server = status_of(&rejection_for(Owner::Server, 401, &HeaderMap::new(), body));

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
