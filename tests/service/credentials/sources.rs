use tonic::Code;

use super::{Folder, SANDBOX_KEY, iam, metadata, metadata_service, ready, token_file};
use crate::support::{Failure, Program, Sandbox, Upstream, example_request, reply};

const PROFILE: &str = "[basic]\nak = SANDBOXACCESSKEY\nsk = sandbox-secret-key\n";

/// What upstream received of a credential.
const CREDENTIAL_HEADERS: [&str; 3] = ["x-auth-token", "authorization", "x-security-token"];
const TOKEN: &[&str] = &["x-auth-token"];
const KEY: &[&str] = &["authorization"];
const TEMPORARY_KEY: &[&str] = &["authorization", "x-security-token"];

type Variables<'a> = Vec<(&'a str, &'a str)>;
type Metadata<'a> = &'a [(&'static str, &'a str)];

#[tokio::test]
async fn each_source_makes_calls_with_its_own_credential_and_no_other() {
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let folder = Folder::new();
    let file = folder.file("token", "sandbox-token\n");
    let password_file = folder.file("password", "sandbox-password\n");
    let profile = folder.file(".huaweicloud/credentials", PROFILE);
    let home = folder.0.path().to_str().expect("a UTF-8 path");
    let mut by_name = iam(&url, &password_file);
    *by_name.last_mut().expect("the project comes last") = "cn-north-4";
    let args = |source| vec!["--endpoint", &url, "--credentials", source];
    let metadata_args = |source| metadata(source, &url, &url).to_vec();
    let mut temporary = SANDBOX_KEY.to_vec();
    temporary.push(("HUAWEICLOUD_SDK_SECURITY_TOKEN", "sandbox-security-token"));
    let named = vec![("HUAWEICLOUD_SDK_CREDENTIALS_FILE", profile.as_str())];
    let token = vec![("RDS_TASK_FACADE_TOKEN", "sandbox-token")];
    let cases: Vec<(&str, Vec<&str>, Variables<'_>, &[&str])> = vec![
        ("token", args("token"), token, TOKEN),
        (
            "token file",
            token_file(&url, &file).to_vec(),
            vec![],
            TOKEN,
        ),
        ("iam, project id", iam(&url, &password_file), vec![], TOKEN),
        ("iam, project name", by_name, vec![], TOKEN),
        ("env", args("env"), SANDBOX_KEY.to_vec(), KEY),
        (
            "env, temporary",
            args("env"),
            temporary.clone(),
            TEMPORARY_KEY,
        ),
        ("profile, named", args("profile"), named.clone(), KEY),
        ("profile, home", args("profile"), vec![("HOME", home)], KEY),
        ("metadata", metadata_args("metadata"), vec![], TEMPORARY_KEY),
        ("chain, env", args("chain"), SANDBOX_KEY.to_vec(), KEY),
        ("chain, profile", args("chain"), named, KEY),
        (
            "chain, metadata",
            metadata_args("chain"),
            vec![],
            TEMPORARY_KEY,
        ),
    ];

    for (case, args, env, expected) in cases {
        let program = Program::start(&args, &env);
        ready(&program).await;

        let brought = [
            ("x-auth-token", "the-callers"),
            ("authorization", "Bearer x"),
        ];
        let reply = program.call_with(example_request(), &brought).await;

        let job = reply.map(|reply| reply.into_inner().job_id);
        assert_eq!(
            job.as_deref().ok(),
            Some("102772a9-31fa-4129-b9f8-7638e2792f3b"),
            "{case}: {job:?}"
        );
        let headers = sandbox.last_headers().await;
        let sent: Vec<_> = CREDENTIAL_HEADERS
            .into_iter()
            .filter(|known| headers.iter().any(|(name, _)| name == known))
            .collect();
        assert_eq!(sent, expected, "{case}");
        assert!(
            headers
                .iter()
                .all(|(_, value)| !value.contains("the-callers")),
            "{case}"
        );
    }
}

#[tokio::test]
async fn hardened_metadata_returns_its_key_only_for_a_metadata_token() {
    let sandbox = Sandbox::start();
    sandbox.set("hardened?on=true").await;
    let url = sandbox.url();

    for source in ["metadata", "chain"] {
        let program = Program::start(&metadata(source, &url, &url), &[]);
        ready(&program).await;

        assert!(program.call(example_request()).await.is_ok(), "{source}");
    }

    assert_eq!(sandbox.count("metadata_token_requests").await, 2);
    assert_eq!(sandbox.count("key_requests").await, 2);
}

#[tokio::test]
async fn every_source_works_against_the_embedded_sandbox() {
    let folder = Folder::new();
    let password_file = folder.file("password", "sandbox-password");
    let user = [
        "--iam-user",
        "sandbox-user",
        "--iam-domain",
        "sandbox-domain",
    ];
    let iam = [
        &[
            "--credentials",
            "iam",
            "--iam-password-file",
            &password_file,
        ],
        &user[..],
    ]
    .concat();

    for args in [
        &[][..],
        &["--credentials", "metadata"],
        &["--credentials", "chain"],
        &iam,
    ] {
        let program = Program::sandboxed(args);

        let reply = program.call(example_request()).await;

        assert!(reply.is_ok(), "{args:?}: {reply:?}");
    }
}

#[tokio::test]
async fn a_callers_token_is_passed_on_and_is_the_callers_to_correct() {
    let sandbox = Sandbox::start();
    let program = Program::start(&["--endpoint", &sandbox.url()], &[]);

    let good = program
        .call_with(example_request(), &[("x-auth-token", "sandbox-token")])
        .await;
    let bad = program
        .call_with(example_request(), &[("x-auth-token", "no-such-token")])
        .await;

    assert!(good.is_ok(), "{good:?}");
    let bad = Failure::from_status(&bad.expect_err("an unknown token"));
    assert_eq!(
        bad.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert_eq!(bad.metadata["credentialOwner"], "caller");
    assert_eq!(
        sandbox.count("task_requests").await,
        2,
        "no refresh and no retry"
    );
}

#[tokio::test]
async fn calls_without_one_good_token_fail_before_any_upstream_work() {
    let upstream = Upstream::always(reply(500, &[], "")).await;
    let program = Program::start(&["--endpoint", &upstream.url()], &[]);
    let token = ("x-auth-token", "one");
    let cases: [(&str, Metadata<'_>, &str); 4] = [
        ("none", &[], "CREDENTIAL_MISSING"),
        (
            "another header",
            &[("authorization", "one")],
            "CREDENTIAL_MISSING",
        ),
        ("two", &[token, token], "CREDENTIAL_REJECTED"),
        (
            "a blank in it",
            &[("x-auth-token", "o ne")],
            "CREDENTIAL_REJECTED",
        ),
    ];

    for (case, metadata, reason) in cases {
        let reply = program.call_with(example_request(), metadata).await;

        let failure = Failure::from_status(&reply.expect_err("no good token"));
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unauthenticated, reason),
            "{case}"
        );
        assert_eq!(failure.metadata["credentialOwner"], "caller", "{case}");
    }
    assert!(upstream.requests().is_empty());
}

#[tokio::test]
async fn a_chain_whose_links_all_fail_is_not_ready_and_its_log_names_all_three() {
    let sandbox = Sandbox::start();
    sandbox.set("fail-metadata?status=500&times=1000").await;
    let url = sandbox.url();
    let program = Program::start(&metadata("chain", &url, &url), &[]);

    let failure = program.failure(example_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unavailable, "CREDENTIAL_UNAVAILABLE")
    );
    assert_eq!(program.admin("/readyz").await.0, 503);
    let line = program.wait_for_log(|line| line["source"] == "chain");
    let error = line["error"].as_str().expect("a text");
    for link in [
        "environment: ",
        "profile: ",
        "metadata service: HTTP status 500",
    ] {
        assert!(error.contains(link), "{error}");
    }
}

#[tokio::test]
async fn a_machine_without_an_agency_is_a_rejection_by_the_metadata_service() {
    let body = r#"{"message":"Please configure Cloud Service Agency first."}"#;
    let service = metadata_service(move |_| reply(401, &[], body)).await;
    let url = service.url();
    let program = Program::start(&metadata("metadata", &url, &url), &[]);

    let failure = program.failure(example_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_REJECTED")
    );
    assert_eq!(failure.metadata["credentialOwner"], "server");
    assert_eq!(failure.metadata["upstreamService"], "METADATA");
    assert_eq!(failure.metadata["httpStatus"], "401");
    assert_eq!(failure.retry_delay, None, "its operator has to act");
}

#[tokio::test]
async fn the_log_shows_the_source_that_the_chain_has_chosen_and_why_it_skipped_others() {
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let folder = Folder::new();
    let home = folder.0.path().to_str().expect("a UTF-8 path");
    let [ak, sk] = SANDBOX_KEY;
    let token = ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "sandbox-security-token");
    let home = ("HOME", home);
    let good = folder.file("good", PROFILE);
    let half = folder.file("half", "[basic]\nak = SANDBOXACCESSKEY\n");
    let variable = "HUAWEICLOUD_SDK_CREDENTIALS_FILE";
    let (good, half) = ((variable, good.as_str()), (variable, half.as_str()));
    // The variables, the start of the chosen source, and a part of each warning.
    let cases: Vec<(Variables<'_>, &str, Vec<&str>)> = vec![
        (vec![ak, sk], "environment", vec![]),
        (vec![ak, good], "profile ", vec!["HUAWEICLOUD_SDK_SK"]),
        (vec![sk, home], "metadata ", vec!["HUAWEICLOUD_SDK_AK"]),
        (
            vec![token],
            "metadata ",
            vec!["HUAWEICLOUD_SDK_AK, HUAWEICLOUD_SDK_SK"],
        ),
        (
            vec![ak, half],
            "metadata ",
            vec!["HUAWEICLOUD_SDK_SK", "needs both ak and sk"],
        ),
        (vec![home], "metadata ", vec![]),
    ];

    for (env, source, warnings) in cases {
        let program = Program::start(&metadata("chain", &url, &url), &env);
        let lines = |level: &str| -> Vec<String> {
            let lines = program.logs().into_iter();
            lines
                .filter(|line| line.contains(level) && line.contains("credentials::chain"))
                .collect()
        };

        let chosen = lines("INFO");
        assert_eq!(chosen.len(), 1, "{env:?}: {:?}", program.logs());
        let expected = format!("\"source\":\"{source}");
        assert!(chosen[0].contains(&expected), "{env:?}: {chosen:?}");
        let warned = lines("WARN");
        assert_eq!(warned.len(), warnings.len(), "{env:?}: {warned:?}");
        for (line, part) in warned.iter().zip(warnings) {
            assert!(line.contains(part), "{env:?}: {line}");
        }
    }
}
