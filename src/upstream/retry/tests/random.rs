//! Calls that fail at random, one after the other, at the same time and on several threads.

use std::{
    collections::VecDeque,
    sync::{Arc, Barrier},
    thread,
};

use proptest::prelude::*;
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinSet,
    time::sleep,
};

use super::*;
use crate::deadline::Deadline;

const ANN: Caller = Caller::Connection(1);

fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

fn in_paused_time<T>(test: impl Future<Output = T>) -> T {
    paused().block_on(test)
}

fn millis(most: u64) -> impl Strategy<Value = Duration> {
    (0..=most).prop_map(Duration::from_millis)
}

fn failed() -> impl Strategy<Value = Advice> {
    let repeat = prop_oneof![
        1 => Just(Repeat::Never),
        2 => Just(Repeat::Once),
        8 => Just(Repeat::Backoff),
    ];
    (repeat, any::<bool>(), prop::option::of(millis(40_000))).prop_map(
        |(repeat, at_once, retry_after)| Advice {
            repeat,
            at_once,
            retry_after,
        },
    )
}

#[derive(Debug, Clone)]
enum Step {
    Call,
    Pay,
    Wait(Duration),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Call),
        8 => Just(Step::Pay),
        1 => millis(12_000).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn each_wait_is_within_its_bounds_and_each_end_has_a_cause(
        max in 1..=10u32,
        spent in 0..=20u64,
        failures in prop::collection::vec((failed(), millis(60_000)), 1..30),
        jitter: u64,
    ) {
        fastrand::seed(jitter);
        in_paused_time(async {
            let budget = Budget::new(0);
            for _ in 0..spent.min(RESERVE) {
                assert!(budget.withdraw(ANN));
            }
            let mut unspent = RESERVE.saturating_sub(spent);
            let mut attempts = Attempts::new(max);
            let (mut made, mut repeated_once) = (1, false);
            for (failed, remaining) in failures {
                let ceiling = Duration::from_millis(50 << (made - 1)).min(Duration::from_secs(2));
                let least = failed.retry_after.unwrap_or_default();
                let most = match failed {
                    Advice { retry_after: None, at_once: true, .. } if made == 1 => Duration::ZERO,
                    _ => least + ceiling,
                };
                let forbidden = match failed.repeat {
                    Repeat::Never => true,
                    Repeat::Once => repeated_once,
                    Repeat::Backoff => false,
                } || made == max || unspent == 0;

                match attempts.next(failed, remaining, &budget, ANN) {
                    Some(wait) => {
                        assert!(!forbidden);
                        assert!(wait >= least && wait <= most, "{wait:?}, {failed:?}");
                        assert!(wait + FLOOR < remaining, "{wait:?} of {remaining:?}");
                        made += 1;
                        unspent -= 1;
                        repeated_once |= failed.repeat == Repeat::Once;
                    }
                    None => assert!(forbidden || most + FLOOR >= remaining, "{failed:?}"),
                }
            }
        });
    }

    #[test]
    fn the_budget_is_the_reserve_and_the_share_of_the_last_ten_seconds_calls(
        percent in 0..=200u32,
        steps in prop::collection::vec(step(), 1..300),
    ) {
        in_paused_time(async {
            let budget = Budget::new(percent);
            let mut now = Duration::ZERO;
            let (mut calls, mut retries) = (VecDeque::new(), VecDeque::new());
            for step in steps {
                match step {
                    Step::Call => {
                        budget.call();
                        calls.push_back(now.as_secs());
                    }
                    Step::Wait(length) => {
                        tokio::time::advance(length).await;
                        now += length;
                        for times in [&mut calls, &mut retries] {
                            times.retain(|second| second + 10 > now.as_secs());
                        }
                    }
                    Step::Pay => {
                        let most = 10 + calls.len() * percent as usize / 100;
                        let paid = budget.withdraw(ANN);
                        assert_eq!(paid, retries.len() < most, "{retries:?} of {most}");
                        if paid {
                            retries.push_back(now.as_secs());
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn calls_side_by_side_stay_within_attempts_deadline_and_budget(
        max in 1..=10u32,
        percent in 0..=50u32,
        calls in prop::collection::vec((millis(9_000), millis(20_000)), 1..60),
        jitter: u64,
    ) {
        fastrand::seed(jitter);
        in_paused_time(async {
            let budget = Arc::new(Budget::new(percent));
            let number = calls.len() as u64;
            let runs = calls.into_iter().map(|(begins, timeout)| {
                let budget = Arc::clone(&budget);
                async move {
                    sleep(begins).await;
                    budget.call();
                    let deadline = Deadline::after(timeout);
                    let mut attempts = Attempts::new(max);
                    let mut retries = 0;
                    let failed = Advice { repeat: Repeat::Backoff, at_once: true, retry_after: None };
                    while let Some(wait) = attempts.next(failed, deadline.remaining(), &budget, ANN) {
                        sleep(wait).await;
                        assert!(!deadline.remaining().is_zero());
                        retries += 1;
                    }
                    assert!(retries < max);
                    (deadline.at(), u64::from(retries))
                }
            });
            let ended = runs.collect::<JoinSet<_>>().join_all().await;
            let retries: u64 = ended.iter().map(|(_, retries)| retries).sum();
            // The last call ends in the thirtieth second at the latest, so the reserve is renewed twice.
            assert!(retries <= 3 * (RESERVE + number * u64::from(percent) / 100), "{retries}");
        });
    }
}

#[test]
fn threads_that_pay_at_the_same_moment_do_not_overdraw_the_budget() {
    const THREADS: usize = 4;
    // Its clock stands still, for all that enter it: the moment is the same however slow the machine.
    let runtime = paused();
    for _ in 0..300 {
        let _clock = runtime.enter();
        let budget = Arc::new(Budget::new(0));
        let begin = Arc::new(Barrier::new(THREADS));
        let threads = [(); THREADS].map(|()| {
            let (budget, begin) = (Arc::clone(&budget), Arc::clone(&begin));
            let runtime = runtime.handle().clone();
            thread::spawn(move || {
                let _clock = runtime.enter();
                begin.wait();
                (0..20).filter(|_| budget.withdraw(ANN)).count()
            })
        });

        let paid: usize = threads.map(|thread| thread.join().unwrap()).iter().sum();

        assert_eq!(paid, RESERVE as usize);
    }
}
