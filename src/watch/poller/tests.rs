use std::time::UNIX_EPOCH;

use http::HeaderValue;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use super::*;
use crate::{
    coalescer::Coalescer,
    credentials::{Credentials, Identity, Source, Token},
    http_client::{self, SystemRoots},
    options::defaults,
    pb::{GetTaskDetailResponse, SubTask},
    quota_store::scripted::{self, Scripted, reply},
    task::Task,
    telemetry::metrics::Metrics,
    test_support::{
        upstream::{Gate, Step, Upstream, gated_example},
        wait::eventually,
    },
    upstream::{Endpoint, Pacing, RateConfig, TaskQuery, rejection},
    watch::{Options, Subscription, Watcher},
};

const INTERVAL: Duration = Duration::from_secs(10);

const CALLER: Caller = Caller::Connection(1);

fn http() -> http_client::Config {
    http_client::Config {
        tls: http_client::tls_config(SystemRoots::Ignored, None).unwrap(),
        proxy: None,
        connect_timeout: INTERVAL,
    }
}

/// A poller with a watcher, whose results the test passes in.
fn poller(resumes: bool) -> (Poller, Subscription) {
    poller_of("http://127.0.0.1:1", resumes)
}

/// The same, with RDS at this URL.
fn poller_of(url: &str, resumes: bool) -> (Poller, Subscription) {
    let metrics = Metrics::new();
    let url = Url::parse(url).unwrap();
    let http = http();
    let token = HeaderValue::from_static("t");
    let source = Source::Token(token.clone());
    let credentials = Credentials::start(source, None, &http, Arc::clone(&metrics)).unwrap();
    let lookups = Lookups {
        upstream: upstream::Client::new(
            http_client::Client::new(&http, &url, 1).unwrap(),
            Endpoint::new(url, defaults(), Arc::clone(&metrics)),
            credentials.clone(),
        ),
        coalescer: Coalescer::new(&defaults(), Arc::clone(&metrics)),
        credentials,
        store: None,
    };
    let options = Options {
        watch_interval: INTERVAL,
        watch_rate: None,
    };
    let hub = Hub::new(&options, INTERVAL, metrics);
    let key = lookups.coalescer.key(Identity::Server, query());
    let task = Arc::new(WatchedTask::new(key));
    let watcher = Watcher {
        caller: CALLER,
        auth: Auth::Token(Token {
            value: token,
            generation: 0,
            identity: Identity::Server,
            fragments: None,
        }),
        span: None,
        resumes,
    };
    let subscription = WatchedTask::join(&task, watcher);
    (Poller::new(hub, task, lookups), subscription)
}

fn query() -> TaskQuery {
    TaskQuery {
        project_id: "p".into(),
        instance_id: "i".into(),
        workflow_id: "w".into(),
        workflow_name: None,
    }
}

fn snapshot(status: &str, process: &str, updated: &str, part: Option<&str>) -> Snapshot {
    let text = |text: &str| Some(text.to_owned());
    let mut task = Task::new(GetTaskDetailResponse {
        status: text(status),
        process: text(process),
        update_at: text(updated),
        ..GetTaskDetailResponse::default()
    });
    if let Some(part) = part {
        task.push(SubTask {
            status: text(part),
            ..SubTask::default()
        });
    }
    Snapshot::new(&task).expect("short")
}

fn running(process: &str, updated: &str) -> Snapshot {
    snapshot("Running", process, updated, None)
}

fn upstream_error(error: upstream::Error) -> Error {
    Error::Upstream(Box::new(FailedLookup {
        error,
        facts: Facts::default(),
        owner: Owner::Server,
        query: query(),
    }))
}

fn observe(poller: &mut Poller, snapshot: Snapshot) -> Next {
    poller.observe(snapshot, Arrival::now(Instant::now()))
}

/// Asserts a pause of this multiple of the interval, with the random addition.
fn assert_pause(next: Next, growth: f64) {
    let Next::Pause(pause) = next else {
        panic!("the end instead of a pause");
    };
    let least = INTERVAL.mul_f64(growth);
    let most = least.mul_f64(1.0 + JITTER);
    assert!(
        (least..=most).contains(&pause),
        "{pause:?} {least:?} {most:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_until_a_state_or_percentage_changes() {
    let (mut poller, _watch) = poller(false);

    assert_pause(observe(&mut poller, running("1", "a")), 1.0);
    assert_pause(observe(&mut poller, running("1", "a")), 1.5);
    assert_pause(observe(&mut poller, running("1", "another time")), 2.25);
    for _ in 0..20 {
        assert_pause(observe(&mut poller, running("1", "a")), 3.0);
    }
    assert_pause(observe(&mut poller, running("2", "a")), 1.0);
    assert_pause(observe(&mut poller, running("2", "a")), 1.5);
}

#[tokio::test(start_paused = true)]
async fn each_new_text_is_a_state_and_the_latest_former_etags_are_kept() {
    let (mut poller, watch) = poller(false);
    let mut etags = Vec::new();
    for number in 0..2 * MAX_FORMER_ETAGS {
        let state = running("1", &number.to_string());
        etags.push(state.etag.clone());
        observe(&mut poller, state);
    }
    observe(&mut poller, running("1", "63"));

    assert_eq!(watch.observations.borrow().states, 64);
    etags.pop();
    etags.reverse();
    etags.truncate(MAX_FORMER_ETAGS);
    assert_eq!(*poller.task.former_etags.lock(), etags);
}

#[tokio::test(start_paused = true)]
async fn watchers_wake_for_a_new_state_or_an_awaited_poll() {
    let (mut poller, mut watch) = poller(false);
    let mut wakes = |poller: &mut Poller, process| {
        observe(poller, running(process, "a"));
        let wakes = watch.observations.has_changed().unwrap();
        watch.observations.mark_unchanged();
        wakes
    };

    assert!(wakes(&mut poller, "1"));
    assert!(!wakes(&mut poller, "1"));
    assert!(wakes(&mut poller, "2"));
    poller.task.watchers.lock().awaits_poll = true;
    assert!(wakes(&mut poller, "2"));
    assert!(!wakes(&mut poller, "2"));
}

#[tokio::test(start_paused = true)]
async fn a_contradictory_end_is_published_when_it_is_confirmed() {
    let (mut poller, watch) = poller(false);
    let contradiction = || snapshot("Completed", "100", "a", Some("Running"));

    assert!(matches!(
        observe(&mut poller, contradiction()),
        Next::Pause(INTERVAL)
    ));
    assert!(watch.observations.borrow().snapshot.is_none());
    assert!(matches!(
        observe(&mut poller, contradiction()),
        Next::End(Ok(()))
    ));
    assert!(watch.observations.borrow().snapshot.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_known_task_may_be_missing_once_and_an_unknown_one_for_ever() {
    let (mut poller, watch) = poller(false);
    let missing =
        |poller: &mut Poller| poller.observe_unknown(Error::Internal, Arrival::now(Instant::now()));

    for _ in 0..3 {
        assert!(matches!(missing(&mut poller), Next::Pause(_)));
        assert!(watch.observations.borrow().missing.is_some());
    }
    observe(&mut poller, running("1", "a"));
    assert!(watch.observations.borrow().missing.is_none());
    for _ in 0..2 {
        assert!(matches!(missing(&mut poller), Next::Pause(_)));
        observe(&mut poller, running("1", "a"));
    }
    assert!(matches!(missing(&mut poller), Next::Pause(_)));
    assert!(matches!(missing(&mut poller), Next::End(Err(_))));
}

#[tokio::test(start_paused = true)]
async fn transient_errors_end_a_watch_only_before_the_first_reply() {
    let (mut poller, watch) = poller(false);
    let transient = || upstream_error(upstream::Error::AttemptTimeout);
    let fail = |poller: &mut Poller, error| poller.observe_error(error, false, Instant::now());
    assert!(matches!(fail(&mut poller, transient()), Next::End(Err(_))));
    observe(&mut poller, running("1", "a"));

    assert_pause(fail(&mut poller, transient()), 1.5);
    let begun = Instant::now();
    tokio::time::advance(INTERVAL).await;
    poller.task.watchers.lock().awaits_poll = true;
    assert_pause(fail(&mut poller, transient()), 2.25);
    assert_eq!(poller.failing.as_ref().unwrap().0, begun);
    let failed_at = watch.observations.borrow().failure.clone().unwrap().0;
    assert_eq!(failed_at, Instant::now());
    let throttled = upstream_error(upstream::Error::Throttled {
        retry_after: 10 * INTERVAL,
        subject: None,
    });
    let Next::Pause(pause) = fail(&mut poller, throttled) else {
        panic!("throttling is transient");
    };
    assert!((10 * INTERVAL..14 * INTERVAL).contains(&pause), "{pause:?}");
    let permanent = upstream_error(upstream::Error::TooLarge);
    assert!(matches!(fail(&mut poller, permanent), Next::End(Err(_))));
    observe(&mut poller, running("1", "a"));
    assert!(poller.failing.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_result_of_another_replica_may_be_as_old_as_the_pause_but_not_used_before() {
    let (mut poller, _watch) = poller(false);
    assert_eq!(poller.max_age(), INTERVAL);
    (poller.latest_pause, poller.result_at) = (2 * INTERVAL, None);
    assert_eq!(poller.max_age(), 2 * INTERVAL);

    (poller.latest_pause, poller.result_at) = (INTERVAL, Some(Instant::now()));
    assert_eq!(poller.max_age(), Duration::ZERO);
    tokio::time::advance(INTERVAL / 2).await;
    assert_eq!(poller.max_age(), INTERVAL / 2 - SAME_RESULT);
    tokio::time::advance(INTERVAL).await;
    assert_eq!(poller.max_age(), INTERVAL);
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_awaits_a_poll_shortens_the_pause_unless_polls_fail() {
    for is_failing in [false, true] {
        let (mut poller, _watch) = poller(false);
        let begun = Instant::now();
        poller.asked_at = Some(begun);
        poller.task.watchers.lock().awaits_poll = true;
        if is_failing {
            poller.failing = Some((begun, Error::Internal));
        }

        poller.pause(5 * INTERVAL).await;

        let expected = if is_failing { 5 * INTERVAL } else { INTERVAL };
        assert_eq!(begun.elapsed(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_poll_for_resumed_watches_waits_for_up_to_five_seconds() {
    let begun = Instant::now();
    let (urgent, _watch) = poller(false);
    urgent.spread_resumed().await;
    assert_eq!(begun.elapsed(), Duration::ZERO);

    let mut waits = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        let (resumed, _watch) = poller(true);
        resumed.spread_resumed().await;
        waits.push(begun.elapsed());
    }
    assert!(waits.iter().all(|wait| *wait <= RESUME_SPREAD), "{waits:?}");
    assert!(
        waits.iter().any(|wait| *wait > RESUME_SPREAD / 10),
        "{waits:?}"
    );
}

fn hub(poller: &mut Poller) -> &mut Hub {
    Arc::get_mut(&mut poller.hub).expect("no other poller")
}

/// Limits the polls to this number in half a minute.
fn limit(poller: &mut Poller, calls: u32) {
    hub(poller).rate = Some(Pacing::for_polls(RateConfig {
        calls: calls.try_into().unwrap(),
        period: Duration::from_secs(30),
    }));
}

fn in_fleet(store: &Scripted) -> InFleet {
    let session = store.session();
    let task = session.task(&[b"task"]);
    InFleet { session, task }
}

#[tokio::test(start_paused = true)]
async fn the_margin_for_the_same_result_is_at_most_half_of_the_interval() {
    let (mut poller, _watch) = poller(false);
    let millis = Duration::from_millis;
    hub(&mut poller).interval = millis(40);
    poller.result_at = Some(Instant::now());

    tokio::time::advance(millis(30)).await;

    assert_eq!(poller.max_age(), millis(10));
}

#[tokio::test(start_paused = true)]
async fn the_pauses_grow_while_another_replica_polls_the_task() {
    let store = Scripted::start(INTERVAL, |number| match number {
        0..8 => reply("busy", 0),
        _ => reply("fresh", 0),
    })
    .await;
    let (poller, _watch) = poller(false);

    let start = poller.wait_in_fleet(&in_fleet(&store)).await;

    assert_eq!(start, Some(Ok(CALLER)));
    let runs = store.runs("poll").await;
    assert_eq!(runs.len(), 9);
    let factor = 1.0..=1.0 + JITTER;
    scripted::assert_pauses(&runs, Duration::ZERO, FIRST_LOOK..=LONGEST_LOOK, factor);
}

#[tokio::test(start_paused = true)]
async fn without_room_in_the_rate_of_all_replicas_only_a_first_poll_is_rejected() {
    let wait = Duration::from_secs(20);
    for (has_reply, start, limits) in [
        (false, Err(wait), &["30"][..]),
        (true, Ok(CALLER), &["0", "0"][..]),
    ] {
        let store = Scripted::start(INTERVAL, |number| match number {
            0 => reply("late", 20_000_000),
            _ => reply("start", 0),
        })
        .await;
        let (mut poller, _watch) = poller(false);
        limit(&mut poller, 30);
        poller.has_reply = has_reply;

        let started = poller.wait_in_fleet(&in_fleet(&store)).await;

        assert_eq!(started, Some(start));
        // The limit on first polls.
        let runs = store.runs("poll").await;
        let asked: Vec<_> = runs.iter().map(|run| run.arg(4)).collect();
        assert_eq!(asked, limits);
    }
}

#[tokio::test(start_paused = true)]
async fn without_room_in_the_rate_only_a_first_poll_is_rejected() {
    let (mut poller, watch) = poller(false);
    limit(&mut poller, 1);
    let begun = Instant::now();
    assert_eq!(poller.wait_for_rate().await, Some(Ok(CALLER)));

    let rejected = poller.wait_for_rate().await;

    let window = Duration::from_millis(30_050);
    assert_eq!(rejected, Some(Err(window)));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    poller.has_reply = true;
    assert_eq!(poller.wait_for_rate().await, Some(Ok(CALLER)));
    assert_eq!(begun.elapsed(), window);
    drop(watch);
    assert_eq!(poller.wait_for_rate().await, None);
}

#[tokio::test(start_paused = true)]
async fn watches_end_if_polls_fail_or_wait_for_five_minutes() {
    let (mut poller, watch) = poller(false);
    limit(&mut poller, 1);
    let queued = |poller: &Poller| {
        let rate = poller.hub.rate.as_ref().expect("a rate");
        rate.queue_repeated(poller.task.key.identity, &[CALLER])
    };
    // The rate has room for none of the polls.
    let greedy = AbortOnDropHandle::new(tokio::spawn({
        let polls: Vec<_> = (0..100).map(|_| queued(&poller)).collect();
        async move {
            for poll in polls {
                poll.start().await;
            }
        }
    }));
    poller.has_reply = true;
    poller.failing = Some((Instant::now(), Error::Overloaded));
    let begun = Instant::now();

    poller.run().await;

    assert_eq!(begun.elapsed(), MAX_STALE);
    let last = watch.observations.borrow();
    assert!(last.is_stale);
    let end = last.end.as_ref().expect("the end").as_ref();
    assert!(matches!(
        end.map_err(|error| &**error),
        Err(Error::Overloaded)
    ));
    drop(greedy);
}

#[tokio::test]
async fn the_end_of_the_watches_ends_a_first_poll_or_one_with_a_callers_token() {
    for (has_reply, is_callers, continues) in [
        (false, false, false),
        (true, false, true),
        (false, true, false),
        (true, true, false),
    ] {
        let gate = Gate::default();
        let upstream = Upstream::always(gated_example(&gate)).await;
        let (mut poller, watch) = poller_of(&upstream.url(), false);
        poller.has_reply = has_reply;
        drop(watch);
        {
            // The poll begins just before the last watch ends.
            let mut watchers = poller.task.watchers.lock();
            watchers.callers.insert(CALLER, 1);
            watchers.auth = is_callers.then(|| {
                Auth::Token(Token {
                    value: HeaderValue::from_static("caller"),
                    generation: 0,
                    identity: Identity::Caller([1; 16]),
                    fragments: None,
                })
            });
        }

        let (next, ()) = tokio::join!(poller.poll(CALLER), async {
            // A poll that continues needs a reply.
            if continues {
                upstream.wait_for_requests(1).await;
            }
            gate.open();
        });

        let Next::Pause(pause) = next else {
            panic!("the end instead of a pause");
        };
        assert_eq!(
            pause > Duration::ZERO,
            continues,
            "{has_reply} {is_callers}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_pause_after_a_result_of_another_replica_counts_from_the_result() {
    let age = Duration::from_secs(6);
    let store = Scripted::start(INTERVAL, move |_| {
        scripted::result(&GetTaskDetailResponse::default(), age)
    })
    .await;
    let (mut poller, watch) = poller(false);
    poller.lookups.store = Some(Arc::clone(&store.store));

    let next = poller.poll(CALLER).await;

    assert!(watch.observations.borrow().snapshot.is_some());
    let Next::Pause(pause) = next else {
        panic!("the end instead of a pause");
    };
    // The result has grown older meanwhile, by the clock of the system.
    let least = INTERVAL - age - Duration::from_secs(3);
    let most = INTERVAL.mul_f64(1.0 + JITTER) - age;
    assert!((least..=most).contains(&pause), "{pause:?}");
}

#[tokio::test]
async fn the_pause_after_a_poll_without_a_reply_counts_from_its_end() {
    let store = Scripted::start(INTERVAL, |_| reply("lease", 1)).await;
    let metadata = Upstream::always(vec![Step::Hold]).await;
    let (mut poller, _watch) = poller(false);
    let source = Source::Metadata(Url::parse(&metadata.url()).unwrap());
    let credentials = Credentials::start(source, None, &http(), Metrics::new());
    poller.lookups.credentials = credentials.unwrap();
    poller.lookups.store = Some(Arc::clone(&store.store));
    hub(&mut poller).poll_timeout = Duration::from_millis(10);
    poller.has_reply = true;
    poller.result_at = Some(Instant::now() - INTERVAL / 2);

    let next = poller.poll(CALLER).await;

    assert!(poller.failing.is_some());
    assert_pause(next, 1.0);
}

#[tokio::test]
async fn the_poller_of_a_known_task_outlives_its_watches_by_a_pause() {
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let (mut poller, watch) = poller_of(&upstream.url(), false);
    observe(&mut poller, running("1", "a"));
    hub(&mut poller).interval = Duration::from_secs(3600);
    let (hub, task) = (Arc::clone(&poller.hub), Arc::clone(&poller.task));
    let known = Arc::clone(&task);
    hub.tasks.lock().insert(Arc::clone(&task.key), known);
    let run = AbortOnDropHandle::new(tokio::spawn(poller.run()));
    upstream.wait_for_requests(1).await;

    drop(watch);
    gate.open();

    eventually("the poll continues", async || {
        task.observations.borrow().states == 2
    })
    .await;
    assert!(hub.tasks.lock().contains_key(&task.key));
    assert!(!run.is_finished());
}

#[tokio::test]
async fn a_dropped_poller_ends_its_watches_with_an_internal_error() {
    let (poller, watch) = poller(false);

    drop(poller);

    let end = watch.observations.borrow().end.clone().expect("the end");
    assert!(matches!(*end.expect_err("a bug"), Error::Internal));
}

#[test]
fn errors_after_which_the_next_poll_may_succeed_are_transient() {
    let second = Duration::from_secs(1);
    let transient = [408, 409, 425, 429, 500, 502, 503, 504].map(|status| (status, true));
    let permanent = [400, 401, 403, 404].map(|status| (status, false));
    for (status, expected) in transient.into_iter().chain(permanent) {
        let (rejection, facts) = rejection::from_reply(status, &HeaderMap::new(), b"", UNIX_EPOCH);
        let error = Error::Upstream(Box::new(FailedLookup {
            error: upstream::Error::Rejected(Box::new(rejection)),
            facts,
            owner: Owner::Server,
            query: query(),
        }));
        assert_eq!(is_transient(&error), expected, "{status}");
    }
    let unavailable = credentials::Error::Unavailable {
        retry_after: second,
    };
    let locked = credentials::Error::Locked {
        retry_after: second,
    };
    let cases = [
        (
            upstream_error(upstream::Error::Transport(Reason::UpstreamReset, None)),
            true,
        ),
        (upstream_error(upstream::Error::DeadlineExceeded), true),
        (
            upstream_error(upstream::Error::CircuitOpen {
                retry_after: second,
            }),
            true,
        ),
        (
            upstream_error(upstream::Error::Credentials(unavailable.clone())),
            true,
        ),
        (Error::Credentials(unavailable), true),
        (
            Error::Credentials(credentials::Error::DeadlineExceeded),
            true,
        ),
        (Error::Credentials(locked.clone()), false),
        (upstream_error(upstream::Error::Credentials(locked)), false),
        (upstream_error(upstream::Error::Malformed), false),
        (Error::Internal, false),
    ];
    for (error, expected) in cases {
        assert_eq!(is_transient(&error), expected, "{error:?}");
    }
}
