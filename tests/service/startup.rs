use std::{fs, time::Duration, time::Instant};

use crate::support::{
    Program, Upstream,
    certificates::{Authority, Pair},
    example, example_request,
    program::run,
};

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Name, arguments, environment, exit code, and a part of the line.
type Case<'a> = (&'a str, Vec<&'a str>, Variables<'a>, i32, &'a str);

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
    let damaged = pair.cert.replacen("MII", "MIsecret-content", 1);
    let bundle = file(
        "bundle.pem",
        &[&pair.cert, &damaged, &other.cert]
            .map(String::as_str)
            .concat(),
    );
    let quoted = file("quoted", "\"secret-content\"\n");
    let invisible = file("invisible", "secret-content\u{200b}");
    let nul = file("nul", "secret-content\0");
    let iam = ["--iam-user", "u", "--iam-domain", "d", "--iam-project", "p"];
    let user = [&["--credentials", "iam"], &iam[..]].concat();
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
            "perhaps an earlier rds-task-facade: stop it, or set --listen",
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
            "garbage.pem",
        ),
        (
            "damaged certificate in the upstream CA file",
            [&free[..], &https, &["--upstream-ca", &bundle]].concat(),
            &[],
            2,
            "bundle.pem: certificate 2 ",
        ),
        (
            "damaged certificate in the client CA file",
            [
                &free[..],
                &["--sandbox", "--tls-cert", &cert, "--tls-key", &key],
                &["--tls-client-ca", &bundle],
            ]
            .concat(),
            &[],
            2,
            "bundle.pem: certificate 2 ",
        ),
        (
            "quoted key",
            [&free[..], &["--sandbox", "--credentials", "env"]].concat(),
            &[
                ("HUAWEICLOUD_SDK_AK", "'secret-content'"),
                ("HUAWEICLOUD_SDK_SK", "sk"),
            ],
            2,
            "HUAWEICLOUD_SDK_AK: is in quotes",
        ),
        (
            "quoted security token",
            [&free[..], &["--sandbox", "--credentials", "chain"]].concat(),
            &[
                ("HUAWEICLOUD_SDK_AK", "ak"),
                ("HUAWEICLOUD_SDK_SK", "sk"),
                ("HUAWEICLOUD_SDK_SECURITY_TOKEN", "\"\""),
            ],
            2,
            "HUAWEICLOUD_SDK_SECURITY_TOKEN: is in quotes",
        ),
        (
            "quoted token in a variable",
            [&free[..], &["--sandbox", "--credentials", "token"]].concat(),
            &[("RDS_TASK_FACADE_TOKEN", "\"secret-content\"")],
            2,
            "RDS_TASK_FACADE_TOKEN: is in quotes",
        ),
        (
            "quoted token in a file",
            [&free[..], &["--sandbox", "--token-file", &quoted]].concat(),
            &[],
            2,
            "--token-file: the content is in quotes",
        ),
        (
            "token with a zero-width character",
            [&free[..], &["--sandbox", "--token-file", &invisible]].concat(),
            &[],
            2,
            "--token-file: the content holds an invisible character",
        ),
        (
            "password with a NUL",
            [
                &free[..],
                &["--sandbox", "--iam-password-file", &nul],
                &user,
            ]
            .concat(),
            &[],
            2,
            "--iam-password-file: the content holds an invisible character",
        ),
        (
            "quoted password",
            [
                &free[..],
                &["--sandbox", "--iam-password-file", &quoted],
                &user,
            ]
            .concat(),
            &[],
            2,
            "--iam-password-file: the content is in quotes",
        ),
        (
            "half of a key",
            [&free[..], &["--sandbox", "--credentials", "env"]].concat(),
            &[("HUAWEICLOUD_SDK_SK", "secret-content")],
            2,
            "HUAWEICLOUD_SDK_AK: must be set",
        ),
        (
            "malformed host of the vendor's variable",
            [
                &free[..],
                &["--endpoint", "https://rds.example.com"],
                &["--iam-password-file", &garbage, "--credentials", "iam"],
                &iam,
            ]
            .concat(),
            &[("HUAWEICLOUD_SDK_IAM_ENDPOINT", "https://[fe80::1%25eth0]")],
            2,
            "HUAWEICLOUD_SDK_IAM_ENDPOINT: \"https://[fe80::1%25eth0]\" is not a URL",
        ),
        (
            "host without a name",
            [&free[..], &["--endpoint", "https://a..b"]].concat(),
            &[],
            2,
            "--endpoint: \"https://a..b\" is not a URL",
        ),
        (
            "quoted region",
            [&free[..], &["--region", "'cn-north-4'"]].concat(),
            &[],
            2,
            "--region: \"'cn-north-4'\" is not a known region; did you mean cn-north-4?",
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
    let metrics = ["--listen", "127.0.0.1:0", "--metrics-listen", &in_use];
    let (code, out, _) = run(&[&["serve", "--sandbox"], &metrics[..]].concat(), &[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.ends_with("stop it, or set --metrics-listen\n"), "{out}");
    let (code, out, _) = run(&["sandbox", "--listen", &in_use], &[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.ends_with("stop it, or set --listen\n"), "{out}");
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

#[tokio::test]
async fn unusable_variables_of_opentelemetry_do_not_stop_the_start() {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    let no_roots = [
        ("SSL_CERT_FILE", "/nonexistent"),
        ("SSL_CERT_DIR", "/nonexistent"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:9"),
    ];
    // Of variables from all groups at once, and those that disable the export, each with the parts of the only warning.
    let cases: [(Variables<'_>, &[&str]); 5] = [
        (
            &[
                endpoint,
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
                ("OTEL_EXPORTER_OTLP_HEADERS", "canary"),
                ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
                ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nonexistent"),
                ("OTEL_TRACES_SAMPLER", "xray"),
                ("OTEL_PROPAGATORS", "jaeger"),
                ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
                ("OTEL_RESOURCE_ATTRIBUTES", "name"),
            ],
            &[
                "OTEL_EXPORTER_OTLP_PROTOCOL=\"grpc\"",
                "OTEL_EXPORTER_OTLP_TIMEOUT=\"10s\"",
                "OTEL_EXPORTER_OTLP_HEADERS must be",
                "OTEL_EXPORTER_OTLP_COMPRESSION=\"gzip\"",
                "OTEL_EXPORTER_OTLP_CERTIFICATE=\"/nonexistent\"",
                "OTEL_TRACES_SAMPLER=\"xray\"",
                "OTEL_PROPAGATORS=\"jaeger\"",
                "OTEL_BSP_SCHEDULE_DELAY=\"5s\"",
                "OTEL_RESOURCE_ATTRIBUTES=\"name\"",
            ],
        ),
        (
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")],
            &["OTEL_EXPORTER_OTLP_ENDPOINT=\"collector:4317\""],
        ),
        (
            &[endpoint, ("OTEL_TRACES_EXPORTER", "console")],
            &["OTEL_TRACES_EXPORTER=\"console\""],
        ),
        (&no_roots, &["https://127.0.0.1:9/v1/traces"]),
        (&[endpoint, ("OTEL_TRACES_EXPORTER", "None")], &[]),
    ];

    for (env, parts) in cases {
        let program = Program::start(&["--sandbox", "--allow-project", "p"], env);
        assert_eq!(program.admin("/readyz").await.0, 200, "{env:?}");
        let log = program.logs();
        let warnings = log.iter().filter(|line| line.contains("WARN"));
        let warnings: Vec<&String> = warnings.filter(|line| !line.contains("sandbox")).collect();
        assert_eq!(
            warnings.len(),
            usize::from(!parts.is_empty()),
            "{env:?}: {log:?}"
        );
        for part in parts {
            let part = part.replace('"', "\\\"");
            assert!(warnings[0].contains(&part), "{part}: {warnings:?}");
        }
        assert!(!log.concat().contains("canary"), "{log:?}");
    }
}

/// The status that `/readyz` and a call have over an address, and the peer of the call in the log.
async fn reach(program: &Program, ip: &str) -> (bool, String) {
    let port = program.grpc.port();
    let (code, ..) = run(&["call", "--target", &format!("http://{ip}:{port}")], &[]);
    let line = program.wait_for_log(|line| line["target"] == "access");
    (code == 0, line["peer"].to_string())
}

#[tokio::test]
async fn a_listener_on_every_address_serves_both_protocols() {
    for (ip, peer) in [("127.0.0.1", "\"127.0.0.1:"), ("[::1]", "\"[::1]:")] {
        let program = Program::start_under(&[], "[::]:0", &["--sandbox"], &[]);

        let (reached, seen) = reach(&program, ip).await;

        assert!(reached, "{ip}");
        assert!(seen.starts_with(peer), "{seen}");
    }
}

#[tokio::test]
async fn without_ipv6_in_the_kernel_a_listener_on_every_address_serves_ipv4() {
    let folder = tempfile::tempdir().expect("a folder");
    let (source, library) = (folder.path().join("no6.c"), folder.path().join("no6.so"));
    let code = r"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <sys/socket.h>
        int socket(int domain, int type, int protocol) {
            if (domain == AF_INET6) { errno = EAFNOSUPPORT; return -1; }
            return ((int (*)(int, int, int))dlsym(RTLD_NEXT, __func__))(domain, type, protocol);
        }";
    fs::write(&source, code).expect("a file");
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .status();
    assert!(compiled.expect("a C compiler").success());
    let env = [("LD_PRELOAD", library.to_str().expect("a UTF-8 path"))];

    let program = Program::start_under(&[], "[::]:0", &["--sandbox"], &env);

    assert_eq!(program.grpc.ip().to_string(), "0.0.0.0");
    assert!(reach(&program, "127.0.0.1").await.0);
    let lines = program.logs().into_iter();
    assert_eq!(lines.filter(|line| line.contains("no IPv6")).count(), 1);
    let (code, lines, _) = rejected(&["--sandbox", "--listen", "[::1]:0"], &env);
    assert_eq!((code, lines.len()), (1, 1), "{lines:?}");
}

#[test]
fn the_program_leaves_no_core_dump() {
    let program = Program::sandboxed(&[]);

    let limits = fs::read_to_string(format!("/proc/{}/limits", program.pid())).expect("it runs");

    let line = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let words: Vec<&str> = line.expect("a limit").split_whitespace().collect();
    assert_eq!(words[4..6], ["0", "0"], "{words:?}");
}
