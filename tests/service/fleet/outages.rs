use std::time::{Duration, Instant};

use super::shared::all_seen;
use crate::support::{
    Program, Store, Upstream, eventually, example, numbered,
    program::{self, TOKEN},
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

async fn is_up(replica: &Program, up: bool) {
    eventually(&format!("the store is up: {up}"), async || {
        (replica.metric("quota_store_up").await == 1.0) == up
    })
    .await;
}

#[tokio::test]
async fn no_call_fails_while_the_store_is_gone_and_replicas_return_to_it() {
    let Some(mut store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let replica = store.replica(
        &upstream,
        &["--cache-ttl", "1ms", "--upstream-rate", "1000/1s"],
    );
    slowest(&replica, 0, 5).await;
    is_up(&replica, true).await;

    store.signal("STOP");
    slowest(&replica, 100, 20).await;
    is_up(&replica, false).await;
    store.signal("CONT");
    is_up(&replica, true).await;

    store.kill();
    slowest(&replica, 200, 20).await;
    is_up(&replica, false).await;
    store.restart().await;
    is_up(&replica, true).await;

    store.command(&["FLUSHALL"]);
    store.command(&["SCRIPT", "FLUSH"]);
    slowest(&replica, 300, 20).await;
    is_up(&replica, true).await;
    let downs = replica.logs();
    let downs = downs.iter().filter(|line| line.contains("cannot be used"));
    assert_eq!(downs.count(), 2, "{:#?}", replica.logs());
}

#[tokio::test]
async fn without_the_store_each_replica_uses_its_share_of_the_rate() {
    let Some(mut store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let rate = ["--upstream-rate", "6/1h"];
    let replicas = [(); 3].map(|()| store.replica(&upstream, &rate));
    all_seen(&replicas).await;
    store.kill();

    for replica in &replicas {
        is_up(replica, false).await;
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
        let replica = store.replica(&upstream, &["--cache-ttl", "10s"]);

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
    let replica = store.replica(&upstream, &["--quota-store-password-file", file]);

    is_up(&replica, true).await;
    replica.call(numbered(0)).await.expect("a reply");

    let (_, metrics) = replica.admin("/metrics").await;
    for text in [metrics, replica.logs().join("\n")] {
        assert!(!text.contains(password) && !text.contains(TOKEN), "{text}");
    }
}

#[tokio::test]
async fn a_replica_leaves_the_count_at_its_end() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let mut replicas = [(); 2].map(|()| store.replica(&upstream, &[]));
    all_seen(&replicas).await;
    replicas[0].signal("TERM");
    replicas[0].wait();
    let name = store.names("replicas").remove(0);

    assert_eq!(store.command(&["ZCARD", &name]), ["1"]);
}
