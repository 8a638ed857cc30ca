use std::collections::VecDeque;

use futures_util::poll;
use proptest::prelude::*;
use tokio::task::{JoinSet, yield_now};

use super::{
    fleet::{Fleet, LocalStart},
    *,
};
use crate::quota_store::{
    AttemptContext,
    scripted::{Reply, Run, Scripted, reply},
};

const RDS: Identity = Identity::Server;
const ANN: Caller = Caller::Connection(1);
const BOB: Caller = Caller::Connection(2);

fn pacing(calls: u32, period: Duration) -> Arc<Pacing> {
    Arc::new(Pacing::new(Config {
        calls: NonZeroU32::new(calls).unwrap(),
        period,
    }))
}

fn in_seconds(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}

/// Queues an attempt for each caller, in this order. Each returns its index and its start in seconds from now.
async fn start(
    pacing: &Arc<Pacing>,
    callers: &[Caller],
) -> JoinSet<(usize, Result<u64, Duration>)> {
    let begun = Instant::now();
    let mut starts = JoinSet::new();
    for (index, caller) in callers.iter().copied().enumerate() {
        let pacing = Arc::clone(pacing);
        starts.spawn(async move {
            let start = pacing.wait(RDS, caller, in_seconds(600)).await;
            (index, start.map(|()| begun.elapsed().as_secs()))
        });
        yield_now().await;
    }
    starts
}

async fn times(mut starts: JoinSet<(usize, Result<u64, Duration>)>) -> Vec<u64> {
    let mut times = Vec::new();
    while let Some(start) = starts.join_next().await {
        let (index, at) = start.unwrap();
        times.push((index, at.expect("a start before the deadline")));
    }
    times.sort_unstable();
    times.into_iter().map(|(_, at)| at).collect()
}

#[tokio::test(start_paused = true)]
async fn an_empty_window_is_free_at_once_and_the_rest_wait_for_room_a_spacing_apart() {
    let pacing = pacing(3, Duration::from_secs(30));

    let starts = start(&pacing, &[ANN; 7]).await;

    assert_eq!(times(starts).await, [0, 0, 0, 30, 40, 50, 60]);
}

#[tokio::test(start_paused = true)]
async fn callers_start_round_robin_even_if_one_has_many_attempts() {
    let pacing = pacing(1, Duration::from_secs(1));
    start(&pacing, &[ANN]).await.join_all().await;

    let starts = start(
        &pacing,
        &[ANN, ANN, ANN, ANN, BOB, BOB, Caller::Connection(3)],
    )
    .await;

    assert_eq!(times(starts).await, [1, 4, 6, 7, 2, 5, 3]);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_cannot_start_before_its_deadline_is_rejected_at_once() {
    let pacing = pacing(1, Duration::from_secs(10));
    let _waiting = start(&pacing, &[ANN; 4]).await;

    let before = Instant::now();
    let last = pacing.wait(RDS, ANN, in_seconds(39)).await.unwrap_err();
    let fair = pacing.wait(RDS, BOB, in_seconds(19)).await.unwrap_err();

    assert_eq!(Instant::now(), before);
    assert_eq!((last.as_secs(), fair.as_secs()), (40, 20));
}

#[tokio::test(start_paused = true)]
async fn an_attempt_delayed_by_others_is_rejected_shortly_before_its_deadline() {
    let pacing = pacing(1, Duration::from_secs(10));
    let _waiting = start(&pacing, &[ANN; 3]).await;
    let begun = Instant::now();
    let mut late = Box::pin(pacing.wait(RDS, ANN, in_seconds(35)));
    assert!(poll!(&mut late).is_pending());

    let _others = start(&pacing, &[BOB; 3]).await;

    let wait = late.await.expect_err("BOB's starts came in between");
    assert_eq!((begun + Duration::from_secs(35)) - Instant::now(), SLACK);
    assert!(wait > Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_attempt_leaves_the_queue_at_any_position() {
    for cancelled in 0..3 {
        let pacing = pacing(1, Duration::from_secs(1));
        start(&pacing, &[ANN]).await.join_all().await;
        let mut waiting = Vec::new();
        for caller in [ANN, BOB, ANN] {
            waiting.push(start(&pacing, &[caller]).await);
        }

        drop(waiting.remove(cancelled));
        yield_now().await;
        waiting.push(start(&pacing, &[BOB]).await);

        let mut came = Vec::new();
        for starts in waiting {
            came.extend(times(starts).await);
        }
        came.sort_unstable();
        assert_eq!(came, [1, 2, 3], "{cancelled}");
        let lane = pacing.lanes.get(&RDS).expect("a lane");
        assert!(
            lane.state().queues.iter().all(VecDeque::is_empty),
            "{cancelled}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn no_attempt_overtakes_a_queue_that_has_not_woken_yet() {
    let pacing = pacing(1, Duration::from_secs(1));
    start(&pacing, &[ANN]).await.join_all().await;
    let mut first = Box::pin(pacing.wait(RDS, ANN, in_seconds(9)));
    assert!(poll!(&mut first).is_pending());
    tokio::time::advance(Duration::from_secs(2)).await;

    let mut second = Box::pin(pacing.wait(RDS, BOB, in_seconds(9)));

    assert!(poll!(&mut second).is_pending());
    assert!(poll!(&mut first).is_ready());
    assert!(poll!(&mut second).is_pending());
}

#[tokio::test(start_paused = true)]
async fn each_credential_has_a_window_of_its_own() {
    let pacing = pacing(1, Duration::from_secs(60));
    let other = Identity::Caller([1; 16]);

    assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_ok());
    assert!(pacing.wait(other, ANN, in_seconds(0)).await.is_ok());
    assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn ever_new_credentials_are_not_all_remembered() {
    let pacing = pacing(60, Duration::from_secs(60));

    for number in 0..3 * u128::from(MAX_IDENTITIES) {
        let identity = Identity::Caller(number.to_be_bytes());
        let start = pacing.wait(identity, ANN, in_seconds(0)).await;
        start.expect("an empty window");
    }

    pacing.lanes.run_pending_tasks();
    assert!(pacing.lanes.entry_count() <= MAX_IDENTITIES);
}

#[tokio::test(start_paused = true)]
async fn a_steady_load_below_the_rate_starts_at_once() {
    let pacing = pacing(60_000, Duration::from_secs(60));

    for _ in 0..3 * 60 * 800 {
        tokio::time::advance(Duration::from_micros(1250)).await;
        let start = pacing.wait(RDS, ANN, in_seconds(0)).await;
        start.expect("800 a second of 1000");
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_of_the_first_queued_attempt_includes_the_spacing() {
    let pacing = pacing(2, Duration::from_secs(10));
    start(&pacing, &[ANN]).await.join_all().await;
    tokio::time::advance(Duration::from_millis(9900)).await;
    start(&pacing, &[ANN]).await.join_all().await;

    let before = Instant::now();
    let wait = pacing.wait(RDS, ANN, in_seconds(2)).await.unwrap_err();

    assert_eq!((Instant::now(), wait.as_secs()), (before, 5));
}

#[tokio::test(start_paused = true)]
async fn a_window_of_many_starts_is_small_and_still_holds() {
    let calls = 100_000;
    let pacing = pacing(calls, Duration::from_secs(60));
    for _ in 0..calls {
        tokio::time::advance(Duration::from_micros(100)).await;
        pacing
            .wait(RDS, ANN, in_seconds(0))
            .await
            .expect("there is room");
    }

    assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
    let lane = pacing.lanes.get(&RDS).expect("a lane");
    assert!(lane.state().starts.len() <= MAX_STARTS as usize + 1);
}

#[tokio::test(start_paused = true)]
async fn a_withdrawn_start_leaves_its_room_to_one_other() {
    // With the larger number, the starts share an entry of the window.
    for calls in [2, 10_000] {
        let pacing = pacing(calls, Duration::from_secs(60));
        for _ in 0..calls {
            let started = pacing.wait(RDS, ANN, in_seconds(0)).await;
            started.expect("there is room");
        }
        let lane = pacing.lanes.get(&RDS).expect("a lane");

        lane.state().withdraw(REPEATED, Instant::now());
        assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
        lane.state().withdraw(FIRST, Instant::now());

        let started = pacing.wait(RDS, ANN, in_seconds(0)).await;
        assert_eq!(started, Ok(()), "{calls}");
        assert!(pacing.wait(RDS, ANN, in_seconds(0)).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_local_start_counts_only_if_it_leads_to_an_attempt() {
    let pacing = pacing(1, Duration::from_secs(60));
    let queued = pacing.queue_repeated(RDS, &[ANN]);
    let at = Instant::now();
    let start = || LocalStart {
        queued: &queued,
        caller: ANN,
        has_waited: false,
        at: Some(at),
    };

    for is_dropped in [true, false] {
        queued.lane.state().start(REPEATED, at);
        match is_dropped {
            true => drop(start()),
            false => assert_eq!(start().begin(at), ANN),
        }

        let started = queued.lane.state().started[REPEATED];
        assert_eq!(started, u32::from(!is_dropped));
    }
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_has_started_is_not_queued_under_further_callers() {
    let pacing = polls(1, Duration::from_secs(60));
    let poll = pacing.queue_repeated(RDS, &[ANN]);

    poll.add(&[BOB]);
    assert_eq!(poll.lane.state().queues[REPEATED].len(), 2);
    poll.lane.state().start_head(REPEATED, Instant::now());
    poll.add(&[BOB]);

    assert!(poll.lane.state().queues[REPEATED].is_empty());
}

fn polls(calls: u32, period: Duration) -> Arc<Pacing> {
    Arc::new(Pacing::for_polls(Config {
        calls: NonZeroU32::new(calls).unwrap(),
        period,
    }))
}

/// Queues a repeated poll for each list of callers. Each returns its start in seconds from now, and the caller that it used.
async fn repeat(pacing: &Arc<Pacing>, callers: &[&[Caller]]) -> JoinSet<(u64, Caller)> {
    let begun = Instant::now();
    let mut polls = JoinSet::new();
    for callers in callers {
        let poll = pacing.queue_repeated(RDS, callers);
        polls.spawn(async move {
            let caller = poll.start().await;
            (begun.elapsed().as_secs(), caller)
        });
        yield_now().await;
    }
    polls
}

#[tokio::test(start_paused = true)]
async fn repeated_polls_start_a_spacing_apart_and_round_robin_among_callers() {
    let pacing = polls(3, Duration::from_secs(30));

    let polls = repeat(&pacing, &[&[ANN], &[ANN], &[ANN], &[BOB], &[ANN, BOB]]).await;

    let mut starts = polls.join_all().await;
    starts.sort_unstable_by_key(|(at, _)| *at);
    assert_eq!(
        starts,
        [(0, ANN), (10, ANN), (20, BOB), (30, ANN), (40, BOB)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_poll_keeps_its_place_when_callers_join() {
    let pacing = polls(1, Duration::from_secs(10));
    let mut first = repeat(&pacing, &[&[ANN]]).await;
    first.join_next().await;
    let shared = pacing.queue_repeated(RDS, &[ANN]);
    let mut others = repeat(&pacing, &[&[ANN], &[ANN]]).await;
    let begun = Instant::now();

    for number in 10..20 {
        shared.add(&[ANN, Caller::Connection(number)]);
    }

    assert_eq!(shared.start().await, ANN);
    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(others.join_next().await.unwrap().unwrap().0, 20);
    assert_eq!(others.join_next().await.unwrap().unwrap().0, 30);
    let lane = pacing.lanes.get(&RDS).expect("a lane");
    assert!(lane.state().queues.iter().all(VecDeque::is_empty));
}

#[tokio::test(start_paused = true)]
async fn first_polls_start_at_once_before_repeated_ones() {
    let pacing = polls(6, Duration::from_secs(60));
    let mut repeated = repeat(&pacing, &[&[ANN], &[ANN]]).await;
    repeated.join_next().await;
    tokio::time::advance(Duration::from_secs(1)).await;

    for caller in [BOB, BOB, BOB] {
        let first = pacing.wait(RDS, caller, in_seconds(0)).await;
        first.expect("half of the window");
    }
    let fourth = pacing.wait(RDS, BOB, in_seconds(10)).await;

    let wait = fourth.expect_err("the other half is for repeated polls");
    assert_eq!(wait.as_secs(), 60);
    let (at, _) = repeated.join_next().await.unwrap().unwrap();
    assert_eq!(at, 11);
}

#[tokio::test(start_paused = true)]
async fn ever_new_first_polls_of_a_caller_leave_repeated_polls_their_half() {
    let pacing = polls(30, Duration::from_secs(60));
    let greedy = Arc::clone(&pacing);
    let _greedy = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let _ = greedy.wait(RDS, BOB, in_seconds(10)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }));
    tokio::time::sleep(Duration::from_secs(90)).await;
    let begun = Instant::now();

    for _ in 0..60 {
        pacing.queue_repeated(RDS, &[ANN]).start().await;
    }

    // Fifteen a minute, after at most a minute in which the window is still full of first polls.
    assert!(
        begun.elapsed() <= Duration::from_secs(5 * 60),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_became_second_wakes_the_first() {
    let pacing = polls(2, Duration::from_secs(10));
    repeat(&pacing, &[&[ANN]]).await.join_all().await;
    tokio::time::advance(Duration::from_secs(5)).await;
    start(&pacing, &[ANN]).await.join_all().await;
    let mut repeated = repeat(&pacing, &[&[ANN]]).await;
    let mut first = start(&pacing, &[BOB]).await;

    // Both could have started by now.
    tokio::time::advance(Duration::from_secs(20)).await;

    let begun = Instant::now();
    first
        .join_next()
        .await
        .expect("a poll")
        .expect("no panic")
        .1
        .expect("a start");
    assert_eq!(Instant::now(), begun);
    repeated
        .join_next()
        .await
        .expect("a poll")
        .expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn queued_first_polls_start_when_the_window_has_room_without_a_spacing() {
    let pacing = polls(3, Duration::from_secs(9));
    start(&pacing, &[ANN; 3]).await.join_all().await;

    let starts = start(&pacing, &[ANN; 3]).await;

    assert_eq!(times(starts).await, [9, 9, 9]);
}

proptest! {
    /// With any arrivals and cancellations, at most N attempts start in any window.
    #[test]
    fn never_more_than_n_in_any_window(
        calls in 1..6u32,
        attempts in prop::collection::vec((0..4u64, 0..4000u64, 0..9000u64), 1..60),
    ) {
        let period = Duration::from_secs(3);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let mut starts = runtime.block_on(async {
            let pacing = pacing(calls, period);
            let mut runs = JoinSet::new();
            for (caller, comes, patience) in attempts {
                let pacing = Arc::clone(&pacing);
                runs.spawn(async move {
                    tokio::time::sleep(Duration::from_millis(comes)).await;
                    let deadline = Deadline::after(Duration::from_secs(20));
                    let start = pacing.wait(RDS, Caller::Connection(caller), deadline);
                    let patience = Duration::from_millis(patience);
                    let start = tokio::time::timeout(patience, start).await;
                    matches!(start, Ok(Ok(()))).then(Instant::now)
                });
            }
            let starts = runs.join_all().await;
            let lane = pacing.lanes.get(&RDS).expect("a lane");
            assert!(lane.state().queues.iter().all(VecDeque::is_empty));
            starts.into_iter().flatten().collect::<Vec<_>>()
        });
        starts.sort_unstable();
        for window in starts.windows(calls as usize + 1) {
            prop_assert!(*window.last().unwrap() - window[0] > period);
        }
    }
}

/// The state of a lane with a quota store that is up and has delayed no start.
fn quiet_fleet() -> Fleet {
    Fleet {
        is_up: true,
        replicas: 1,
        alone_until: Instant::now(),
        next_at: None,
        gap: Duration::ZERO,
        assigned: [None; 2],
    }
}

#[tokio::test(start_paused = true)]
async fn a_slot_of_the_quota_store_has_the_rate_in_a_part_of_the_period_if_it_is_large() {
    let second = Duration::from_secs(1);
    let attempts = pacing(2500, 30 * second).lane(RDS);

    let slot = attempts
        .state()
        .slot(FIRST, Some(Instant::now() + 5 * second));

    assert_eq!((slot.calls, slot.window), (833, 10 * second + JITTER));
    assert_eq!(slot.spacing, Duration::from_millis(12));
    assert_eq!((slot.limit_of_first, slot.has_waited), (None, false));
    assert_eq!(slot.longest, 5 * second);
    let brief = pacing(5, second / 10).lane(RDS);
    let slot = brief.state().slot(FIRST, None);
    assert_eq!((slot.calls, slot.window), (5, second / 10 + second / 200));
    assert_eq!(slot.longest, LONGEST_POLL_WAIT);
}

#[tokio::test(start_paused = true)]
async fn a_slot_of_a_first_poll_has_half_of_the_rate_while_polls_repeat() {
    let pacing = Pacing::for_polls(Config {
        calls: NonZeroU32::new(5).unwrap(),
        period: Duration::from_secs(1),
    });
    let lane = pacing.lane(RDS);
    let slot = |kind| {
        let slot = lane.state().slot(kind, None);
        (slot.limit_of_first, slot.has_waited)
    };

    assert_eq!(slot(FIRST), (Some(5), false));
    let _queued = pacing.queue_repeated(RDS, &[ANN]);
    assert_eq!(slot(FIRST), (Some(3), false));
    assert_eq!(slot(REPEATED), (None, true));
    lane.state().fleet = Some(quiet_fleet());
    assert_eq!(slot(FIRST), (Some(3), false));
    lane.state().fleet.as_mut().unwrap().next_at = Some(Instant::now());
    assert_eq!(slot(FIRST), (Some(3), true));
}

#[tokio::test(start_paused = true)]
async fn the_start_of_a_head_that_has_left_is_used_until_it_is_over() {
    let lane = pacing(1, Duration::from_secs(1)).lane(RDS);
    let mut state = lane.state();
    let at = Instant::now() + Duration::from_secs(9);
    assert_eq!(state.assigned(FIRST, at), None, "no store");
    let assigned = [Some(at), None];
    state.fleet = Some(Fleet {
        assigned,
        ..quiet_fleet()
    });

    assert_eq!(state.assigned(REPEATED, at), None);
    assert_eq!(state.assigned(FIRST, at), Some(at));
    assert_eq!(state.assigned(FIRST, at + JITTER), Some(at));
    let later = at + JITTER + Duration::from_millis(1);
    assert_eq!(state.assigned(FIRST, later), None);
    assert_eq!(state.assigned(FIRST, at), None, "it is over");
}

#[tokio::test(start_paused = true)]
async fn starts_are_free_unless_the_rate_delays_one_or_the_store_is_not_in_charge() {
    let lane = pacing(1, Duration::from_secs(1)).lane(RDS);
    let mut state = lane.state();
    let now = Instant::now();
    assert!(state.is_free(now), "no store");
    let later = Some(now + Duration::from_secs(1));
    let cases = [
        (quiet_fleet(), true),
        (
            Fleet {
                assigned: [None, later],
                ..quiet_fleet()
            },
            true,
        ),
        (
            Fleet {
                assigned: [later, None],
                ..quiet_fleet()
            },
            false,
        ),
        (
            Fleet {
                next_at: later,
                ..quiet_fleet()
            },
            false,
        ),
        (
            Fleet {
                is_up: false,
                ..quiet_fleet()
            },
            false,
        ),
        (
            Fleet {
                alone_until: now + Duration::from_millis(1),
                ..quiet_fleet()
            },
            false,
        ),
    ];

    for (fleet, is_free) in cases {
        state.fleet = Some(fleet);
        assert_eq!(state.is_free(now), is_free, "{:?}", state.fleet);
    }
}

#[tokio::test(start_paused = true)]
async fn without_the_store_a_delayed_start_delays_those_after_it() {
    let second = Duration::from_secs(1);
    let lane = pacing(2, 10 * second).lane(RDS);
    let mut state = lane.state();
    let now = Instant::now();
    state.fleet = Some(Fleet {
        is_up: false,
        ..quiet_fleet()
    });
    let next_at = |state: &lane::State| state.fleet.as_ref().unwrap().next_at;

    state.start(FIRST, now);
    assert_eq!(state.due_at(FIRST, now), now, "without a spacing");
    assert_eq!(next_at(&state), None);
    assert_eq!(state.due_at(REPEATED, now), now + 5 * second);
    assert_eq!(next_at(&state), None);
    state.start(FIRST, now);
    let room_at = now + 10 * second + JITTER;
    assert_eq!(state.due_at(FIRST, now), room_at);
    assert_eq!(next_at(&state), Some(room_at));
    let later = room_at + second;
    state.start(FIRST, later);
    assert_eq!(state.due_at(FIRST, later), later + 5 * second, "a spacing");
}

/// A store whose reply to request number n for a start is `script(n)`, counted from 0.
async fn scripted(script: impl FnMut(usize) -> Reply + Send + 'static) -> Arc<Scripted> {
    Arc::new(Scripted::start(Duration::from_secs(10), script).await)
}

/// Queues an attempt. Returns the answer, and when it came, in milliseconds from now.
fn start_in_fleet(
    pacing: &Arc<Pacing>,
    store: &Arc<Scripted>,
    deadline: Deadline,
) -> impl Future<Output = (Answer, u128)> + Send + 'static {
    let (pacing, session, begun) = (Arc::clone(pacing), store.session(), Instant::now());
    async move {
        let request = Request::Attempt(AttemptContext {
            instance: None,
            key: None,
            probe: Some(7),
            deadline,
        });
        let answer = pacing.wait_in_fleet(RDS, ANN, deadline, &session, request);
        let answer = answer.await;
        (answer, begun.elapsed().as_millis())
    }
}

/// The time of each request for a start, in milliseconds, and its rate. The rate is 0 if the store has assigned the start before.
async fn asked(store: &Scripted, since: Instant) -> Vec<(u128, String)> {
    let asked = |run: &Run| ((run.at - since).as_millis(), run.arg(1).to_owned());
    store.runs("admit").await.iter().map(asked).collect()
}

const AT_ONCE: Answer = Answer::Start(Duration::ZERO);

#[tokio::test(start_paused = true)]
async fn replies_of_the_quota_store_show_whether_it_delays_starts() {
    let second = Duration::from_secs(1);
    let store = scripted(|_| reply("start", 0)).await;
    let session = store.session();
    let now = Instant::now();
    let (soon, later) = (now + second, now + 3 * second);
    let zero = Duration::ZERO;
    // Spacings of 100 ms, 50 ms and 10 ms. The last two columns: when the next start is, and the gap before it.
    let cases = [
        (10, FIRST, Some(soon), AT_ONCE, Some(soon), zero),
        (20, FIRST, Some(soon), AT_ONCE, Some(soon), zero),
        (100, FIRST, Some(soon), AT_ONCE, None, zero),
        (100, REPEATED, Some(soon), AT_ONCE, Some(soon), zero),
        (10, FIRST, None, AT_ONCE, None, zero),
        (10, FIRST, None, Answer::Late(second), Some(soon), zero),
        (
            10,
            FIRST,
            Some(later),
            Answer::Late(second),
            Some(later),
            zero,
        ),
        (10, REPEATED, None, Answer::Late(second), None, zero),
        (
            10,
            FIRST,
            None,
            Answer::Start(second),
            Some(soon),
            second / 10,
        ),
        (
            10,
            FIRST,
            Some(soon),
            Answer::Start(3 * second),
            Some(later),
            2 * second,
        ),
        (10, REPEATED, None, Answer::Start(second), None, zero),
        (10, FIRST, None, Answer::Unavailable, None, zero),
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let (calls, kind, next_at, answer, expected, gap) = case;
        let lane = pacing(calls, second).lane(RDS);
        let mut state = lane.state();
        state.fleet = Some(Fleet {
            next_at,
            ..quiet_fleet()
        });

        state.answered(kind, &answer, &session, now);

        let fleet = state.fleet.as_ref().unwrap();
        assert_eq!((fleet.next_at, fleet.gap), (expected, gap), "{number}");
        assert_eq!(fleet.is_up, answer != Answer::Unavailable, "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_local_rule_applies_for_a_window_after_the_return_to_the_quota_store() {
    let lane = pacing(1, Duration::from_secs(1)).lane(RDS);
    let store = scripted(|_| reply("start", 0)).await;
    let since = Instant::now();
    store.came_back();
    tokio::time::advance(Duration::from_millis(1)).await;

    let mut state = lane.state();
    state.answered(FIRST, &AT_ONCE, &store.session(), Instant::now());

    let window = Duration::from_secs(1) + JITTER;
    assert_eq!(state.fleet.as_ref().unwrap().alone_until, since + window);
}

#[tokio::test(start_paused = true)]
async fn attempts_that_the_store_delays_start_in_turn_at_the_times_it_assigns() {
    let store = scripted(|number| match number {
        0 => reply("start", 300_000),
        2 => reply("start", 100_000),
        _ => reply("start", 0),
    })
    .await;
    let pacing = pacing(10, Duration::from_secs(1));
    let begun = Instant::now();

    let mut starts = JoinSet::new();
    starts.spawn(start_in_fleet(&pacing, &store, in_seconds(9)));
    tokio::time::sleep(Duration::from_millis(1)).await;
    starts.spawn(start_in_fleet(&pacing, &store, in_seconds(9)));

    let mut starts = starts.join_all().await;
    starts.sort_unstable_by_key(|(_, at)| *at);
    assert_eq!(starts, [(AT_ONCE, 300), (AT_ONCE, 399)]);
    // Each asks again at its start.
    let expected = [(0, "10"), (300, "0"), (300, "10"), (400, "0")];
    let expected = expected.map(|(at, calls)| (at, calls.to_owned()));
    assert_eq!(asked(&store, begun).await, expected);
    let runs = store.runs("admit").await;
    let probes: Vec<_> = runs.iter().map(|run| run.arg(8)).collect();
    assert_eq!(probes, ["7", "", "7", ""]);
    let longest = Duration::from_secs(9) - FLEET_SLACK;
    assert_eq!(runs[0].arg(6), longest.as_micros().to_string());
}

#[tokio::test(start_paused = true)]
async fn a_throttle_window_ends_the_wait_for_an_assigned_start() {
    let store = scripted(|number| match number {
        0 => reply("start", 300_000),
        _ => reply("throttled", 5000),
    })
    .await;
    let pacing = pacing(10, Duration::from_secs(1));

    let (answer, at) = start_in_fleet(&pacing, &store, in_seconds(9)).await;

    assert!(matches!(answer, Answer::Throttled(..)), "{answer:?}");
    assert_eq!(at, 300);
}

#[tokio::test(start_paused = true)]
async fn the_start_of_a_canceled_attempt_is_for_the_next_unless_it_is_too_late() {
    let store = scripted(|number| match number {
        0 => reply("start", 5_000_000),
        _ => reply("start", 0),
    })
    .await;
    let pacing = pacing(1, Duration::from_secs(1));
    let begun = Instant::now();
    let canceled = tokio::spawn(start_in_fleet(&pacing, &store, in_seconds(9)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    canceled.abort();
    yield_now().await;

    let hurried = start_in_fleet(&pacing, &store, in_seconds(2)).await;
    let patient = start_in_fleet(&pacing, &store, in_seconds(9)).await;

    assert_eq!(hurried, (Answer::Late(Duration::from_secs(4)), 0));
    assert_eq!(patient, (AT_ONCE, 4000));
    let asked = asked(&store, begun).await;
    assert_eq!(asked, [(0, "1".to_owned()), (5000, "0".to_owned())]);
    let runs = store.runs("admit").await;
    assert_eq!(runs[1].arg(8), "7", "a probe of its own");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_waits_for_probes_until_its_deadline_is_not_throttled() {
    let store = scripted(|_| reply("probed", 0)).await;
    let pacing = pacing(10, Duration::from_secs(1));

    let (answer, at) = start_in_fleet(&pacing, &store, in_seconds(9)).await;

    assert_eq!((answer, at), (Answer::Probed, 8940));
}

#[tokio::test(start_paused = true)]
async fn attempts_that_the_rate_does_not_delay_ask_the_store_at_once() {
    let late = Duration::from_millis(20);
    let store = scripted(move |_| reply("start", 0).after(late)).await;
    let pacing = pacing(1000, Duration::from_secs(1));
    let begun = Instant::now();

    let mut starts = JoinSet::new();
    for _ in 0..5 {
        starts.spawn(start_in_fleet(&pacing, &store, in_seconds(9)));
    }

    for start in starts.join_all().await {
        assert_eq!(start, (AT_ONCE, 20));
    }
    assert_eq!(asked(&store, begun).await, vec![(0, "1000".to_owned()); 5]);
}

#[tokio::test(start_paused = true)]
async fn repeated_polls_ask_the_store_one_after_the_other() {
    let late = Duration::from_millis(20);
    let store = scripted(move |_| reply("start", 0).after(late)).await;
    let pacing = polls(1000, Duration::from_secs(1));
    let begun = Instant::now();

    let mut starts = JoinSet::new();
    for _ in 0..2 {
        let poll = pacing.queue_repeated(RDS, &[ANN]);
        let session = store.session();
        starts.spawn(async move {
            let task = session.task(&[b"task"]);
            let max_age = Duration::ZERO;
            let request = Request::Poll {
                task: &task,
                max_age,
            };
            poll.start_in_fleet(&session, request).await
        });
    }

    for start in starts.join_all().await {
        assert_eq!(start, Ok(ANN));
    }
    let runs = store.runs("poll").await;
    let asked = runs.iter().map(|run| (run.at - begun).as_millis());
    assert_eq!(asked.collect::<Vec<_>>(), [0, 20]);
    let longest = LONGEST_POLL_WAIT.as_micros().to_string();
    assert!(runs.iter().all(|run| run.arg(6) == longest), "{runs:?}");
}

/// Makes the local rule apply for an hour, with a store that is up.
fn keep_to_share(pacing: &Arc<Pacing>) {
    pacing.lane(RDS).state().fleet = Some(Fleet {
        alone_until: Instant::now() + Duration::from_secs(3600),
        ..quiet_fleet()
    });
}

#[tokio::test(start_paused = true)]
async fn attempts_in_the_share_ask_the_store_for_a_start_that_has_waited_if_they_have() {
    let store = scripted(|_| reply("start", 0)).await;
    let pacing = pacing(1, Duration::from_secs(1));
    keep_to_share(&pacing);

    let mut starts = JoinSet::new();
    for _ in 0..3 {
        starts.spawn(start_in_fleet(&pacing, &store, in_seconds(9)));
    }

    let mut starts = starts.join_all().await;
    starts.sort_unstable_by_key(|(_, at)| *at);
    assert_eq!(starts, [(AT_ONCE, 0), (AT_ONCE, 1050), (AT_ONCE, 2100)]);
    let runs = store.runs("admit").await;
    let have_waited: Vec<_> = runs.iter().map(|run| run.arg(5)).collect();
    assert_eq!(have_waited, ["0", "1", "1"]);
}

#[tokio::test(start_paused = true)]
async fn the_store_may_delay_an_attempt_in_the_share_further() {
    let store = scripted(|number| match number {
        0 => reply("start", 300_000),
        _ => reply("start", 0),
    })
    .await;
    let pacing = pacing(1, Duration::from_secs(1));
    keep_to_share(&pacing);
    let begun = Instant::now();

    let start = start_in_fleet(&pacing, &store, in_seconds(9)).await;

    assert_eq!(start, (AT_ONCE, 300));
    let asked = asked(&store, begun).await;
    assert_eq!(asked, [(0, "1".to_owned()), (300, "0".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_the_store_has_not_seen_extends_the_local_rule() {
    let store = scripted(|_| reply("unknown", 0)).await;
    let pacing = pacing(1, Duration::from_secs(1));
    pacing.lane(RDS).state().fleet = Some(Fleet {
        is_up: false,
        ..quiet_fleet()
    });

    let start = start_in_fleet(&pacing, &store, in_seconds(9)).await;

    assert_eq!(start, (AT_ONCE, 0));
    let lane = pacing.lane(RDS);
    let until = lane.state().fleet.as_ref().unwrap().alone_until;
    assert_eq!(until - Instant::now(), Duration::from_secs(1) + JITTER);
}
