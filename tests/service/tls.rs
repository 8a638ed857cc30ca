use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;
use tonic::Code;

use crate::support::{
    Gate, Program, Sandbox, Step, Upstream,
    certificates::{Authority, Pair, client},
    eventually, example, example_request, gated_example,
    program::run,
    tls::{call, connect},
    within,
};

/// A client's hello in TLS 1.1, with two ciphers of its time.
const HELLO_OF_TLS_1_1: &[u8] = &[
    0x16, 3, 1, 0, 47, 1, 0, 0, 43, 3, 2, // record and handshake headers, version 1.1
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
    26, 27, 28, 29, 30, 31, // random
    0, 0, 4, 0xc0, 0x13, 0, 0x2f, 1, 0, // no session, two ciphers, no compression
];

/// A program that accepts only clients with a certificate of this authority, and the file of the authority's certificate.
fn mutual(folder: &Path, authority: &Authority) -> (Program, String) {
    let ca = authority.write(folder, "ca");
    let (cert, key) = Pair::for_server(authority, "localhost").write(folder, "server");
    let program = Program::sandboxed(&[
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--tls-client-ca",
        &ca,
    ]);
    (program, ca)
}

#[tokio::test]
async fn call_and_health_reach_a_tls_listener_only_with_the_right_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let other_ca = stranger.write(folder.path(), "other");
    let (cert, key) = Pair::for_server(&authority, "localhost").write(folder.path(), "plain");
    let (client_cert, client_key) = Pair::for_client(&authority).write(folder.path(), "client");
    let plain = Program::sandboxed(&["--tls-cert", &cert, "--tls-key", &key]);
    let (mutual, ca) = mutual(folder.path(), &authority);
    let with = ["--cert", &client_cert, "--key", &client_key];
    let cases = [
        ("right CA", &plain, &ca, &[][..], 0),
        ("another CA", &plain, &other_ca, &[], 1),
        ("with a client certificate", &mutual, &ca, &with, 0),
        ("without a client certificate", &mutual, &ca, &[], 1),
    ];

    for (case, program, ca, files, expected) in cases {
        let target = format!("https://localhost:{}", program.grpc.port());
        for command in ["call", "health"] {
            let args = [&[command, "--target", &target, "--ca", ca], files].concat();
            let (code, out, err) = run(&args, &[]);

            assert_eq!(code, expected, "{case}: {command}: {out}{err}");
        }
    }
}

#[tokio::test]
async fn call_and_health_explain_a_rejected_client_certificate_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (program, ca) = mutual(folder.path(), &authority);
    let target = format!("https://localhost:{}", program.grpc.port());
    let advice = "; if the server requires a client certificate, check --cert and --key\n";
    let expired = Pair::expired_of_client(&authority).write(folder.path(), "expired");
    let unknown = Pair::for_client(&stranger).write(folder.path(), "unknown");
    let with =
        |files: &(String, String)| ["--cert", &files.0, "--key", &files.1].map(str::to_owned);
    let cases = [vec![], with(&expired).to_vec(), with(&unknown).to_vec()];

    for files in cases {
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        for command in ["call", "health"] {
            let args = [&[command, "--target", &target, "--ca", &ca], &files[..]].concat();
            let (code, out, err) = run(&args, &[]);

            assert_eq!((code, out.as_str()), (1, ""), "{command} {files:?}");
            let cause = err
                .strip_prefix(&format!("rds-task-facade: no reply from {target}: "))
                .and_then(|rest| rest.strip_suffix(advice));
            // The server's alert, or the error of the operating system if the client was still writing.
            let causes = [
                "alert: Certificate",
                "alert: Decrypt",
                "closed",
                "broken pipe",
                "reset",
            ];
            assert!(
                cause.is_some_and(|cause| causes.iter().any(|part| cause.contains(part))),
                "{command} {files:?}: {err}"
            );
        }
    }
}

#[tokio::test]
async fn connection_and_health_check_share_one_timeout() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let mut config = ServerConfig::clone(&Pair::for_server(&authority, "localhost").server());
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let (timeout, handshake) = (Duration::from_secs(4), Duration::from_secs(3));
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.expect("a client");
        tokio::time::sleep(handshake).await;
        let mut silent = acceptor.accept(socket).await.expect("a handshake");
        let _ = silent.read_to_end(&mut Vec::new()).await;
    });
    let target = format!("https://localhost:{port}");
    let started = Instant::now();

    let checked = tokio::task::spawn_blocking(move || {
        let with = ["--target", &target, "--ca", &ca, "--timeout", "4s"];
        run(&[&["health"], &with[..]].concat(), &[])
    });
    let (code, _, err) = checked.await.expect("no panic");

    assert_eq!(code, 1);
    assert!(err.contains("no reply within 4s"), "{err}");
    // With separate timeouts, the health check alone would take 4 s after the handshake.
    assert!(started.elapsed() < handshake + timeout, "{err}");
}

#[tokio::test]
async fn unauthorized_clients_are_rejected_and_the_next_client_is_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (program, _) = mutual(folder.path(), &authority);
    let good = client(&authority, Some(&Pair::for_client(&authority)));
    let bad = [
        ("no certificate", None),
        ("of another authority", Some(Pair::for_client(&stranger))),
        ("expired", Some(Pair::expired_of_client(&authority))),
        (
            "of a server",
            Some(Pair::for_server(&authority, "localhost")),
        ),
    ];

    for (number, (case, pair)) in bad.iter().enumerate() {
        let config = client(&authority, pair.as_ref());

        assert_eq!(call(program.grpc, config).await, None, "{case}");
        assert_eq!(
            call(program.grpc, good.clone()).await,
            Some(Code::Ok),
            "after {case}"
        );
        assert_eq!(program.refused("tls").await, (number + 1) as f64, "{case}");
    }
    for (case, bytes) in [
        ("TLS 1.1", HELLO_OF_TLS_1_1),
        ("plain HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("plain HTTP/1.1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
    ] {
        let mut peer = TcpStream::connect(program.grpc).await.expect("it listens");
        peer.write_all(bytes).await.expect("it reads");
        let mut received = Vec::new();
        let _ = within("the end of the connection", peer.read_to_end(&mut received)).await;

        // Only a TLS alert, no plaintext HTTP.
        assert_eq!(received.first(), Some(&0x15), "{case}: {received:?}");
        assert_eq!(received.len(), 7, "{case}: {received:?}");
        assert_eq!(call(program.grpc, good.clone()).await, Some(Code::Ok));
    }
    assert_eq!(program.refused("tls").await, 7.0);
}

#[tokio::test]
async fn tcp_checks_do_not_hide_clients_that_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let (program, _) = mutual(folder.path(), &authority);
    let pair = Pair::for_client(&authority);
    let mut no_protocol = (*client(&authority, Some(&pair))).clone();
    no_protocol.alpn_protocols.clear();
    let no_protocol = Arc::new(no_protocol);

    for number in 0..50 {
        let mut check = TcpStream::connect(program.grpc).await.expect("it listens");
        // A check closes the connection, resets it, or first sends a part of a record.
        match number % 3 {
            0 => {}
            1 => check.set_zero_linger().expect("a TCP option"),
            _ => check
                .write_all(&HELLO_OF_TLS_1_1[..3])
                .await
                .expect("it reads"),
        }
    }
    eventually("all checks are counted", async || {
        program.refused("closed").await == 50.0
    })
    .await;
    for _ in 0..20 {
        assert_eq!(call(program.grpc, no_protocol.clone()).await, None);
    }
    assert_eq!(call(program.grpc, client(&authority, None)).await, None);

    let message = |line: &serde_json::Value, text: &str| {
        line["level"] == "WARN" && line["msg"].as_str().is_some_and(|msg| msg.contains(text))
    };
    program.wait_for_log(|line| message(line, "ALPN"));
    program.wait_for_log(|line| message(line, "no certificate"));
    assert_eq!(program.refused("alpn").await, 20.0);
    assert_eq!(program.refused("tls").await, 1.0);
    let logs = program.logs();
    let failed = logs.iter().filter(|line| line.contains("handshake failed"));
    // The limit of lines of one kind, and the other kind.
    assert_eq!(failed.count(), 6, "{logs:#?}");
}

#[tokio::test]
async fn changed_certificates_are_used_without_a_failed_call_and_invalid_ones_are_ignored() {
    let folder = tempfile::tempdir().expect("a folder");
    let (old, new) = (Authority::new(), Authority::new());
    let (cert, key) = Pair::for_server(&old, "localhost").write(folder.path(), "server");
    let gate = Gate::default();
    let first = gated_example(&gate);
    let upstream = Upstream::start(move |request| match request.number {
        // In flight while the files change.
        0 => first.clone(),
        _ => example(),
    })
    .await;
    let program = Program::patient(&upstream.url(), &["--tls-cert", &cert, "--tls-key", &key]);
    let connection = connect(program.grpc, client(&old, None))
        .await
        .expect("the old certificate is trusted");
    let calling = connection.clone();
    let mut slow = example_request();
    slow.workflow_id = "slow".to_owned();
    let in_flight = tokio::spawn(async move { calling.call_within("100S", &slow).await });
    upstream.wait_for_requests(1).await;

    Pair::for_server(&new, "localhost").write(folder.path(), "server");
    program.wait_for_log(|line| line["msg"] == "certificates reloaded");
    let with_new = call(program.grpc, client(&new, None)).await;
    let with_old = call(program.grpc, client(&old, None)).await;
    let on_connection = connection.call_within("20S", &example_request()).await;
    gate.open();
    let slow = within("the call in flight", in_flight)
        .await
        .expect("no panic");
    fs::write(&key, "no key").expect("a file");
    program.wait_for_log(|line| line["level"] == "ERROR");
    let with_current = call(program.grpc, client(&new, None)).await;

    assert_eq!(with_new, Some(Code::Ok));
    assert_eq!(with_old, None, "the old certificate is no longer presented");
    for reply in [on_connection, slow] {
        let status = reply.expect("a reply").status().expect("a status");
        assert_eq!(status.code(), Code::Ok);
    }
    assert_eq!(with_current, Some(Code::Ok));
}

#[tokio::test]
async fn an_expired_certificate_is_a_warning_at_the_start_and_never_replaces_a_valid_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let expired = Pair::expired_of_server(&authority, "localhost");
    let (cert, key) = expired.write(folder.path(), "server");
    let upstream = Upstream::always(example()).await;
    let start = || Program::patient(&upstream.url(), &["--tls-cert", &cert, "--tls-key", &key]);

    let program = start();
    let warning = program.wait_for_log(|line| line["level"] == "WARN");
    let error = warning["error"].as_str().unwrap_or_default();
    assert!(
        error.ends_with("server.pem: the certificate has expired; replace it"),
        "{warning}"
    );
    drop(program);

    Pair::for_server(&authority, "localhost").write(folder.path(), "server");
    let program = start();
    expired.write(folder.path(), "server");
    program.signal("HUP");
    let rejected = program.wait_for_log(|line| line["level"] == "ERROR");
    let served = call(program.grpc, client(&authority, None)).await;

    assert_eq!(rejected["error"], warning["error"]);
    assert_eq!(served, Some(Code::Ok));
}

#[tokio::test]
async fn upstream_is_called_only_if_its_certificate_is_valid_and_an_invalid_one_is_not_retried() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ca = authority.write(folder.path(), "ca");
    let cases = [
        ("good", Pair::for_server(&authority, "localhost"), true),
        (
            "of another authority",
            Pair::for_server(&stranger, "localhost"),
            false,
        ),
        (
            "expired",
            Pair::expired_of_server(&authority, "localhost"),
            false,
        ),
        (
            "of another name",
            Pair::for_server(&authority, "other.example"),
            false,
        ),
    ];

    for (case, pair, good) in cases {
        let upstream = Upstream::always_over_tls(pair.server(), example()).await;
        let program = Program::over(&upstream.url(), &["--upstream-ca", &ca]);

        if good {
            let result = program.call(example_request()).await;
            assert!(result.is_ok(), "{case}: {result:?}");
            assert_eq!(upstream.requests().len(), 1, "{case}");
        } else {
            let failure = program.failure(example_request()).await;
            let expected = (Code::Unavailable, "UPSTREAM_TLS");
            assert_eq!(failure.code_and_reason(), expected, "{case}");
            assert!(upstream.requests().is_empty(), "{case}");
        }
        assert_eq!(upstream.hellos().len(), 1, "{case}: one handshake");
    }
}

#[tokio::test]
async fn the_configured_proxy_is_used_and_its_error_is_upstream_connect() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let pair = Pair::for_server(&authority, "localhost");
    let upstream = Upstream::always_over_tls(pair.server(), example()).await;
    let endpoint = upstream.url();
    let password = folder.path().join("password");
    fs::write(&password, "hunter2\n").expect("a file");
    let password = password.display().to_string();
    let cases = [
        ("HTTP/1.1 200 OK\r\n\r\n", true),
        ("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n", false),
        (
            "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n",
            false,
        ),
        (
            "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",
            false,
        ),
        ("garbage\r\n\r\n", false),
    ];

    for (reply, good) in cases {
        let after = if good {
            Step::Tunnel(upstream.address)
        } else {
            Step::Close
        };
        let proxy = Upstream::always(vec![Step::Send(reply.into()), after]).await;
        // The password comes from a file or from the URL.
        let inline = if good { "" } else { ":hunter2" };
        let url = format!("http://user{inline}@{}", proxy.address);
        let mut args = vec!["--upstream-ca", &ca, "--upstream-proxy", &url];
        args.extend_from_slice(&["--max-attempts", "1"]);
        if good {
            args.extend_from_slice(&["--upstream-proxy-password-file", &password]);
        }
        let program = Program::over(&endpoint, &args);

        let result = program.call(example_request()).await;

        let request = &proxy.requests()[0];
        let target = format!("CONNECT localhost:{} HTTP/1.1", upstream.address.port());
        assert_eq!(request.line, target, "{reply}");
        // "user:hunter2" in base 64.
        assert_eq!(
            request.header("proxy-authorization"),
            Some("Basic dXNlcjpodW50ZXIy"),
            "{reply}"
        );
        match result {
            Ok(_) => assert!(good, "{reply}"),
            Err(status) => {
                assert!(!good, "{reply}: {status:?}");
                let failure = crate::support::Failure::from_status(&status);
                let expected = (Code::Unavailable, "UPSTREAM_CONNECT");
                assert_eq!(failure.code_and_reason(), expected, "{reply}");
            }
        }
        let log = program.logs().join("\n");
        assert!(!log.contains("hunter2"), "{log}");
    }
}

#[tokio::test]
async fn proxy_variables_of_the_environment_are_ignored() {
    let upstream = Upstream::always(example()).await;
    let elsewhere = Upstream::always(example()).await;
    let url = elsewhere.url();
    let names = [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ];
    let mut env = names.map(|name| (name, url.as_str())).to_vec();
    env.push(("RDS_TASK_FACADE_TOKEN", "a-token"));
    let program = Program::start(
        &["--endpoint", &upstream.url(), "--credentials", "token"],
        &env,
    );

    let result = program.call(example_request()).await;

    assert!(result.is_ok(), "{result:?}");
    assert_eq!(elsewhere.connections().opened, 0);
}

/// At a limit on processes the system refuses new threads, so a running program must not need one.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_tokens_are_replaced_without_a_new_thread() {
    let folder = tempfile::tempdir().expect("a folder");
    let authorities = [(); 3].map(|()| Authority::new());
    let rotate =
        |authority| Pair::for_server(authority, "localhost").write(folder.path(), "server");
    let (cert, key) = rotate(&authorities[0]);
    let password = folder.path().join("password");
    fs::write(&password, "sandbox-password").expect("a file");
    let password = password.display().to_string();
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let args = [
        ["--endpoint", &url],
        ["--credentials", "iam"],
        ["--iam-endpoint", &url],
        ["--iam-user", "sandbox-user"],
        ["--iam-domain", "sandbox-domain"],
        ["--iam-password-file", &password],
        ["--iam-project", "0483b6b16e954cb88930a360d2c4e663"],
        ["--tls-cert", &cert],
        ["--tls-key", &key],
    ];
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")];
    let program = Program::start(args.as_flattened(), &env);
    let threads = || {
        let tasks = format!("/proc/{}/task", program.pid());
        fs::read_dir(tasks).expect("a running process").count()
    };
    let served = async |authority| {
        eventually("a call with the new certificate", async || {
            Box::pin(call(program.grpc, client(authority, None))).await == Some(Code::Ok)
        })
        .await;
    };
    served(&authorities[0]).await;

    let before = threads();
    for authority in &authorities[1..] {
        rotate(authority);
        program.signal("HUP");
        sandbox.set("revoke-tokens").await;
        served(authority).await;
        assert_eq!(threads(), before);
    }

    assert!(sandbox.count("token_requests").await >= 2);
}
