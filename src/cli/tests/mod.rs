//! Validation of arguments and variables together.

mod command;
mod credentials;

use std::{io::Write as _, os::unix::ffi::OsStringExt as _, time::Duration};

use clap::CommandFactory as _;

use super::*;
use crate::{
    client::Task,
    credentials::Source,
    options::{defaults, url::without_slash},
};

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Parses `rds-task-facade` with these arguments and variables.
fn command(args: &[&str], variables: Variables<'_>) -> Result<Command, Invalid> {
    let environment = variables
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)))
        .collect();
    let program = std::iter::once(&"rds-task-facade");
    parse(
        program.chain(args).map(OsString::from).collect(),
        &environment,
    )
}

/// Parses `rds-task-facade serve` with these arguments and variables.
fn serve(args: &[&str], variables: Variables<'_>) -> Result<Serve, Invalid> {
    match command(&[&["serve"], args].concat(), variables)? {
        Command::Serve(options) => Ok(*options),
        other => panic!("not serve: {other:?}"),
    }
}

fn problems(args: &[&str], variables: Variables<'_>) -> Vec<String> {
    let parsed = serve(args, variables);
    parsed.expect_err("must be invalid").problems
}

fn printed(args: &[&str], variables: Variables<'_>) -> String {
    match command(args, variables).unwrap() {
        Command::Print(text) => text,
        other => panic!("not a text: {other:?}"),
    }
}

/// Name and default of every flag of a subcommand.
fn flags(subcommand: &str) -> Vec<(String, String)> {
    let command = Command::command();
    let subcommand = command.find_subcommand(subcommand).unwrap();
    let flag = |arg: &clap::Arg| {
        let defaults = arg.get_default_values().iter();
        let default = defaults.map(|value| value.to_string_lossy().into_owned());
        (arg.get_long().unwrap().to_owned(), default.collect())
    };
    subcommand.get_arguments().map(flag).collect()
}

fn file_with(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn flags_and_defaults_match_the_contract() {
    let contract = [
        ("listen", "127.0.0.1:50051"),
        ("metrics-listen", "127.0.0.1:9464"),
        ("region", ""),
        ("endpoint", ""),
        ("sandbox", "false"),
        ("allow-insecure-upstream", "false"),
        ("upstream-ca", ""),
        ("upstream-proxy", ""),
        ("upstream-proxy-password-file", ""),
        ("upstream-rate", "off"),
        ("watch-interval", "5s"),
        ("watch-rate", "30/1m"),
        ("credentials", ""),
        ("token-file", ""),
        ("iam-endpoint", ""),
        ("iam-user", ""),
        ("iam-domain", ""),
        ("iam-password-file", ""),
        ("iam-project", ""),
        ("metadata-endpoint", "http://169.254.169.254"),
        ("allow-project", ""),
        ("timeout", "30s"),
        ("attempt-timeout", "10s"),
        ("connect-timeout", "3s"),
        ("max-attempts", "3"),
        ("retry-budget", "20"),
        ("max-in-flight", "2048"),
        ("max-watch-duration", "1h"),
        ("max-watches", "1000"),
        ("max-connections", "1000"),
        ("cache-ttl", "0s"),
        ("cache-entries", "10000"),
        ("quota-store", ""),
        ("quota-store-password-file", ""),
        ("quota-store-key-file", ""),
        ("quota-store-ca", ""),
        ("allow-insecure-quota-store", "false"),
        ("drain-delay", "0s"),
        ("shutdown-grace", "20s"),
        ("max-connection-age", "30m"),
        ("tls-cert", ""),
        ("tls-key", ""),
        ("tls-client-ca", ""),
        ("reflection", "true"),
        ("propagate-trace-upstream", "false"),
        ("log-format", "text"),
        ("print-config", "false"),
    ];

    let mut contract: Vec<(String, String)> = contract
        .map(|(flag, default)| (flag.to_owned(), default.to_owned()))
        .to_vec();
    contract.sort();
    let mut declared = flags("serve");
    declared.sort();

    assert_eq!(declared, contract);
    Command::command().debug_assert();
}

#[test]
fn defaults_apply_without_flags_and_variables() {
    let config = serve(&["--region", "cn-north-4"], &[]).unwrap();

    assert_eq!(config.server.listen, "127.0.0.1:50051".parse().unwrap());
    assert_eq!(
        config.admin.metrics_listen,
        Some("127.0.0.1:9464".parse().unwrap())
    );
    assert_eq!(
        without_slash(&config.upstream.base_url().unwrap()),
        "https://rds.cn-north-4.myhuaweicloud.com"
    );
    assert!(matches!(config.source, Source::Caller));
    assert_eq!(config.server.timeout, Duration::from_secs(30));
    assert_eq!(config.upstream.max_attempts, 3);
    assert_eq!(
        config.server.timings.max_connection_age,
        Duration::from_secs(1800)
    );
    assert_eq!(config.upstream.upstream_rate, None);
    assert!(config.server.tls.is_none());
    assert!(config.server.reflection);
    assert_eq!(config.telemetry.filter, "info");
}

#[test]
fn flag_wins_over_variable_and_variable_over_default() {
    let variable = [("RDS_TASK_FACADE_TIMEOUT", "7s")];
    let cases = [
        (vec!["--sandbox"], &[][..], 30),
        (vec!["--sandbox"], &variable[..], 7),
        (vec!["--sandbox", "--timeout", "5s"], &variable[..], 5),
        (vec!["--sandbox", "--timeout=5s"], &variable[..], 5),
        (
            vec!["--sandbox"],
            &[("RDS_TASK_FACADE_TIMEOUT", "")][..],
            30,
        ),
    ];

    for (args, env, seconds) in cases {
        let config = serve(&args, env).unwrap();
        assert_eq!(config.server.timeout.as_secs(), seconds, "{args:?} {env:?}");
    }
}

#[test]
fn every_flag_of_serve_has_a_variable() {
    let file = file_with("x");
    let path = file.path().to_str().unwrap();
    let values = [
        ("region", "cn-north-4"),
        ("credentials", "caller"),
        ("endpoint", "https://rds.example.com"),
        ("upstream-ca", path),
        ("upstream-proxy", "http://proxy:3128"),
        ("quota-store", "redis://127.0.0.1:6379"),
        ("token-file", path),
        ("iam-endpoint", "https://iam.example.com"),
        ("iam-user", "ann"),
        ("iam-domain", "acme"),
        ("iam-password-file", path),
        ("iam-project", "p"),
        ("allow-project", "p"),
        ("tls-cert", path),
        ("tls-key", path),
        ("tls-client-ca", path),
    ];

    for (flag, default) in flags("serve") {
        let value = values
            .iter()
            .find(|(name, _)| *name == flag)
            .map_or(default.as_str(), |(_, value)| value);
        let variable = variable_name(&flag);
        let env = [(variable.as_str(), value)];
        let found = match serve(&["--sandbox"], &env) {
            Ok(_) => Vec::new(),
            Err(invalid) => invalid.problems,
        };
        assert!(
            !found
                .iter()
                .any(|problem| problem.contains("not a known variable")),
            "{variable}: {found:?}"
        );
    }
}

#[test]
fn every_default_parses() {
    let serve: Serve = defaults();
    let call: client::CallOptions = defaults();
    let health: client::HealthOptions = defaults();
    let sandbox: sandbox::Options = defaults();

    assert!(serve.server.tls.is_none() && call.task.is_none());
    assert!(call.server.pair.is_none() && health.server.pair.is_none());
    assert!(sandbox.listen.ip().is_loopback());
}

#[test]
fn values_that_are_not_utf_8_are_rejected() {
    let invalid = OsString::from_vec(vec![b'1', 0xff]);
    let environment = Environment::from([
        ("RDS_TASK_FACADE_TIMEOUT".into(), invalid.clone()),
        ("HUAWEICLOUD_SDK_AK".into(), invalid.clone()),
        ("HUAWEICLOUD_SDK_SK".into(), "sk".into()),
    ]);
    let args = [
        "rds-task-facade",
        "serve",
        "--sandbox",
        "--credentials",
        "env",
    ];
    let mut args: Vec<OsString> = args.map(OsString::from).to_vec();
    args.extend(["--max-attempts".into(), invalid]);

    let found = parse(args, &environment).expect_err("must be invalid");

    assert_eq!(
        found.problems,
        [
            "RDS_TASK_FACADE_TIMEOUT: is not UTF-8",
            "--max-attempts: is not UTF-8",
            "HUAWEICLOUD_SDK_AK: is not UTF-8",
        ]
    );
}

#[test]
fn exactly_one_of_region_endpoint_and_sandbox_must_be_set() {
    let endpoint = ["--endpoint", "https://rds.example.com"];
    let region = ["--region", "cn-north-4"];
    let cases = [
        (vec![], &[][..], false),
        (vec!["--sandbox=false"], &[], false),
        (vec!["--sandbox"], &[], true),
        (endpoint.to_vec(), &[], true),
        (region.to_vec(), &[], true),
        ([endpoint, region].concat(), &[], false),
        (vec!["--sandbox", "--region", "cn-north-4"], &[], false),
        (
            vec!["--sandbox"],
            &[("RDS_TASK_FACADE_REGION", "cn-north-4")],
            false,
        ),
        (
            vec!["--sandbox=0"],
            &[("RDS_TASK_FACADE_REGION", "cn-north-4")],
            true,
        ),
        (vec!["--region", "cn-nroth-4"], &[], false),
        (vec!["--endpoint", "http://127.0.0.1:8080"], &[], true),
        (
            vec![
                "--endpoint",
                "http://rds.example.com",
                "--allow-insecure-upstream",
            ],
            &[],
            true,
        ),
    ];

    for (args, env, expected) in cases {
        assert_eq!(serve(&args, env).is_ok(), expected, "{args:?} {env:?}");
    }
    assert_eq!(
        problems(&["--region", "cn-nroth-4"], &[]),
        [
            "--region: \"cn-nroth-4\" is not a known region; did you mean cn-north-4? use --endpoint for others"
        ]
    );
}

#[test]
fn kubernetes_service_variables_are_ignored() {
    let url = "tcp://10.0.0.1:50051";
    // Name, value, and whether it is ignored.
    let cases = [
        ("RDS_TASK_FACADE_SERVICE_HOST", "10.0.0.1", true),
        ("RDS_TASK_FACADE_SERVICE_PORT", "50051", true),
        ("RDS_TASK_FACADE_SERVICE_PORT_GRPC", "50051", true),
        ("RDS_TASK_FACADE_PORT", url, true),
        ("RDS_TASK_FACADE_PORT_50051_TCP", url, true),
        ("RDS_TASK_FACADE_PORT_50051_TCP_PROTO", "tcp", true),
        ("RDS_TASK_FACADE_PORT_50051_TCP_PORT", "50051", true),
        ("RDS_TASK_FACADE_PORT_50051_TCP_ADDR", "10.0.0.1", true),
        ("RDS_TASK_FACADE_CANARY_SERVICE_HOST", "fd00::1", true),
        ("RDS_TASK_FACADE_CANARY_SERVICE_PORT_GRPC_WEB", "80", true),
        ("RDS_TASK_FACADE_2_PORT", "udp://10.0.0.1:53", true),
        ("RDS_TASK_FACADE_2_PORT_53_UDP", "udp://10.0.0.1:53", true),
        ("RDS_TASK_FACADE_X_PORT", "sctp://10.0.0.1:1", true),
        ("RDS_TASK_FACADE_X_PORT_1_SCTP_ADDR", "10.0.0.1", true),
        ("RDS_TASK_FACADE_PORT_8_PORT_80_TCP_ADDR", "10.0.0.1", true),
        ("RDS_TASK_FACADE_METRICS_PORT", url, true),
        ("RDS_TASK_FACADEX", "x", true),
        ("RDS_TASK_FACADE_PORT", "50051", false),
        ("RDS_TASK_FACADE_METRICS_PORT", "9464", false),
        ("RDS_TASK_FACADE_PORT", "http://10.0.0.1:80", false),
        ("RDS_TASK_FACADE_PORTS", url, false),
        ("RDS_TASK_FACADE_PORT_50051", url, false),
        ("RDS_TASK_FACADE_PORT_X_TCP", url, false),
        ("RDS_TASK_FACADE_PORT_70000_TCP", url, false),
        ("RDS_TASK_FACADE_PORT_50051_TLS", url, false),
        ("RDS_TASK_FACADE_PORT_50051_TCP_HOST", "10.0.0.1", false),
        ("RDS_TASK_FACADE_SERVICE", "x", false),
        ("RDS_TASK_FACADE_SERVICE_PORT_", "1", false),
        ("RDS_TASK_FACADE_SERVICE_HOSTS", "x", false),
        ("RDS_TASK_FACADE_SERVICE_HOST_NAME", "x", false),
        ("RDS_TASK_FACADE_", "x", false),
        ("RDS_TASK_FACADE_timeout", "1s", false),
    ];

    for (name, value, ignored) in cases {
        let found = serve(&["--sandbox"], &[(name, value)]);
        assert_eq!(found.is_ok(), ignored, "{name}={value}");
    }
    assert!(serve(&["--sandbox"], &[("RDS_TASK_FACADE_ODD", "")]).is_ok());
}

#[test]
fn the_problem_of_an_unknown_variable_has_the_nearest_name() {
    let cases = [
        ("RDS_TASK_FACADE_TIMOUT", "RDS_TASK_FACADE_TIMEOUT"),
        ("RDS_TASK_FACADE_TOKEN_PATH", "RDS_TASK_FACADE_TOKEN_FILE"),
        (
            "RDS_TASK_FACADE_max_attempts",
            "RDS_TASK_FACADE_MAX_ATTEMPTS",
        ),
        (
            "RDS_TASK_FACADE_METRICS_PORT",
            "RDS_TASK_FACADE_METRICS_LISTEN",
        ),
        ("RDS_TASK_FACADE_TOKENS", "RDS_TASK_FACADE_TOKEN"),
    ];

    for (name, close) in cases {
        let expected = format!("{name}: is not a known variable; did you mean {close}?");
        assert_eq!(problems(&["--sandbox"], &[(name, "x")]), [expected]);
    }
}

/// A file with a certificate and its key, valid for every TLS flag.
fn certificate_and_key() -> tempfile::NamedTempFile {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    file_with(&(made.cert.pem() + &made.signing_key.serialize_pem()))
}

#[test]
fn tls_files_must_be_complete_and_valid() {
    let (one, other, text) = (
        certificate_and_key(),
        certificate_and_key(),
        file_with("pem"),
    );
    let [path, other, text] = [&one, &other, &text].map(|file| file.path().to_str().unwrap());
    let cases = [
        (vec!["--tls-cert", path, "--tls-key", path], true),
        (
            vec![
                "--tls-cert",
                path,
                "--tls-key",
                path,
                "--tls-client-ca",
                path,
            ],
            true,
        ),
        (vec!["--tls-cert", path], false),
        (vec!["--tls-key", path], false),
        (vec!["--tls-client-ca", path], false),
        (vec!["--tls-cert", path, "--tls-key", "/nowhere"], false),
        (vec!["--tls-cert", path, "--tls-key", other], false),
        (vec!["--tls-cert", text, "--tls-key", path], false),
        (vec!["--upstream-ca", path], true),
        (vec!["--upstream-ca", text], false),
    ];

    for (args, expected) in cases {
        let args = [&["--sandbox"][..], &args].concat();
        assert_eq!(serve(&args, &[]).is_ok(), expected, "{args:?}");
    }
}

#[test]
fn problems_are_json_if_json_is_requested_even_with_an_invalid_command_line() {
    let by_variable = [("RDS_TASK_FACADE_LOG_FORMAT", "json")];
    let format = |args: &[&str], env| command(args, env).unwrap_err().log_format;

    let twice = ["serve", "--log-format", "json", "--log-format", "json"];
    assert_eq!(format(&twice, &[]), OutputFormat::Json);
    assert_eq!(
        format(&["serve", "--log-format=json", "--odd"], &[]),
        OutputFormat::Json
    );
    assert_eq!(
        format(&["serve", "--odd"], &by_variable),
        OutputFormat::Json
    );
    assert_eq!(format(&["serve", "--odd"], &[]), OutputFormat::Text);
    assert_eq!(format(&["call", "--odd"], &by_variable), OutputFormat::Text);
}

#[test]
fn invalid_boolean_is_one_problem() {
    assert_eq!(
        problems(&[], &[("RDS_TASK_FACADE_SANDBOX", "TRUE")]).len(),
        1
    );
}

#[test]
fn repeated_and_comma_separated_projects_are_combined() {
    let args = [
        "--sandbox",
        "--allow-project",
        "a,b",
        "--allow-project",
        "c",
    ];
    let env = [("RDS_TASK_FACADE_ALLOW_PROJECT", "d")];

    assert_eq!(
        serve(&args, &env).unwrap().rpc.allow_project,
        ["a", "b", "c"]
    );
    assert_eq!(
        serve(&["--sandbox"], &env).unwrap().rpc.allow_project,
        ["d"]
    );
    assert_eq!(problems(&["--sandbox", "--allow-project="], &[]).len(), 1);
    assert_eq!(
        problems(&["--sandbox", "--allow-project", ","], &[]).len(),
        1
    );
}

#[test]
fn a_server_credential_for_any_project_is_warned_about() {
    let file = certificate_and_key();
    let path = file.path().to_str().unwrap();
    let tls = ["--tls-cert", path, "--tls-key", path];
    let exposed = ["--sandbox", "--listen", "0.0.0.0:50051"];
    let both: &[&str] = &["--tls-client-ca", "--allow-project"];
    let projects: &[&str] = &["--allow-project"];
    // The arguments, and the flags that the warning names.
    let cases: [(Vec<&str>, &[&str]); 9] = [
        (exposed.to_vec(), both),
        ([&exposed[..], &tls].concat(), both),
        (
            [&exposed[..], &tls, &["--tls-client-ca", path]].concat(),
            projects,
        ),
        ([&exposed[..], &["--allow-project", "p"]].concat(), &[]),
        ([&exposed[..], &["--credentials", "caller"]].concat(), &[]),
        (vec!["--sandbox", "--listen", "[::]:50051"], both),
        (vec!["--sandbox", "--listen", "[::1]:50051"], projects),
        (vec!["--sandbox"], projects),
        (vec!["--sandbox", "--allow-project", "p"], &[]),
    ];

    let empty = ("RDS_TASK_FACADE_ALLOW_PROJECT", "");
    for (args, named) in cases {
        let warning = serve(&args, &[empty]).unwrap().exposure_warning();
        let warning = warning.unwrap_or_default();
        for flag in both {
            assert_eq!(warning.contains(flag), named.contains(flag), "{args:?}");
        }
    }
}

#[test]
fn the_password_of_the_proxy_comes_from_a_file() {
    let good = file_with("\u{feff}a b:c@%\u{e4}\r\n");
    let bad = [
        file_with(""),
        file_with("\"canary\""),
        file_with("can\0ary"),
    ];
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let with = |proxy: &str, file: &str| {
        let file = ["--upstream-proxy-password-file", file];
        serve(
            &[&["--sandbox"][..], &file].concat(),
            &[("RDS_TASK_FACADE_UPSTREAM_PROXY", proxy)],
        )
    };

    let options = with("http://ann@proxy:3128", &path(&good)).unwrap();
    let proxy = options.upstream.upstream_proxy.as_ref().unwrap();
    assert_eq!(
        proxy.url().as_str(),
        "http://ann:a%20b%3Ac%40%25%C3%A4@proxy:3128/"
    );
    for text in [options.printed(), options.summary(), format!("{options:?}")] {
        assert!(!text.contains("ann") && !text.contains("a%20b"), "{text}");
    }

    let mut rejected = vec![
        with("", &path(&good)),
        with("http://proxy:3128", &path(&good)),
        with("http://ann:canary@proxy:3128", &path(&good)),
        with("http://ann@proxy:3128", "/nonexistent/canary"),
    ];
    rejected.extend(
        bad.iter()
            .map(|file| with("http://ann@proxy:3128", &path(file))),
    );
    for result in rejected {
        let problems = result.unwrap_err().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].starts_with("--upstream-proxy-password-file: "),
            "{problems:?}"
        );
        assert!(!problems[0].contains("canary"), "{problems:?}");
    }
}

#[test]
fn the_quota_store_needs_a_key_and_tls_beyond_loopback_and_shows_no_credential() {
    let key = file_with(&"k".repeat(32));
    let short = file_with("canary");
    let password = file_with("canary");
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let with = |store: &str, flags: &[&str]| {
        let args = [&["--sandbox"][..], flags].concat();
        serve(&args, &[("RDS_TASK_FACADE_QUOTA_STORE", store)])
    };
    let (key, short, password) = (path(&key), path(&short), path(&password));
    let key_file = ["--quota-store-key-file", &key];

    for (store, shown) in [
        (
            "redis://ann:canary@127.0.0.1:6379/3",
            "redis://127.0.0.1:6379/3",
        ),
        ("rediss://:canary@store:6380", "rediss://store:6380/0"),
    ] {
        let options = with(store, &key_file).unwrap();
        let printed = options.printed();
        assert!(
            printed.contains(&format!("# RDS_TASK_FACADE_QUOTA_STORE: {shown}\n")),
            "{printed}"
        );
        for text in [printed, options.summary(), format!("{options:?}")] {
            assert!(!text.contains("ann") && !text.contains("canary"), "{text}");
        }
    }
    let allowed = [&key_file[..], &["--allow-insecure-quota-store"]].concat();
    with("redis://store:6379", &allowed).unwrap();
    let from_file = [&key_file[..], &["--quota-store-password-file", &password]].concat();
    with("redis://ann@127.0.0.1:6379", &from_file).unwrap();

    let short_key = ["--quota-store-key-file", &short];
    let no_key = ["--quota-store-key-file", "/nonexistent/canary"];
    let cases: [(&str, &[&str], &str); 6] = [
        (
            "redis://canary@127.0.0.1:1",
            &[],
            "RDS_TASK_FACADE_QUOTA_STORE: requires --quota-store-key-file",
        ),
        (
            "redis://canary@store:1",
            &key_file,
            "RDS_TASK_FACADE_QUOTA_STORE: redis:// is allowed for loopback",
        ),
        (
            "http://canary@store:1",
            &key_file,
            "RDS_TASK_FACADE_QUOTA_STORE: must be redis://",
        ),
        (
            "redis://127.0.0.1:1",
            &short_key,
            "--quota-store-key-file: the file holds 6 bytes",
        ),
        (
            "redis://127.0.0.1:1",
            &no_key,
            "--quota-store-key-file: the file cannot be read",
        ),
        (
            "redis://:canary@127.0.0.1:1",
            &from_file,
            "--quota-store-password-file: requires",
        ),
    ];
    for (store, flags, expected) in cases {
        let problems = with(store, flags).unwrap_err().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with(expected), "{problems:?}");
        assert!(!problems[0].contains("canary"), "{problems:?}");
    }
}
