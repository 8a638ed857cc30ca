use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use tokio::{sync::Notify, time::sleep_until};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);
const REJECTED: TokenEvidence = TokenEvidence::Rejected;
const UNCLEAR: TokenEvidence = TokenEvidence::Unclear;

type Outcome = Result<Fetched<usize>, FetchError>;

/// An issuer whose n-th reply (from 1) comes from a script, after a delay.
#[derive(Clone)]
struct Issuer {
    fetches: Arc<AtomicUsize>,
    /// Points in time at which fetches began.
    times: Arc<Mutex<Vec<Instant>>>,
    delay: Duration,
    reply: fn(usize) -> Outcome,
    replaced: Arc<Notify>,
}

impl Refresh for Issuer {
    type Value = usize;

    async fn refresh(&mut self) -> Outcome {
        let nth = self.fetches.fetch_add(1, SeqCst) + 1;
        self.times.lock().unwrap().push(Instant::now());
        sleep(self.delay).await;
        (self.reply)(nth)
    }

    async fn changed(&mut self) {
        self.replaced.notified().await;
    }
}

fn issuer(reply: fn(usize) -> Outcome) -> Issuer {
    Issuer {
        fetches: Arc::default(),
        times: Arc::default(),
        delay: SECOND,
        reply,
        replaced: Arc::default(),
    }
}

impl Issuer {
    fn start(&self) -> Arc<Cache<usize>> {
        self.start_with(OnRejection::Fetch {
            spacing: 10 * SECOND,
        })
    }

    fn start_with(&self, on_rejection: OnRejection) -> Arc<Cache<usize>> {
        let latest = watch::Sender::new(None);
        let metrics = Metrics::new();
        Arc::new(Cache::start(
            "test",
            self.clone(),
            on_rejection,
            latest,
            metrics,
        ))
    }

    fn fetches(&self) -> usize {
        self.fetches.load(SeqCst)
    }
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the signature of an issuer's reply"
)]
fn good(value: usize) -> Outcome {
    Ok(Fetched {
        value,
        lifetime: Some(24 * HOUR),
    })
}

fn down() -> Outcome {
    Err(FetchError::unavailable("down"))
}

fn rejected() -> Outcome {
    Err(FetchError {
        rejected_by: Some((super::Issuer::Identity, 401)),
        wait: 900 * SECOND,
        cause: "401".to_owned(),
    })
}

fn soon() -> Deadline {
    Deadline::after(30 * SECOND)
}

#[tokio::test(start_paused = true)]
async fn a_thousand_cold_calls_cause_one_fetch_and_each_waits_within_its_own_deadline() {
    let issuer = issuer(good);
    let cache = issuer.start();
    let calls: Vec<_> = (0..1000)
        .map(|index| {
            let cache = cache.clone();
            let patience = if index % 2 == 0 { 30 } else { 0 };
            let deadline = Deadline::after(patience * SECOND + SECOND / 2);
            tokio::spawn(async move { cache.current(deadline).await })
        })
        .collect();

    for (index, call) in calls.into_iter().enumerate() {
        let expected = if index % 2 == 0 {
            Ok((1, 1))
        } else {
            Err(Error::DeadlineExceeded)
        };
        assert_eq!(call.await.unwrap(), expected, "call {index}");
    }

    assert_eq!(issuer.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_fetch_survives_the_call_that_waited_for_it() {
    let issuer = issuer(good);
    let cache = issuer.start();

    let first = tokio::spawn({
        let cache = cache.clone();
        async move { cache.current(soon()).await }
    });
    sleep(SECOND / 2).await;
    first.abort();

    assert_eq!(cache.current(soon()).await, Ok((1, 1)));
    assert_eq!(issuer.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_rejections_of_one_value_cause_one_fetch_and_all_get_the_new_value() {
    let issuer = issuer(good);
    let cache = issuer.start();
    let (_, used) = cache.current(soon()).await.unwrap();

    let calls: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.refresh(used, REJECTED, soon()).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(Some((2, 2))));
    }

    assert_eq!(issuer.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_rejection_during_a_fetch_that_is_longer_than_the_spacing_causes_no_other() {
    let issuer = Issuer {
        delay: 8 * SECOND,
        ..issuer(good)
    };
    let cache = issuer.start_with(OnRejection::Fetch {
        spacing: 2 * SECOND,
    });
    let (_, used) = cache.current(soon()).await.unwrap();

    let (first, second) = tokio::join!(cache.refresh(used, REJECTED, soon()), async {
        sleep(3 * SECOND).await;
        cache.refresh(used, REJECTED, soon()).await
    });

    assert_eq!((first, second), (Ok(Some((2, 2))), Ok(Some((2, 2)))));
    assert_eq!(issuer.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_straggler_gets_the_newer_value_without_a_fetch() {
    let issuer = issuer(good);
    let cache = issuer.start();
    let (_, used) = cache.current(soon()).await.unwrap();
    cache.refresh(used, REJECTED, soon()).await.unwrap();
    sleep(HOUR).await;

    let straggler = cache.refresh(used, REJECTED, soon()).await;

    assert_eq!(straggler, Ok(Some((2, 2))));
    assert_eq!(issuer.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_began_before_a_rejection_is_discarded_and_repeated() {
    let issuer = Issuer {
        delay: 8 * SECOND,
        ..issuer(good)
    };
    let cache = issuer.start();
    let (_, used) = cache.current(soon()).await.unwrap();
    timeout(24 * HOUR, async {
        while issuer.fetches() < 2 {
            sleep(SECOND).await;
        }
    })
    .await
    .expect("the value is replaced before its end");

    let newer = cache.refresh(used, REJECTED, soon()).await;

    assert_eq!(newer, Ok(Some((3, 2))), "the second fetch's value is gone");
    assert_eq!(issuer.fetches(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_began_after_a_rejection_is_used_even_if_an_unclear_one_follows_during_it() {
    let issuer = Issuer {
        delay: 8 * SECOND,
        ..issuer(|nth| if nth < 4 { good(nth) } else { rejected() })
    };
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();
    let newer = cache.refresh(1, UNCLEAR, soon()).await;
    assert_eq!(newer, Ok(Some((2, 2))));
    let too_soon = cache.refresh(2, REJECTED, soon()).await;
    assert_eq!(too_soon, Ok(None), "the spacing is ten seconds");
    sleep(SECOND).await;
    issuer.replaced.notify_one();
    sleep(2 * SECOND).await;

    let newer = cache.refresh(2, UNCLEAR, soon()).await;

    assert_eq!(newer, Ok(Some((3, 3))));
    assert_eq!(issuer.fetches(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_rejects_every_value_does_not_cause_a_fetch_for_each_call() {
    let issuer = issuer(good);
    let cache = issuer.start();
    let mut nothing_newer = 0;

    let (_, mut used) = cache.current(soon()).await.unwrap();
    for _ in 0..100 {
        match cache.refresh(used, REJECTED, soon()).await.unwrap() {
            Some((_, newer)) => used = newer,
            None => nothing_newer += 1,
        }
        sleep(SECOND / 10).await;
    }

    assert!(issuer.fetches() <= 3, "{} fetches", issuer.fetches());
    assert!(nothing_newer >= 98, "{nothing_newer}");
}

#[tokio::test(start_paused = true)]
async fn while_the_successor_is_fetched_the_rejected_call_waits_and_all_others_use_the_value() {
    for evidence in [REJECTED, UNCLEAR] {
        let issuer = issuer(good);
        let cache = issuer.start();
        cache.current(soon()).await.unwrap();

        let (newer, others) = tokio::join!(cache.refresh(1, evidence, soon()), async {
            sleep(SECOND / 2).await;
            cache.current(Deadline::after(Duration::ZERO)).await
        });

        assert_eq!(others, Ok((1, 1)), "{evidence:?}");
        assert_eq!(newer, Ok(Some((2, 2))), "{evidence:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unclear_rejection_of_a_value_that_was_accepted_in_the_last_minute_causes_no_fetch() {
    for (pause, evidence, fetches) in [
        (60 * SECOND - SECOND / 1000, UNCLEAR, 1),
        (60 * SECOND, UNCLEAR, 2),
        (SECOND, REJECTED, 2),
    ] {
        let issuer = issuer(good);
        let cache = issuer.start();
        cache.current(soon()).await.unwrap();
        cache.accepted(1, Instant::now());
        sleep(pause).await;

        let newer = cache.refresh(1, evidence, soon()).await;

        assert_eq!(
            newer.unwrap().is_some(),
            fetches == 2,
            "{pause:?} {evidence:?}"
        );
        assert_eq!(issuer.fetches(), fetches, "{pause:?} {evidence:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_success_with_the_previous_value_does_not_prove_its_successor() {
    let issuer = issuer(good);
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();
    cache.refresh(1, REJECTED, soon()).await.unwrap();
    cache.accepted(1, Instant::now());
    sleep(10 * SECOND).await;

    assert_eq!(cache.refresh(2, UNCLEAR, soon()).await, Ok(Some((3, 3))));
}

#[tokio::test(start_paused = true)]
async fn if_the_fetch_fails_a_value_stays_in_use_unless_upstream_and_issuer_both_reject_us() {
    let unavailable = |nth| if nth == 1 { good(1) } else { down() };
    let issuer_rejects = |nth| if nth == 1 { good(1) } else { rejected() };
    // Then: a call was accepted a second before the rejection; a call was accepted after it; the value stays in use.
    type Case = (fn(usize) -> Outcome, TokenEvidence, bool, bool, bool);
    let cases: [Case; 7] = [
        (unavailable, REJECTED, false, false, true),
        (unavailable, UNCLEAR, false, false, true),
        (issuer_rejects, UNCLEAR, false, false, true),
        (issuer_rejects, REJECTED, false, false, false),
        (issuer_rejects, REJECTED, true, false, true),
        (issuer_rejects, REJECTED, false, true, true),
        (issuer_rejects, UNCLEAR, true, true, true),
    ];

    for (index, (reply, evidence, before, after, in_use)) in cases.into_iter().enumerate() {
        let issuer = issuer(reply);
        let cache = issuer.start();
        cache.current(soon()).await.unwrap();
        if before {
            cache.accepted(1, Instant::now());
        }
        sleep(SECOND).await;

        let (newer, ()) = tokio::join!(cache.refresh(1, evidence, soon()), async {
            sleep(SECOND / 2).await;
            if after {
                cache.accepted(1, Instant::now());
            }
        });

        let is_suspect = evidence == REJECTED && !after;
        assert_eq!(newer.is_err(), is_suspect, "{index}: {newer:?}");
        assert!(!matches!(newer, Ok(Some(_))), "{index}: {newer:?}");
        let later = cache.current(soon()).await;
        assert_eq!(later.is_ok(), in_use, "{index}: {later:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_that_upstream_and_issuer_reject_is_withheld_a_minute_after_its_last_success() {
    let issuer = issuer(|nth| if nth == 1 { good(1) } else { rejected() });
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();
    cache.accepted(1, Instant::now());
    cache.refresh(1, REJECTED, soon()).await.unwrap_err();
    assert_eq!(cache.current(soon()).await, Ok((1, 1)));

    sleep(60 * SECOND).await;
    assert!(matches!(
        cache.current(soon()).await,
        Err(Error::Rejected { .. })
    ));

    // The reply to an attempt that was sent before.
    cache.accepted(1, Instant::now());
    assert_eq!(cache.current(soon()).await, Ok((1, 1)));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_does_not_wait_for_an_issuer_that_has_failed() {
    let issuer = issuer(|nth| match nth {
        1 => good(1),
        2 => Err(FetchError {
            wait: 120 * SECOND,
            ..FetchError::unavailable("429")
        }),
        _ => good(nth),
    });
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();
    cache.refresh(1, UNCLEAR, soon()).await.unwrap();

    let begun = Instant::now();
    assert_eq!(cache.refresh(1, UNCLEAR, soon()).await, Ok(None));
    let suspect = cache.refresh(1, REJECTED, soon()).await;

    assert!(
        matches!(suspect, Err(Error::Unavailable { .. })),
        "{suspect:?}"
    );
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(issuer.fetches(), 2);
    sleep(122 * SECOND).await;
    assert_eq!(cache.current(soon()).await, Ok((3, 2)));
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_began_before_a_rejection_is_used_if_a_success_came_after_the_rejection() {
    let issuer = Issuer {
        delay: 8 * SECOND,
        ..issuer(good)
    };
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();
    issuer.replaced.notify_one();
    sleep(SECOND).await;

    let (newer, ()) = tokio::join!(cache.refresh(1, REJECTED, soon()), async {
        sleep(SECOND).await;
        cache.accepted(1, Instant::now());
    });

    assert_eq!(newer, Ok(Some((2, 2))));
    sleep(HOUR).await;
    assert_eq!(issuer.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_value_stays_in_use_during_the_one_fetch_that_replaces_it() {
    let issuer = issuer(good);
    let cache = issuer.start_with(OnRejection::Fetch {
        spacing: 300 * SECOND,
    });
    cache.current(soon()).await.unwrap();

    for _ in 0..10 {
        cache.rejected(|value| *value == 1);
        assert_eq!(cache.current(soon()).await, Ok((1, 1)));
    }
    sleep(2 * SECOND).await;
    assert_eq!(cache.current(soon()).await, Ok((2, 2)));

    cache.rejected(|value| *value == 1);
    cache.rejected(|value| *value == 2);
    sleep(2 * SECOND).await;
    assert_eq!(issuer.fetches(), 2, "a straggler, and a rejection too soon");
}

#[tokio::test(start_paused = true)]
async fn a_value_is_replaced_in_the_background_at_75_to_85_per_cent_of_its_life() {
    let issuer = issuer(good);
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();

    sleep(24 * HOUR).await;

    let times = issuer.times.lock().unwrap().clone();
    let waited = (times[1] - times[0] - SECOND).as_secs_f64() / (24 * HOUR).as_secs_f64();
    assert!((0.75..=0.8501).contains(&waited), "{waited}");
    assert_eq!(
        cache.current(Deadline::after(Duration::ZERO)).await,
        Ok((2, 2))
    );
}

#[tokio::test(start_paused = true)]
async fn a_value_that_is_still_good_hides_failures_and_its_end_shows_them() {
    let issuer = issuer(|nth| if nth == 1 { good(1) } else { down() });
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();

    sleep(24 * HOUR - 62 * SECOND).await;
    assert_eq!(cache.current(soon()).await, Ok((1, 1)));
    assert!(issuer.fetches() > 60, "it keeps trying");

    sleep(3 * SECOND).await;
    assert!(matches!(
        cache.current(soon()).await,
        Err(Error::Unavailable { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_value_is_used_until_just_before_the_last_minute_of_its_life() {
    let issuer = issuer(|nth| if nth == 1 { good(1) } else { down() });
    let cache = issuer.start();
    let now = Deadline::after(Duration::ZERO);
    cache.current(soon()).await.unwrap();
    let ends = Instant::now() + 24 * HOUR - 60 * SECOND;

    sleep_until(ends - SECOND / 1000).await;
    let just_before = cache.current(now).await;
    sleep_until(ends).await;
    let at_that_moment = cache.current(now).await;

    assert_eq!(just_before, Ok((1, 1)));
    assert!(matches!(at_that_moment, Err(Error::Unavailable { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_after_the_spacing_causes_a_fetch_and_one_within_it_does_not() {
    for (wait, fetches) in [(10 * SECOND - SECOND / 1000, 2), (10 * SECOND, 3)] {
        let issuer = issuer(good);
        let cache = issuer.start_with(OnRejection::Fetch {
            spacing: 10 * SECOND,
        });
        cache.current(soon()).await.unwrap();

        cache.rejected(|_| true);
        sleep(wait).await;
        cache.rejected(|_| true);
        sleep(SECOND).await;

        assert_eq!(issuer.fetches(), fetches, "{wait:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_value_a_failure_is_returned_at_once_with_the_time_of_the_next_fetch() {
    let issuer = issuer(|_| {
        Err(FetchError {
            wait: 120 * SECOND,
            ..FetchError::unavailable("429")
        })
    });
    let cache = issuer.start();

    let first = cache.current(soon()).await;
    sleep(20 * SECOND).await;
    let second = cache.current(Deadline::after(Duration::ZERO)).await;

    let unavailable = |seconds| {
        Err(Error::Unavailable {
            retry_after: seconds * SECOND,
        })
    };
    assert_eq!(first, unavailable(120));
    assert_eq!(second, unavailable(100));
    assert_eq!(issuer.fetches(), 1, "the issuer's wait is everybody's");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_without_a_reply_ends_after_ten_seconds() {
    let issuer = Issuer {
        delay: HOUR,
        ..issuer(good)
    };
    let cache = issuer.start();
    let began = Instant::now();

    let outcome = cache.current(soon()).await;

    assert!(matches!(outcome, Err(Error::Unavailable { .. })));
    assert_eq!(began.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn after_a_rejection_by_the_issuer_it_is_not_asked_for_fifteen_minutes() {
    let issuer = issuer(|nth| if nth == 1 { good(1) } else { rejected() });
    let cache = issuer.start();
    let (_, used) = cache.current(soon()).await.unwrap();

    let error = cache.refresh(used, REJECTED, soon()).await.unwrap_err();
    for _ in 0..10 {
        cache.refresh(used, REJECTED, soon()).await.unwrap_err();
        sleep(30 * SECOND).await;
    }

    assert_eq!(
        error,
        Error::Rejected {
            issuer: super::Issuer::Identity,
            http_status: 401
        }
    );
    assert_eq!(issuer.fetches(), 2);
    sleep(610 * SECOND).await;
    assert_eq!(issuer.fetches(), 3, "then once per fifteen minutes");
}

#[tokio::test(start_paused = true)]
async fn a_changed_source_is_asked_again_at_once_after_a_rejection() {
    let issuer = issuer(|nth| if nth == 1 { rejected() } else { good(nth) });
    let cache = issuer.start();
    cache.current(soon()).await.unwrap_err();

    issuer.replaced.notify_one();
    sleep(2 * SECOND).await;

    assert_eq!(cache.current(soon()).await, Ok((2, 1)));
}

#[tokio::test(start_paused = true)]
async fn each_new_value_is_sent_to_those_who_follow() {
    let issuer = issuer(|nth| if nth < 3 { down() } else { good(nth) });
    let (latest, mut followed) = watch::channel(None);
    let on_rejection = OnRejection::Fetch { spacing: SECOND };
    let cache = Cache::start("test", issuer.clone(), on_rejection, latest, Metrics::new());
    cache.current(soon()).await.unwrap_err();
    assert_eq!(*followed.borrow(), None);

    followed.changed().await.unwrap();

    assert_eq!(*followed.borrow_and_update(), Some(3));
    assert_eq!(issuer.fetches(), 3);
    cache.refresh(1, REJECTED, soon()).await.unwrap();
    assert_eq!(*followed.borrow_and_update(), Some(4));
    drop(cache);
    assert!(followed.changed().await.is_err(), "the refresher has ended");
}

#[tokio::test(start_paused = true)]
async fn a_changed_source_is_asked_again_while_its_value_is_good() {
    let issuer = issuer(good);
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();

    issuer.replaced.notify_one();
    sleep(2 * SECOND).await;

    assert_eq!(cache.current(soon()).await, Ok((2, 2)));
}

#[tokio::test(start_paused = true)]
async fn fetching_an_equal_value_makes_no_new_generation() {
    let issuer = issuer(|_| good(7));
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();

    sleep(24 * HOUR).await;

    assert_eq!(issuer.fetches(), 2);
    assert_eq!(cache.current(soon()).await, Ok((7, 1)));
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the signature of an issuer's reply"
)]
fn endless(value: usize) -> Outcome {
    Ok(Fetched {
        value,
        lifetime: None,
    })
}

#[tokio::test(start_paused = true)]
async fn a_value_without_an_end_is_used_forever_and_not_fetched_again() {
    let issuer = issuer(endless);
    let cache = issuer.start();
    cache.current(soon()).await.unwrap();

    sleep(10 * 365 * 24 * HOUR).await;

    assert_eq!(
        cache.current(Deadline::after(Duration::ZERO)).await,
        Ok((1, 1))
    );
    assert_eq!(issuer.fetches(), 1);
}

#[tokio::test(start_paused = true)]
async fn with_recheck_rejected_calls_wait_for_the_source_and_all_others_use_the_value() {
    let issuer = issuer(endless);
    let cache = issuer.start_with(OnRejection::Recheck);
    cache.current(soon()).await.unwrap();

    let calls: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.refresh(1, REJECTED, soon()).await })
        })
        .collect();
    sleep(SECOND / 2).await;
    let meanwhile = cache.current(Deadline::after(Duration::ZERO)).await;

    assert_eq!(meanwhile, Ok((1, 1)));
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(Some((2, 2))));
    }
    assert_eq!(
        cache.refresh(1, REJECTED, soon()).await,
        Ok(Some((2, 2))),
        "a straggler"
    );
    assert_eq!(issuer.fetches(), 2);
}

#[tokio::test(start_paused = true)]
async fn with_recheck_each_rejection_asks_the_source_and_a_failure_keeps_the_value() {
    let issuer = issuer(|nth| match nth {
        1 | 2 => endless(1),
        3 | 4 => down(),
        _ => endless(nth),
    });
    let cache = issuer.start_with(OnRejection::Recheck);
    cache.current(soon()).await.unwrap();

    assert_eq!(
        cache.refresh(1, REJECTED, soon()).await,
        Ok(None),
        "nothing newer"
    );
    assert_eq!(
        cache.refresh(1, REJECTED, soon()).await,
        Ok(None),
        "the source is down"
    );
    assert_eq!(cache.current(soon()).await, Ok((1, 1)));
    assert_eq!(
        cache.refresh(1, REJECTED, soon()).await,
        Ok(None),
        "still down"
    );
    let begun = Instant::now();
    assert_eq!(cache.refresh(1, REJECTED, soon()).await, Ok(Some((5, 2))));

    assert_eq!(begun.elapsed(), SECOND, "a rejection ends the backoff");
    assert_eq!(issuer.fetches(), 5);
}

#[tokio::test(start_paused = true)]
async fn with_recheck_a_new_value_is_published_although_the_old_one_is_rejected_meanwhile() {
    let issuer = issuer(endless);
    let cache = issuer.start_with(OnRejection::Recheck);
    cache.current(soon()).await.unwrap();

    for _ in 0..10 {
        cache.rejected(|_| true);
        sleep(SECOND / 4).await;
    }

    let (value, generation) = cache.current(soon()).await.unwrap();
    assert!(generation >= 2, "{value} {generation}");
}

#[tokio::test(start_paused = true)]
async fn the_metric_of_the_expiry_is_the_end_of_the_life_by_our_clock() {
    let metrics = Metrics::new();
    let latest = watch::Sender::new(None);
    let on_rejection = OnRejection::Fetch { spacing: SECOND };
    let now = server_time::our_clock();
    let cache = Cache::start("test", issuer(good), on_rejection, latest, metrics.clone());

    cache.current(soon()).await.unwrap();

    let text = metrics.encode();
    let expiry: f64 = text
        .lines()
        .find_map(|line| line.strip_prefix("rds_credential_expiry_timestamp_seconds "))
        .and_then(|value| value.parse().ok())
        .unwrap();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    let left = expiry - now.as_secs_f64();
    assert!((86_400.0..86_500.0).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn dropping_the_cache_ends_its_refresher() {
    let issuer = issuer(|_| down());
    drop(issuer.start());

    sleep(HOUR).await;

    assert_eq!(issuer.fetches(), 0);
}

#[test]
fn backoff_is_a_random_part_of_a_time_that_doubles_up_to_a_minute() {
    let bounds = [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (40, 60)];

    for (failures, seconds) in bounds {
        let waits: Vec<_> = (0..1000)
            .map(|_| backoff(failures, Issuer::MAX_BACKOFF))
            .collect();
        let (shortest, longest) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());

        assert!(*shortest >= SHORTEST_PAUSE, "{failures}");
        assert!(*shortest < seconds * SECOND / 2, "{failures}");
        assert!(*longest <= seconds * SECOND, "{failures}");
        assert!(*longest > seconds * SECOND / 2, "{failures}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_panics_is_restarted_and_calls_get_the_next_value() {
    let issuer = issuer(|nth| match nth {
        1 | 2 => panic!("a bug"),
        _ => good(nth),
    });
    let cache = issuer.start();

    let begun = Instant::now();
    let without = cache.current(soon()).await;
    let waited = begun.elapsed();
    sleep(5 * SECOND).await;

    assert!(
        matches!(without, Err(Error::Unavailable { .. })),
        "{without:?}"
    );
    assert!(waited < 3 * SECOND, "{waited:?}");
    assert_eq!(cache.current(soon()).await, Ok((3, 1)));
    assert_eq!(issuer.fetches(), 3);
}
