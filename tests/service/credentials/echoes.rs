use rds_task_facade::pb::GetTaskDetailRequest;
use serde_json::json;
use tonic::{Code, Response, Status};

use super::distinct_request;
use crate::support::{Program, Step, Upstream, reply, upstream::Received};

const TOKEN: &str = "MIIFTgYJKo+Zhvc-NAQcCoIIFPz";
const AK: &str = "HPUAKEXAMPLE0123ABCD";
const SK: &str = "9tR-fQmZ2vLx8WcNd5KsYb1G";
const SECURITY_TOKEN: &str = "ggpjbi1ub3J0aC00-T0V4QU1QTEU";
/// Of the proxy.
const PASSWORD: &str = "Pq7-wRt5_yUi3oPa9s";
/// Not a credential of the facade.
const OTHER: &str = "MIIKqwEAOther-text/of+length";

/// A text in different forms.
fn forms(text: &str) -> Vec<String> {
    let hex = |prefix: &str| text.bytes().map(|b| format!("{prefix}{b:02x}")).collect();
    let full_width = |c| char::from_u32(u32::from(c) + 0xfee0).expect("a character");
    let base64 = [
        // base64 of "a:" and TOKEN, of AK, SK and SECURITY_TOKEN, of "a:" and PASSWORD.
        (TOKEN, "YTpNSUlGVGdZSktvK1podmMtTkFRY0NvSUlGUHo="),
        (AK, "SFBVQUtFWEFNUExFMDEyM0FCQ0Q="),
        (SK, "OXRSLWZRbVoydkx4OFdjTmQ1S3NZYjFH"),
        (SECURITY_TOKEN, "Z2dwamJpMXViM0owYUMwMC1UMFY0UVUxUVRFVQ=="),
        (PASSWORD, "YTpQcTctd1J0NV95VWkzb1BhOXM="),
        (OTHER, "TUlJS3F3RUFPdGhlci10ZXh0L29mK2xlbmd0aA=="),
    ];
    let base64 = base64.iter().find(|(of, _)| *of == text);
    vec![
        text.to_owned(),
        format!("X-Other-Header=[{text}]"),
        text.to_lowercase(),
        text.replace('-', "\u{2011}"),
        text.chars().map(full_width).collect(),
        hex(""),
        hex("%"),
        hex("\\u00"),
        base64.expect("a known text").1.to_owned(),
    ]
}

/// A reply with the text in one place. All texts in headers and codes are printable ASCII.
fn reply_with(place: usize, text: &str) -> Vec<Step> {
    let is_ascii = text.bytes().all(|byte| byte.is_ascii_graphic());
    let error = |status, body: serde_json::Value| reply(status, &[], body.to_string());
    match place {
        0 => error(400, json!({"error_code": "DBS.200001", "error_msg": text})),
        1 => error(404, json!({"error_code": "DBS.200543", "error_msg": text})),
        2 => error(400, json!({"error_code": text, "error_msg": "bad"})),
        3 => error(400, json!({"error_code": "DBS.1", "request_id": text})),
        4 => error(
            403,
            json!({"error_code": "APIGW.0302", "encoded_authorization_message": text}),
        ),
        5 if is_ascii => reply(400, &[("x-request-id", text)], ""),
        6 if is_ascii => reply(200, &[("x-request-id", text)], r#"{"job_id":"1"}"#),
        7 => error(200, json!({"job_id": "1", "instance_name": text})),
        8 => error(
            200,
            json!({"job_id": "1", "sub_task_list": [{"status": text}]}),
        ),
        _ => error(200, json!({"error_code": "DBS.1", "error_msg": text})),
    }
}

const PLACES: usize = 10;

/// The request whose reply has this form of the text in this place.
fn request_for(place: usize, form: usize) -> GetTaskDetailRequest {
    GetTaskDetailRequest {
        workflow_name: Some(format!("{place} {form}")),
        ..distinct_request()
    }
}

async fn echoing(text: &'static str) -> Upstream {
    Upstream::start(move |request: &Received| {
        let body: serde_json::Value = serde_json::from_str(&request.body).expect("JSON");
        let name = body["workflow_name"].as_str().expect("a name");
        let (place, form) = name.split_once(' ').expect("two numbers");
        let form: usize = form.parse().expect("a number");
        reply_with(place.parse().expect("a number"), &forms(text)[form])
    })
    .await
}

/// All that a caller receives.
fn received<T: std::fmt::Debug>(result: &Result<Response<T>, Status>) -> String {
    match result {
        Ok(reply) => format!("{reply:?}"),
        Err(status) => format!(
            "{} {} {:?}",
            status.message(),
            String::from_utf8_lossy(status.details()),
            status.metadata()
        ),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_facades_own_credential_in_a_reply_reaches_neither_callers_nor_the_log() {
    let key = [
        ("HUAWEICLOUD_SDK_AK", AK),
        ("HUAWEICLOUD_SDK_SK", SK),
        ("HUAWEICLOUD_SDK_SECURITY_TOKEN", SECURITY_TOKEN),
    ];
    let token = [("RDS_TASK_FACADE_TOKEN", TOKEN)];
    let cases: [(_, &[_], _, _); 7] = [
        ("token", &token, TOKEN, false),
        ("token", &token, OTHER, true),
        ("env", &key, AK, false),
        ("env", &key, SK, false),
        ("env", &key, SECURITY_TOKEN, false),
        ("token", &token, PASSWORD, false),
        ("env", &key, PASSWORD, false),
    ];

    for (source, env, text, is_shown) in cases {
        let upstream = echoing(text).await;
        let url = upstream.url();
        // Forwards plain requests.
        let proxy = format!("http://a:{PASSWORD}@{}", upstream.address);
        let flags = [
            "--endpoint",
            &url,
            "--credentials",
            source,
            "--upstream-proxy",
            &proxy,
        ];
        let program = Program::start(&flags, env);
        for place in 0..PLACES {
            for (form, shown) in forms(text).iter().enumerate() {
                let result = program.call(request_for(place, form)).await;

                let case = format!("{source}, {text}, place {place}: {shown}");
                let received = received(&result);
                if is_shown && [0, 1, 7, 8].contains(&place) && !shown.contains('\\') {
                    assert!(received.contains(shown), "{case}: {received}");
                }
                if !is_shown {
                    assert!(!received.contains(shown), "{case}: {received}");
                    let code = result.as_ref().map_or_else(Status::code, |_| Code::Ok);
                    let expected = match place {
                        0 | 2 | 3 | 5 => Code::InvalidArgument,
                        1 => Code::NotFound,
                        4 => Code::PermissionDenied,
                        6..=8 => Code::Ok,
                        _ => Code::Unknown,
                    };
                    if place != 5 && place != 6 {
                        assert_eq!(code, expected, "{case}");
                    }
                }
            }
        }
        let calls = PLACES * forms(text).len();
        program.wait_for_log(|line| line.get("grpc_code").is_some());
        let log = program.logs().join("\n");
        assert_eq!(upstream.requests().len(), calls);
        for shown in forms(text).iter().filter(|_| !is_shown) {
            assert!(!log.contains(shown), "{source}, {text}: {shown} in {log}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_token_in_a_reply_does_not_reach_the_log() {
    let upstream = echoing(TOKEN).await;
    let program = Program::start(&["--endpoint", &upstream.url()], &[]);
    let metadata = [("x-auth-token", TOKEN)];

    for place in 0..PLACES {
        for form in 0..forms(TOKEN).len() {
            let _ = program.call_with(request_for(place, form), &metadata).await;
        }
    }
    let last = [("x-auth-token", TOKEN), ("x-request-id", "last-one")];
    let _ = program.call_with(request_for(0, 0), &last).await;

    program.access_line("last-one");
    let log = program.logs().join("\n");
    for shown in forms(TOKEN) {
        assert!(!log.contains(&shown), "{shown} in {log}");
    }
}
