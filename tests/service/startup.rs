use std::{fs, time::Duration, time::Instant};

use crate::support::{
    Program, Upstream,
    certificates::{Authority, Pair},
    example, example_request,
    program::run,
};

/// Name, arguments, environment, exit code, and what the line names.
type Case<'a> = (
    &'a str,
    Vec<&'a str>,
    &'a [(&'a str, &'a str)],
    i32,
    &'a str,
);

/// What a run that must fail has written.
fn refused(args: &[&str], env: &[(&str, &str)]) -> (i32, Vec<String>, Duration) {
    let started = Instant::now();
    let (code, out, err) = run(&[&["serve", "--metrics-listen", "off"], args].concat(), env);
    let lines = format!("{out}{err}").lines().map(str::to_owned).collect();
    (code, lines, started.elapsed())
}

#[tokio::test]
async fn a_start_that_cannot_work_ends_at_once_with_one_line_that_says_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a file");
        path.display().to_string()
    };
    let authority = Authority::new();
    let pair = Pair::of_server(&authority, "localhost");
    let other = Pair::of_server(&authority, "localhost");
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
            "no address",
            vec!["--sandbox", "--listen", "localhost"],
            &[],
            2,
            "--listen",
        ),
        (
            "host that is no address",
            [&free[..], &["--endpoint", "https://10.0.0.256"]].concat(),
            &[],
            2,
            "--endpoint",
        ),
        (
            "proxy that is no address",
            [&free[..], &["--sandbox"]].concat(),
            &[("RDS_TASK_FACADE_UPSTREAM_PROXY", "http://1.2.3.4.5:3128")],
            2,
            "RDS_TASK_FACADE_UPSTREAM_PROXY",
        ),
        (
            "certificate that is not there",
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
            "certificate that is none",
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
            "upstream CA that is none",
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
        let (ended, lines, took) = refused(&args, env);

        assert_eq!(ended, code, "{case}: {lines:?}");
        assert_eq!(lines.len(), 1, "{case}: {lines:?}");
        assert!(lines[0].contains(names), "{case}: {lines:?}");
        assert!(!lines[0].contains("secret-content"), "{case}: {lines:?}");
        assert!(took < Duration::from_secs(5), "{case}: {took:?}");
    }
    drop(taken);
}

#[tokio::test]
async fn a_machine_without_certificates_is_enough_where_none_of_them_is_needed() {
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
async fn no_file_is_written_and_neither_home_nor_a_writable_folder_is_needed() {
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
    let answered = program.call(example_request()).await;
    program.signal("TERM");
    let ended = program.wait();

    assert!(answered.is_ok(), "{answered:?}");
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test]
async fn one_processor_is_enough_for_calls_health_and_drain() {
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

    let answers = calls.join_all().await;
    let ready = program.admin("/readyz").await.0;
    program.signal("TERM");
    let ended = program.wait();

    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(ready, 200);
    assert_eq!(ended.code(), Some(0));
}
