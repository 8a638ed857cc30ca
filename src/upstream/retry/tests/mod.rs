/// Random calls.
mod random;

use super::*;

const ANN: Caller = Caller::Connection(1);
const BOB: Caller = Caller::Connection(2);
const LONG: Duration = Duration::from_secs(30);
const BACKOFF: Advice = Advice {
    repeat: Repeat::Backoff,
    at_once: false,
    retry_after: None,
};

#[tokio::test(start_paused = true)]
async fn attempts_end_at_the_maximum() {
    let budget = Budget::new(100);
    let mut attempts = Attempts::new(3);

    let waits = [(); 3].map(|()| attempts.next(BACKOFF, LONG, &budget, ANN).is_some());

    assert_eq!(waits, [true, true, false]);
    assert_eq!(Attempts::new(1).next(BACKOFF, LONG, &budget, ANN), None);
}

#[tokio::test(start_paused = true)]
async fn once_is_once_and_never_is_never() {
    let budget = Budget::new(100);
    let once = Advice {
        repeat: Repeat::Once,
        ..BACKOFF
    };
    let never = Advice {
        repeat: Repeat::Never,
        ..BACKOFF
    };
    let mut attempts = Attempts::new(10);

    assert!(attempts.next(once, LONG, &budget, ANN).is_some());
    assert_eq!(attempts.next(once, LONG, &budget, ANN), None);
    assert!(attempts.next(BACKOFF, LONG, &budget, ANN).is_some());
    assert_eq!(attempts.next(never, LONG, &budget, ANN), None);
}

#[tokio::test(start_paused = true)]
async fn the_wait_grows_to_the_cap_and_is_jittered() {
    for made in 1..=12 {
        let ceiling = Duration::from_millis((50u64 << (made - 1)).min(2000));
        let waits: Vec<_> = (0..200).map(|_| full_jitter(made)).collect();

        assert!(waits.iter().all(|wait| *wait <= ceiling), "attempt {made}");
        assert!(
            waits.iter().any(|wait| *wait > ceiling / 2),
            "attempt {made}"
        );
        assert!(
            waits.iter().any(|wait| *wait < ceiling / 2),
            "attempt {made}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn only_a_first_retry_goes_out_at_once_and_each_later_one_may_wait_twice_as_long() {
    let retries = |failed| {
        let budget = Budget::new(0);
        let mut attempts = Attempts::new(4);
        [(); 3].map(|()| attempts.next(failed, LONG, &budget, ANN).unwrap())
    };
    let at_once = Advice {
        at_once: true,
        ..BACKOFF
    };
    let longest = |failed, nth: usize| (0..200).map(|_| retries(failed)[nth]).max().unwrap();

    assert_eq!(longest(at_once, 0), Duration::ZERO);
    for (failed, nth, ceiling) in [(BACKOFF, 0, 50), (at_once, 1, 100), (at_once, 2, 200)] {
        let (longest, ceiling) = (longest(failed, nth), Duration::from_millis(ceiling));
        assert!(
            longest > ceiling / 2 && longest <= ceiling,
            "{longest:?} of {ceiling:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_obeyed_within_the_deadline_only() {
    let budget = Budget::new(100);
    let asked = Advice {
        retry_after: Some(Duration::from_secs(2)),
        ..BACKOFF
    };

    let wait = Attempts::new(3).next(asked, LONG, &budget, ANN);
    assert!(
        wait.is_some_and(
            |wait| wait >= Duration::from_secs(2) && wait <= Duration::from_secs(2) + BACKOFF_BASE
        ),
        "{wait:?}"
    );
    assert_eq!(
        Attempts::new(3).next(asked, Duration::from_secs(2), &budget, ANN),
        None
    );
}

#[tokio::test(start_paused = true)]
async fn no_retry_starts_below_the_floor() {
    let budget = Budget::new(100);
    let at_once = Advice {
        at_once: true,
        ..BACKOFF
    };

    assert_eq!(Attempts::new(3).next(at_once, FLOOR, &budget, ANN), None);
    assert_eq!(
        Attempts::new(3).next(at_once, FLOOR * 2, &budget, ANN),
        Some(Duration::ZERO)
    );
}

#[tokio::test(start_paused = true)]
async fn the_budget_allows_the_reserve_and_a_share_of_the_calls() {
    let budget = Budget::new(20);
    for _ in 0..100 {
        budget.call();
    }

    let paid = (0..100).filter(|_| budget.withdraw(ANN)).count();

    assert_eq!(paid, 10 + 20);
}

#[tokio::test(start_paused = true)]
async fn the_budget_recovers_when_the_window_has_passed() {
    let budget = Budget::new(0);
    let spent = (0..100).filter(|_| budget.withdraw(ANN)).count();

    tokio::time::advance(Duration::from_secs(10)).await;

    assert_eq!(spent, 10);
    assert!(budget.withdraw(ANN));
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_not_made_costs_nothing() {
    let budget = Budget::new(0);
    for _ in 0..100 {
        assert_eq!(Attempts::new(3).next(BACKOFF, FLOOR, &budget, ANN), None);
    }

    assert!(budget.withdraw(ANN));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_uses_up_the_budget_leaves_the_others_their_share() {
    let budget = Budget::new(0);
    let spent = (0..100).filter(|_| budget.withdraw(ANN)).count();

    let bobs = (0..100).filter(|_| budget.withdraw(BOB)).count();
    let anns = (0..100).filter(|_| budget.withdraw(ANN)).count();
    let others = (0..1000).filter(|number| budget.withdraw(Caller::Connection(100 + number)));

    assert_eq!((spent, bobs, anns), (10, 5, 0));
    assert!(
        others.count() <= 10,
        "together at most the budget once more"
    );
}
