use std::{fs, time::Duration, time::Instant};

use crate::support::{
    Program, Upstream,
    certificates::{Authority, Pair},
    example, example_request,
    program::run,
};

/// Name, arguments, environment, exit code, and a part of the line.
type Case<'a> = (
    &'a str,
    Vec<&'a str>,
    &'a [(&'a str, &'a str)],
    i32,
    &'a str,
);

/// Exit code, output lines and duration of a start that must fail.
fn rejected(args: &[&str], env: &[(&str, &str)]) -> (i32, Vec<String>, Duration) {
    let started = Instant::now();
    let (code, out, err) = run(&[&["serve", "--metrics-listen", "off"], args].concat(), env);
    let lines = format!("{out}{err}").lines().map(str::to_owned).collect();
    (code, lines, started.elapsed())
}

#[tokio::test]
async fn a_failed_start_exits_within_five_seconds_with_one_line_that_names_the_cause() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a file");
        path.display().to_string()
    };
    let authority = Authority::new();
    let pair = Pair::for_server(&authority, "localhost");
    let other = Pair::for_server(&authority, "localhost");
    let (garbage, cert) = (
        file("garbage.pem", "secret-content"),
        file("c.pem", &pair.cert),
    );
    let (key, other_key) = (file("k.pem", &pair.key), file("o.pem", &other.key));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let in_use = taken.local_addr().expect("an address").to_string();
    let free = ["--listen", "127.0.0.1:0"];
    let https = ["--endpoint", "https://127.0.0.1:1"];
    let no_roots = [
        ("SSL_CERT_FILE", "/nonexistent"),
        ("SSL_CERT_DIR", "/nonexistent"),
    ];
    let nowhere = "/nonexistent/file";
    let cases: Vec<Case<'_>> = vec![
        (
            "port in use",
            vec!["--sandbox", "--listen", &in_use],
            &[],
            1,
            &in_use,
        ),
        (
            "address of another machine",
            vec!["--sandbox", "--listen", "192.0.2.1:50051"],
            &[],
            1,
            "192.0.2.1:50051",
        ),
        (
            "host name instead of an address",
            vec!["--sandbox", "--listen", "localhost"],
            &[],
            2,
            "--listen",
        ),
        (
            "malformed address in the endpoint",
            [&free[..], &["--endpoint", "https://10.0.0.256"]].concat(),
            &[],
            2,
            "--endpoint",
        ),
        (
            "malformed address in the proxy URL",
            [&free[..], &["--sandbox"]].concat(),
            &[("RDS_TASK_FACADE_UPSTREAM_PROXY", "http://1.2.3.4.5:3128")],
            2,
            "RDS_TASK_FACADE_UPSTREAM_PROXY",
        ),
        (
            "missing certificate file",
            [
                &free[..],
                &["--sandbox", "--tls-cert", nowhere, "--tls-key", &key],
            ]
            .concat(),
            &[],
            2,
            "--tls-cert",
        ),
        (
            "certificate file without a certificate",
            [
                &free[..],
                &["--sandbox", "--tls-cert", &garbage, "--tls-key", &key],
            ]
            .concat(),
            &[],
            2,
            "garbage.pem",
        ),
        (
            "key of another certificate",
            [
                &free[..],
                &["--sandbox", "--tls-cert", &cert, "--tls-key", &other_key],
            ]
            .concat(),
            &[],
            2,
            "o.pem",
        ),
        (
            "upstream CA file without a certificate",
            [&free[..], &https, &["--upstream-ca", &garbage]].concat(),
            &[],
            2,
            "CA",
        ),
        (
            "no certificates on the machine",
            [&free[..], &https].concat(),
            &no_roots,
            1,
            "--upstream-ca",
        ),
        (
            "unknown value of a variable",
            [&free[..], &["--sandbox"]].concat(),
            &[("RDS_TASK_FACADE_LOG_FORMAT", "xml")],
            2,
            "RDS_TASK_FACADE_LOG_FORMAT",
        ),
    ];

    for (case, args, env, code, names) in cases {
        let (ended, lines, took) = rejected(&args, env);

        assert_eq!(ended, code, "{case}: {lines:?}");
        assert_eq!(lines.len(), 1, "{case}: {lines:?}");
        assert!(lines[0].contains(names), "{case}: {lines:?}");
        assert!(!lines[0].contains("secret-content"), "{case}: {lines:?}");
        assert!(took < Duration::from_secs(5), "{case}: {took:?}");
    }
    drop(taken);
}

#[tokio::test]
async fn system_certificates_are_not_required_if_no_connection_uses_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new().write(folder.path(), "ca");
    let cases = [
        vec!["--sandbox"],
        vec!["--endpoint", "http://127.0.0.1:1"],
        vec!["--endpoint", "https://127.0.0.1:1", "--upstream-ca", &ca],
    ];

    for args in cases {
        let program = Program::start(
            &args,
            &[
                ("SSL_CERT_FILE", "/nonexistent"),
                ("SSL_CERT_DIR", "/nonexistent"),
            ],
        );

        assert_eq!(program.admin("/livez").await.0, 200, "{args:?}");
    }
}

#[tokio::test]
async fn the_program_writes_no_file_and_needs_no_home_or_writable_folder() {
    let upstream = Upstream::always(example()).await;
    // A write to any file would end the process with SIGXFSZ; the log goes to a pipe.
    let shell = [
        "/bin/sh",
        "-c",
        "cd /proc && ulimit -f 0 && exec \"$@\"",
        "sh",
    ];

    let mut program = Program::start_under(
        &shell,
        "127.0.0.1:0",
        &["--endpoint", &upstream.url(), "--credentials", "token"],
        &[("RDS_TASK_FACADE_TOKEN", "a-token")],
    );
    let result = program.call(example_request()).await;
    program.signal("TERM");
    let ended = program.wait();

    assert!(result.is_ok(), "{result:?}");
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test]
async fn one_cpu_is_enough_for_calls_readyz_and_drain() {
    let mut program = Program::start_under(
        &["/usr/bin/taskset", "-c", "0"],
        "127.0.0.1:0",
        &["--sandbox"],
        &[],
    );
    let client = program.client().await;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..100 {
        let mut client = client.clone();
        let mut request = example_request();
        request.workflow_name = Some(number.to_string());
        calls.spawn(async move { client.get_task_detail(request).await });
    }

    let results = calls.join_all().await;
    let ready = program.admin("/readyz").await.0;
    program.signal("TERM");
    let ended = program.wait();

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(ready, 200);
    assert_eq!(ended.code(), Some(0));
}
