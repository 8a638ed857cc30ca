use std::{
    pin::pin,
    task::{Context, Poll, Waker},
};

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::pb::TaskState;

/// The example reply of the vendor's page.
const EXAMPLE: &str = r#"{
    "instance_id": "1ffc4167903840cb93a3da56d28c14fdin01",
    "instance_name": "mysql-instance",
    "job_id": "102772a9-31fa-4129-b9f8-7638e2792f3b",
    "job_name": "CreateMysqlSingleHAInstance"
}"#;

fn decoded(task: &Task) -> GetTaskDetailResponse {
    let mut encoded = Vec::new();
    task.encode(&mut encoded);
    GetTaskDetailResponse::decode(&*encoded).expect("a message")
}

fn parse(body: &str) -> Result<GetTaskDetailResponse, NotATask> {
    Ok(decoded(&parse_task_detail(body.as_bytes())?))
}

/// A task of which only `job_id` is known, with one more member.
fn with(member: &str) -> Result<GetTaskDetailResponse, NotATask> {
    parse(&format!(r#"{{"job_id":"j",{member}}}"#))
}

fn job() -> GetTaskDetailResponse {
    GetTaskDetailResponse {
        job_id: "j".to_owned(),
        ..GetTaskDetailResponse::default()
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn the_example_of_the_vendors_page_is_read() {
    let task = parse(EXAMPLE).unwrap();

    assert_eq!(
        task,
        GetTaskDetailResponse {
            instance_id: "1ffc4167903840cb93a3da56d28c14fdin01".to_owned(),
            instance_name: "mysql-instance".to_owned(),
            job_id: "102772a9-31fa-4129-b9f8-7638e2792f3b".to_owned(),
            job_name: "CreateMysqlSingleHAInstance".to_owned(),
            ..GetTaskDetailResponse::default()
        }
    );
}

#[test]
fn every_field_of_the_vendors_model_is_read() {
    let body = r#"{"instance_id":"i","instance_name":"n","job_id":"j","job_name":"k",
        "created_at":"2025-12-09T08:09:10+0800","update_at":"u","process":"60%","status":"Running",
        "sub_task_list":[{"sub_task_name":"s","percent":"60","executed_time":"e","status":"Pending",
        "remaining_time":"r","show_detail":true},{}]}"#;

    let task = parse(body).unwrap();

    let first = SubTask {
        sub_task_name: some("s"),
        percent: some("60"),
        executed_time: some("e"),
        status: some("Pending"),
        remaining_time: some("r"),
        show_detail: Some(true),
        state: TaskState::Pending.into(),
        progress_percent: Some(60),
    };
    assert_eq!(
        task,
        GetTaskDetailResponse {
            instance_id: "i".to_owned(),
            instance_name: "n".to_owned(),
            job_id: "j".to_owned(),
            job_name: "k".to_owned(),
            created_at: some("2025-12-09T08:09:10+0800"),
            update_at: some("u"),
            process: some("60%"),
            status: some("Running"),
            state: TaskState::Running.into(),
            progress_percent: Some(60),
            create_time: Some(prost_types::Timestamp {
                seconds: 1_765_238_950,
                nanos: 0,
            }),
            update_time: None,
            sub_task_list: vec![first, SubTask::default()],
        }
    );
}

#[test]
fn a_value_of_another_kind_becomes_its_json_text_or_stays_unset() {
    let cases = [
        ("text", r#""60""#, some("60")),
        ("empty text", r#""""#, some("")),
        (
            "escapes",
            r#""a\u00e9\n\ud83d\ude00""#,
            some("a\u{e9}\n\u{1f600}"),
        ),
        ("null", "null", None),
        ("integer", "60", some("60")),
        ("negative", "-1", some("-1")),
        ("fraction", "1.0", some("1.0")),
        ("exponent", "1e3", some("1e3")),
        (
            "beyond any integer",
            "123456789012345678901234567890",
            some("123456789012345678901234567890"),
        ),
        ("bool", "true", some("true")),
        ("blanks around", " 60 ", some("60")),
        ("object", r#"{"a":1}"#, None),
        ("array", "[1]", None),
    ];

    for (name, value, expected) in cases {
        let task = with(&format!(r#""process":{value}"#)).unwrap();

        assert_eq!(task.process, expected, "{name}");
    }
}

#[test]
fn the_documented_fields_are_as_lenient_and_empty_when_unset() {
    let task =
        parse(r#"{"instance_id":7,"instance_name":null,"job_id":{},"job_name":true}"#).unwrap();

    assert_eq!(
        (task.instance_id.as_str(), task.job_name.as_str()),
        ("7", "true")
    );
    assert_eq!(
        (task.instance_name.as_str(), task.job_id.as_str()),
        ("", "")
    );
}

#[test]
fn show_detail_is_a_bool_or_the_text_of_one() {
    let cases = [
        ("true", Some(true)),
        ("false", Some(false)),
        (r#""true""#, Some(true)),
        (r#""false""#, Some(false)),
        (r#""False""#, None),
        (r#""""#, None),
        ("1", None),
        ("null", None),
        ("{}", None),
    ];

    for (value, expected) in cases {
        let task = with(&format!(r#""sub_task_list":[{{"show_detail":{value}}}]"#)).unwrap();

        assert_eq!(task.sub_task_list[0].show_detail, expected, "{value}");
    }
}

#[test]
fn sub_task_list_may_be_a_single_object_and_skips_other_values() {
    let cases = [
        ("list", r#"[{"percent":"1"},{"percent":2}]"#, vec!["1", "2"]),
        ("single object", r#"{"percent":"1"}"#, vec!["1"]),
        (
            "strangers in the list",
            r#"[null,"x",3,[],{"percent":"1"}]"#,
            vec!["1"],
        ),
        ("empty list", "[]", vec![]),
        ("null", "null", vec![]),
        ("text", r#""x""#, vec![]),
        ("number", "1", vec![]),
    ];

    for (name, value, expected) in cases {
        let task = with(&format!(r#""sub_task_list":{value}"#)).unwrap();

        let percents: Vec<_> = task
            .sub_task_list
            .iter()
            .map(|part| part.percent.as_deref().unwrap())
            .collect();
        assert_eq!(percents, expected, "{name}");
    }
}

#[test]
fn unknown_fields_with_any_value_are_ignored() {
    let deep = 500_000;
    let values = [
        "1".to_owned(),
        r#""\ud800""#.to_owned(),
        r#"{"error_code":"DBS.1","code":"x","message":"y"}"#.to_owned(),
        format!("{}{}", "[".repeat(deep), "]".repeat(deep)),
        format!("{}1{}", r#"{"a":"#.repeat(deep), "}".repeat(deep)),
    ];

    for value in values {
        assert_eq!(
            with(&format!(r#""new":{value}"#)),
            Ok(job()),
            "{:.20}",
            value
        );
    }
}

#[test]
fn a_deep_value_in_a_known_field_does_not_overflow_the_stack() {
    let deep = "[".repeat(500_000) + &"]".repeat(500_000);

    assert_eq!(with(&format!(r#""process":{deep}"#)), Ok(job()));
    assert_eq!(with(&format!(r#""sub_task_list":{deep}"#)), Ok(job()));
    assert_eq!(
        with(&format!(r#""sub_task_list":[{{"percent":{deep}}}]"#))
            .unwrap()
            .sub_task_list
            .len(),
        1
    );
}

#[test]
fn what_cannot_be_read_as_a_task_is_malformed() {
    let cases = [
        ("empty", ""),
        ("blanks", " \n"),
        ("html", "<html></html>"),
        ("text", "ok"),
        ("null", "null"),
        ("number", "1"),
        ("string", r#""job_id""#),
        ("empty array", "[]"),
        (
            "array of the fields' values",
            r#"["i","n","j","k",null,null,null,null,null,null,null,null,null,null]"#,
        ),
        ("empty object", "{}"),
        ("none of the documented fields", r#"{"status":"Running"}"#),
        (
            "documented fields that are null",
            r#"{"job_id":null,"instance_id":null}"#,
        ),
        (
            "documented fields without text",
            r#"{"job_id":{},"instance_id":[]}"#,
        ),
        ("trailing garbage", r#"{"job_id":"j"} x"#),
        ("two objects", r#"{"job_id":"j"}{"job_id":"j"}"#),
        ("byte order mark", "\u{feff}{\"job_id\":\"j\"}"),
        ("cut off", r#"{"job_id":"j""#),
        ("NaN", r#"{"job_id":NaN}"#),
        ("NaN in an unknown field", r#"{"job_id":"j","new":NaN}"#),
        ("single quotes", "{'job_id':'j'}"),
        ("trailing comma", r#"{"job_id":"j",}"#),
        ("lone surrogate in a known field", r#"{"job_id":"\ud800"}"#),
        ("line end in a string", "{\"job_id\":\"a\nb\"}"),
        ("a known field twice", r#"{"job_id":"j","job_id":"j"}"#),
        (
            "a known field twice in a part",
            r#"{"job_id":"j","sub_task_list":[{"percent":1,"percent":1}]}"#,
        ),
        ("leading zero", r#"{"job_id":007}"#),
        (
            "null as error code",
            r#"{"error_code":null,"error_msg":"m"}"#,
        ),
        ("empty error code", r#"{"error_code":"","error_msg":"m"}"#),
    ];

    for (name, body) in cases {
        assert_eq!(parse(body), Err(NotATask::Malformed), "{name}");
    }
    let invalid: [&[u8]; 2] = [
        b"{\"job_id\":\"\xff\"}",
        b"{\"job_id\":\"j\",\"new\":\"\xc3\"}",
    ];
    for body in invalid {
        assert_eq!(parse_task_detail(body), Err(NotATask::Malformed));
    }
}

#[test]
fn an_error_code_in_any_spelling_makes_an_error_object_also_next_to_a_task() {
    let cases = [
        (r#"{"error_code":"DBS.1","error_msg":"m"}"#, Some("DBS.1")),
        (r#"{"error_code":"DBS.1","job_id":"j"}"#, Some("DBS.1")),
        (r#"{"errorCode":"DBS.1","job_id":"j"}"#, Some("DBS.1")),
        (r#"{"errCode":"DBS.1","job_id":"j"}"#, Some("DBS.1")),
        (
            r#"{"code":"DBS.1","message":"m","job_id":"j"}"#,
            Some("DBS.1"),
        ),
        (r#"{"code":"DBS.1"}"#, Some("DBS.1")),
        (r#"{"error_code":17,"job_id":"j"}"#, None),
        (r#"{"error_code":0,"job_id":"j"}"#, None),
        (r#"{"error":{"code":401,"message":"m"}}"#, None),
        (r#"{"x":{"error_code":"DBS.1"}}"#, Some("DBS.1")),
    ];

    for (body, code) in cases {
        let Err(NotATask::ErrorObject(envelope)) = parse(body) else {
            panic!("{body} is not an error object");
        };
        assert_eq!(envelope.error_code.as_deref(), code, "{body}");
    }
}

#[test]
fn a_task_with_an_error_code_that_says_nothing_is_a_task() {
    let members = [
        r#""error_code":null"#,
        r#""error_code":"""#,
        r#""error_code":" ""#,
        r#""error_code":{}"#,
        r#""error_msg":"m""#,
        r#""code":"200""#,
        r#""code":null,"message":"m""#,
    ];

    for member in members {
        assert_eq!(with(member), Ok(job()), "{member}");
    }
}

#[test]
fn long_strings_and_long_lists_are_read_whole() {
    let long = "x".repeat(1_000_000);
    let list = vec![r#"{"x":1}"#; MAX_PARTS].join(",");

    let with_string = with(&format!(r#""process":"{long}""#)).unwrap();
    let with_list = with(&format!(r#""sub_task_list":[{list}]"#)).unwrap();

    assert_eq!(with_string.process.unwrap().len(), 1_000_000);
    assert_eq!(with_list.sub_task_list.len(), MAX_PARTS);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(body: Vec<u8>) {
        let _ = parse_task_detail(&body);
    }

    #[test]
    fn any_text_comes_back_as_it_was(value: String) {
        let body = format!(r#"{{"job_id":{}}}"#, serde_json::to_string(&value).unwrap());

        prop_assert_eq!(parse(&body).unwrap().job_id, value);
    }
}

#[test]
fn a_task_has_at_most_ten_thousand_parts() {
    let list = |count: usize| format!("\"sub_task_list\":[{}]", vec!["{}"; count].join(","));

    let most = with(&list(MAX_PARTS)).expect("as many as allowed");

    assert_eq!(most.sub_task_list.len(), MAX_PARTS);
    for count in [MAX_PARTS + 1, MAX_PARTS + 2, 349_000] {
        assert_eq!(with(&list(count)), Err(NotATask::TooManyParts), "{count}");
    }
    let broken = format!("{},", list(MAX_PARTS + 5).trim_end_matches(']'));
    assert_eq!(with(&broken), Err(NotATask::Malformed));
}

/// A task of about 1 MiB, the limit of a body, with this part as often as it fits.
fn task_of_a_mebibyte(part: &str) -> String {
    let count = ((1 << 20) - 40) / (part.len() + 1);
    let list = vec![part; count.min(MAX_PARTS)].join(",");
    format!(r#"{{"job_id":"j","sub_task_list":[{list}]}}"#)
}

#[test]
fn a_long_task_is_parsed_with_pauses_and_a_short_one_without() {
    let short = r#"{"job_id":"j","sub_task_list":[{"status":"s"}]}"#;
    let long = task_of_a_mebibyte(&format!(r#"{{"status":"{}"}}"#, "x".repeat(90)));
    for (body, expected_pauses) in [(short, 0..=0), (&long, 60..=70)] {
        let mut parsing = pin!(parse_with_pauses(body.as_bytes(), &|_| false));
        let mut context = Context::from_waker(Waker::noop());
        let mut pauses = 0;

        let parsed = loop {
            match parsing.as_mut().poll(&mut context) {
                Poll::Ready(parsed) => break parsed,
                Poll::Pending => pauses += 1,
            }
        };

        assert_eq!(parsed, parse_task_detail(body.as_bytes()));
        assert!(expected_pauses.contains(&pauses), "{pauses}");
    }
}
