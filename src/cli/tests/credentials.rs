//! Credential sources, and secrets in output.

use std::path::PathBuf;

use super::*;

#[test]
fn each_credential_source_requires_only_its_own_settings() {
    let region = ["--region", "cn-north-4"];
    let keys = [("HUAWEICLOUD_SDK_AK", "ak"), ("HUAWEICLOUD_SDK_SK", "sk")];
    let cases: [(&str, Variables<'_>, &[&str]); 10] = [
        ("caller", &[], &[]),
        ("token", &[], &["--token-file"]),
        ("token", &[("RDS_TASK_FACADE_TOKEN", "t")], &[]),
        (
            "iam",
            &[],
            &["--iam-user", "--iam-domain", "--iam-password-file"],
        ),
        ("env", &[], &["HUAWEICLOUD_SDK_AK", "HUAWEICLOUD_SDK_SK"]),
        ("env", &keys, &[]),
        ("profile", &[], &["HUAWEICLOUD_SDK_CREDENTIALS_FILE"]),
        ("metadata", &[], &[]),
        ("chain", &[], &[]),
        ("keys", &[], &["--credentials"]),
    ];

    for (source, env, expected) in cases {
        let args = [&region[..], &["--credentials", source]].concat();
        let found = match serve(&args, env) {
            Ok(_) => Vec::new(),
            Err(invalid) => invalid.problems,
        };
        let about: Vec<&str> = found
            .iter()
            .filter_map(|problem| problem.split(": ").next())
            .collect();
        assert_eq!(about, expected, "{source} {env:?}");
    }
    let unused = [
        "--region",
        "cn-north-4",
        "--token-file",
        "/nowhere",
        "--iam-endpoint",
        "?",
    ];
    assert!(serve(&unused, &[]).is_ok());
}

#[test]
fn iam_endpoint_is_set_by_flag_then_variables_then_region() {
    let password = file_with("secret");
    let path = password.path().to_str().unwrap();
    let iam = [
        "--credentials",
        "iam",
        "--iam-user",
        "ann",
        "--iam-domain",
        "acme",
        "--iam-password-file",
        path,
    ];
    let sdk = ("HUAWEICLOUD_SDK_IAM_ENDPOINT", "https://sdk.example.com");
    let own = ("RDS_TASK_FACADE_IAM_ENDPOINT", "https://own.example.com");
    let region = ["--region", "cn-north-4"];
    let cases = [
        (
            region.to_vec(),
            vec![],
            "https://iam.cn-north-4.myhuaweicloud.com cn-north-4",
        ),
        (
            region.to_vec(),
            vec![sdk],
            "https://sdk.example.com cn-north-4",
        ),
        (
            region.to_vec(),
            vec![sdk, own],
            "https://own.example.com cn-north-4",
        ),
        (
            vec!["--sandbox"],
            vec![],
            "http://127.0.0.1:0 0483b6b16e954cb88930a360d2c4e663",
        ),
        (
            vec!["--endpoint", "https://r.example.com", "--iam-project", "p"],
            vec![own],
            "https://own.example.com p",
        ),
        (
            vec![
                "--region",
                "eu-west-101",
                "--iam-endpoint",
                "https://flag.example.com",
            ],
            vec![own],
            "https://flag.example.com eu-west-101",
        ),
    ];

    for (upstream, env, expected) in cases {
        let config = serve(&[&upstream[..], &iam].concat(), &env).unwrap();
        let Source::Iam(found) = config.source else {
            panic!("{upstream:?}: not iam");
        };
        assert_eq!(
            format!("{} {}", without_slash(&found.endpoint), found.project),
            expected,
            "{upstream:?}"
        );
    }
    let nowhere = problems(
        &[&["--endpoint", "https://r.example.com"][..], &iam].concat(),
        &[],
    );
    assert_eq!(nowhere.len(), 2, "{nowhere:?}");
    let other_site = problems(&[&["--region", "eu-west-101"][..], &iam].concat(), &[]);
    assert!(
        other_site[0].starts_with("--iam-endpoint: "),
        "{other_site:?}"
    );
}

#[test]
fn sandbox_sets_token_and_endpoints_but_not_the_iam_user() {
    let token = serve(&["--sandbox"], &[]).unwrap().source;
    let metadata = serve(&["--sandbox", "--credentials", "metadata"], &[])
        .unwrap()
        .source;

    let Source::Token(token) = token else {
        panic!("{token:?}");
    };
    assert_eq!(token, "sandbox-token");
    assert!(token.is_sensitive());
    assert!(matches!(metadata, Source::Metadata(url) if url.port() == Some(0)));
    assert_eq!(
        problems(&["--sandbox", "--credentials", "iam"], &[]).len(),
        3
    );
    let caller = serve(&["--sandbox", "--credentials", "caller"], &[]).unwrap();
    assert!(matches!(caller.source, Source::Caller));
}

#[test]
fn chain_uses_only_complete_keys_and_finds_the_profile_in_home() {
    let env = [("HUAWEICLOUD_SDK_AK", "ak"), ("HOME", "/home/ann")];
    let args = ["--region", "cn-north-4", "--credentials", "chain"];

    let config = serve(&args, &env).unwrap();

    let Source::Chain(chain) = config.source else {
        panic!("not a chain");
    };
    assert!(chain.environment.is_none());
    assert_eq!(chain.missing, ["HUAWEICLOUD_SDK_SK"]);
    assert_eq!(
        chain.profile,
        Some(PathBuf::from("/home/ann/.huaweicloud/credentials"))
    );
    assert_eq!(
        without_slash(&chain.metadata_endpoint),
        "http://169.254.169.254"
    );
}

#[test]
fn help_debug_summary_and_printed_configuration_contain_no_secret() {
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "canary"),
        ("HUAWEICLOUD_SDK_AK", "canary"),
        ("HUAWEICLOUD_SDK_SK", "canary"),
        ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "canary"),
        (
            "RDS_TASK_FACADE_UPSTREAM_PROXY",
            "http://canary:canary@proxy:3128",
        ),
        ("RDS_TASK_FACADE_IAM_ENDPOINT", "https://canary:canary@iam"),
        ("RDS_TASK_FACADE_REGION", "cn-north-4"),
    ];

    for source in ["caller", "token", "env", "chain"] {
        let args = ["--credentials", source];
        let config = serve(&args, &env).unwrap();
        let mut texts = vec![config.summary(), config.printed()];
        texts.push(printed(
            &["serve", "--credentials", source, "--print-config"],
            &env,
        ));
        texts.push(printed(&["serve", "--credentials", source, "--help"], &env));
        texts.push(format!("{config:?}"));
        for text in texts {
            assert!(!text.contains("canary"), "{source}: {text}");
        }
    }
    assert!(
        serve(&[], &env)
            .unwrap()
            .summary()
            .contains("upstream-proxy=set")
    );
}

#[test]
fn malformed_secrets_are_reported_without_their_value() {
    let (two_lines, no_key, empty) = (
        file_with("canary\nX-Evil: 1\n"),
        file_with("[basic]\nak = canary\n"),
        file_with("\n"),
    );
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let (two_lines, no_key, empty) = (path(&two_lines), path(&no_key), path(&empty));
    let iam = ["--iam-user", "ann", "--iam-domain", "acme"];
    let cases: [(&[&str], Variables<'_>, &str); 8] = [
        (
            &["token", "--token-file", &two_lines],
            &[],
            "--token-file: the content holds a line break; write it on one line",
        ),
        (
            &["token"],
            &[("RDS_TASK_FACADE_TOKEN", "can ary")],
            "RDS_TASK_FACADE_TOKEN: holds a blank",
        ),
        (
            &[&["iam", "--iam-password-file", &empty][..], &iam].concat(),
            &[],
            "--iam-password-file: the content is empty",
        ),
        (
            &["env"],
            &[
                ("HUAWEICLOUD_SDK_AK", "canary"),
                ("HUAWEICLOUD_SDK_SK", "can\u{e4}ry"),
            ],
            "HUAWEICLOUD_SDK_SK: holds a character that is not visible ASCII",
        ),
        (
            &["chain"],
            &[
                ("HUAWEICLOUD_SDK_AK", "canary"),
                ("HUAWEICLOUD_SDK_SK", "canary"),
                ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "can\r\nary"),
            ],
            "HUAWEICLOUD_SDK_SECURITY_TOKEN: holds a line break; write it on one line",
        ),
        (
            &["profile"],
            &[("HUAWEICLOUD_SDK_CREDENTIALS_FILE", &no_key)],
            "HUAWEICLOUD_SDK_CREDENTIALS_FILE: the section [basic] needs both ak and sk",
        ),
        (
            &["profile"],
            &[("HUAWEICLOUD_SDK_CREDENTIALS_FILE", "/nonexistent/canary")],
            "HUAWEICLOUD_SDK_CREDENTIALS_FILE: the file cannot be read: entity not found",
        ),
        (
            &["profile"],
            &[("HOME", "/nonexistent/canary")],
            "~/.huaweicloud/credentials: the file cannot be read: entity not found",
        ),
    ];

    for (args, env, expected) in cases {
        let args = [&["--region", "cn-north-4", "--credentials"], args].concat();

        assert_eq!(problems(&args, env), [expected]);
    }
}

#[test]
fn problems_contain_no_secret() {
    let cases: [(&[&str], Variables<'_>); 16] = [
        (&["--tokn", "canary"], &[]),
        (&["--tokn=canary"], &[]),
        (&["canary"], &[]),
        (&["--", "canary"], &[]),
        (&["-pcanary"], &[]),
        (&["--=canary"], &[]),
        (&["--tokn=a=canary"], &[]),
        (&["--upstream-proxy", "--sandbox", "canary"], &[]),
        (
            &["--upstream-proxy", "canary", "--upstream-proxy", "canary"],
            &[],
        ),
        (&["--token-file", "canary", "--credentials", "token"], &[]),
        (&["--endpoint", "https://canary:canary@rds"], &[]),
        (&["--upstream-proxy", "socks5://canary:canary@proxy:1"], &[]),
        (
            &[
                "--metadata-endpoint",
                "http://canary@x",
                "--credentials",
                "metadata",
            ],
            &[],
        ),
        (
            &["--credentials", "token"],
            &[("RDS_TASK_FACADE_TOKEN", "canary canary")],
        ),
        (
            &["--credentials", "env"],
            &[("HUAWEICLOUD_SDK_SK", "canary\u{e4}")],
        ),
        (
            &[],
            &[
                ("RDS_TASK_FACADE_TOKNE", "canary"),
                ("RDS_TASK_FACADE_SK", "canary"),
            ],
        ),
    ];

    for (args, env) in cases {
        let invalid = serve(args, env).unwrap_err();
        assert!(!format!("{invalid:?}").contains("canary"), "{invalid:?}");
    }
}
