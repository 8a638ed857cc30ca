use super::*;

#[test]
fn every_error_without_a_reply_has_its_code_reason_delay_and_owner() {
    let facts = Facts::default;
    let lookup = |error| upstream(error, facts(), Owner::Server);
    let retry_after = WAIT;
    let rejected = credentials::Error::Rejected {
        issuer: Issuer::Identity,
        http_status: 401,
    };
    let unavailable = credentials::Error::Unavailable { retry_after };
    let locked = credentials::Error::Locked { retry_after };
    let invalid = Error::InvalidRequest(vec![Violation {
        field: "project_id",
        description: "is empty".to_owned(),
    }]);
    let cases = [
        (
            invalid,
            Code::InvalidArgument,
            "INVALID_REQUEST",
            None,
            None,
        ),
        (
            Error::Protocol(Code::Internal, "two messages"),
            Code::Internal,
            "INVALID_REQUEST",
            None,
            None,
        ),
        (
            Error::ProjectNotAllowed,
            Code::PermissionDenied,
            "PROJECT_NOT_ALLOWED",
            None,
            None,
        ),
        (
            Error::DeadlineExceeded,
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED",
            None,
            None,
        ),
        (
            Error::Overloaded,
            Code::ResourceExhausted,
            "OVERLOADED",
            Some(1),
            None,
        ),
        (
            Error::ShuttingDown { retry_after: None },
            Code::Unavailable,
            "SHUTTING_DOWN",
            None,
            None,
        ),
        (Error::Internal, Code::Internal, "INTERNAL", None, None),
        (
            Error::Credentials(credentials::Error::Missing),
            Code::Unauthenticated,
            "CREDENTIAL_MISSING",
            None,
            Some("caller"),
        ),
        (
            Error::Credentials(credentials::Error::Malformed),
            Code::Unauthenticated,
            "CREDENTIAL_REJECTED",
            None,
            Some("caller"),
        ),
        (
            Error::Credentials(rejected.clone()),
            Code::Unauthenticated,
            "CREDENTIAL_REJECTED",
            None,
            Some("server"),
        ),
        (
            Error::Credentials(unavailable.clone()),
            Code::Unavailable,
            "CREDENTIAL_UNAVAILABLE",
            Some(7),
            Some("server"),
        ),
        (
            Error::Credentials(locked.clone()),
            Code::Unauthenticated,
            "CREDENTIAL_LOCKED",
            Some(7),
            Some("server"),
        ),
        (
            Error::Credentials(credentials::Error::DeadlineExceeded),
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamDns, None)),
            Code::Unavailable,
            "UPSTREAM_DNS",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamConnect, None)),
            Code::Unavailable,
            "UPSTREAM_CONNECT",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamTls, None)),
            Code::Unavailable,
            "UPSTREAM_TLS",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamReset, None)),
            Code::Unavailable,
            "UPSTREAM_RESET",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamTruncated, None)),
            Code::Unavailable,
            "UPSTREAM_TRUNCATED",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Transport(Reason::UpstreamProtocol, None)),
            Code::Unavailable,
            "UPSTREAM_PROTOCOL",
            None,
            None,
        ),
        (
            lookup(upstream::Error::AttemptTimeout),
            Code::DeadlineExceeded,
            "UPSTREAM_TIMEOUT",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Malformed),
            Code::Internal,
            "UPSTREAM_MALFORMED_RESPONSE",
            None,
            None,
        ),
        (
            lookup(upstream::Error::TooLarge),
            Code::Internal,
            "UPSTREAM_RESPONSE_TOO_LARGE",
            None,
            None,
        ),
        (
            lookup(upstream::Error::DeadlineExceeded),
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED",
            None,
            None,
        ),
        (
            lookup(upstream::Error::CircuitOpen { retry_after }),
            Code::Unavailable,
            "CIRCUIT_OPEN",
            Some(7),
            None,
        ),
        (
            lookup(upstream::Error::ClockSkew),
            Code::Unauthenticated,
            "CLOCK_SKEW",
            None,
            Some("server"),
        ),
        (
            lookup(upstream::Error::Panicked),
            Code::Internal,
            "INTERNAL",
            None,
            None,
        ),
        (
            lookup(upstream::Error::Throttled {
                retry_after,
                subject: None,
            }),
            Code::ResourceExhausted,
            "THROTTLED",
            Some(7),
            None,
        ),
        (
            lookup(upstream::Error::Credentials(rejected)),
            Code::Unauthenticated,
            "CREDENTIAL_REJECTED",
            None,
            Some("server"),
        ),
        (
            lookup(upstream::Error::Credentials(unavailable)),
            Code::Unavailable,
            "CREDENTIAL_UNAVAILABLE",
            Some(7),
            Some("server"),
        ),
        (
            lookup(upstream::Error::Credentials(locked)),
            Code::Unauthenticated,
            "CREDENTIAL_LOCKED",
            Some(7),
            Some("server"),
        ),
    ];

    for (error, code, expected_reason, wait, owner) in cases {
        let status = status_of(&error);

        let details = check(&status);
        assert_eq!(status.code(), code, "{error:?}");
        assert_eq!(info(&status).0, expected_reason, "{error:?}");
        assert_eq!(
            Failure::from_error(&error).reason.as_str(),
            expected_reason,
            "{error:?}"
        );
        assert_eq!(
            details.retry_info().and_then(|info| info.retry_delay),
            wait.map(Duration::from_secs),
            "{error:?}"
        );
        assert_eq!(
            metadata(&status, "credentialOwner").as_deref(),
            owner,
            "{error:?}"
        );
    }
}

#[test]
fn an_error_without_facts_has_no_metadata() {
    let status = status_of(&Error::Internal);

    assert_eq!(info(&status).1, HashMap::new());
    assert_eq!(status.metadata().len(), 0);
}

#[test]
fn every_violation_is_in_bad_request_and_the_message_names_the_first() {
    let violation = |field, description: &str| Violation {
        field,
        description: description.to_owned(),
    };
    let error = Error::InvalidRequest(vec![
        violation("project_id", "is empty: give 1 to 64 characters"),
        violation("workflow_id", "is empty: give 1 to 128 characters"),
    ]);

    let status = status_of(&error);

    check(&status);
    let fields: Vec<_> = status
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|violation| (violation.field, violation.description))
        .collect();
    assert_eq!(
        fields[0],
        (
            "project_id".to_owned(),
            "is empty: give 1 to 64 characters".to_owned()
        )
    );
    assert_eq!(
        fields[1],
        (
            "workflow_id".to_owned(),
            "is empty: give 1 to 128 characters".to_owned()
        )
    );
    assert_eq!(
        status.message(),
        "project_id: is empty: give 1 to 64 characters; workflow_id: is empty: give 1 to 128 characters"
    );
}

#[test]
fn a_rejected_login_of_the_server_names_the_service_that_rejected_it() {
    for (issuer, service) in [(Issuer::Identity, "IAM"), (Issuer::Metadata, "METADATA")] {
        let error = Error::Credentials(credentials::Error::Rejected {
            issuer,
            http_status: 403,
        });

        let status = status_of(&error);

        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(metadata(&status, "httpStatus").as_deref(), Some("403"));
        assert_eq!(
            metadata(&status, "upstreamService").as_deref(),
            Some(service)
        );
    }
}

#[test]
fn the_pushback_is_rounded_up_to_milliseconds() {
    let error = Error::Credentials(credentials::Error::Unavailable {
        retry_after: Duration::from_micros(1_500_001),
    });

    let status = status_of(&error);

    assert_eq!(
        status.metadata().get("grpc-retry-pushback-ms").unwrap(),
        "1501"
    );
}

#[test]
fn a_status_of_the_grpc_library_gets_details_and_loses_its_text() {
    let text = "canary: invalid wire type";
    let cases = [
        (
            Code::OutOfRange,
            text,
            Code::ResourceExhausted,
            "INVALID_REQUEST",
        ),
        (
            Code::ResourceExhausted,
            text,
            Code::ResourceExhausted,
            "INVALID_REQUEST",
        ),
        (
            Code::Unimplemented,
            "",
            Code::Unimplemented,
            "INVALID_REQUEST",
        ),
        (
            Code::Unimplemented,
            "canary is compressed with",
            Code::Unimplemented,
            "INVALID_REQUEST",
        ),
        (Code::Internal, text, Code::Internal, "INVALID_REQUEST"),
        (
            Code::InvalidArgument,
            text,
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
        (
            Code::DeadlineExceeded,
            text,
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED",
        ),
    ];

    for (code, text, expected_code, expected_reason) in cases {
        let status = Failure::from_library(code, text).to_status("r-1", Duration::MAX);

        check(&status);
        assert_eq!(status.code(), expected_code, "{code:?}");
        assert_eq!(info(&status).0, expected_reason, "{code:?}");
        assert!(!status.message().contains("canary"), "{code:?}");
    }
    assert_ne!(
        Failure::from_library(Code::Unimplemented, "")
            .to_status("r-1", Duration::MAX)
            .message(),
        Failure::from_library(Code::Unimplemented, "compressed")
            .to_status("r-1", Duration::MAX)
            .message()
    );
}
