use std::{collections::HashSet, thread};

use proptest::prelude::*;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::*;

/// One call of a random run.
#[derive(Debug, Clone)]
struct Asker {
    identity: u8,
    task: u8,
    begins: Duration,
    /// How long it waits before it leaves.
    patience: Duration,
    /// How long the work takes, should this call begin it.
    work: Duration,
    outcome: u8,
}

fn asker() -> impl Strategy<Value = Asker> {
    let millis = |most: u64| (0..most).prop_map(Duration::from_millis);
    (0..4u8, 0..3u8, millis(60), millis(40), millis(30), 0..8u8).prop_map(
        |(identity, task, begins, patience, work, outcome)| Asker {
            identity,
            task,
            begins,
            patience,
            work,
            outcome,
        },
    )
}

/// Asks, and leaves when out of patience. A task that comes names whose credential found it, and what was asked.
async fn run(coalescer: Arc<Coalescer>, asker: Asker) -> Option<String> {
    sleep(asker.begins).await;
    let name = format!("{}/{}", asker.identity, asker.task);
    let key = coalescer.key(
        Identity::Caller([asker.identity; 16]),
        query(asker.task.to_string()),
    );
    let work = |_, _| {
        let (name, asker) = (name.clone(), asker.clone());
        async move {
            sleep(asker.work).await;
            match asker.outcome {
                0 => panic!("on purpose"),
                1 => Err(Error::DeadlineExceeded),
                2 => Err(rejected(404, "")),
                _ => Ok(task(name)),
            }
        }
    };
    let answer = coalescer.look_up(&key, in_seconds(1), |_| {}, work);
    let lookup = timeout(asker.patience, answer).await.ok()?;
    let task = lookup.result.as_ref().ok()?;
    assert_eq!(task.job_id, name);
    Some(name)
}

proptest! {
    #[test]
    fn nobody_sees_the_answer_of_another_credential_or_question(
        askers in prop::collection::vec(asker(), 1..80),
        cached in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let coalescer = if cached { with_cache() } else { without_cache() };
            let runs = askers.into_iter().map(|asker| run(Arc::clone(&coalescer), asker));
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
            let mut asker = || Asker {
                identity: random.u8(0..2),
                task: random.u8(0..2),
                begins: Duration::from_millis(random.u64(0..300)),
                patience: Duration::from_millis(random.u64(1..20)),
                work: Duration::from_millis(random.u64(0..10)),
                outcome: random.u8(1..8),
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap();
            let runs = (0..2000).map(|_| run(Arc::clone(&coalescer), asker()));
            let seen = runtime.block_on(async { runs.collect::<JoinSet<_>>().join_all().await });
            seen.into_iter().flatten().collect::<HashSet<_>>()
        })
    });
    let seen: HashSet<_> = workers
        .into_iter()
        .flat_map(|worker| worker.join().expect("every answer is its own"))
        .collect();

    assert_eq!(seen.len(), 4);
    assert!(coalescer.metrics.coalesced.get() > 0);
    assert_eq!(coalescer.in_flight.count(), 0);
}

/// `cargo test --release --lib cost_of_a_question -- --ignored --nocapture`
#[tokio::test]
#[ignore = "measures, and decides nothing"]
async fn cost_of_a_question_that_nobody_shares() {
    const QUESTIONS: u32 = 1_000_000;
    let coalescer = without_cache();

    let begun = std::time::Instant::now();
    for number in 0..QUESTIONS {
        let answer = ask(
            &coalescer,
            ANN,
            "102772a9-31fa-4129-b9f8-7638e2792f3b",
            || Ok(TaskDetail::default()),
        );
        assert!(answer.await.result.is_ok(), "{number}");
    }

    println!("{:?} a question", begun.elapsed() / QUESTIONS);
}
