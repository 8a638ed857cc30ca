//! Calls that come, wait, leave and report successes and rejections at random, while an issuer replies, fails and stalls at random.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use proptest::prelude::*;
use tokio::task::JoinSet;

use super::*;

/// The outcome of one fetch.
#[derive(Debug, Clone)]
struct Fetch {
    takes: Duration,
    /// How long the value lives; `None` for a failure.
    lifetime: Option<Duration>,
    rejects: bool,
}

/// The behaviour of one call.
#[derive(Debug, Clone)]
struct Call {
    begins: Duration,
    /// It is cancelled after this time.
    patience: Duration,
    /// Its report about the value it got.
    report: Report,
}

#[derive(Debug, Clone, Copy)]
enum Report {
    Nothing,
    Accepted,
    Refresh(TokenEvidence),
    Rejected,
}

/// A value from the issuer.
#[derive(Debug, Clone)]
struct Issued {
    began: Instant,
    usable_until: Instant,
    fetched_at: Instant,
}

#[derive(Default)]
struct Seen {
    fetching: bool,
    fetches: Vec<Instant>,
    issued: BTreeMap<usize, Issued>,
    /// The value of each generation that a call got.
    generations: BTreeMap<u64, usize>,
    /// Whether the last fetch failed because the issuer rejected us.
    rejected_by_issuer: bool,
    rejections: Vec<(Instant, usize, TokenEvidence)>,
    /// When the accepted attempts were sent.
    successes: Vec<(Instant, usize)>,
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
        self.seen().rejected_by_issuer = fetch.lifetime.is_none() && fetch.rejects;
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
        let fetched_at = Instant::now();
        let usable_until = fetched_at + lifetime - LAST_USE_BEFORE_END.min(lifetime / 10);
        let issued = Issued {
            began,
            usable_until,
            fetched_at,
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
            "used after its end"
        );
    }

    /// Whether a call must get a value: the last one has not ended, was not discarded, and is not rejected on both sides.
    fn has_good_value(&self, on_rejection: OnRejection) -> bool {
        self.has_trusted_value(on_rejection)
            || (self.has_value(on_rejection) && !self.is_withheld())
    }

    fn has_value(&self, on_rejection: OnRejection) -> bool {
        let now = Instant::now();
        let Some((_, issued)) = self.issued.last_key_value() else {
            return false;
        };
        let is_fetched = matches!(on_rejection, OnRejection::Fetch { .. });
        // The cache discards a value if the one before was rejected during its fetch.
        let was_discarded = self.rejections.iter().any(|(at, _, evidence)| {
            (issued.began..=issued.fetched_at).contains(at) && *evidence == TokenEvidence::Rejected
        });
        issued.fetched_at < now && now < issued.usable_until && !(is_fetched && was_discarded)
    }

    /// Like [`Self::has_value`], and upstream has not rejected the value, or accepted it since.
    fn has_trusted_value(&self, on_rejection: OnRejection) -> bool {
        let last = self.issued.keys().next_back().copied();
        let last_success = self
            .successes
            .iter()
            .filter(|(_, value)| Some(*value) == last);
        let last_success = last_success.map(|(at, _)| *at).max();
        let is_suspect = self.rejections.iter().any(|(at, value, evidence)| {
            Some(*value) == last
                && *evidence == TokenEvidence::Rejected
                && last_success.is_none_or(|success| success <= *at)
        });
        self.has_value(on_rejection)
            && (matches!(on_rejection, OnRejection::Recheck) || !is_suspect)
    }

    fn is_withheld(&self) -> bool {
        let last = self.issued.keys().next_back().copied();
        let is_recent = |at: &Instant| at.elapsed() < PROOF_LASTS;
        let mut successes = self.successes.iter();
        self.rejected_by_issuer
            && !successes.any(|(at, value)| Some(*value) == last && is_recent(at))
    }
}

async fn run(cache: Arc<Cache<usize>>, issuer: Issuer, call: Call, on_rejection: OnRejection) {
    sleep(call.begins).await;
    let soon = Deadline::after(Duration::from_secs(60));
    let newest = || issuer.seen().generations.keys().next_back().copied();
    let newest_before = newest();
    let begun = Instant::now();
    let had_good_value = issuer.seen().has_good_value(on_rejection);
    let found = timeout(call.patience, cache.current(soon)).await;
    let waited = begun.elapsed();
    assert!(!had_good_value || waited.is_zero(), "waited {waited:?}");
    let (value, used) = match found {
        Err(_) | Ok(Err(Error::DeadlineExceeded)) => return,
        Ok(Err(error)) => {
            let is_good = issuer.seen().has_good_value(on_rejection);
            assert!(!is_good, "{error} although the value is good");
            return;
        }
        Ok(Ok(found)) => found,
    };
    issuer.seen().got(value, used, newest_before);
    let sent_at = Instant::now();
    sleep(call.patience / 2).await;
    let reject = |evidence| {
        let rejection = (Instant::now(), value, evidence);
        issuer.seen().rejections.push(rejection);
    };
    match call.report {
        Report::Nothing => {}
        Report::Accepted => {
            issuer.seen().successes.push((sent_at, value));
            cache.accepted(used, sent_at);
        }
        Report::Rejected => {
            reject(TokenEvidence::Unclear);
            cache.rejected(|known| *known == value);
        }
        Report::Refresh(evidence) => {
            let newest_before = newest();
            reject(evidence);
            match timeout(call.patience, cache.refresh(used, evidence, soon)).await {
                Ok(Ok(Some((newer, generation)))) => {
                    assert!(generation > used);
                    issuer.seen().got(newer, generation, newest_before);
                }
                Ok(Err(error @ (Error::Unavailable { .. } | Error::Rejected { .. }))) => {
                    let is_trusted = issuer.seen().has_trusted_value(on_rejection);
                    assert!(!is_trusted, "{error} although the value is good");
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
        2 => Just(Report::Accepted),
        1 => Just(Report::Refresh(TokenEvidence::Rejected)),
        1 => Just(Report::Refresh(TokenEvidence::Unclear)),
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
        Just(OnRejection::Fetch { spacing }),
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
            let latest = watch::Sender::new(None);
            let cache = Cache::start("test", issuer.clone(), on_rejection, latest, Metrics::new());
            let cache = Arc::new(cache);

            let runs = calls
                .into_iter()
                .map(|call| run(cache.clone(), issuer.clone(), call, on_rejection));
            runs.collect::<JoinSet<_>>().join_all().await;

            let seen = issuer.seen();
            for pair in seen.fetches.windows(2) {
                let rejected = seen.rejections.iter().any(|(at, ..)| (pair[0]..=pair[1]).contains(at));
                assert!(rejected || pair[1] - pair[0] >= SHORTEST_PAUSE, "two fetches without a pause");
            }
        });
    }
}
