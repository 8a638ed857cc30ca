use std::{collections::BTreeMap, process::Command, sync::Arc};

use tokio::{sync::Semaphore, task::JoinSet};

use crate::shared::scenarios::documented;
use crate::support::{
    Program, Upstream,
    certificates::{Authority, Pair},
    example, free_address,
    program::{PROGRAM, run},
    reply,
};

const CONFIGURATION: &str = include_str!("../../docs/configuration.md");

/// Flag -> default, as `serve --help` prints them.
fn flags_of_help() -> BTreeMap<String, Option<String>> {
    let (code, help, _) = run(&["serve", "--help"], &[]);
    assert_eq!(code, 0);
    let mut flags = BTreeMap::new();
    let mut current = String::new();
    let (table, _) = help.split_once("Every flag has a variable").expect("notes");
    for line in table.lines().map(str::trim) {
        // A flag stands alone on its line, its text on the next.
        if let Some(name) = line.split([' ', ',']).find(|word| word.starts_with("--"))
            && line.starts_with('-')
        {
            current = name.to_owned();
            flags.insert(current.clone(), None);
        } else if let Some((_, default)) = line.split_once("[default: ") {
            flags.insert(
                current.clone(),
                Some(default.trim_end_matches(']').to_owned()),
            );
        }
    }
    flags.remove("--help");
    flags
}

#[test]
fn the_documented_table_and_the_help_list_the_same_flags_and_defaults() {
    let mut documented_flags = BTreeMap::new();
    let table = CONFIGURATION
        .split("| flag of `serve` | default | |")
        .nth(1)
        .expect("the table");
    for row in table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
    {
        let cells: Vec<_> = row.split('|').skip(1).map(str::trim).collect();
        // A default in backticks is literal; any other text describes the absence of one.
        let default = cells[1].split('`').nth(1).map(str::to_owned);
        for flag in cells[0].split('`').filter(|word| word.starts_with("--")) {
            documented_flags.insert(flag.to_owned(), default.clone());
        }
    }

    assert_eq!(documented_flags, flags_of_help());
}

#[test]
fn invalid_values_are_reported_together_with_exit_code_2_and_without_secrets() {
    let args = [
        "serve",
        "--endpoint",
        "ftp://x",
        "--timeout",
        "soon",
        "--max-attempts",
        "11",
        "--credentials",
        "token",
        "--upstream-proxy",
        "http://user:canary-password@",
    ];
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "canary token"),
        ("RDS_TASK_FACADE_MAX_IN_FLIGHTS", "7"),
        ("RDS_TASK_FACADE_REFLECTION", "maybe"),
        ("RDS_TASK_FACADE_SERVICE_HOST", "10.0.0.1"),
        ("RDS_TASK_FACADE_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
        ("RDS_TASK_FACADE_DRAIN_DELAY", ""),
    ];

    let (code, out, err) = run(&args, &env);

    assert_eq!((code, out.as_str()), (2, ""));
    let expected = [
        "--endpoint",
        "--timeout",
        "--max-attempts",
        "RDS_TASK_FACADE_TOKEN",
        "--upstream-proxy",
        "RDS_TASK_FACADE_MAX_IN_FLIGHTS",
        "RDS_TASK_FACADE_REFLECTION",
    ];
    for name in expected {
        let lines = err
            .lines()
            .filter(|line| line.contains(&format!(" {name}:")))
            .count();
        assert_eq!(lines, 1, "{name} in {err}");
    }
    assert_eq!(err.lines().count(), expected.len(), "{err}");
    assert!(!err.contains("canary"), "{err}");
}

#[test]
fn the_printed_configuration_shows_which_secrets_are_set_but_not_their_values() {
    let args = [
        "serve",
        "--region",
        "cn-north-4",
        "--credentials",
        "token",
        "--print-config",
    ];

    let (code, out, _) = run(
        &args,
        &[
            ("RDS_TASK_FACADE_TOKEN", "canary"),
            ("RDS_TASK_FACADE_TIMEOUT", "5s"),
        ],
    );

    assert_eq!(code, 0);
    assert!(out.contains("RDS_TASK_FACADE_TIMEOUT=5s\n"), "{out}");
    assert!(out.contains("RDS_TASK_FACADE_REGION=cn-north-4\n"), "{out}");
    assert!(out.contains("# RDS_TASK_FACADE_TOKEN: set\n"), "{out}");
    assert!(!out.contains("canary"), "{out}");
}

#[test]
fn a_shell_reads_the_printed_configuration_and_serve_accepts_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let password = folder.path().join("pass word's $file");
    std::fs::write(&password, "canary").expect("a file");
    let password = password.to_str().expect("a path");
    let iam = [
        "--credentials",
        "iam",
        "--iam-user",
        "it's `me`, \"you\" & $HOME",
        "--iam-domain",
        "\u{5317}\u{4eac}",
        "--iam-password-file",
        password,
    ];
    let cases: [(&[&str], &[&str]); 4] = [
        (&["--sandbox"], &[]),
        (&["--sandbox"], &iam),
        (
            &[
                "--region",
                "cn-north-4",
                "--allow-project",
                "a,b",
                "--upstream-rate",
                "60/1m",
            ],
            &iam,
        ),
        (
            &[
                "--endpoint",
                "https://[2001:db8::1]:8443",
                "--metrics-listen",
                "off",
            ],
            &[],
        ),
    ];

    for (target, source) in cases {
        let args = [&["serve", "--print-config"], target, source].concat();
        let env = [("RUST_LOG", "info,access::health=error")];
        let (code, printed, err) = run(&args, &env);
        assert_eq!(code, 0, "{args:?}: {err}");
        let file = folder.path().join("settings");
        std::fs::write(&file, &printed).expect("a file");
        let script = "set -a; . \"$1\"; exec \"$2\" serve --print-config";
        let again = Command::new("sh")
            .args(["-c", script, "sh"])
            .args([file.as_os_str(), PROGRAM.as_ref()])
            .env_clear()
            .output()
            .expect("a shell");
        let err = String::from_utf8_lossy(&again.stderr);
        assert_eq!(
            String::from_utf8_lossy(&again.stdout),
            printed,
            "{args:?}: {err}"
        );
    }
}

#[test]
fn an_unknown_flag_is_one_line_with_exit_code_2_and_a_suggestion_and_without_the_value() {
    for args in [
        ["--tokn-file=canary", "--sandbox"],
        ["--tokn-file", "canary"],
    ] {
        let (code, out, err) = run(&[&["serve"], &args[..]].concat(), &[]);

        assert_eq!((code, out.as_str()), (2, ""));
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(err.contains("--tokn-file"), "{err}");
        assert!(err.contains("--token-file"), "{err}");
        assert!(!err.contains("canary"), "{err}");
    }
}

#[test]
fn invalid_values_are_json_if_the_log_is_and_name_their_variable() {
    let env = [
        ("RDS_TASK_FACADE_LOG_FORMAT", "json"),
        ("RDS_TASK_FACADE_TIMEOUT", "soon"),
    ];

    let (code, _, err) = run(&["serve", "--sandbox"], &env);

    assert_eq!(code, 2);
    let line: serde_json::Value = serde_json::from_str(&err).expect("one JSON object");
    assert_eq!(line["level"], "ERROR");
    let problem = line["msg"].as_str().expect("a text");
    assert!(
        problem.starts_with("RDS_TASK_FACADE_TIMEOUT: "),
        "{problem}"
    );
}

#[test]
fn the_flag_wins_over_the_variable() {
    let args = ["serve", "--sandbox", "--timeout", "7s", "--print-config"];

    let (_, out, _) = run(&args, &[("RDS_TASK_FACADE_TIMEOUT", "5s")]);

    assert!(out.contains("RDS_TASK_FACADE_TIMEOUT=7s\n"), "{out}");
}

#[tokio::test]
async fn call_prints_the_reply_or_the_status_with_its_details() {
    let program = Program::sandboxed(&[]);
    let target = format!("http://{}", program.grpc);

    let (code, out, err) = run(&["call", "--target", &target], &[]);
    let ids = [
        "--project-id",
        "p",
        "--instance-id",
        "i",
        "--workflow-id",
        "w",
    ];
    let (missing_code, missing_out, missing_err) =
        run(&[&["call", "--target", &target], &ids[..]].concat(), &[]);

    assert_eq!((code, err.as_str()), (0, ""));
    let reply: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let expected: serde_json::Value =
        serde_json::from_str(crate::support::upstream::EXAMPLE).expect("JSON");
    assert_eq!(reply, expected);
    assert_eq!((missing_code, missing_out.as_str()), (1, ""));
    for part in ["NOT_FOUND", "TASK_NOT_FOUND", "DBS.200543"] {
        assert!(missing_err.contains(part), "{part} in {missing_err}");
    }
}

#[tokio::test]
async fn call_sends_its_token_and_ignores_the_variables_of_serve() {
    let upstream = Upstream::start(|request| match request.header("x-auth-token") {
        Some("mine") => example(),
        _ => reply(401, &[], ""),
    })
    .await;
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "caller"],
        &[],
    );
    let target = format!("http://{}", program.grpc);
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "mine"),
        ("RDS_TASK_FACADE_TIMEOUT", "nonsense"),
    ];

    let called =
        tokio::task::spawn_blocking(move || run(&["call", "--target", &target], &env)).await;

    assert_eq!(called.expect("no panic").0, 0);
}

#[tokio::test]
async fn health_exits_with_0_only_when_serving() {
    let program = Program::sandboxed(&[]);
    let target = format!("http://{}", program.grpc);
    let closed = "http://127.0.0.1:9";

    let service = "huaweicloud.rds.task.v1.TaskService";
    let codes = [
        run(&["health", "--target", &target], &[]).0,
        run(&["health", "--target", &target, "--service", service], &[]).0,
        run(
            &["health", "--target", &target, "--service", "unknown"],
            &[],
        )
        .0,
        run(&["health", "--target", closed], &[]).0,
    ];

    assert_eq!(codes, [0, 0, 1, 1]);
}

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Exit code and output of `health` with the variables of a server.
fn health_of(listen: &str, metrics_listen: &str, tls: Variables<'_>) -> (i32, String) {
    let mut env = vec![
        ("RDS_TASK_FACADE_LISTEN", listen),
        ("RDS_TASK_FACADE_METRICS_LISTEN", metrics_listen),
        // Not about the listener, so `health` does not read it.
        ("RDS_TASK_FACADE_TIMEOUT", "nonsense"),
    ];
    env.extend_from_slice(tls);
    let (code, out, err) = run(&["health"], &env);
    (code, out + &err)
}

#[tokio::test]
async fn health_without_a_target_asks_the_server_with_the_same_variables() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let (cert, key) = Pair::for_server(&authority, "facade").write(folder.path(), "server");
    let (both_cert, both_key) = Pair::for_both(&authority, "facade").write(folder.path(), "both");
    let tls = [
        ("RDS_TASK_FACADE_TLS_CERT", cert.as_str()),
        ("RDS_TASK_FACADE_TLS_KEY", key.as_str()),
    ];
    let both = [
        ("RDS_TASK_FACADE_TLS_CERT", both_cert.as_str()),
        ("RDS_TASK_FACADE_TLS_KEY", both_key.as_str()),
    ];
    let client_ca = [("RDS_TASK_FACADE_TLS_CLIENT_CA", ca.as_str())];
    let mutual = [&tls[..], &client_ca].concat();
    let mutual_both = [&both[..], &client_ca].concat();
    // The address, the variables of TLS, whether `health` knows the metrics listener, and whether it can find out.
    let cases: [(&str, Variables<'_>, bool, bool); 10] = [
        ("127.0.0.1:0", &[], true, true),
        ("0.0.0.0:0", &[], true, true),
        ("[::]:0", &[], true, true),
        ("[::1]:0", &[], true, true),
        ("0.0.0.0:0", &tls, true, true),
        ("[::]:0", &tls, false, true),
        ("[::1]:0", &tls, false, true),
        ("[::]:0", &mutual, true, true),
        ("[::1]:0", &mutual_both, false, true),
        ("127.0.0.1:0", &mutual, false, false),
    ];
    // Without a credential, health is NOT_SERVING.
    let unready = [
        "--credentials",
        "metadata",
        "--metadata-endpoint",
        "http://127.0.0.1:1",
    ];

    for (listen, tls, metrics, found) in cases {
        for (args, serving) in [(&[][..], true), (&unready, false)] {
            let args = [&["--sandbox"], args].concat();
            let program = Program::start_under(&[], listen, &args, tls);
            let metrics_listen = match metrics {
                true => program.admin.to_string(),
                false => "off".to_owned(),
            };

            let (code, output) = health_of(&program.grpc.to_string(), &metrics_listen, tls);

            let expected = match (found, serving) {
                (false, _) => None,
                (true, true) => Some("SERVING\n"),
                (true, false) => Some("NOT_SERVING\n"),
            };
            let case = format!("{listen} {tls:?} {metrics} {serving}: {output}");
            assert_eq!(code == 0, found && serving, "{case}");
            match expected {
                Some(expected) => assert_eq!(output, expected, "{case}"),
                None => assert!(output.contains("check --cert and --key"), "{case}"),
            }
        }
    }
}

#[test]
fn health_without_a_target_reports_a_stopped_server_and_invalid_variables() {
    let address = free_address().to_string();
    let cases = [
        (
            health_of(&address, "off", &[]),
            1,
            "cannot connect to http://127.0.0.1:",
        ),
        (
            health_of("localhost:1", "off", &[]),
            2,
            "RDS_TASK_FACADE_LISTEN: ",
        ),
        (
            health_of(&address, "of", &[]),
            2,
            "RDS_TASK_FACADE_METRICS_LISTEN: ",
        ),
        (
            health_of(
                &address,
                "off",
                &[("RDS_TASK_FACADE_TLS_CERT", "/nonexistent")],
            ),
            2,
            "RDS_TASK_FACADE_TLS_CERT: ",
        ),
    ];

    for ((code, output), expected, part) in cases {
        assert_eq!(code, expected, "{output}");
        assert!(output.contains(part), "{output}");
        assert_eq!(output.lines().count(), 1, "{output}");
    }
}

#[tokio::test]
async fn every_test_id_of_the_sandbox_has_its_documented_outcome_also_after_all_others() {
    let program = Arc::new(Program::sandboxed(&[]));
    let at_once = Arc::new(Semaphore::new(32));
    let mut calls = JoinSet::new();
    // Each id is called often enough to open a circuit and to use up a retry budget that calls share.
    for round in 0..4 {
        for scenario in documented() {
            let (program, at_once) = (Arc::clone(&program), Arc::clone(&at_once));
            calls.spawn(async move {
                let _permit = at_once.acquire().await;
                let mut request = crate::support::example_request();
                request.instance_id = scenario.instance_id.to_owned();
                request.workflow_id = format!("round-{round}");
                let got = match program.call(request).await {
                    Ok(_) => "OK".to_owned(),
                    Err(status) => {
                        let failure = crate::support::Failure::from_status(&status);
                        format!("{} / {}", upper_snake(failure.code), failure.reason)
                    }
                };
                (round, scenario.instance_id, scenario.outcome, got)
            });
        }
    }
    let mut results = calls.join_all().await;

    results.retain(|(_, _, documented, got)| documented != got);
    assert!(
        results.is_empty(),
        "(round, id, documented, got): {results:#?}"
    );
}

fn upper_snake(code: tonic::Code) -> String {
    let mut text = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(c.to_ascii_uppercase());
    }
    text
}
