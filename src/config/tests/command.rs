//! The command line: subcommands, help, and every mistake at once.

use super::*;
use crate::client;

#[test]
fn booleans_stand_alone_or_with_a_value() {
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
            serve(&args, &[]).unwrap().reflection,
            reflection,
            "{args:?}"
        );
    }
}

#[test]
fn all_mistakes_show_at_once_in_one_line_each() {
    let args = [
        "--listen",
        "nowhere",
        "--timeout",
        "0s",
        "--max-attempts=11",
        "--retry-budget",
        "101",
        "--tmeout",
        "1s",
        "--tls-cert",
        "/nowhere/cert.pem",
        "--drain-delay",
        "1s",
        "--drain-delay",
        "2s",
        "--endpoint",
        "http://rds.example.com",
        "--cache-ttl",
    ];
    let env = [
        ("RDS_TASK_FACADE_MAX_IN_FLIGHT", "0"),
        ("RDS_TASK_FACADE_MAX_IN_FLIHGT", "1"),
        ("RDS_TASK_FACADE_LOG_FORMAT", "xml"),
        ("RUST_LOG", "info,="),
        ("PATH", "/bin"),
    ];

    let refused = serve(&args, &env).unwrap_err();

    let mut found = refused.mistakes.clone();
    found.sort();
    let expected = [
        "--cache-ttl: needs a value",
        "--drain-delay: is given more than once",
        "--endpoint: plain http is for loopback only; use https, or allow it with --allow-insecure-upstream",
        "--listen: \"nowhere\" is no address; write it like 127.0.0.1:50051, 0.0.0.0:50051 or [::1]:50051",
        "--max-attempts: \"11\" is no whole number from 1 to 10",
        "--retry-budget: \"101\" is no whole number from 0 to 100",
        "--timeout: must be longer than zero",
        "--tls-cert: needs --tls-key too",
        "--tmeout: no such flag; did you mean --timeout?",
        "RDS_TASK_FACADE_LOG_FORMAT: \"xml\" is not one of text, json",
        "RDS_TASK_FACADE_MAX_IN_FLIGHT: \"0\" is no whole number from 1 to 1000000",
        "RDS_TASK_FACADE_MAX_IN_FLIHGT: no such variable; did you mean RDS_TASK_FACADE_MAX_IN_FLIGHT?",
        "RUST_LOG: must be a level (error, warn, info, debug, trace, off) or target=level, with commas between",
    ];
    assert_eq!(found, expected);
    let lines = refused.to_string();
    assert_eq!(lines.lines().count(), expected.len());
    assert!(
        lines
            .lines()
            .all(|line| line.starts_with("rds-task-facade: "))
    );
}

#[test]
fn print_config_shows_every_flag_with_its_effective_value() {
    let env = [("RDS_TASK_FACADE_TIMEOUT", "7s")];

    let text = text_of(
        &["serve", "--sandbox", "--print-config", "--max-attempts=5"],
        &env,
    );

    for flag in flags::SERVE {
        assert!(
            text.contains(&format!("{} = ", flag.name)),
            "{}: {text}",
            flag.name
        );
    }
    let lines = [
        "timeout = 7s",
        "max-attempts = 5",
        "connect-timeout = 3s",
        "credentials = token",
        "iam-user = not in use",
        "RDS_TASK_FACADE_TOKEN = set",
        "RUST_LOG = info",
    ];
    for line in lines {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
}

#[test]
fn help_names_every_flag_with_its_default() {
    for (subcommand, flags, ..) in flags::SUBCOMMANDS {
        let help = text_of(&[subcommand, "--help"], &[]);
        for flag in flags {
            assert!(
                help.contains(&format!("--{} ", flag.name)),
                "{subcommand} {}",
                flag.name
            );
            assert!(help.contains(flag.default), "{subcommand} {}", flag.name);
        }
    }
    let help = text_of(&["--help"], &[]);
    for subcommand in ["serve", "call", "health", "sandbox"] {
        assert!(help.contains(subcommand));
    }
    assert_eq!(
        text_of(&["--version"], &[]),
        concat!("rds-task-facade ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn call_asks_for_the_example_task_only_without_any_id() {
    let ids = [
        "--project-id",
        "p",
        "--instance-id",
        "i",
        "--workflow-id",
        "w",
    ];
    let cases = [
        (vec![], Some(client::Task::example())),
        (
            ids.to_vec(),
            Some(client::Task {
                project_id: "p".to_owned(),
                instance_id: "i".to_owned(),
                workflow_id: "w".to_owned(),
                workflow_name: None,
            }),
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
fn client_commands_ignore_the_variables_of_serve_but_for_the_token() {
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

    assert_eq!(call.server.timeout, Duration::from_secs(10));
    assert!(matches!(call.token, Some(client::Token::Fixed(_))));
    assert_eq!(health.server.timeout, Duration::from_secs(3));
    assert_eq!(health.server.target.as_str(), "http://127.0.0.1:50051");
    assert!(
        matches!(command(&["sandbox"], &env), Ok(Command::Sandbox(address)) if address.port() == 8080)
    );
}

#[test]
fn a_command_line_that_asks_for_nothing_known_is_refused() {
    let cases: [(&[&str], &str); 9] = [
        (&[], "no subcommand"),
        (&["srve"], "unknown subcommand"),
        (
            &["--verbose", "serve", "--sandbox"],
            "--verbose: no such flag",
        ),
        (
            &["--verbose", "serve", "--timeout=x"],
            "--timeout: \"x\" is no duration",
        ),
        (&["--sandbox"], "--sandbox: no such flag"),
        (
            &["serve", "--sandbox", "stray"],
            "--sandbox: \"stray\" is not true",
        ),
        (
            &["serve", "--sandbox=1", "stray"],
            "argument 3: belongs to no flag",
        ),
        (
            &["call", "--target", "localhost"],
            "--target: must be a URL",
        ),
        (
            &["call", "--cert", "/nowhere"],
            "--ca, --cert, --key: need an https --target",
        ),
    ];

    for (args, expected) in cases {
        let refused = command(args, &[]).expect_err("must be refused");
        assert!(
            refused
                .mistakes
                .iter()
                .any(|mistake| mistake.starts_with(expected)),
            "{args:?}: {refused}"
        );
    }
}
