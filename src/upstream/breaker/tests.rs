use proptest::prelude::*;

use super::{probers::MAX_PROBERS, *};

const ANN: Caller = Caller::Connection(1);
const BOB: Caller = Caller::Connection(2);

fn breaker() -> Breaker {
    Breaker::new(Gauge::default(), Gauge::default())
}

fn query(instance: usize, task: &str) -> TaskQuery {
    TaskQuery {
        project_id: "p".to_owned(),
        instance_id: format!("i{instance}"),
        workflow_id: task.to_owned(),
        workflow_name: None,
    }
}

fn admit<'a>(
    breaker: &'a Breaker,
    caller: Caller,
    instance: usize,
    task: &str,
) -> Result<Admission<'a>, Duration> {
    breaker.admit(Attempt {
        query: &query(instance, task),
        identity: Identity::Server,
        caller,
    })
}

fn fail(breaker: &Breaker, caller: Caller, instance: usize, times: u32) {
    for _ in 0..times {
        let admission = admit(breaker, caller, instance, "t");
        admission.expect("a closed circuit").failed();
    }
}

/// Fails calls of `caller` about several instances until the circuit of the endpoint opens.
fn bring_down(breaker: &Breaker, caller: Caller) {
    for instance in (0..ENDPOINT_INSTANCES)
        .cycle()
        .take(ENDPOINT_FAILURES as usize)
    {
        fail(breaker, caller, instance, 1);
    }
    assert_eq!(breaker.endpoint_open.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_circuit_of_a_failing_instance_does_not_affect_others() {
    let breaker = breaker();

    fail(&breaker, ANN, 1, INSTANCE_FAILURES);

    assert_eq!(admit(&breaker, BOB, 1, "t").unwrap_err(), PROBE_INTERVAL);
    for caller in [ANN, BOB] {
        assert!(admit(&breaker, caller, 2, "t").is_ok());
    }
    assert_eq!(breaker.endpoint_open.get(), 0);
    assert_eq!(breaker.instances_open.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_for_another_task_is_a_probe_and_its_success_closes_the_circuit() {
    let breaker = breaker();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);

    let other = admit(&breaker, BOB, 1, "another").expect("it did not fail last");
    assert!(admit(&breaker, BOB, 1, "t").is_err());
    let third = admit(&breaker, BOB, 1, "third").expect("another task, too");
    third.failed();
    assert!(
        admit(&breaker, BOB, 1, "fourth").is_err(),
        "a probe has failed"
    );
    other.succeeded();

    assert!(admit(&breaker, ANN, 1, "t").is_ok());
    assert_eq!(breaker.instances_open.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_open_instance_is_probed_once_per_interval() {
    let breaker = breaker();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);
    tokio::time::advance(PROBE_INTERVAL).await;

    let probe = admit(&breaker, ANN, 1, "t").expect("the first probe");
    assert!(admit(&breaker, BOB, 1, "t").is_err(), "a second probe");
    probe.failed();
    assert_eq!(admit(&breaker, ANN, 1, "t").unwrap_err(), PROBE_INTERVAL);

    tokio::time::advance(PROBE_INTERVAL).await;
    drop(admit(&breaker, ANN, 1, "t").expect("a probe that is cancelled"));
    admit(&breaker, ANN, 1, "t")
        .expect("another probe")
        .succeeded();
    assert!(admit(&breaker, BOB, 1, "t").is_ok());
}

#[tokio::test(start_paused = true)]
async fn several_failing_instances_and_no_success_open_the_endpoint() {
    for (instances, opens) in [(ENDPOINT_INSTANCES - 1, false), (ENDPOINT_INSTANCES, true)] {
        let breaker = breaker();

        for instance in (0..instances).cycle().take(ENDPOINT_FAILURES as usize) {
            fail(&breaker, ANN, instance, 1);
        }

        assert_eq!(breaker.endpoint_open.get() == 1, opens, "{instances}");
        assert_eq!(admit(&breaker, ANN, 9, "t").is_err(), opens, "{instances}");
    }
}

#[tokio::test(start_paused = true)]
async fn while_others_succeed_no_number_of_failing_ids_opens_the_endpoint() {
    let breaker = breaker();

    for instance in 0..10_000 {
        fail(&breaker, ANN, instance, 1);
        if instance % 5 == 0 {
            admit(&breaker, BOB, 77_777, "t")
                .expect("others are up")
                .succeeded();
        }
    }

    assert_eq!(breaker.endpoint_open.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_caller_without_failures_gets_through_an_open_endpoint_and_closes_it() {
    let breaker = breaker();
    bring_down(&breaker, ANN);

    assert_eq!(admit(&breaker, ANN, 9, "t").unwrap_err(), PROBE_INTERVAL);
    let probe = admit(&breaker, BOB, 9, "t").expect("it has not failed");
    assert!(admit(&breaker, BOB, 8, "t").is_err(), "one probe a caller");
    assert!(admit(&breaker, ANN, 8, "t").is_err(), "it has just failed");
    probe.succeeded();

    assert_eq!(breaker.endpoint_open.get(), 0);
    assert!(admit(&breaker, ANN, 9, "t").is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_caller_that_failed_probes_the_endpoint_once_in_each_interval() {
    let breaker = breaker();
    bring_down(&breaker, ANN);
    for _ in 0..3 {
        tokio::time::advance(PROBE_INTERVAL).await;
        let probe = admit(&breaker, ANN, 9, "t").expect("a probe");
        assert!(admit(&breaker, ANN, 8, "t").is_err(), "a second probe");
        probe.failed();
    }
}

#[tokio::test(start_paused = true)]
async fn with_several_credentials_in_use_failures_of_one_do_not_open_the_endpoint() {
    let breaker = breaker();
    let identity = |number| Identity::Caller([number; 16]);
    let query = query(99, "t");
    let good = Attempt {
        query: &query,
        identity: identity(1),
        caller: BOB,
    };
    breaker.admit(good).expect("up").succeeded();

    for (number, opens) in [(2, false), (3, true)] {
        for instance in 0..20 {
            let query = self::query(instance, "t");
            let identity = identity(number);
            let attempt = Attempt {
                query: &query,
                identity,
                caller: ANN,
            };
            if let Ok(admission) = breaker.admit(attempt) {
                admission.failed();
            }
        }
        assert_eq!(breaker.endpoint_open.get() == 1, opens, "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_that_end_late_do_not_delay_probes() {
    let breaker = breaker();
    let late: Vec<_> = (0..30)
        .map(|number| admit(&breaker, ANN, number % 3, "t").expect("up"))
        .collect();
    bring_down(&breaker, ANN);
    tokio::time::advance(PROBE_INTERVAL / 2).await;

    late.into_iter().for_each(Admission::failed);

    assert_eq!(
        admit(&breaker, ANN, 9, "t").unwrap_err(),
        PROBE_INTERVAL / 2
    );
}

#[tokio::test(start_paused = true)]
async fn attempts_that_end_late_do_not_delay_the_probe_of_an_instance() {
    let breaker = breaker();
    let late: Vec<_> = (0..5)
        .map(|_| admit(&breaker, ANN, 1, "t").expect("up"))
        .collect();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);
    tokio::time::advance(PROBE_INTERVAL / 2).await;

    late.into_iter().for_each(Admission::failed);

    assert_eq!(
        admit(&breaker, ANN, 1, "t").unwrap_err(),
        PROBE_INTERVAL / 2
    );
}

#[tokio::test(start_paused = true)]
async fn a_check_has_the_result_of_an_admission_and_uses_up_no_probe() {
    let breaker = breaker();
    let query = query(1, "t");
    let attempt = Attempt {
        query: &query,
        identity: Identity::Server,
        caller: ANN,
    };
    assert_eq!(breaker.check(attempt), Ok(()));
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);

    assert_eq!(breaker.check(attempt), Err(PROBE_INTERVAL));
    tokio::time::advance(PROBE_INTERVAL).await;
    assert_eq!(breaker.check(attempt), Ok(()));
    assert!(breaker.admit(attempt).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_credential_that_is_no_longer_in_use_does_not_keep_the_endpoint_closed() {
    let breaker = breaker();
    let query = query(9, "t");
    let other = Attempt {
        query: &query,
        identity: Identity::Caller([1; 16]),
        caller: BOB,
    };
    breaker.admit(other).expect("up").succeeded();
    tokio::time::advance(MEMORY).await;

    bring_down(&breaker, ANN);
}

#[tokio::test(start_paused = true)]
async fn a_probe_in_flight_keeps_old_failures() {
    for is_endpoint in [false, true] {
        let breaker = breaker();
        if is_endpoint {
            bring_down(&breaker, ANN);
        } else {
            fail(&breaker, ANN, 9, INSTANCE_FAILURES);
        }
        tokio::time::advance(PROBE_INTERVAL).await;
        let probe = admit(&breaker, ANN, 9, "t").expect("a probe");
        tokio::time::advance(MEMORY).await;

        assert!(admit(&breaker, ANN, 9, "t").is_err(), "{is_endpoint}");
        drop(probe);
        assert!(admit(&breaker, ANN, 9, "t").is_ok(), "{is_endpoint}");
    }
}

#[tokio::test(start_paused = true)]
async fn many_failures_of_one_instance_do_not_evict_another() {
    let breaker = breaker();
    let late: Vec<_> = (0..2 * MAX_INSTANCES)
        .map(|_| admit(&breaker, BOB, 2, "t").expect("up"))
        .collect();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);

    late.into_iter().for_each(Admission::failed);

    assert!(admit(&breaker, ANN, 1, "t").is_err());
}

#[tokio::test(start_paused = true)]
async fn old_failures_do_not_count() {
    let breaker = breaker();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES - 1);
    tokio::time::advance(MEMORY).await;

    fail(&breaker, ANN, 1, INSTANCE_FAILURES - 1);

    assert!(admit(&breaker, ANN, 1, "t").is_ok());
    tokio::time::advance(MEMORY).await;
    for instance in 0..ENDPOINT_FAILURES as usize - 1 {
        fail(&breaker, ANN, instance, 1);
    }
    assert_eq!(breaker.endpoint_open.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn probes_that_take_as_long_as_an_attempt_keep_the_circuits_open() {
    for is_endpoint in [false, true] {
        let breaker = breaker();
        if is_endpoint {
            bring_down(&breaker, ANN);
        } else {
            fail(&breaker, ANN, 9, INSTANCE_FAILURES);
        }
        for round in 0..5 {
            tokio::time::advance(PROBE_INTERVAL).await;
            let probe = admit(&breaker, ANN, 9, "t").expect("a probe");
            tokio::time::advance(Duration::from_secs(10)).await;
            probe.failed();

            assert!(admit(&breaker, ANN, 9, "t").is_err(), "{round}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn new_callers_probe_although_many_others_have_failed_or_hang() {
    let breaker = breaker();
    bring_down(&breaker, ANN);
    for number in 100..100 + MAX_PROBERS as u64 {
        fail(&breaker, Caller::Connection(number), number as usize, 1);
    }
    tokio::time::advance(PROBE_INTERVAL).await;
    assert!(admit(&breaker, BOB, 9, "t").is_ok());

    let mut hanging: Vec<_> = (200..300)
        .filter_map(|number| admit(&breaker, Caller::Connection(number), number as usize, "t").ok())
        .collect();
    assert_eq!(hanging.len(), MAX_PROBERS + 1);
    assert!(admit(&breaker, BOB, 9, "t").is_err(), "too many probes");
    drop(hanging.remove(0));
    drop(admit(&breaker, BOB, 9, "t").expect("a cancelled probe makes room"));
    tokio::time::advance(PROBE_INTERVAL).await;
    admit(&breaker, BOB, 9, "t").expect("one more").succeeded();

    assert_eq!(breaker.endpoint_open.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn failures_that_no_call_follows_are_removed_at_the_next_success_of_another() {
    let breaker = breaker();
    fail(&breaker, ANN, 1, INSTANCE_FAILURES);
    tokio::time::advance(MEMORY).await;

    admit(&breaker, ANN, 2, "t").expect("up").succeeded();

    assert_eq!(breaker.instances_open.get(), 0);
    assert!(!breaker.suspect.load(Ordering::Acquire));
}

#[tokio::test(start_paused = true)]
async fn failing_instances_and_callers_are_tracked_up_to_a_limit() {
    let breaker = breaker();

    for number in 0..100_000 {
        let caller = Caller::Connection(number as u64);
        if let Ok(admission) = admit(&breaker, caller, number, "t") {
            admission.failed();
        }
    }

    let state = breaker.state.lock();
    assert!(state.instances.len() <= MAX_INSTANCES + 1);
    assert!(state.order.len() <= 4 * MAX_INSTANCES + 1);
    assert!(state.endpoint.probers.callers.len() <= MAX_PROBERS);
}

/// One step of a random run: an attempt, or elapsed time.
#[derive(Debug, Clone)]
enum Step {
    Fails(u64, usize, usize),
    Succeeds(u64, usize, usize),
    Cancels(u64, usize, usize),
    Passes(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let call = || (0..3u64, 0..5usize, 0..2usize);
    prop_oneof![
        4 => call().prop_map(|(caller, instance, task)| Step::Fails(caller, instance, task)),
        1 => call().prop_map(|(caller, instance, task)| Step::Succeeds(caller, instance, task)),
        1 => call().prop_map(|(caller, instance, task)| Step::Cancels(caller, instance, task)),
        2 => (0..3000u64).prop_map(Step::Passes),
    ]
}

proptest! {
    /// After any history, a caller without failures is admitted for healthy instances, and a success closes the circuit of an
    /// instance for all callers.
    #[test]
    fn no_history_keeps_a_fresh_caller_from_a_healthy_instance(
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let breaker = breaker();
            for step in steps {
                let admit = |caller, instance, task: usize| {
                    let caller = Caller::Connection(caller);
                    admit(&breaker, caller, instance, ["a", "b"][task]).ok()
                };
                match step {
                    Step::Fails(caller, instance, task) => {
                        let _ = admit(caller, instance, task).map(Admission::failed);
                    }
                    Step::Succeeds(caller, instance, task) => {
                        let _ = admit(caller, instance, task).map(Admission::succeeded);
                    }
                    Step::Cancels(caller, instance, task) => drop(admit(caller, instance, task)),
                    Step::Passes(millis) => {
                        tokio::time::advance(Duration::from_millis(millis)).await;
                    }
                }
            }

            let fresh = admit(&breaker, Caller::Connection(9), 9, "t");
            fresh.expect("a caller that never failed, a healthy instance").succeeded();
            prop_assert_eq!(breaker.endpoint_open.get(), 0);
            tokio::time::advance(PROBE_INTERVAL).await;
            for instance in 0..5 {
                let probe = admit(&breaker, ANN, instance, "a");
                probe.expect("a probe in each interval").succeeded();
                prop_assert!(admit(&breaker, BOB, instance, "b").is_ok());
            }
            prop_assert_eq!(breaker.instances_open.get(), 0);
            Ok(())
        })?;
    }
}
