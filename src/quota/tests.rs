use std::{
    collections::HashSet,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::SystemTime,
};

use futures_util::poll;
use http::HeaderMap;
use proptest::prelude::*;
use tokio::{
    sync::Notify,
    task::{JoinHandle, JoinSet, yield_now},
    time::{sleep, timeout},
};

use super::*;
use crate::upstream::{
    Facts, rejection,
    wire::{SubTask, TaskDetail},
};

const ANN: Identity = Identity::Caller([1; 16]);
const BOB: Identity = Identity::Caller([2; 16]);

fn quota(cache_ttl: Duration, cache_entries: u64) -> Arc<Quota> {
    let config = Config {
        cache_ttl,
        cache_entries,
    };
    Quota::new(config, Metrics::new())
}

fn without_cache() -> Arc<Quota> {
    quota(Duration::ZERO, 100)
}

fn with_cache() -> Arc<Quota> {
    quota(Duration::from_secs(3600), 100)
}

fn query(task: impl Into<String>) -> TaskQuery {
    TaskQuery {
        project_id: "p".into(),
        instance_id: "i".into(),
        workflow_id: task.into(),
        workflow_name: None,
    }
}

fn task(job_id: impl Into<String>) -> TaskDetail {
    TaskDetail {
        job_id: job_id.into(),
        ..TaskDetail::default()
    }
}

fn rejected(http_status: u16, body: &str) -> Error {
    let now = SystemTime::UNIX_EPOCH;
    let (rejection, facts) =
        rejection::of_answer(http_status, &HeaderMap::new(), body.as_bytes(), now);
    Error {
        kind: ErrorKind::Rejected(Box::new(rejection)),
        facts,
    }
}

fn in_seconds(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}

/// The upstream of a test: it counts the work that begins and that is dropped, and lets work end when told.
struct Upstream {
    begun: AtomicUsize,
    dropped: AtomicUsize,
    limits: Mutex<Vec<Limit>>,
    goes_on: Notify,
    outcome: Box<dyn Fn() -> Result<TaskDetail, Error> + Send + Sync>,
}

impl Upstream {
    fn that(outcome: impl Fn() -> Result<TaskDetail, Error> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            begun: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            limits: Mutex::default(),
            goes_on: Notify::new(),
            outcome: Box::new(outcome),
        })
    }

    fn finds() -> Arc<Self> {
        Self::that(|| Ok(task("found")))
    }

    async fn work(self: Arc<Self>, limit: Limit) -> Result<Found, Error> {
        let unless_dropped = Dropped(Arc::clone(&self));
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.limits.lock().unwrap().push(limit);
        self.goes_on.notified().await;
        std::mem::forget(unless_dropped);
        let facts = Facts::default();
        (self.outcome)().map(|task| Found { task, facts })
    }

    fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Relaxed)
    }
}

struct Dropped(Arc<Upstream>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// A call of `identity` for one task; it has been polled when this returns.
async fn call(
    quota: &Arc<Quota>,
    upstream: &Arc<Upstream>,
    identity: Identity,
    deadline: Deadline,
) -> JoinHandle<Answer> {
    let (quota, upstream) = (Arc::clone(quota), Arc::clone(upstream));
    let call = tokio::spawn(async move {
        let question = quota.question(identity, query("w"));
        let work = |limit, _| Arc::clone(&upstream).work(limit);
        quota.ask(&question, deadline, |_| {}, work).await
    });
    yield_now().await;
    call
}

/// One call whose work ends at once with `outcome`.
async fn ask(
    quota: &Arc<Quota>,
    identity: Identity,
    task: &str,
    outcome: impl Fn() -> Result<TaskDetail, Error>,
) -> Answer {
    let question = quota.question(identity, query(task));
    let work = |_, _| {
        let facts = Facts::default();
        let answer = outcome().map(|task| Found { task, facts });
        async move { answer }
    };
    quota.ask(&question, in_seconds(9), |_| {}, work).await
}

fn job_id(answer: &Answer) -> &str {
    &answer.as_ref().expect("a task").task.job_id
}

#[tokio::test(start_paused = true)]
async fn equal_questions_in_flight_share_one_answer_and_each_that_joined_counts_once() {
    let (quota, upstream) = (without_cache(), Upstream::finds());
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(call(&quota, &upstream, ANN, in_seconds(9)).await);
    }

    upstream.goes_on.notify_one();

    for call in calls {
        assert_eq!(job_id(&call.await.unwrap()), "found");
    }
    assert_eq!(upstream.begun(), 1);
    assert_eq!(quota.metrics.coalesced.get(), 4);
    assert_eq!(quota.flights.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn questions_of_different_identities_are_not_merged() {
    let (quota, upstream) = (without_cache(), Upstream::finds());

    let _ann = call(&quota, &upstream, ANN, in_seconds(9)).await;
    let _bob = call(&quota, &upstream, BOB, in_seconds(9)).await;

    assert_eq!(upstream.begun(), 2);
    assert_eq!(quota.metrics.coalesced.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_work_goes_on_while_anyone_waits_and_is_dropped_with_the_last() {
    for leaves_first in [0, 1] {
        let (quota, upstream) = (without_cache(), Upstream::finds());
        let mut calls = vec![
            call(&quota, &upstream, ANN, in_seconds(9)).await,
            call(&quota, &upstream, ANN, in_seconds(9)).await,
        ];

        let leaving = calls.remove(leaves_first);
        leaving.abort();
        let _ = leaving.await;
        assert_eq!((upstream.dropped(), quota.flights.count()), (0, 1));
        let third = call(&quota, &upstream, ANN, in_seconds(9)).await;
        for leaving in [calls.remove(0), third] {
            leaving.abort();
            let _ = leaving.await;
        }

        assert_eq!((upstream.dropped(), quota.flights.count()), (1, 0));
        assert_eq!(upstream.begun(), 1);
        let anew = call(&quota, &upstream, ANN, in_seconds(9)).await;
        upstream.goes_on.notify_one();
        assert_eq!(job_id(&anew.await.unwrap()), "found");
        assert_eq!(upstream.begun(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn who_stays_gets_the_answer_after_the_first_has_left() {
    let (quota, upstream) = (without_cache(), Upstream::finds());
    let first = call(&quota, &upstream, ANN, in_seconds(9)).await;
    let second = call(&quota, &upstream, ANN, in_seconds(9)).await;

    first.abort();
    let _ = first.await;
    upstream.goes_on.notify_one();

    assert_eq!(job_id(&second.await.unwrap()), "found");
    assert_eq!(upstream.begun(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_the_work_is_that_of_the_call_with_the_longest_deadline() {
    let (quota, upstream) = (without_cache(), Upstream::finds());
    let longest = in_seconds(30);

    let _calls = [
        call(&quota, &upstream, ANN, in_seconds(1)).await,
        call(&quota, &upstream, ANN, longest).await,
        call(&quota, &upstream, ANN, in_seconds(2)).await,
    ];

    assert_eq!(upstream.limits.lock().unwrap()[0].deadline(), longest);
}

#[tokio::test(start_paused = true)]
async fn an_error_is_shared_unless_it_is_about_time_that_a_joined_call_still_has() {
    let retry_after = Duration::from_secs(5);
    let cases: [(&str, fn(Duration) -> ErrorKind, u64, bool); 6] = [
        ("the deadline", |_| ErrorKind::DeadlineExceeded, 9, true),
        (
            "the deadline of all",
            |_| ErrorKind::DeadlineExceeded,
            0,
            false,
        ),
        (
            "the deadline, at the credential",
            |_| ErrorKind::Credentials(credentials::Error::DeadlineExceeded),
            9,
            true,
        ),
        (
            "a turn that fits",
            |retry_after| ErrorKind::Throttled { retry_after },
            9,
            true,
        ),
        (
            "a turn that does not fit",
            |retry_after| ErrorKind::Throttled { retry_after },
            5,
            false,
        ),
        ("any other", |_| ErrorKind::AttemptTimeout, 9, false),
    ];

    for (case, kind, seconds, asks_again) in cases {
        let quota = without_cache();
        let upstream = Upstream::that(move || Err(kind(retry_after).into()));
        let first = call(&quota, &upstream, ANN, in_seconds(0)).await;
        let joined = call(&quota, &upstream, ANN, in_seconds(seconds)).await;

        upstream.goes_on.notify_one();
        first.await.unwrap().expect_err(case);
        upstream.goes_on.notify_one();
        joined.await.unwrap().expect_err(case);

        assert_eq!(upstream.begun(), 1 + usize::from(asks_again), "{case}");
        assert_eq!(quota.metrics.coalesced.get(), 1, "{case}");
        let throttled = if case.contains("turn") { 2 } else { 0 };
        assert_eq!(quota.metrics.throttled.get(), throttled, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_work_is_an_answer_for_each_and_does_not_outlive_it() {
    let quota = with_cache();
    let upstream = Upstream::that(|| panic!("on purpose"));
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(call(&quota, &upstream, ANN, in_seconds(9)).await);
    }

    upstream.goes_on.notify_one();

    for call in calls {
        let answer = call.await.expect("the call itself does not panic");
        assert!(matches!(
            answer,
            Err(Error {
                kind: ErrorKind::Panicked,
                ..
            })
        ));
    }
    assert_eq!(quota.metrics.panics.get(), 1);
    assert_eq!(quota.flights.count(), 0);
    let answer = ask(&quota, ANN, "w", || Ok(task("found"))).await;
    assert_eq!(job_id(&answer), "found");
}

#[tokio::test(start_paused = true)]
async fn a_flight_that_ends_late_leaves_the_next_one_alone() {
    /// Asks the same question again while the work is being dropped: its flight is over, and still on the list.
    struct AsksAgain(Arc<Quota>, Arc<Question>, Arc<Mutex<Option<Seat>>>);
    impl Drop for AsksAgain {
        fn drop(&mut self) {
            let start = |_, _| pending();
            let seat = self.0.flights.join(&self.1, in_seconds(9), start);
            *self.2.lock().unwrap() = Some(seat);
        }
    }
    let quota = without_cache();
    let question = quota.question(ANN, query("w"));
    let next = Arc::new(Mutex::new(None));
    let guard = AsksAgain(Arc::clone(&quota), Arc::clone(&question), Arc::clone(&next));
    let mut seat = quota
        .flights
        .join(&question, in_seconds(9), |_, _| async move {
            let _guard = guard;
            pending().await
        });
    assert!(poll!(&mut seat.work).is_pending());

    drop(seat);

    let next = next.lock().unwrap().take().expect("it asked again");
    assert!(!next.joined);
    assert_eq!(quota.flights.count(), 1);
    let third = quota
        .flights
        .join(&question, in_seconds(9), |_, _| pending());
    assert!(third.joined);
    drop((next, third));
    assert_eq!(quota.flights.count(), 0);
}

#[tokio::test]
async fn tasks_and_missing_tasks_of_at_most_64_kib_are_kept_and_nothing_else() {
    let missing = r#"{"error_code":"DBS.200543","error_msg":"m"}"#;
    let parts = |count| TaskDetail {
        sub_task_list: vec![SubTask::default(); count],
        ..task("")
    };
    let cases: Vec<(&str, bool, Result<TaskDetail, Error>)> = vec![
        ("a task", true, Ok(task("t"))),
        ("64 KiB", true, Ok(task("t".repeat(64 << 10)))),
        ("one byte more", false, Ok(task("t".repeat((64 << 10) + 1)))),
        ("ten empty parts", true, Ok(parts(10))),
        ("many empty parts", false, Ok(parts(10_000))),
        ("no such task", true, Err(rejected(400, missing))),
        ("404", true, Err(rejected(404, ""))),
        ("403", false, Err(rejected(403, ""))),
        ("409", false, Err(rejected(409, ""))),
        ("429", false, Err(rejected(429, ""))),
        ("503", false, Err(rejected(503, ""))),
        ("malformed", false, Err(ErrorKind::Malformed.into())),
        ("timeout", false, Err(ErrorKind::AttemptTimeout.into())),
    ];

    for (case, kept, outcome) in cases {
        let quota = with_cache();
        let asked = AtomicUsize::new(0);
        for _ in 0..3 {
            let answer = ask(&quota, ANN, "w", || {
                asked.fetch_add(1, Ordering::Relaxed);
                outcome.clone()
            });
            assert_eq!(answer.await.is_ok(), outcome.is_ok(), "{case}");
        }

        let (calls, hits) = if kept { (1, 2) } else { (3, 0) };
        assert_eq!(asked.into_inner(), calls, "{case}");
        assert_eq!(quota.metrics.cache_hits.get(), hits, "{case}");
    }
}

#[tokio::test]
async fn an_answer_is_kept_for_its_credential_only_and_for_no_longer_than_the_ttl() {
    let kept = with_cache();
    ask(&kept, ANN, "w", || Ok(task("ann's"))).await.unwrap();
    let bobs = ask(&kept, BOB, "w", || Ok(task("bob's"))).await;
    assert_eq!(job_id(&bobs), "bob's");

    let brief = quota(Duration::from_millis(1), 100);
    ask(&brief, ANN, "w", || Ok(task("first"))).await.unwrap();
    sleep(Duration::from_millis(5)).await;
    let later = ask(&brief, ANN, "w", || Ok(task("second"))).await;
    assert_eq!(job_id(&later), "second");
}

#[tokio::test]
async fn no_more_answers_are_kept_than_configured_and_none_when_off() {
    let quota = quota(Duration::from_secs(3600), 100);

    for number in 0..1000 {
        ask(&quota, ANN, &number.to_string(), || Ok(task("t")))
            .await
            .unwrap();
    }

    let cache = quota.cache.as_ref().expect("the cache is on");
    cache.run_pending_tasks();
    assert!(cache.entry_count() <= 100, "{}", cache.entry_count());
    assert!(without_cache().cache.is_none());
}

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
async fn run(quota: Arc<Quota>, asker: Asker) -> Option<String> {
    sleep(asker.begins).await;
    let name = format!("{}/{}", asker.identity, asker.task);
    let question = quota.question(
        Identity::Caller([asker.identity; 16]),
        query(asker.task.to_string()),
    );
    let work = |_, _| {
        let (name, asker) = (name.clone(), asker.clone());
        async move {
            sleep(asker.work).await;
            let facts = Facts::default();
            match asker.outcome {
                0 => panic!("on purpose"),
                1 => Err(ErrorKind::DeadlineExceeded.into()),
                2 => Err(rejected(404, "")),
                _ => Ok(Found {
                    task: task(name),
                    facts,
                }),
            }
        }
    };
    let answer = quota.ask(&question, in_seconds(1), |_| {}, work);
    let found = timeout(asker.patience, answer).await.ok()?.ok()?;
    assert_eq!(found.task.job_id, name);
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
            let quota = if cached { with_cache() } else { without_cache() };
            let runs = askers.into_iter().map(|asker| run(Arc::clone(&quota), asker));
            runs.collect::<JoinSet<_>>().join_all().await;
            assert_eq!(quota.flights.count(), 0);
        });
    }
}

#[test]
fn calls_of_several_workers_share_work_and_leave_no_entry_behind() {
    let quota = without_cache();

    let workers = [1, 2, 3, 4].map(|seed| {
        let quota = Arc::clone(&quota);
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
            let runs = (0..2000).map(|_| run(Arc::clone(&quota), asker()));
            let seen = runtime.block_on(async { runs.collect::<JoinSet<_>>().join_all().await });
            seen.into_iter().flatten().collect::<HashSet<_>>()
        })
    });
    let seen: HashSet<_> = workers
        .into_iter()
        .flat_map(|worker| worker.join().expect("every answer is its own"))
        .collect();

    assert_eq!(seen.len(), 4);
    assert!(quota.metrics.coalesced.get() > 0);
    assert_eq!(quota.flights.count(), 0);
}
