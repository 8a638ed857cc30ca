use serde_json::json;

use super::{Folder, distinct_request, iam, metadata, token_file};
use crate::support::{
    Program, Step, Upstream,
    canary::{
        assert_no_canary, assert_no_canary_in_status, assert_no_canary_printed,
        assert_no_canary_shown,
    },
    program::run,
    reply,
    upstream::Received,
};

type Variables<'a> = &'a [(&'a str, &'a str)];

/// The behaviour of the vendor's services. Each reply echoes the request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Fine,
    /// RDS rejects the credential and echoes the request, as the gateway really does.
    Rejecting,
    /// IAM and the metadata service reject the request.
    IssuersRejecting,
    /// IAM and the metadata service reply with a malformed token or key.
    IssuersMalformed,
    Malformed,
    Page,
}

const MOODS: [Mood; 6] = [
    Mood::Fine,
    Mood::Rejecting,
    Mood::IssuersRejecting,
    Mood::IssuersMalformed,
    Mood::Malformed,
    Mood::Page,
];

fn services(mood: Mood, request: &Received) -> Vec<Step> {
    let echo = format!("canary-of-the-reply {:?} {}", request.headers, request.body);
    let is_issuer = !request.line.contains("/task-center-detail");
    if is_issuer && mood == Mood::IssuersRejecting {
        return reply(401, &[], json!({"error": {"message": echo}}).to_string());
    }
    let blank = if mood == Mood::IssuersMalformed {
        " "
    } else {
        "-"
    };
    if request.line.starts_with("POST /v3/auth/tokens") {
        return reply(
            201,
            &[("x-subject-token", &format!("canary{blank}token"))],
            &echo,
        );
    }
    if request.line.starts_with("PUT") {
        return reply(200, &[], format!("canary{blank}metadata-token"));
    }
    if is_issuer {
        let key = json!({
            "access": format!("canary{blank}ak"),
            "secret": format!("canary{blank}sk"),
            "securitytoken": format!("canary{blank}st"),
        });
        return reply(200, &[], json!({"credential": key}).to_string());
    }
    match mood {
        Mood::Rejecting => {
            let message = format!("verify aksk signature fail, canonicalRequest:{echo}");
            let body = json!({"error_code": "APIGW.0301", "error_msg": message});
            reply(401, &[], body.to_string())
        }
        Mood::Malformed => reply(200, &[], format!("{{\"instance_name\": \"{echo}")),
        Mood::Page => reply(
            500,
            &[("content-type", "text/html")],
            format!("<html>{echo}"),
        ),
        _ => reply(200, &[], r#"{"instance_name":"canary-name","job_id":"1"}"#),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_source_shows_a_secret_with_good_or_bad_replies() {
    let folder = Folder::new();
    let file_of_token = folder.file("token", "canary-token\n");
    let password_file = folder.file("password", "canary-password\n");
    let profile = folder.file(
        "profile",
        "[basic]\nak=canary-ak\nsk=canary-sk\nsecurity_token=canary-st\n",
    );
    let bad_profile = folder.file("bad-profile", "[basic]\nak=canary ak\nsk=canary-sk\n");

    for mood in MOODS {
        let services = Upstream::start(move |request| services(mood, request)).await;
        let url = services.url();
        let with_metadata = |source| metadata(source, &url, &url).to_vec();
        let key = vec![
            ("HUAWEICLOUD_SDK_AK", "canary-ak"),
            ("HUAWEICLOUD_SDK_SK", "canary-sk"),
            ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "canary-st"),
        ];
        let file = |path| vec![("HUAWEICLOUD_SDK_CREDENTIALS_FILE", path)];
        let cases = [
            (with_metadata("caller"), vec![]),
            (
                with_metadata("token"),
                vec![("RDS_TASK_FACADE_TOKEN", "canary-token")],
            ),
            (token_file(&url, &file_of_token).to_vec(), vec![]),
            (iam(&url, &password_file), vec![]),
            (with_metadata("env"), key.clone()),
            (with_metadata("profile"), file(profile.as_str())),
            (with_metadata("metadata"), vec![]),
            (with_metadata("chain"), key),
            (with_metadata("chain"), file(profile.as_str())),
            (with_metadata("chain"), file(bad_profile.as_str())),
        ];
        for (args, mut env) in cases {
            let case = format!("{} with services {mood:?}", args[3]);
            assert_no_canary_printed(&case, &args, &env);
            env.push(("RUST_LOG", "trace"));
            let program = Program::start(&args, &env);

            for token in ["canary-of-the-caller", "canary of the caller"] {
                let mut request = distinct_request();
                request.workflow_name = Some("canary-workflow".into());
                let metadata = [
                    ("x-auth-token", token),
                    ("authorization", "Basic Y2FuYXJ5OmNhbmFyeQ=="),
                ];
                match program.call_with(request, &metadata).await {
                    Ok(_) => {}
                    Err(status) => assert_no_canary_in_status(&case, &status),
                }
            }

            program.wait_for_log(|line| line.get("grpc_code").is_some());
            assert_no_canary_shown(&case, &program).await;
        }
    }
}

#[test]
fn a_malformed_secret_ends_the_start_with_one_line_that_does_not_show_it() {
    let folder = Folder::new();
    let bad = folder.file("bad", "canary\r\nX-Evil: canary\n");
    let blank = folder.file("blank", "\n");
    let bad_key = folder.file("profile", "[basic]\nak = canary\nsk = can\u{e4}canary\n");
    let region = ["--region", "cn-north-4"];
    let token_file = ["--credentials", "token", "--token-file", &bad];
    let password = [
        "--credentials",
        "iam",
        "--iam-user",
        "u",
        "--iam-domain",
        "d",
        "--iam-password-file",
        &blank,
    ];
    let cases: [(&[&str], Variables<'_>, &str); 7] = [
        (
            &token_file,
            &[],
            "--token-file: the content holds a line break",
        ),
        (&password, &[], "--iam-password-file: the content is empty"),
        (
            &["--credentials", "token"],
            &[("RDS_TASK_FACADE_TOKEN", "canary canary")],
            "RDS_TASK_FACADE_TOKEN: holds a blank",
        ),
        (
            &["--credentials", "env"],
            &[
                ("HUAWEICLOUD_SDK_AK", "canary\tcanary"),
                ("HUAWEICLOUD_SDK_SK", "canary"),
            ],
            "HUAWEICLOUD_SDK_AK: holds a blank",
        ),
        (
            &["--credentials", "env"],
            &[
                ("HUAWEICLOUD_SDK_AK", "canary"),
                ("HUAWEICLOUD_SDK_SK", "canary\u{fc}"),
            ],
            "HUAWEICLOUD_SDK_SK: holds a character that is not visible ASCII",
        ),
        (
            &["--credentials", "chain"],
            &[
                ("HUAWEICLOUD_SDK_AK", "canary"),
                ("HUAWEICLOUD_SDK_SK", "canary"),
                ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "canary\r\ncanary"),
            ],
            "HUAWEICLOUD_SDK_SECURITY_TOKEN: holds a line break",
        ),
        (
            &["--credentials", "profile"],
            &[("HUAWEICLOUD_SDK_CREDENTIALS_FILE", &bad_key)],
            "HUAWEICLOUD_SDK_CREDENTIALS_FILE: the secret access key (SK) holds a character that is not visible ASCII",
        ),
    ];

    for (args, env, expected) in cases {
        let with_another = ["--max-attempts", "0"];
        let (code, out, err) = run(
            &[&["serve"], &region[..], args, &with_another].concat(),
            env,
        );

        assert_eq!(code, 2, "{expected}: {err}");
        assert_eq!(out, "", "{expected}");
        let about_it: Vec<_> = err.lines().filter(|line| line.contains(expected)).collect();
        assert_eq!(about_it.len(), 1, "{expected}: {err}");
        assert!(
            err.contains("--max-attempts: "),
            "all problems are reported at once: {err}"
        );
        assert_no_canary(expected, &err);
    }
}

#[tokio::test]
async fn a_trailing_line_break_of_a_mounted_file_is_not_part_of_the_secret() {
    let upstream = Upstream::start(|_| reply(200, &[], r#"{"job_id":"1"}"#)).await;
    let folder = Folder::new();
    let url = upstream.url();

    for (name, text) in [
        ("unix", "the-token\n"),
        ("windows", "the-token\r\n"),
        ("none", "the-token"),
    ] {
        let file = folder.file(name, text);
        let program = Program::start(&token_file(&url, &file), &[]);

        program.call(distinct_request()).await.expect("a task");

        let last = upstream.requests().pop().expect("a request");
        assert_eq!(last.header("x-auth-token"), Some("the-token"), "{name}");
    }
}
