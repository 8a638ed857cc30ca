use super::*;

#[test]
fn the_text_of_rds_becomes_one_clean_line_of_256_characters() {
    let long = "x".repeat(300);
    let cases = [
        (
            "plain",
            "The DB instance does not exist.",
            "The DB instance does not exist.",
        ),
        (
            "not English",
            "\u{5b9e}\u{4f8b}\u{4e0d}\u{5b58}\u{5728}",
            "\u{5b9e}\u{4f8b}\u{4e0d}\u{5b58}\u{5728}",
        ),
        (
            "line breaks",
            "first\\nsecond\\r\\nthird\\tfourth",
            "first second  third fourth",
        ),
        (
            "control characters",
            "a\\u0000b\\u001b[31mc\\u007f\\u0085",
            "ab[31mc",
        ),
        ("writing direction", "a\\u202eb", "ab"),
        ("too long", long.as_str(), &long[..256]),
    ];

    for (name, text, expected) in cases {
        let status = status_of_reply(
            400,
            &format!(r#"{{"error_code":"DBS.200001","error_msg":"{text}"}}"#),
        );

        check(&status);
        assert_eq!(status.message(), expected, "{name}");
    }
}

#[test]
fn wide_characters_are_cut_to_the_size_limit_of_the_header() {
    let wide = "\u{1f600}".repeat(300);

    let status = status_of_reply(
        400,
        &format!(r#"{{"error_code":"DBS.1","error_msg":"{wide}"}}"#),
    );

    check(&status);
    assert_eq!(status.message().chars().count(), 128);
}

#[test]
fn the_text_of_a_failed_authentication_is_never_passed_on() {
    let text = "canary ak not exist";
    let cases = [
        (401, "APIGW.0301"),
        (401, "APIGW.0303"),
        (401, "APIGW.0307"),
        (403, "APIGW.0302"),
        (403, "APIGW.0304"),
        (403, "APIGW.0310"),
        (200, "APIGW.0301"),
        (500, "APIGW.0301"),
        (401, "IAM.0001"),
        (401, "IAM.0064"),
        (400, "IAM.1104"),
        (400, "IAM.1108"),
        (403, "DBS.280056"),
        (401, "DBS.999999"),
    ];

    for owner in [Owner::Caller, Owner::Server] {
        for (http_status, code) in cases {
            let body = format!(r#"{{"error_code":"{code}","error_msg":"{text}"}}"#);

            let error = rejection_for(owner, http_status, &HeaderMap::new(), body.as_bytes());
            let status = status_of(&error);

            check(&status);
            assert!(!status.message().contains("canary"), "{http_status} {code}");
            let details = String::from_utf8_lossy(status.details());
            assert!(!details.contains("canary"), "{http_status} {code}");
        }
    }
}

#[test]
fn text_that_repeats_a_header_is_never_passed_on() {
    let texts = [
        "canary Authorization: x",
        "canary|x-sdk-date:1|SDK-HMAC-SHA256 Access=AK1",
        "canary X-Auth-Token is bad",
        "canary x-security-token",
        "canary Signature=00",
        "canary X-Auth\\u0000-Token is bad",
        "canary SDK\\u202e-HMAC-SHA256",
    ];

    for text in texts {
        let status = status_of_reply(
            400,
            &format!(r#"{{"error_code":"DBS.200001","error_msg":"{text}"}}"#),
        );

        check(&status);
        assert!(!status.message().contains("canary"), "{text}");
    }
}

#[test]
fn a_reply_without_readable_text_gets_a_sentence_of_the_facade() {
    let bodies = [
        "<html>canary</html>",
        "canary",
        "[\"canary\"]",
        "\"canary\"",
        "",
        r#"{"other":"canary"}"#,
        r#"{"error_code":"DBS.1","error_msg":"<html>canary</html>"}"#,
    ];

    for body in bodies {
        for http_status in [400, 403, 404, 409, 413, 500, 502, 503, 504, 599] {
            let status = status_of_reply(http_status, body);

            check(&status);
            assert!(!status.message().contains("canary"), "{http_status} {body}");
        }
    }
}

#[test]
fn details_over_4_kib_lose_the_authorization_message_first_and_then_violations() {
    for length in [100, 3000, 4000, 4096, 10_000, 1_000_000] {
        let body = format!(
            r#"{{"error_code":"IAM.0002","error_msg":"m","encoded_authorization_message":"{}"}}"#,
            "\u{e9}".repeat(length / 2)
        );

        let status = status_of_reply(403, &body);

        check(&status);
        let remaining = metadata(&status, "encodedAuthorizationMessage").unwrap();
        assert!(
            remaining.len() >= length.min(3700),
            "{} of {length}",
            remaining.len()
        );
    }

    let violation = Violation {
        field: "project_id",
        description: "x".repeat(1500),
    };
    let status = status_of(&Error::InvalidRequest(vec![violation; 4]));

    let details = check(&status);
    assert_eq!(details.bad_request().unwrap().field_violations.len(), 2);
}
