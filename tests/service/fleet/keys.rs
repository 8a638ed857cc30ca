use tokio::task::JoinSet;
use tonic::Code;

use crate::support::{
    Failure, Gate, LONGER_THAN_PATIENCE, Program, Sandbox, Step, Store, Upstream, eventually,
    example, numbered, reply,
};

const AK: &str = "SANDBOXACCESSKEY";

fn rejection() -> Vec<Step> {
    let text = "Incorrect IAM authentication information: verify aksk signature fail";
    let body = format!(r#"{{"error_msg":"{text}","error_code":"APIGW.0301"}}"#);
    reply(401, &[], body)
}

/// Replicas that sign with this secret key, with timeouts longer than the test.
async fn replicas<const N: usize>(store: &Store, upstream: &str, secret: &str) -> [Program; N] {
    let flags = store.flags();
    let mut args = vec!["--credentials", "env", "--endpoint", upstream];
    for timeout in ["--timeout", "--attempt-timeout"] {
        args.extend([timeout, LONGER_THAN_PATIENCE]);
    }
    args.extend(flags.iter().map(String::as_str));
    let env = [("HUAWEICLOUD_SDK_AK", AK), ("HUAWEICLOUD_SDK_SK", secret)];
    let replicas = [(); N].map(|()| Program::start(&args, &env));
    for replica in &replicas {
        replica.uses_store(true).await;
    }
    replicas
}

async fn is_stored(store: &Store, kind: &str) {
    eventually(&format!("a {kind} is stored"), async || {
        !store.names(kind).is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_unproven_key_rests_on_all_replicas_after_its_first_rejection() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(rejection()).await;
    let replicas = replicas::<2>(&store, &upstream.url(), "a-wrong-key").await;
    let first = replicas[0].failure(numbered(0)).await;
    is_stored(&store, "key-rest").await;

    let second = replicas[1].failure(numbered(1)).await;

    let codes = [first, second].map(|failure| (failure.code, failure.reason));
    let expected = ["CREDENTIAL_REJECTED", "CREDENTIAL_LOCKED"];
    let expected = expected.map(|reason| (Code::Unauthenticated, reason.to_owned()));
    assert_eq!(codes, expected);
    assert_eq!(upstream.requests().len(), 1);
    eventually("the second replica is not ready", async || {
        replicas[1].admin("/readyz").await.0 == 503
    })
    .await;
}

#[tokio::test]
async fn a_rollout_with_a_wrong_secret_stops_early_and_leaves_the_right_one_alone() {
    let Some(store) = Store::start().await else {
        return;
    };
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let [healthy] = replicas(&store, &url, "sandbox-secret-key").await;
    healthy
        .call(numbered(0))
        .await
        .map_err(|status| Failure::from_status(&status))
        .expect_err("unknown");
    is_stored(&store, "key-proof").await;
    let before = sandbox.count("task_requests").await;
    let rollout = replicas::<4>(&store, &url, "a-wrong-key").await;
    let mut calls = JoinSet::new();
    for replica in &rollout {
        let mut client = replica.client().await;
        calls.spawn(async move { client.get_task_detail(numbered(1)).await });
    }

    let results = calls.join_all().await;

    assert!(results.iter().all(Result::is_err), "{results:?}");
    let sent = sandbox.count("task_requests").await - before;
    // One, unless its outcome takes more than a second.
    assert!(sent <= 2, "{sent} bad signatures");
    let failure = healthy.failure(numbered(2)).await;
    assert_eq!(failure.code, Code::NotFound);
}

#[tokio::test]
async fn probes_of_a_key_become_rarer_while_there_is_no_outcome() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let held = [vec![Step::WaitFor(gate.clone())], rejection()].concat();
    let upstream = Upstream::always(held).await;
    let replicas = replicas::<4>(&store, &upstream.url(), "a-wrong-key").await;
    let mut calls = JoinSet::new();
    for (number, replica) in replicas.iter().enumerate() {
        let mut client = replica.client().await;
        calls.spawn(async move { client.get_task_detail(numbered(number)).await });
    }

    upstream.wait_for_requests(4).await;

    let name = store.names("key-probes").remove(0);
    let probes = store.command(&["ZRANGE", &name, "0", "-1", "WITHSCORES"]);
    let micros = probes.iter().skip(1).step_by(2);
    let micros: Vec<u64> = micros.map(|at| at.parse().expect("a number")).collect();
    let gaps: Vec<u64> = micros.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(gaps.len(), 3);
    for (gap, least) in gaps.iter().zip([1_000_000, 2_000_000, 4_000_000]) {
        assert!(*gap >= least, "{gaps:?}");
    }
    gate.open();
    let results = calls.join_all().await;
    assert!(results.iter().all(Result::is_err), "{results:?}");
}

#[tokio::test]
async fn a_probe_without_evidence_ends_at_once() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::start(|request| match request.number {
        0..3 => reply(503, &[], ""),
        _ => example(),
    })
    .await;
    let replicas = replicas::<2>(&store, &upstream.url(), "a-key").await;

    let failure = replicas[0].failure(numbered(0)).await;

    assert_eq!(failure.reason, "UPSTREAM_UNAVAILABLE");
    eventually("no probe is left", async || {
        store.names("key-probes").is_empty()
    })
    .await;
    replicas[1].call(numbered(1)).await.expect("a reply");
}

#[tokio::test]
async fn a_store_without_its_data_does_not_make_a_proven_key_rest_after_one_rejection() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::start(|request| match request.number {
        2 => rejection(),
        _ => example(),
    })
    .await;
    let replicas = replicas::<2>(&store, &upstream.url(), "a-key").await;
    for replica in &replicas {
        replica.call(numbered(0)).await.expect("a reply");
    }
    is_stored(&store, "key-proof").await;
    store.command(&["FLUSHALL"]);

    let failure = replicas[0].failure(numbered(1)).await;
    assert_eq!(failure.reason, "CREDENTIAL_REJECTED");
    is_stored(&store, "ak-count").await;

    for replica in &replicas {
        replica.call(numbered(2)).await.expect("a reply");
    }
}

#[tokio::test]
async fn three_rejections_on_any_replicas_rest_a_proven_key() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::start(|request| match request.number {
        0..3 => example(),
        _ => rejection(),
    })
    .await;
    let replicas = replicas::<3>(&store, &upstream.url(), "a-key").await;
    for (number, replica) in replicas.iter().enumerate() {
        replica.call(numbered(number)).await.expect("a reply");
    }
    is_stored(&store, "key-proof").await;
    for (number, replica) in replicas.iter().enumerate() {
        let failure = replica.failure(numbered(10 + number)).await;
        assert_eq!(failure.reason, "CREDENTIAL_REJECTED");
    }
    is_stored(&store, "ak-rest").await;

    for replica in &replicas {
        assert_eq!(
            replica.failure(numbered(20)).await.reason,
            "CREDENTIAL_LOCKED"
        );
    }

    assert_eq!(upstream.requests().len(), 6);
}
