use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tonic::{Code, Request};

use crate::support::{
    Failure, Gate, Program, Step, Store, Upstream, eventually, example, example_request,
    gated_example, numbered, reply,
};

/// An upstream that records when requests arrive.
async fn timed() -> (Upstream, Arc<Mutex<Vec<Instant>>>) {
    let times = Arc::new(Mutex::new(Vec::new()));
    let arrivals = Arc::clone(&times);
    let upstream = Upstream::start(move |_| {
        arrivals.lock().expect("no panic").push(Instant::now());
        example()
    });
    (upstream.await, times)
}

/// The most arrivals in any window.
fn most_in(window: Duration, times: &[Instant]) -> usize {
    let in_window = |first: &Instant| {
        let window = *first..*first + window;
        times.iter().filter(|&time| window.contains(time)).count()
    };
    times.iter().map(in_window).max().unwrap_or_default()
}

/// Waits until each replica has seen all of them.
pub(super) async fn all_seen(replicas: &[Program]) {
    for replica in replicas {
        eventually("all replicas are seen", async || {
            replica.metric("quota_store_replicas").await == replicas.len() as f64
        })
        .await;
    }
}

#[tokio::test]
async fn the_upstream_rate_is_a_limit_of_all_replicas_together() {
    let Some(store) = Store::start().await else {
        return;
    };
    let (upstream, times) = timed().await;
    let replicas = store
        .replicas::<3>(&upstream, &["--upstream-rate", "6/2s"])
        .await;
    let mut calls = JoinSet::new();
    for number in 0..30 {
        let client = replicas[number % 3].client().await;
        calls.spawn(async move {
            let mut request = Request::new(numbered(number));
            request.set_timeout(Duration::from_secs(29));
            client.clone().get_task_detail(request).await
        });
    }

    let results = calls.join_all().await;

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    let times = times.lock().expect("no panic").clone();
    assert_eq!(times.len(), 30);
    // Requests that start two seconds apart may arrive closer together on a busy machine. Without a store, 18 would start at once.
    let most = most_in(Duration::from_secs(1), &times);
    assert!(most <= 7, "{most} in a second");
    let took = *times.iter().max().unwrap() - *times.iter().min().unwrap();
    assert!(took >= Duration::from_secs(7), "{took:?}");
}

#[tokio::test]
async fn a_call_that_would_wait_for_another_replica_beyond_its_deadline_is_rejected_at_once() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let replicas = store
        .replicas::<2>(&upstream, &["--upstream-rate", "1/1h"])
        .await;
    replicas[0].call(numbered(0)).await.expect("a reply");

    let failure = replicas[1].failure(numbered(1)).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    let delay = failure.retry_delay.expect("RetryInfo");
    assert!(delay > Duration::from_secs(60), "{delay:?}");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_throttle_window_of_one_replica_applies_to_the_others() {
    let Some(store) = Store::start().await else {
        return;
    };
    let text = "policy user over ratelimit,limit:200,time:1 minute";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0308"}}"#);
    let upstream = Upstream::always(reply(429, &[("retry-after", "120")], body)).await;
    let replicas = store.replicas::<2>(&upstream, &[]).await;
    replicas[0].failure(numbered(0)).await;
    eventually("the window is stored", async || {
        !store.names("window").is_empty()
    })
    .await;

    let first = replicas[1].failure(numbered(1)).await;
    let second = replicas[1].failure(numbered(2)).await;

    for failure in [first, second] {
        assert_eq!(
            failure.code_and_reason(),
            (Code::ResourceExhausted, "THROTTLED")
        );
        assert!(failure.retry_delay.expect("RetryInfo") > Duration::from_secs(60));
        assert_eq!(failure.quota_subjects.len(), 1);
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_call_that_waits_for_its_start_notices_a_throttle_window_of_another_replica() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let throttling = reply(429, &[("retry-after", "120")], "");
    let held = [vec![Step::WaitFor(gate.clone())], throttling].concat();
    let upstream = Upstream::always(held).await;
    let replicas = store
        .replicas::<2>(&upstream, &["--upstream-rate", "1/5s"])
        .await;
    let mut client = replicas[0].client().await;
    let throttled = tokio::spawn(async move { client.get_task_detail(numbered(0)).await });
    upstream.wait_for_requests(1).await;
    let mut client = replicas[1].client().await;
    let waiting = tokio::spawn(async move { client.get_task_detail(numbered(1)).await });
    eventually("a start is reserved", async || {
        let names = store.names("rate");
        names
            .first()
            .is_some_and(|name| store.command(&["ZCARD", name]) == ["2"])
    })
    .await;

    gate.open();

    throttled.await.expect("no panic").expect_err("throttled");
    let status = waiting.await.expect("no panic").expect_err("throttled");
    assert_eq!(Failure::from_status(&status).reason, "THROTTLED");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_canceled_call_leaves_its_start_to_the_next() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let replica = store.replica(&upstream, &["--upstream-rate", "4/4s"]).await;
    for number in 0..4 {
        replica.call(numbered(number)).await.expect("a reply");
    }
    for number in 4..16 {
        let mut client = replica.client().await;
        let call = tokio::spawn(async move { client.get_task_detail(numbered(number)).await });
        // Long enough to get a start; with less, the call proves nothing.
        tokio::time::sleep(Duration::from_millis(50)).await;
        call.abort();
    }

    let begun = Instant::now();
    replica.call(numbered(16)).await.expect("a reply");

    let took = begun.elapsed();
    assert!(took < Duration::from_secs(9), "{took:?}");
}

#[tokio::test]
async fn a_call_with_little_time_is_not_rejected_because_of_the_store() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let store_flags = [store.url(), store.key_file()];
    let rate = ["--upstream-rate", "1000/1s"];
    let replica = Program::impatient("50", &upstream, store_flags, &rate);
    let mut client = replica.client().await;
    replica.call(numbered(0)).await.expect("a reply");
    for (state, timeout) in [("running", 45), ("stopped", 90)] {
        if state == "stopped" {
            store.signal("STOP");
        }
        for number in 1..20 {
            let mut request = Request::new(numbered(number));
            request.set_timeout(Duration::from_millis(timeout));
            if let Err(status) = client.get_task_detail(request).await {
                assert_ne!(
                    status.code(),
                    Code::ResourceExhausted,
                    "{state}: {status:?}"
                );
            }
        }
    }
    store.signal("CONT");
}

#[tokio::test]
async fn an_early_start_does_not_end_the_count_of_a_later_one() {
    let Some(store) = Store::start().await else {
        return;
    };
    let script = concat!(
        include_str!("../../../src/quota_store/scripts/slots.lua"),
        include_str!("../../../src/quota_store/scripts/admit.lua"),
    );
    let start = |spacing, has_waited, id| {
        let names = ["EVAL", script, "4", "a", "b", "c", "d"];
        let slot = [
            "3", "10000000", spacing, "2", has_waited, "60000000", id, "",
        ];
        store.command(&[&names[..], &slot].concat())
    };
    start("0", "0", "first");

    start("30000000", "1", "later");
    start("0", "0", "at once");

    let left: u64 = store.command(&["PTTL", "a"])[0].parse().expect("a number");
    assert!(left > 30_000, "{left}");
}

#[tokio::test]
async fn a_throttle_window_by_address_is_not_shared() {
    let Some(store) = Store::start().await else {
        return;
    };
    let text = "policy ip over ratelimit,limit:200,time:1 minute";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0308"}}"#);
    let upstream = Upstream::always(reply(429, &[], body)).await;
    let replicas = store.replicas::<2>(&upstream, &[]).await;

    for replica in &replicas {
        replica.failure(numbered(0)).await;
    }

    assert_eq!(upstream.requests().len(), 2);
    assert!(store.names("window").is_empty() && store.names("api-window").is_empty());
}

#[tokio::test]
async fn a_cached_reply_serves_all_replicas_and_its_age_counts_from_the_reply() {
    let Some(store) = Store::start().await else {
        return;
    };
    let unknown = r#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;
    let upstream = Upstream::start(move |request| match request.body.contains("w-1") {
        true => reply(404, &[("x-request-id", "vendor-1")], unknown),
        false => example(),
    })
    .await;
    let flags = ["--cache-ttl", "20s"];
    let replicas = store.replicas::<2>(&upstream, &flags).await;
    let known = replicas[0].call(numbered(0)).await.expect("a reply");
    let missing = replicas[0].failure(numbered(1)).await;
    eventually("both results are stored", async || {
        store.names("result").len() == 2
    })
    .await;

    let again = replicas[1].call(numbered(0)).await.expect("a reply");
    let missing_again = replicas[1].failure(numbered(1)).await;

    assert_eq!(known.get_ref(), again.get_ref());
    assert_eq!(
        missing.code_and_reason(),
        (Code::NotFound, "TASK_NOT_FOUND")
    );
    assert_eq!(missing_again.code_and_reason(), missing.code_and_reason());
    assert_eq!(upstream.requests().len(), 2);
    for name in store.names("result") {
        let left: u64 = store.command(&["PTTL", &name])[0]
            .parse()
            .expect("a number");
        assert!(left <= 20_000, "{left}");
    }
}

#[tokio::test]
async fn a_miss_is_coalesced_over_all_replicas() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let replicas = store
        .replicas::<3>(&upstream, &["--cache-ttl", "20s"])
        .await;
    let mut calls = JoinSet::new();
    for replica in &replicas {
        let mut client = replica.client().await;
        calls.spawn(async move { client.get_task_detail(example_request()).await });
    }
    upstream.wait_for_requests(1).await;
    for replica in &replicas {
        eventually("the replica waits", async || {
            let series = "quota_store_requests_total{operation=\"share\",outcome=\"ok\"}";
            replica.metric(series).await >= 1.0
        })
        .await;
    }
    gate.open();

    let results = calls.join_all().await;

    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_replica_that_dies_while_it_asks_is_replaced_soon() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let holds = gate.clone();
    let upstream = Upstream::start(move |request| match request.number {
        0 => gated_example(&holds),
        _ => example(),
    })
    .await;
    let [first, second] = store
        .replicas::<2>(&upstream, &["--cache-ttl", "20s"])
        .await;
    let mut client = first.client().await;
    let lost = tokio::spawn(async move { client.get_task_detail(example_request()).await });
    upstream.wait_for_requests(1).await;
    drop(first);
    lost.await
        .expect("no panic")
        .expect_err("the replica is gone");

    let begun = Instant::now();
    second.call(example_request()).await.expect("a reply");

    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn a_lookup_without_a_result_releases_its_lease() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(reply(400, &[], r#"{"error_code":"DBS.280001"}"#)).await;
    let replica = store.replica(&upstream, &["--cache-ttl", "20s"]).await;

    eventually("a lease is released", async || {
        let failed = replica.call(example_request()).await;
        failed.expect_err("RDS rejects the request");
        store.released_leases() > 0
    })
    .await;
}

#[tokio::test]
async fn the_lease_of_a_lookup_is_renewed_while_rds_does_not_reply() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let replica = store.replica(&upstream, &["--cache-ttl", "20s"]).await;
    let mut client = replica.client().await;
    let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
    upstream.wait_for_requests(1).await;
    let lease = store.names("lease").remove(0);

    // It has no end until the replica sets another one.
    assert_eq!(store.command(&["PERSIST", &lease]), ["1"]);

    eventually("the lease has an end again", async || {
        store.command(&["PTTL", &lease]) != ["-1"]
    })
    .await;
    gate.open();
    call.await.expect("no panic").expect("a reply");
}

#[tokio::test]
async fn a_call_waits_for_another_replica_for_half_of_its_time_only() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let replicas = store
        .replicas::<2>(&upstream, &["--cache-ttl", "20s"])
        .await;
    let mut calls = JoinSet::new();
    for (index, replica) in replicas.iter().enumerate() {
        let mut client = replica.client().await;
        calls.spawn(async move {
            let mut request = Request::new(example_request());
            request.set_timeout(Duration::from_secs(9));
            client.get_task_detail(request).await
        });
        upstream.wait_for_requests(index + 1).await;
    }
    gate.open();

    let results = calls.join_all().await;

    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[tokio::test]
async fn results_that_were_tampered_with_are_not_used() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let flags = ["--cache-ttl", "20s"];
    let replica = store.replica(&upstream, &flags).await;
    replica.call(numbered(0)).await.expect("a reply");
    eventually("the result is stored", async || {
        store.names("result").len() == 1
    })
    .await;
    let name = store.names("result").remove(0);
    let scripts = [
        // Another byte, cut off, of another name, too long, of another type.
        "local v = redis.call('GET', KEYS[1]) \
         redis.call('SETRANGE', KEYS[1], 40, string.char((v:byte(41) + 1) % 256))",
        "local v = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], v:sub(1, -2))",
        "local v = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], v:sub(1, 13))",
        "local v = redis.call('GET', KEYS[1]) \
         redis.call('SET', KEYS[1], v .. string.rep('x', 100000))",
    ];

    for script in scripts {
        // Repeated, because a reply of the store may be late, and a result of the replica before may be stored after the script has run.
        eventually("a replica rejects the result", async || {
            store.command(&["EVAL", script, "1", &name]);
            let entry = || store.command(&["GET", &name]);
            let (tampered, before) = (entry(), upstream.requests().len());
            let other = store.replica(&upstream, &flags).await;
            other.call(numbered(0)).await.expect("a reply");

            let series = "quota_store_requests_total{operation=\"share\",outcome=\"rejected\"}";
            let rejected = other.metric(series).await == 1.0;
            let asked = upstream.requests().len() == before + 1;
            assert!(asked || !rejected && entry() != tampered, "used: {script}");
            rejected
        })
        .await;
    }
}

#[tokio::test]
async fn replicas_with_another_key_file_or_upstream_share_nothing() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(example()).await;
    let flags = ["--cache-ttl", "20s"];
    let replica = store.replica(&upstream, &flags).await;
    replica.call(numbered(0)).await.expect("a reply");
    let key = store.folder().join("other");
    std::fs::write(&key, [8; 32]).expect("a file");
    let url = store.url();
    let other_key = ["--quota-store", &url, "--quota-store-key-file"];
    let other_key = [&other_key[..], &[key.to_str().expect("ASCII")], &flags].concat();

    let other = Program::over(&upstream.url(), &other_key);
    other.call(numbered(0)).await.expect("a reply");
    let elsewhere = Upstream::always(example()).await;
    let third = store.replica(&elsewhere, &flags).await;
    third.call(numbered(0)).await.expect("a reply");

    assert_eq!(
        (upstream.requests().len(), elsewhere.requests().len()),
        (2, 1)
    );
    assert_eq!(replica.metric("quota_store_replicas").await, 1.0);
}

#[tokio::test]
async fn nothing_secret_reaches_the_store_and_everything_expires() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::start(|request| match request.number {
        0 => example(),
        _ => reply(429, &[("retry-after", "120")], ""),
    })
    .await;
    let flags = ["--cache-ttl", "20s", "--upstream-rate", "60/1m"];
    let replica = store.replica(&upstream, &flags).await;
    replica.call(example_request()).await.expect("a reply");
    replica.failure(numbered(1)).await;
    eventually("all is stored", async || {
        !store.names("result").is_empty() && !store.names("window").is_empty()
    })
    .await;

    for name in store.command(&["KEYS", "*"]) {
        let hex = name.rsplit_once(':').expect("prefix, kind and hash").1;
        assert!(name.starts_with("rtf1:"), "{name}");
        assert!(
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()),
            "{name}"
        );
        let left: i64 = store.command(&["PTTL", &name])[0]
            .parse()
            .expect("a number");
        assert!(left > 0, "{name} does not expire: {left}");
        let dump = store.command(&["DUMP", &name]).join("\n");
        for secret in ["102772a9", "CreateMysql", "1ffc4167", "token"] {
            assert!(!dump.contains(secret), "{name}: {dump}");
        }
    }
    let failure = Failure::from_status(&replica.call(numbered(2)).await.expect_err("throttled"));
    assert_eq!(failure.reason, "THROTTLED");
}
