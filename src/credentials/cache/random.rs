//! Calls that come, wait, leave and report rejections at random, while an issuer answers, fails, stalls and expires at random.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use proptest::prelude::*;
use tokio::task::JoinSet;

use super::*;

/// How one fetch ends.
#[derive(Debug, Clone)]
struct Fetch {
    takes: Duration,
    /// How long the value lives; `None` for a failure.
    lifetime: Option<Duration>,
    rejects: bool,
}

/// What one call does.
#[derive(Debug, Clone)]
struct Call {
    begins: Duration,
    /// It is dropped after this time, whatever it waits for.
    patience: Duration,
    /// What it reports about the value it got.
    report: Report,
}

#[derive(Debug, Clone, Copy)]
enum Report {
    Nothing,
    Refresh,
    Rejected,
}

/// A value as the issuer gave it out.
#[derive(Debug, Clone)]
struct Issued {
    began: Instant,
    usable_until: Instant,
    given_out: Instant,
}

#[derive(Default)]
struct Seen {
    fetching: bool,
    fetches: Vec<Instant>,
    issued: BTreeMap<usize, Issued>,
    /// The value of each generation that a call got.
    generations: BTreeMap<u64, usize>,
    rejections: Vec<(Instant, usize)>,
}

#[derive(Clone)]
struct Issuer {
    script: Arc<Vec<Fetch>>,
    seen: Arc<Mutex<Seen>>,
}

impl Issuer {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

/// Ends a fetch, also one that is dropped.
struct Fetching(Issuer);

impl Drop for Fetching {
    fn drop(&mut self) {
        self.0.seen().fetching = false;
    }
}

impl Refresh for Issuer {
    type Value = usize;

    async fn refresh(&mut self) -> Result<Fetched<usize>, FetchError> {
        let began = Instant::now();
        let number = {
            let mut seen = self.seen();
            assert!(!seen.fetching, "two fetches at a time");
            seen.fetching = true;
            seen.fetches.push(began);
            seen.fetches.len()
        };
        let _fetching = Fetching(self.clone());
        let fetch = self.script[number % self.script.len()].clone();
        sleep(fetch.takes).await;
        let Some(lifetime) = fetch.lifetime else {
            return Err(if fetch.rejects {
                FetchError {
                    rejected_by: Some((crate::credentials::Issuer::Identity, 401)),
                    wait: Duration::from_secs(30),
                    cause: "401".to_owned(),
                }
            } else {
                FetchError::unavailable("down")
            });
        };
        let given_out = Instant::now();
        let usable_until = given_out + lifetime - LAST_USE_BEFORE_END.min(lifetime / 10);
        let issued = Issued {
            began,
            usable_until,
            given_out,
        };
        self.seen().issued.insert(number, issued);
        Ok(Fetched {
            value: number,
            lifetime: Some(lifetime),
        })
    }
}

impl Seen {
    fn got(&mut self, value: usize, generation: u64, newest_before: Option<u64>) {
        assert!(
            newest_before.is_none_or(|newest| generation >= newest),
            "an older one came back"
        );
        assert_eq!(*self.generations.entry(generation).or_insert(value), value);
        assert!(
            self.generations.values().is_sorted(),
            "{:?}",
            self.generations
        );
        assert!(
            Instant::now() < self.issued[&value].usable_until,
            "given out after its end"
        );
    }

    /// A failure is returned only if the last value has ended, or has been rejected and is not kept.
    fn got_none(&self, on_rejection: OnRejection) {
        let now = Instant::now();
        let Some((number, issued)) = self.issued.last_key_value() else {
            return;
        };
        // The cache may have discarded a value if another was rejected during its fetch.
        let during = |at: &Instant| (issued.began..=issued.given_out).contains(at);
        let discarded = self.rejections.iter().any(|(at, _)| during(at));
        let rejected = self.rejections.iter().any(|(_, value)| value == number);
        let replaces = matches!(on_rejection, OnRejection::Replace { .. });
        assert!(
            now >= issued.usable_until
                || now <= issued.given_out
                || (replaces && (discarded || rejected)),
            "a failure although {number} is good"
        );
    }
}

async fn run(cache: Arc<Cache<usize>>, issuer: Issuer, call: Call, on_rejection: OnRejection) {
    sleep(call.begins).await;
    let soon = Deadline::after(Duration::from_secs(60));
    let newest = || issuer.seen().generations.keys().next_back().copied();
    let newest_before = newest();
    let (value, used) = match timeout(call.patience, cache.current(soon)).await {
        Err(_) | Ok(Err(Error::DeadlineExceeded)) => return,
        Ok(Err(_)) => return issuer.seen().got_none(on_rejection),
        Ok(Ok(found)) => found,
    };
    issuer.seen().got(value, used, newest_before);
    sleep(call.patience / 2).await;
    let reject = || issuer.seen().rejections.push((Instant::now(), value));
    match call.report {
        Report::Nothing => {}
        Report::Rejected => {
            reject();
            cache.rejected(|known| *known == value);
        }
        Report::Refresh => {
            let newest_before = newest();
            reject();
            match timeout(call.patience, cache.refresh(used, soon)).await {
                Ok(Ok(Some((newer, generation)))) => {
                    assert!(generation > used);
                    issuer.seen().got(newer, generation, newest_before);
                }
                Ok(Err(Error::Unavailable { .. } | Error::Rejected { .. })) => {
                    issuer.seen().got_none(on_rejection);
                }
                _ => {}
            }
        }
    }
}

fn millis(most: u64) -> impl Strategy<Value = Duration> {
    (0..=most).prop_map(Duration::from_millis)
}

fn fetch() -> impl Strategy<Value = Fetch> {
    let takes = prop_oneof![6 => millis(2_000), 1 => millis(15_000)];
    let lifetime = prop_oneof![
        2 => Just(None),
        2 => (1..5_000u64).prop_map(Some),
        2 => (1_000..900_000u64).prop_map(Some),
    ];
    (takes, lifetime, any::<bool>()).prop_map(|(takes, lifetime, rejects)| Fetch {
        takes,
        lifetime: lifetime.map(Duration::from_millis),
        rejects,
    })
}

fn call() -> impl Strategy<Value = Call> {
    let report = prop_oneof![
        3 => Just(Report::Nothing),
        1 => Just(Report::Refresh),
        1 => Just(Report::Rejected),
    ];
    (millis(120_000), millis(12_000), report).prop_map(|(begins, patience, report)| Call {
        begins,
        patience,
        report,
    })
}

fn on_rejection() -> impl Strategy<Value = OnRejection> {
    let spacing = Duration::from_secs(2);
    prop_oneof![
        Just(OnRejection::Replace { spacing }),
        Just(OnRejection::Keep { spacing }),
        Just(OnRejection::Recheck),
    ]
}

proptest! {
    #[test]
    fn one_fetch_at_a_time_no_older_value_after_a_newer_and_no_failure_while_one_is_good(
        script in prop::collection::vec(fetch(), 1..12),
        calls in prop::collection::vec(call(), 1..60),
        on_rejection in on_rejection(),
        jitter: u64,
    ) {
        fastrand::seed(jitter);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let issuer = Issuer { script: Arc::new(script), seen: Arc::default() };
            let ready = Arc::new(watch::Sender::new(false));
            let cache = Cache::start("test", issuer.clone(), on_rejection, ready, Metrics::new());
            let cache = Arc::new(cache);

            let runs = calls
                .into_iter()
                .map(|call| run(cache.clone(), issuer.clone(), call, on_rejection));
            runs.collect::<JoinSet<_>>().join_all().await;

            let seen = issuer.seen();
            for pair in seen.fetches.windows(2) {
                let rejected = seen.rejections.iter().any(|(at, _)| (pair[0]..=pair[1]).contains(at));
                assert!(rejected || pair[1] - pair[0] >= SHORTEST_PAUSE, "fetches on each other's heels");
            }
        });
    }
}
