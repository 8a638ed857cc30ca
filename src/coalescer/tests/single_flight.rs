use std::{
    collections::HashSet,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::poll;
use tokio::{
    sync::Notify,
    task::{JoinHandle, yield_now},
};

use super::*;

/// A scripted upstream: counts work that starts and work that is dropped, and completes work on `release`.
struct Upstream {
    started: AtomicUsize,
    dropped: AtomicUsize,
    deadlines: Mutex<Vec<SharedDeadline>>,
    release: Notify,
    outcome: Box<dyn Fn() -> Result<Arc<Task>, Error> + Send + Sync>,
}

impl Upstream {
    fn with(outcome: impl Fn() -> Result<Arc<Task>, Error> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            started: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            deadlines: Mutex::default(),
            release: Notify::new(),
            outcome: Box::new(outcome),
        })
    }

    fn finds() -> Arc<Self> {
        Self::with(|| Ok(task("found")))
    }

    async fn work(self: Arc<Self>, deadline: SharedDeadline) -> Result<Arc<Task>, Error> {
        let drop_counter = Dropped(Arc::clone(&self));
        self.started.fetch_add(1, Ordering::Relaxed);
        self.deadlines.lock().unwrap().push(deadline);
        self.release.notified().await;
        std::mem::forget(drop_counter);
        (self.outcome)()
    }

    fn started(&self) -> usize {
        self.started.load(Ordering::Relaxed)
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

/// A call of `identity` for one task, polled once before this returns.
async fn call(
    coalescer: &Arc<Coalescer>,
    upstream: &Arc<Upstream>,
    identity: Identity,
    deadline: Deadline,
) -> JoinHandle<Arc<Lookup>> {
    let (coalescer, upstream) = (Arc::clone(coalescer), Arc::clone(upstream));
    let call = tokio::spawn(async move {
        let key = coalescer.key(identity, query("w"));
        let work = |deadline, _| Arc::clone(&upstream).work(deadline);
        coalescer.look_up(&key, deadline, None, |_| {}, work).await
    });
    yield_now().await;
    call
}

#[tokio::test(start_paused = true)]
async fn identical_lookups_in_flight_share_one_result_and_each_follower_counts_once() {
    let (coalescer, upstream) = (without_cache(), Upstream::finds());
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(call(&coalescer, &upstream, ANN, in_seconds(9)).await);
    }

    upstream.release.notify_one();

    for call in calls {
        assert_eq!(job_id(&call.await.unwrap()), "found");
    }
    assert_eq!(upstream.started(), 1);
    assert_eq!(coalescer.metrics.coalesced.get(), 4);
    assert_eq!(coalescer.in_flight.count(), 0);
}

#[test]
fn different_lookups_have_different_hashes() {
    let coalescer = without_cache();
    let hasher = RandomState::new();

    let hashes: HashSet<u64> = (0..100)
        .flat_map(|task| {
            [ANN, BOB].map(|identity| coalescer.key(identity, query(task.to_string())))
        })
        .map(|key| hasher.hash_one(key))
        .collect();

    assert_eq!(hashes.len(), 200);
}

#[tokio::test(start_paused = true)]
async fn lookups_of_different_identities_are_not_coalesced() {
    let (coalescer, upstream) = (without_cache(), Upstream::finds());

    let _ann = call(&coalescer, &upstream, ANN, in_seconds(9)).await;
    let _bob = call(&coalescer, &upstream, BOB, in_seconds(9)).await;

    assert_eq!(upstream.started(), 2);
    assert_eq!(coalescer.metrics.coalesced.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_work_continues_while_any_call_waits_and_is_dropped_with_the_last() {
    for leaves_first in [0, 1] {
        let (coalescer, upstream) = (without_cache(), Upstream::finds());
        let mut calls = vec![
            call(&coalescer, &upstream, ANN, in_seconds(9)).await,
            call(&coalescer, &upstream, ANN, in_seconds(9)).await,
        ];

        let leaving = calls.remove(leaves_first);
        leaving.abort();
        let _ = leaving.await;
        assert_eq!((upstream.dropped(), coalescer.in_flight.count()), (0, 1));
        let third = call(&coalescer, &upstream, ANN, in_seconds(9)).await;
        for leaving in [calls.remove(0), third] {
            leaving.abort();
            let _ = leaving.await;
        }

        assert_eq!((upstream.dropped(), coalescer.in_flight.count()), (1, 0));
        assert_eq!(upstream.started(), 1);
        let next = call(&coalescer, &upstream, ANN, in_seconds(9)).await;
        upstream.release.notify_one();
        assert_eq!(job_id(&next.await.unwrap()), "found");
        assert_eq!(upstream.started(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_follower_gets_the_result_after_the_leader_has_left() {
    let (coalescer, upstream) = (without_cache(), Upstream::finds());
    let first = call(&coalescer, &upstream, ANN, in_seconds(9)).await;
    let second = call(&coalescer, &upstream, ANN, in_seconds(9)).await;

    first.abort();
    let _ = first.await;
    upstream.release.notify_one();

    assert_eq!(job_id(&second.await.unwrap()), "found");
    assert_eq!(upstream.started(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_the_work_is_the_latest_of_its_calls() {
    let (coalescer, upstream) = (without_cache(), Upstream::finds());
    let longest = in_seconds(30);

    let _calls = [
        call(&coalescer, &upstream, ANN, in_seconds(1)).await,
        call(&coalescer, &upstream, ANN, longest).await,
        call(&coalescer, &upstream, ANN, in_seconds(2)).await,
    ];

    assert_eq!(upstream.deadlines.lock().unwrap()[0].deadline(), longest);
}

#[tokio::test(start_paused = true)]
async fn a_follower_rejects_a_result_of_another_replica_that_is_older_than_it_may_use() {
    let coalescer = without_cache();
    let key = coalescer.key(ANN, query("task"));
    let started = AtomicUsize::new(0);
    let age = Duration::from_secs(7);
    let call = |max_age: u64| {
        let max_age = Some(Duration::from_secs(max_age));
        coalescer.look_up(
            &key,
            in_seconds(9),
            max_age,
            |_| {},
            |_, _| {
                let is_first = started.fetch_add(1, Ordering::Relaxed) == 0;
                async move {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    let age = if is_first { age } else { Duration::ZERO };
                    Found {
                        age,
                        ..Found::from(Ok(task("job")))
                    }
                }
            },
        )
    };

    let found = tokio::join!(call(8), call(8), call(6), call(0));

    assert_eq!(started.load(Ordering::Relaxed), 2);
    let ages =
        [found.0, found.1, found.2, found.3].map(|lookup| lookup.finished_at.elapsed() >= age);
    assert_eq!(ages, [true, true, false, false]);
}

#[tokio::test(start_paused = true)]
async fn an_error_is_shared_unless_it_is_lack_of_time_and_the_follower_has_time_left() {
    let retry_after = Duration::from_secs(5);
    let cases: [(&str, Error, u64, bool); 6] = [
        ("the deadline", Error::DeadlineExceeded, 9, true),
        ("the deadline of both", Error::DeadlineExceeded, 0, false),
        (
            "the deadline, while waiting for the credential",
            Error::Credentials(credentials::Error::DeadlineExceeded),
            9,
            true,
        ),
        (
            "a turn that fits",
            Error::Throttled {
                retry_after,
                subject: None,
            },
            9,
            true,
        ),
        (
            "a turn that does not fit",
            Error::Throttled {
                retry_after,
                subject: None,
            },
            5,
            false,
        ),
        ("any other", Error::AttemptTimeout, 9, false),
    ];

    for (case, error, seconds, starts_again) in cases {
        let coalescer = without_cache();
        let upstream = Upstream::with(move || Err(error.clone()));
        let first = call(&coalescer, &upstream, ANN, in_seconds(0)).await;
        let joined = call(&coalescer, &upstream, ANN, in_seconds(seconds)).await;

        upstream.release.notify_one();
        first.await.unwrap().result.clone().expect_err(case);
        upstream.release.notify_one();
        joined.await.unwrap().result.clone().expect_err(case);

        assert_eq!(upstream.started(), 1 + usize::from(starts_again), "{case}");
        assert_eq!(coalescer.metrics.coalesced.get(), 1, "{case}");
        let throttled = if case.contains("turn") { 2 } else { 0 };
        assert_eq!(coalescer.metrics.throttled.get(), throttled, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_work_fails_every_waiting_call_and_no_later_one() {
    let coalescer = with_cache();
    let upstream = Upstream::with(|| panic!("on purpose"));
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(call(&coalescer, &upstream, ANN, in_seconds(9)).await);
    }

    upstream.release.notify_one();

    for call in calls {
        let lookup = call.await.expect("the call itself does not panic");
        assert!(matches!(lookup.result, Err(Error::Panicked)));
    }
    assert_eq!(coalescer.metrics.panics.get(), 1);
    assert_eq!(coalescer.in_flight.count(), 0);
    let lookup = look_up(&coalescer, ANN, "w", || Ok(task("found"))).await;
    assert_eq!(job_id(&lookup), "found");
}

#[tokio::test(start_paused = true)]
async fn dropped_work_does_not_remove_the_entry_of_a_newer_lookup() {
    /// Joins the same lookup again while its work is being dropped and its entry still exists.
    struct JoinsOnDrop(Arc<Coalescer>, Arc<LookupKey>, Arc<Mutex<Option<Joined>>>);
    impl Drop for JoinsOnDrop {
        fn drop(&mut self) {
            let start = |_, _| pending();
            let joined = self.0.in_flight.join(&self.1, in_seconds(9), start);
            *self.2.lock().unwrap() = Some(joined);
        }
    }
    let coalescer = without_cache();
    let key = coalescer.key(ANN, query("w"));
    let next = Arc::new(Mutex::new(None));
    let guard = JoinsOnDrop(Arc::clone(&coalescer), Arc::clone(&key), Arc::clone(&next));
    let mut joined = coalescer
        .in_flight
        .join(&key, in_seconds(9), |_, _| async move {
            let _guard = guard;
            pending().await
        });
    assert!(poll!(&mut joined.lookup).is_pending());

    drop(joined);

    let next = next.lock().unwrap().take().expect("it joined again");
    assert!(!next.is_follower);
    assert_eq!(coalescer.in_flight.count(), 1);
    let third = coalescer
        .in_flight
        .join(&key, in_seconds(9), |_, _| pending());
    assert!(third.is_follower);
    drop((next, third));
    assert_eq!(coalescer.in_flight.count(), 0);
}
