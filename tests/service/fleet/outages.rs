use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::shared::all_seen;
use crate::support::{
    Program, Store, Upstream,
    certificates::{Authority, Pair},
    eventually, example, free_address, numbered,
    program::{self, TOKEN},
    reply,
};

/// Calls one by one, and returns how long the slowest took.
async fn slowest(replica: &Program, first: usize, count: usize) -> Duration {
    let mut client = replica.client().await;
    let mut slowest = Duration::ZERO;
    for number in first..first + count {
        let begun = Instant::now();
        let called = client.get_task_detail(numbered(number)).await;
        called.expect("a reply");
        slowest = slowest.max(begun.elapsed());
    }
    slowest
}

/// Makes one call and then this many calls at once, all of which succeed, and returns how long the latter took.
async fn at_once(replica: &Program, count: usize) -> Duration {
    let mut client = replica.client().await;
    client.get_task_detail(numbered(0)).await.expect("a reply");
    let mut calls = JoinSet::new();
    let begun = Instant::now();
    for number in 1..=count {
        let mut client = client.clone();
        calls.spawn(async move { client.get_task_detail(numbered(number)).await });
    }
    for called in calls.join_all().await {
        called.expect("a reply");
    }
    begun.elapsed()
}

#[tokio::test]
async fn no_call_fails_while_the_store_is_gone_and_replicas_return_to_it() {
    let Some(mut store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let flags = ["--cache-ttl", "1ms", "--upstream-rate", "1000/1s"];
    let store_flags = [store.url(), store.key_file()];
    let replica = Program::impatient("1000", &upstream, store_flags, &flags);
    replica.uses_store(true).await;
    slowest(&replica, 0, 5).await;

    store.signal("STOP");
    slowest(&replica, 100, 20).await;
    replica.uses_store(false).await;
    store.signal("CONT");
    replica.uses_store(true).await;

    store.kill();
    slowest(&replica, 200, 20).await;
    replica.uses_store(false).await;
    store.restart().await;
    replica.uses_store(true).await;

    store.command(&["FLUSHALL"]);
    store.command(&["SCRIPT", "FLUSH"]);
    slowest(&replica, 300, 20).await;
    replica.uses_store(true).await;
    let downs = replica.logs();
    let downs = downs.iter().filter(|line| line.contains("cannot be used"));
    assert_eq!(downs.count(), 2, "{:#?}", replica.logs());
}

#[tokio::test]
async fn an_attempt_notices_at_once_that_the_store_is_out_of_memory() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let replica = store
        .replica(&upstream, &["--upstream-rate", "1000/1s"])
        .await;
    slowest(&replica, 0, 3).await;

    store.command(&["CONFIG", "SET", "maxmemory", "1"]);
    slowest(&replica, 3, 1).await;

    let errors = "quota_store_requests_total{operation=\"admit\",outcome=\"error\"}";
    assert_eq!(replica.metric(errors).await, 1.0, "{:#?}", replica.logs());
    replica.uses_store(false).await;
    store.command(&["CONFIG", "SET", "maxmemory", "0"]);
    replica.uses_store(true).await;
}

#[tokio::test]
async fn without_the_store_each_replica_uses_its_share_of_the_rate() {
    let Some(mut store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let rate = ["--upstream-rate", "6/1h"];
    let replicas = store.replicas::<3>(&upstream, &rate).await;
    all_seen(&replicas).await;
    store.kill();

    for replica in &replicas {
        replica.uses_store(false).await;
        for number in 0..4 {
            let _ = replica.call(numbered(number)).await;
        }
    }

    assert_eq!(upstream.requests().len(), 6);
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_named_once_and_fails_no_call() {
    let cases: [(&[&str], &str); 5] = [
        (
            &["--user", "default", "on", "nopass", "~x", "+@all"],
            "(ACL)",
        ),
        (&["--requirepass", "secret"], "rejects user or password"),
        (&["--replicaof", "127.0.0.1", "1"], "is read-only"),
        (&["--maxmemory", "1"], "is out of memory"),
        (
            &["--user", "default", "on", "nopass", "~*", "+@all", "-zadd"],
            "(ACL)",
        ),
    ];
    for (args, problem) in cases {
        let Some(store) = Store::start_with(args).await else {
            return;
        };
        let upstream = Upstream::always(example()).await;
        let replica = store.start_replica(&upstream, &["--cache-ttl", "10s"]);

        slowest(&replica, 0, 3).await;

        let warnings = replica.logs();
        let mut warnings = warnings
            .iter()
            .filter(|line| line.contains("cannot be used"));
        let warning = warnings
            .next()
            .unwrap_or_else(|| panic!("{:#?}", replica.logs()));
        assert!(warning.contains(problem), "{warning}");
        assert!(warning.contains("the only one"), "{warning}");
        assert!(warnings.next().is_none());
        assert_eq!(upstream.requests().len(), 3);
    }
}

#[tokio::test]
async fn access_rules_that_forbid_only_the_commands_of_calls_are_logged_once() {
    let args = [
        "--user",
        "default",
        "on",
        "nopass",
        "~*",
        "+@all",
        "-getrange",
    ];
    let Some(store) = Store::start_with(&args).await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let replica = store.replica(&upstream, &["--cache-ttl", "10s"]).await;

    slowest(&replica, 0, 5).await;

    let warnings = || {
        let logs = replica.logs();
        logs.iter().filter(|line| line.contains("(ACL)")).count()
    };
    eventually("a warning", async || warnings() > 0).await;
    slowest(&replica, 5, 5).await;
    assert_eq!(warnings(), 1, "{:#?}", replica.logs());
}

/// Forwards connections to the store, and returns the URL and the delay of each reply in milliseconds, 20 at first.
async fn slow_proxy(store: &Store) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let target = store.url().replace("redis://", "");
    let delay = Arc::new(AtomicU64::new(20));
    let delays = Arc::clone(&delay);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(&target).await.expect("the store");
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            let delay = Arc::clone(&delays);
            tokio::spawn(async move { copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
                    let delay = Duration::from_millis(delay.load(Ordering::Relaxed));
                    tokio::time::sleep(delay).await;
                    if to_client.write_all(&buffer[..read]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    (format!("redis://127.0.0.1:{port}"), delay)
}

#[tokio::test]
async fn a_slow_store_is_not_used() {
    let Some(store) = Store::start().await else {
        return;
    };
    let (url, delay) = slow_proxy(&store).await;
    let upstream = Upstream::always(example()).await;
    let store_flags = [url, store.key_file()];
    let replica = Program::impatient("1000", &upstream, store_flags, &[]);
    replica.uses_store(true).await;

    delay.store(20_000, Ordering::Relaxed);
    let slowest = slowest(&replica, 0, 30).await;

    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    replica.uses_store(false).await;
    let warning = replica
        .logs()
        .into_iter()
        .find(|line| line.contains("cannot be used"));
    let warning = warning.expect("a warning");
    assert!(warning.contains("does not reply within"), "{warning}");
}

#[tokio::test]
async fn calls_do_not_wait_for_each_others_replies_of_the_store() {
    let Some(store) = Store::start().await else {
        return;
    };
    let (url, _) = slow_proxy(&store).await;
    let upstream = Upstream::always(example()).await;
    let key = store.key_file();
    let rate = ["--upstream-rate", "1000/1s"];
    let flags = ["--quota-store", &url, "--quota-store-key-file", &key];
    let replica = Program::over(&upstream.url(), &[&flags[..], &rate].concat());

    let took = at_once(&replica, 200).await;

    // One after the other, they would take four seconds.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn calls_in_the_share_of_a_replica_do_not_wait_for_each_others_replies_of_the_store() {
    let Some(store) = Store::start().await else {
        return;
    };
    let (url, _) = slow_proxy(&store).await;
    let upstream = Upstream::always(example()).await;
    let key = store.key_file();
    let rate = ["--upstream-rate", "6000/1m"];
    let flags = ["--quota-store", &url, "--quota-store-key-file", &key];
    let replica = Program::over(&upstream.url(), &[&flags[..], &rate].concat());
    replica.uses_store(true).await;
    // A replica that has been without the store keeps to its share for a minute.
    store.command(&["CLIENT", "KILL", "TYPE", "normal"]);
    replica.uses_store(false).await;
    replica.uses_store(true).await;

    let took = at_once(&replica, 400).await;

    // One after the other, they take more than five seconds.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn a_hostile_store_costs_neither_calls_nor_memory() {
    let endless = [b"$2000000000\r\n".to_vec(), vec![b'x'; 1 << 16]].concat();
    let nested = b"*1000000000\r\n".repeat(1 << 12);
    let unasked = b"+OK\r\n".repeat(1 << 12);
    for bytes in [endless, nested, unasked, b"HTTP/1.1 400 X\r\n\r\n".to_vec()] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let begins = String::from_utf8_lossy(&bytes[..8]).into_owned();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let bytes = bytes.clone();
                tokio::spawn(async move {
                    let _ = client.read(&mut [0; 4096]).await;
                    // At most 512 MiB.
                    for _ in 0..1 << 13 {
                        if client.write_all(&bytes).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        let folder = tempfile::tempdir().expect("a folder");
        let key = folder.path().join("key");
        std::fs::write(&key, [7; 32]).expect("a file");
        let url = format!("redis://127.0.0.1:{port}");
        let key = key.to_str().expect("ASCII").to_owned();
        let upstream = Upstream::always(example()).await;
        let replica = Program::impatient("1000", &upstream, [url, key], &[]);

        slowest(&replica, 0, 5).await;

        replica.uses_store(false).await;
        let memory = replica.metric("process_resident_memory_bytes").await;
        assert!(memory < 200e6, "{begins:?}: {memory}");
    }
}

#[tokio::test]
async fn a_start_without_a_store_works_and_the_store_is_used_once_it_runs() {
    let Some(mut store) = Store::start().await else {
        return;
    };
    store.kill();
    let upstream = Upstream::always(example()).await;
    let replica = store.start_replica(&upstream, &["--upstream-rate", "100/1s"]);
    replica.call(numbered(0)).await.expect("a reply");
    assert_eq!(replica.admin("/readyz").await.0, 200);

    store.restart().await;

    replica.uses_store(true).await;
    replica.call(numbered(1)).await.expect("a reply");
}

#[tokio::test]
async fn a_store_with_tls_needs_a_trusted_certificate() {
    let folder = tempfile::tempdir().expect("a folder");
    let (trusted, other) = (Authority::new(), Authority::new());
    let pair = Pair::for_server(&trusted, "localhost");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("ASCII").to_owned()
    };
    let (cert, key) = (write("cert", &pair.cert), write("key", &pair.key));
    let port = free_address().port();
    let number = port.to_string();
    let tls = [
        "--tls-port",
        &number,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--tls-auth-clients",
        "no",
    ];
    let Some(store) = Store::start_with(&tls).await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let url = format!("rediss://localhost:{port}");
    let key_file = store.key_file();

    for (authority, up) in [(&trusted, true), (&other, false)] {
        let ca = authority.write(folder.path(), "ca");
        let flags = [
            "--quota-store",
            &url,
            "--quota-store-key-file",
            &key_file,
            "--quota-store-ca",
            &ca,
        ];
        let replica = Program::over(&upstream.url(), &flags);
        replica.call(numbered(0)).await.expect("a reply");
        replica.uses_store(up).await;
        let warned = replica
            .logs()
            .iter()
            .any(|line| line.contains("cannot be used"));
        assert_eq!(warned, !up, "{:#?}", replica.logs());
    }
}

#[tokio::test]
async fn a_cluster_ends_the_start() {
    let Some(store) = Store::start_with(&["--cluster-enabled", "yes"]).await else {
        return;
    };
    let flags = store.flags();
    let mut args = vec![
        "serve",
        "--sandbox",
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "off",
    ];
    args.extend(flags.iter().map(String::as_str));

    let (code, out, err) = program::run(&args, &[]);

    assert_eq!(code, 2, "{out}{err}");
    assert!(
        format!("{out}{err}").contains("--quota-store: it is a cluster"),
        "{out}{err}"
    );
}

#[tokio::test]
async fn a_password_from_a_file_opens_the_store_and_is_shown_nowhere() {
    let password = "canary-of-the-store";
    let Some(store) = Store::start_with(&["--requirepass", password]).await else {
        return;
    };
    let file = store.folder().join("password");
    std::fs::write(&file, password).expect("a file");
    let upstream = Upstream::always(example()).await;
    let file = file.to_str().expect("ASCII");
    let flags = ["--quota-store-password-file", file];
    let replica = store.replica(&upstream, &flags).await;

    replica.call(numbered(0)).await.expect("a reply");

    let (_, metrics) = replica.admin("/metrics").await;
    for text in [metrics, replica.logs().join("\n")] {
        assert!(!text.contains(password) && !text.contains(TOKEN), "{text}");
    }
}

#[tokio::test]
async fn the_documented_access_rules_are_sufficient() {
    let Some(store) = Store::start().await else {
        return;
    };
    let rules = include_str!("../../../docs/fleet.md");
    let (_, rules) = rules.split_once("ACL SETUSER facade").expect("the rules");
    let (rules, _) = rules.split_once("```").expect("the end of the rules");
    let rules = rules.replace(">PASSWORD", ">secret");
    let command = ["ACL", "SETUSER", "facade"];
    let command = [&command[..], &rules.split_whitespace().collect::<Vec<_>>()].concat();
    assert_eq!(store.command(&command), ["OK"]);
    let upstream = Upstream::start(|request| match request.number {
        0 => example(),
        _ => reply(429, &[("retry-after", "120")], ""),
    })
    .await;
    let url = store.url().replace("//", "//facade:secret@") + "/1";
    let key = store.key_file();
    let flags = [
        "--quota-store",
        &url,
        "--quota-store-key-file",
        &key,
        "--cache-ttl",
        "10s",
        "--upstream-rate",
        "60/1m",
    ];
    let with_token = Program::over(&upstream.url(), &flags);
    with_token.call(numbered(0)).await.expect("a reply");
    with_token.failure(numbered(1)).await;
    let accepts = Upstream::always(example()).await;
    let accepts = accepts.url();
    let with_key = ["--credentials", "env", "--endpoint", &accepts];
    let env = ["AK", "SK"].map(|name| (format!("HUAWEICLOUD_SDK_{name}"), "a-key"));
    let env = env.each_ref().map(|(name, value)| (name.as_str(), *value));
    let with_key = Program::start(&[&with_key, &flags[..]].concat(), &env);
    with_key.call(numbered(0)).await.expect("a reply");

    eventually("all is written", async || {
        let names = store.command(&["-n", "1", "KEYS", "*"]).join(" ");
        let written = ["result", "window", "key-proof"].map(|kind| format!(":{kind}:"));
        written.iter().all(|kind| names.contains(kind)) && !names.contains(":key-probes:")
    })
    .await;

    for replica in [with_token, with_key] {
        let errors = replica.metrics().await;
        let errors = errors
            .keys()
            .filter(|series| series.contains("outcome=\"error\""));
        assert_eq!(errors.count(), 0);
        assert_eq!(replica.metric("quota_store_up").await, 1.0);
    }
}

#[tokio::test]
async fn a_replica_leaves_the_count_at_its_end() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let mut replicas = store.replicas::<2>(&upstream, &[]).await;
    all_seen(&replicas).await;
    replicas[0].signal("TERM");
    replicas[0].wait();
    let name = store.names("replicas").remove(0);

    assert_eq!(store.command(&["ZCARD", &name]), ["1"]);
}
