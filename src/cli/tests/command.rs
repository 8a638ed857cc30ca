//! Subcommands, help, and reports of all problems.

use super::*;

#[test]
fn boolean_flags_take_an_optional_value() {
    let cases = [
        (vec!["--sandbox"], true),
        (vec!["--sandbox", "--reflection"], true),
        (vec!["--sandbox", "--reflection=true"], true),
        (vec!["--sandbox", "--reflection=false"], false),
        (vec!["--sandbox", "--reflection", "0"], false),
        (vec!["--sandbox=1", "--reflection=false"], false),
    ];

    for (args, reflection) in cases {
        assert_eq!(
            serve(&args, &[]).unwrap().server.reflection,
            reflection,
            "{args:?}"
        );
    }
}

#[test]
fn all_problems_are_reported_one_line_each() {
    let args = [
        "--listen",
        "nowhere",
        "--timeout",
        "0s",
        "--max-attempts=11",
        "--retry-budget",
        "101",
        "--tls-cert",
        "/nowhere/cert.pem",
        "--endpoint",
        "http://rds.example.com",
        "--cache-ttl=",
        "--allow-project",
        "p,,/",
    ];
    let env = [
        ("RDS_TASK_FACADE_MAX_IN_FLIGHT", "0"),
        ("RDS_TASK_FACADE_MAX_IN_FLIHGT", "1"),
        ("RDS_TASK_FACADE_LOG_FORMAT", "xml"),
        ("RUST_LOG", "info,="),
        ("PATH", "/bin"),
    ];

    let mut found = problems(&args, &env);

    found.sort();
    let expected = [
        "--allow-project: \"/\" is not a project id; separate ids by commas, each 1 to 64 of letters, digits, '-' and '_'",
        "--allow-project: is not a project id; separate ids by commas, each 1 to 64 of letters, digits, '-' and '_'",
        "--cache-ttl: is not a duration; write it like 250ms, 10s, 5m or 1h",
        "--endpoint: \"http://rds.example.com\" is plain http, which is allowed for loopback only; use https, or set --allow-insecure-upstream",
        "--listen: \"nowhere\" is not an address; write it like 127.0.0.1:50051, 0.0.0.0:50051 or [::]:50051",
        "--max-attempts: \"11\" is not a whole number from 1 to 10",
        "--retry-budget: \"101\" is not a whole number from 0 to 100",
        "--timeout: \"0s\" is not longer than zero",
        "--tls-cert: \"/nowhere/cert.pem\": the file cannot be read: entity not found",
        "--tls-cert: requires --tls-key",
        "RDS_TASK_FACADE_LOG_FORMAT: \"xml\" is not one of text, json",
        "RDS_TASK_FACADE_MAX_IN_FLIGHT: \"0\" is not a whole number from 1 to 1000000",
        "RDS_TASK_FACADE_MAX_IN_FLIHGT: is not a known variable; did you mean RDS_TASK_FACADE_MAX_IN_FLIGHT?",
        "RUST_LOG: \"info,=\" is not a level (error, warn, info, debug, trace, off) or target=level, separated by commas",
    ];
    assert_eq!(found, expected);
}

#[test]
fn rules_for_several_flags_skip_invalid_values() {
    let file = certificate_and_key();
    let path = file.path().to_str().unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["--region", "nowhere"], "--region"),
        (&["--endpoint", "https://10.0.0.256"], "--endpoint"),
        (&["--sandbox=maybe"], "--sandbox"),
        (&["--sandbox", "--credentials", "keys"], "--credentials"),
        (
            &["--sandbox", "--tls-cert", path, "--tls-key", "/nowhere"],
            "--tls-key",
        ),
    ];

    for (args, flag) in cases {
        let found = problems(args, &[]);
        assert_eq!(found.len(), 1, "{args:?}: {found:?}");
        assert!(found[0].starts_with(&format!("{flag}: ")), "{found:?}");
    }
}

#[test]
fn invalid_hosts_are_rejected() {
    let hosts = [
        "10.0.0.256",
        "1.2.3.4.5",
        "[::g]",
        "[fe80::1%25eth0]",
        "xn--a",
    ];
    let iam = [
        "--iam-user",
        "u",
        "--iam-domain",
        "d",
        "--iam-password-file",
        "/dev/null",
    ];

    for host in hosts {
        let https = format!("https://{host}");
        let proxy = format!("http://{host}:3128");
        let cases: [(&str, Vec<&str>); 5] = [
            ("--endpoint", vec!["serve", "--endpoint", &https]),
            (
                "--upstream-proxy",
                vec!["serve", "--sandbox", "--upstream-proxy", &proxy],
            ),
            (
                "--iam-endpoint",
                [
                    &[
                        "serve",
                        "--sandbox",
                        "--credentials",
                        "iam",
                        "--iam-endpoint",
                        &https,
                    ][..],
                    &iam,
                ]
                .concat(),
            ),
            (
                "--metadata-endpoint",
                vec![
                    "serve",
                    "--sandbox",
                    "--credentials",
                    "metadata",
                    "--metadata-endpoint",
                    &https,
                ],
            ),
            ("--target", vec!["call", "--target", &https]),
        ];
        for (flag, args) in cases {
            let found = command(&args, &[]).expect_err("must be invalid").problems;
            let about = found
                .iter()
                .filter(|line| line.starts_with(&format!("{flag}: ")));
            assert_eq!(about.count(), 1, "{flag} {host}: {found:?}");
        }
    }
}

#[test]
fn print_config_shows_the_effective_value_of_every_flag() {
    let env = [("RDS_TASK_FACADE_TIMEOUT", "7s")];

    let text = printed(
        &["serve", "--sandbox", "--print-config", "--max-attempts=5"],
        &env,
    );

    for (flag, _) in flags("serve") {
        let variable = variable_name(&flag);
        let is_about = |line: &str| line.split(['=', ':']).next() == Some(&variable);
        let lines = text.lines().map(|line| line.trim_start_matches("# "));
        let expected = usize::from(flag != "print-config");
        assert_eq!(
            lines.filter(|line| is_about(line)).count(),
            expected,
            "{flag}: {text}"
        );
    }
    let lines = [
        "RDS_TASK_FACADE_TIMEOUT=7s",
        "RDS_TASK_FACADE_MAX_ATTEMPTS=5",
        "RDS_TASK_FACADE_CONNECT_TIMEOUT=3s",
        "RDS_TASK_FACADE_CREDENTIALS=token",
        "# RDS_TASK_FACADE_IAM_USER: not in use",
        "# RDS_TASK_FACADE_TOKEN: set",
        "RUST_LOG=info",
    ];
    for line in lines {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
}

#[test]
fn help_shows_every_flag_with_its_default() {
    let overview = printed(&["--help"], &[]);
    for subcommand in ["serve", "check", "call", "watch", "health", "sandbox"] {
        assert!(overview.contains(subcommand));
        let help = printed(&[subcommand, "--help"], &[]);
        for (flag, default) in flags(subcommand) {
            assert!(help.contains(&format!("--{flag} ")), "{subcommand} {flag}");
            let default = match default.is_empty() {
                true => default,
                false => format!("[default: {default}]"),
            };
            assert!(help.contains(&default), "{subcommand} {flag}");
        }
    }
    assert_eq!(
        printed(&["--version"], &[]),
        concat!("rds-task-facade ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn check_takes_the_flags_and_variables_of_serve() {
    let mut flags_of_check = flags("check");
    flags_of_check.retain(|(flag, _)| flag != "output");
    assert_eq!(flags_of_check, flags("serve"));

    let env = [
        ("RDS_TASK_FACADE_SANDBOX", "1"),
        ("RDS_TASK_FACADE_TIMEOUT", "7s"),
    ];
    let Ok(Command::Check(check)) = command(&["check", "--max-attempts=5"], &env) else {
        panic!("valid settings");
    };
    let serve = &check.serve;
    assert_eq!(serve.server.timeout, Duration::from_secs(7));
    assert_eq!(
        (serve.upstream.sandbox, serve.upstream.max_attempts),
        (true, 5)
    );

    let misspelled = [
        ("RDS_TASK_FACADE_OUTPUT", "json"),
        ("RDS_TASK_FACADE_TIMEOUT", "soon"),
    ];
    let found = command(&["check", "--sandbox"], &misspelled).expect_err("two problems");
    assert_eq!(found.problems.len(), 2, "{found:?}");
}

#[test]
fn call_uses_the_example_task_only_without_ids() {
    let ids = [
        "--project-id",
        "p",
        "--instance-id",
        "i",
        "--workflow-id",
        "w",
    ];
    let cases = [
        (vec![], Some(None)),
        (
            ids.to_vec(),
            Some(Some(Task {
                project_id: "p".to_owned(),
                instance_id: "i".to_owned(),
                workflow_id: "w".to_owned(),
                workflow_name: None,
            })),
        ),
        (ids[..4].to_vec(), None),
        (vec!["--workflow-name", "n"], None),
    ];

    for (args, expected) in cases {
        let args = [&["call"][..], &args].concat();
        let task = match command(&args, &[]) {
            Ok(Command::Call(call)) => Some(call.task),
            _ => None,
        };
        assert_eq!(task, expected, "{args:?}");
    }
}

#[test]
fn client_commands_read_only_the_token_variable() {
    let env = [
        ("RDS_TASK_FACADE_TIMEOUT", "nonsense"),
        ("RDS_TASK_FACADE_ODD", "x"),
        ("RDS_TASK_FACADE_TOKEN", "t"),
    ];

    let Ok(Command::Call(call)) = command(&["call"], &env) else {
        panic!("not a call");
    };
    let Ok(Command::Health(health)) = command(&["health"], &env) else {
        panic!("not a health check");
    };

    assert_eq!(call.timeout, Duration::from_secs(10));
    assert!(call.token.from_variable.is_some());
    assert_eq!(health.timeout, Duration::from_secs(3));
    assert_eq!(
        without_slash(&health.server.target),
        "http://127.0.0.1:50051"
    );
    assert!(
        matches!(command(&["sandbox"], &env), Ok(Command::Sandbox(options)) if options.listen.port() == 8080)
    );
}

#[test]
fn syntax_errors_are_one_line() {
    let cases: [(&[&str], &str); 12] = [
        (&[], "'rds-task-facade' requires a subcommand"),
        (
            &["srve"],
            "unrecognized subcommand 'srve'; tip: a similar subcommand exists: 'serve'",
        ),
        (
            &["--verbose", "serve", "--sandbox"],
            "unexpected argument '--verbose' found",
        ),
        (
            &["serve", "--tmeout", "1s"],
            "unexpected argument '--tmeout' found; tip: a similar argument exists: '--timeout'",
        ),
        (
            &["serve", "--timeout"],
            "a value is required for '--timeout <DURATION>' but none was supplied",
        ),
        (
            &["serve", "--drain-delay", "1s", "--drain-delay", "2s"],
            "the argument '--drain-delay <DURATION>' cannot be used multiple times",
        ),
        (&["--sandbox"], "unexpected argument '--sandbox' found"),
        (
            &["serve", "--sandbox", "stray"],
            "--sandbox: \"stray\" is not true",
        ),
        (
            &["serve", "--sandbox=1", "stray"],
            "unexpected argument without a flag; see --help",
        ),
        (
            &["call", "--target", "localhost"],
            "--target: \"localhost\" is not a URL",
        ),
        (
            &["call", "--ca", "/dev/null"],
            "--ca, --cert, --key: require an https --target",
        ),
        (&["call", "--cert", "/dev/null"], "--cert: requires --key"),
    ];

    for (args, expected) in cases {
        let found = command(args, &[]).expect_err("must be invalid").problems;
        assert_eq!(found.len(), 1, "{args:?}: {found:?}");
        assert!(found[0].starts_with(expected), "{args:?}: {found:?}");
        assert_eq!(found[0].lines().count(), 1, "{args:?}: {found:?}");
    }
}
