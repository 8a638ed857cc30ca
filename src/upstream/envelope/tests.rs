use super::*;

/// (code, message, request id, whether there is a code at all)
fn found(body: &str) -> (Option<String>, String, Option<String>, bool) {
    let envelope = read(body.as_bytes());
    (
        envelope.error_code,
        envelope.message,
        envelope.request_id,
        envelope.has_code,
    )
}

#[test]
fn every_shape_that_the_vendor_uses_is_read() {
    let cases = [
        (
            "rds v3",
            r#"{"error_code":"DBS.200543","error_msg":"m"}"#,
            Some("DBS.200543"),
            "m",
            None,
        ),
        (
            "gateway",
            r#"{"error_msg":"m","error_code":"APIGW.0301","request_id":"r-1"}"#,
            Some("APIGW.0301"),
            "m",
            Some("r-1"),
        ),
        (
            "keystone",
            r#"{"error":{"code":401,"message":"m","title":"Unauthorized"}}"#,
            None,
            "m",
            None,
        ),
        (
            "iam",
            r#"{"error_msg":"m","error_code":"IAM.0006"}"#,
            Some("IAM.0006"),
            "m",
            None,
        ),
        (
            "policy explanation nested",
            r#"{"detail":{"error_code":"IAM.0002","error_msg":"m","encoded_authorization_message":"e"}}"#,
            Some("IAM.0002"),
            "m",
            None,
        ),
        (
            "parts",
            r#"{"details":["x",{"error_code":"DBS.200001","error_msg":"m"},{"error_code":"DBS.2","error_msg":"n"}]}"#,
            Some("DBS.200001"),
            "m",
            None,
        ),
        (
            "camel case",
            r#"{"errorCode":"A.1","errorMsg":"m","requestId":"r"}"#,
            Some("A.1"),
            "m",
            Some("r"),
        ),
        (
            "camel case, long",
            r#"{"errorCode":"A.1","errorMessage":"m"}"#,
            Some("A.1"),
            "m",
            None,
        ),
        (
            "flat",
            r#"{"code":"A.1","message":"m"}"#,
            Some("A.1"),
            "m",
            None,
        ),
        (
            "trove",
            r#"{"itemNotFound":{"code":404,"message":"m"}}"#,
            None,
            "m",
            None,
        ),
        (
            "rds v1",
            r#"{"errCode":"RDS.1102","externalMessage":"m"}"#,
            Some("RDS.1102"),
            "m",
            None,
        ),
    ];

    for (name, body, code, message, request_id) in cases {
        let expected = (
            code.map(str::to_owned),
            message.to_owned(),
            request_id.map(str::to_owned),
            true,
        );

        assert_eq!(found(body), expected, "{name}");
        assert_eq!(read(body.as_bytes()).body, BodyKind::JsonObject, "{name}");
    }
}

#[test]
fn odd_codes_are_taken_for_what_they_are() {
    let cases = [
        (
            "code alone",
            r#"{"error_code":"DBS.1"}"#,
            Some("DBS.1"),
            "",
            true,
        ),
        (
            "message is null",
            r#"{"error_code":"DBS.9","error_msg":null}"#,
            Some("DBS.9"),
            "",
            true,
        ),
        (
            "empty code",
            r#"{"error_code":"","error_msg":"m"}"#,
            None,
            "m",
            false,
        ),
        (
            "blank code",
            r#"{"error_code":"  ","error_msg":"m"}"#,
            None,
            "m",
            false,
        ),
        ("null code", r#"{"error_code":null}"#, None, "", false),
        (
            "object as code",
            r#"{"error_code":{},"error_msg":"m"}"#,
            None,
            "m",
            false,
        ),
        ("bool as code", r#"{"error_code":false}"#, None, "", false),
        (
            "a mere number",
            r#"{"error_code":17,"error_msg":"m"}"#,
            None,
            "m",
            true,
        ),
        (
            "a mere number as text",
            r#"{"code":"404","message":"m"}"#,
            None,
            "m",
            true,
        ),
        (
            "a number that iam documents",
            r#"{"error_code":1101,"error_msg":"m"}"#,
            Some("1101"),
            "m",
            true,
        ),
        (
            "the same as text",
            r#"{"code":"1101","message":"m"}"#,
            Some("1101"),
            "m",
            true,
        ),
        (
            "blanks around",
            r#"{"error_code":" DBS.1 "}"#,
            Some("DBS.1"),
            "",
            true,
        ),
        ("blanks inside", r#"{"error_code":"DBS 1"}"#, None, "", true),
        (
            "line end inside",
            r#"{"error_code":"DBS.1\nx"}"#,
            None,
            "",
            true,
        ),
        (
            "not ASCII",
            r#"{"error_code":"DBS.\u4e00"}"#,
            None,
            "",
            true,
        ),
        (
            "empty spelling before a full one",
            r#"{"error_code":"","code":"A.1"}"#,
            Some("A.1"),
            "",
            true,
        ),
        (
            "number above, code below",
            r#"{"code":400,"message":"m","error":{"error_code":"A.1","error_msg":"n"}}"#,
            Some("A.1"),
            "n",
            true,
        ),
        (
            "above before below",
            r#"{"x":{"error_code":"B.1","error_msg":"n"},"error_code":"A.1","error_msg":"m"}"#,
            Some("A.1"),
            "m",
            true,
        ),
        (
            "the first of two",
            r#"{"x":{"error_code":"A.1"},"y":{"error_code":"B.1"}}"#,
            Some("A.1"),
            "",
            true,
        ),
        (
            "in another array",
            r#"{"list":[{"error_code":"A.1"}]}"#,
            None,
            "",
            false,
        ),
        ("nothing", "{}", None, "", false),
    ];

    for (name, body, code, message, has_code) in cases {
        let expected = (code.map(str::to_owned), message.to_owned(), None, has_code);

        assert_eq!(found(body), expected, "{name}");
    }
}

#[test]
fn a_code_or_request_id_that_is_too_long_is_not_taken() {
    for (length, expected) in [(64, true), (65, false)] {
        let body = format!(r#"{{"error_code":"{}"}}"#, "x".repeat(length));

        assert_eq!(
            read(body.as_bytes()).error_code.is_some(),
            expected,
            "{length}"
        );
    }
    for (length, expected) in [(128, true), (129, false)] {
        let body = format!(r#"{{"request_id":"{}"}}"#, "x".repeat(length));

        assert_eq!(
            read(body.as_bytes()).request_id.is_some(),
            expected,
            "{length}"
        );
    }
}

#[test]
fn a_code_is_found_on_eight_levels_and_not_on_the_ninth() {
    for (levels, expected) in [(8, Some("DBS.1")), (9, None)] {
        let body = format!(
            r#"{}{{"error_code":"DBS.1"}}{}"#,
            r#"{"x":"#.repeat(levels - 1),
            "}".repeat(levels - 1)
        );

        assert_eq!(
            read(body.as_bytes()).error_code.as_deref(),
            expected,
            "{levels}"
        );
    }
}

#[test]
fn each_object_of_a_repeated_name_is_looked_into() {
    let body = br#"{"x":{"a":1},"x":{"error_code":"DBS.1"}}"#;

    assert_eq!(read(body).error_code.as_deref(), Some("DBS.1"));
}

#[test]
fn a_policy_explanation_with_control_characters_is_none() {
    let body = br#"{"error_code":"IAM.0002","encoded_authorization_message":"a\u001b[31mb"}"#;

    assert_eq!(read(body).encoded_authorization_message, None);
}

#[test]
fn the_policy_explanation_is_found_at_the_top_and_below() {
    let bodies = [
        r#"{"error_code":"IAM.0002","encoded_authorization_message":"e"}"#,
        r#"{"error_code":"IAM.0002","x":{"y":{"encoded_authorization_message":"e"}}}"#,
    ];

    for body in bodies {
        let envelope = read(body.as_bytes());

        assert_eq!(
            envelope.encoded_authorization_message.as_deref(),
            Some("e"),
            "{body}"
        );
        assert_eq!(envelope.error_code.as_deref(), Some("IAM.0002"));
    }
}

#[test]
fn a_body_that_is_not_a_json_object_has_no_contents() {
    let cases: [(&[u8], BodyKind); 12] = [
        (b"", BodyKind::Empty),
        (b" \r\n\t", BodyKind::Empty),
        (b"<html>502</html>", BodyKind::Other),
        (b"error_code: DBS.1", BodyKind::Other),
        (b"null", BodyKind::Other),
        (b"[]", BodyKind::Other),
        (br#"["error_code"]"#, BodyKind::Other),
        (br#""text""#, BodyKind::Other),
        (br#"{"error_code":"DBS.1""#, BodyKind::Other),
        (br#"{"error_code":"DBS.1"} trailing"#, BodyKind::Other),
        (b"\xef\xbb\xbf{}", BodyKind::Other),
        (b"{\"error_code\":\"DBS.\xff\"}", BodyKind::Other),
    ];

    for (body, kind) in cases {
        let expected = Envelope {
            body: kind,
            ..Envelope::default()
        };

        assert_eq!(read(body), expected, "{}", String::from_utf8_lossy(body));
    }
}

#[test]
fn hostile_bodies_of_a_mebibyte_are_read_without_overflow() {
    let deep = 250_000;
    let objects = r#"{"a":"#.repeat(deep / 2) + "1" + &"}".repeat(deep / 2);
    let arrays = format!(r#"{{"details":{}{}}}"#, "[".repeat(deep), "]".repeat(deep));
    let wide = format!(
        r#"{{"a":{{}}{},"error_code":"DBS.1"}}"#,
        r#","a":{}"#.repeat(100_000)
    );
    let repeated = format!(r#"{{"code":"A.1"{}}}"#, r#","code":"B.1""#.repeat(70_000));
    let details = format!(r#"{{"details":[{{}}{}]}}"#, ",{}".repeat(300_000));

    assert_eq!(read(objects.as_bytes()).error_code, None);
    assert_eq!(read(arrays.as_bytes()).error_code, None);
    assert_eq!(read(wide.as_bytes()).error_code.as_deref(), Some("DBS.1"));
    assert_eq!(read(repeated.as_bytes()).error_code.as_deref(), Some("A.1"));
    assert_eq!(read(details.as_bytes()).body, BodyKind::JsonObject);
}

#[test]
fn an_error_reply_as_large_as_allowed_is_searched_at_most_three_times() {
    let mut json = format!(
        r#"{{"error_code":"DBS.1","text":"{}"}}"#,
        "x".repeat(900_000)
    );
    for _ in 0..MAX_DEPTH - 2 {
        json = format!(r#"{{"error":{json}}}"#);
    }
    let small = format!(
        r#"{{"error":{{"error":{{"error_code":"DBS.1","text":"{}"}}}}}}"#,
        "x".repeat(90_000)
    );

    assert_eq!(found(&json).0, None);
    assert_eq!(found(&small).0.as_deref(), Some("DBS.1"));
}

#[test]
fn an_error_reply_with_many_details_is_read_to_its_end() {
    let many = vec!["{}"; 300_000].join(",");

    let code = found(&format!(r#"{{"details":[{many}],"error_code":"DBS.1"}}"#));
    let broken = found(&format!(r#"{{"details":[{many},],"error_code":"DBS.1"}}"#));

    assert_eq!(code.0.as_deref(), Some("DBS.1"));
    assert_eq!(broken.0, None);
}
