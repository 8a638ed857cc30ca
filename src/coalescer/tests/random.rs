use std::{collections::HashSet, thread};

use proptest::prelude::*;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::*;

/// A call of a random run.
#[derive(Debug, Clone)]
struct RandomCall {
    identity: u8,
    task: u8,
    starts_after: Duration,
    /// How long the call waits before it gives up.
    patience: Duration,
    /// How long the work takes if this call is the leader.
    work: Duration,
    outcome: u8,
}

fn random_call() -> impl Strategy<Value = RandomCall> {
    let millis = |most: u64| (0..most).prop_map(Duration::from_millis);
    (0..4u8, 0..3u8, millis(60), millis(40), millis(30), 0..8u8).prop_map(
        |(identity, task, starts_after, patience, work, outcome)| RandomCall {
            identity,
            task,
            starts_after,
            patience,
            work,
            outcome,
        },
    )
}

/// Runs the call. The job id of a task that it receives names the identity and the task of the lookup.
async fn run(coalescer: Arc<Coalescer>, call: RandomCall) -> Option<String> {
    sleep(call.starts_after).await;
    let name = format!("{}/{}", call.identity, call.task);
    let key = coalescer.key(
        Identity::Caller([call.identity; 16]),
        query(call.task.to_string()),
    );
    let work = |_, _| {
        let (name, call) = (name.clone(), call.clone());
        async move {
            sleep(call.work).await;
            match call.outcome {
                0 => panic!("on purpose"),
                1 => Err(Error::DeadlineExceeded),
                2 => Err(rejected(404, "")),
                _ => Ok(task(name)),
            }
        }
    };
    let lookup = coalescer.look_up(&key, in_seconds(1), None, |_| {}, work);
    let lookup = timeout(call.patience, lookup).await.ok()?;
    let task = lookup.result.as_ref().ok()?;
    assert_eq!(task.message().job_id, name);
    Some(name)
}

proptest! {
    #[test]
    fn no_call_receives_the_result_of_another_identity_or_task(
        calls in prop::collection::vec(random_call(), 1..80),
        cached in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let coalescer = if cached { with_cache() } else { without_cache() };
            let runs = calls.into_iter().map(|call| run(Arc::clone(&coalescer), call));
            runs.collect::<JoinSet<_>>().join_all().await;
            assert_eq!(coalescer.in_flight.count(), 0);
        });
    }
}

#[test]
fn calls_of_several_workers_share_work_and_leave_no_entry_behind() {
    let coalescer = without_cache();

    let workers = [1, 2, 3, 4].map(|seed| {
        let coalescer = Arc::clone(&coalescer);
        thread::spawn(move || {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut call = || RandomCall {
                identity: random.u8(0..2),
                task: random.u8(0..2),
                starts_after: Duration::from_millis(random.u64(0..300)),
                patience: Duration::from_millis(random.u64(1..20)),
                work: Duration::from_millis(random.u64(0..10)),
                outcome: random.u8(1..8),
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap();
            let runs = (0..2000).map(|_| run(Arc::clone(&coalescer), call()));
            let seen = runtime.block_on(async { runs.collect::<JoinSet<_>>().join_all().await });
            seen.into_iter().flatten().collect::<HashSet<_>>()
        })
    });
    let seen: HashSet<_> = workers
        .into_iter()
        .flat_map(|worker| worker.join().expect("every call receives its own result"))
        .collect();

    assert_eq!(seen.len(), 4);
    assert!(coalescer.metrics.coalesced.get() > 0);
    assert_eq!(coalescer.in_flight.count(), 0);
}

/// `cargo test --release --lib cost_of_an_unshared_lookup -- --ignored --nocapture`
#[tokio::test]
#[ignore = "a measurement without assertions"]
async fn cost_of_an_unshared_lookup() {
    const LOOKUPS: u32 = 1_000_000;
    let coalescer = without_cache();

    let started = std::time::Instant::now();
    for number in 0..LOOKUPS {
        let lookup = look_up(
            &coalescer,
            ANN,
            "102772a9-31fa-4129-b9f8-7638e2792f3b",
            || Ok(task("")),
        );
        assert!(lookup.await.result.is_ok(), "{number}");
    }

    println!("{:?} per lookup", started.elapsed() / LOOKUPS);
}
