//! Circuit breaker on two levels: for each instance, and for the endpoint as a whole.
//!
//! The circuit of an *instance* opens after 8 consecutive failures and then admits one probe every 1.5 s. A call for another task of the
//! instance than the one that failed last is admitted as a probe at once. The circuit of the *endpoint* opens only if several distinct
//! instances fail, with several credentials if several are in use, without any success in between; any success closes it. While it is
//! open, every caller may probe.
//!
//! On both levels a caller has one probe in flight, and waits for 1.5 s after a failed one. Therefore the failures of one caller, even
//! with invented ids, do not make the breaker reject the calls of another.
//!
//! Failures are: no connection, reset, truncation, timeout, and the statuses 502, 503 and 504. Any other reply is a success, even if it
//! cannot be parsed: upstream is up if it replies.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::TaskQuery;
use crate::{caller::Caller, credentials::Identity};

/// The time between two probes. Short enough to recover within 2 s after upstream does; long enough that the probes of an instance take
/// at most 40 of the vendor's 60 requests per minute.
const PROBE_INTERVAL: Duration = Duration::from_millis(1500);

/// Consecutive failures after which the circuit of an instance opens.
const INSTANCE_FAILURES: u32 = 8;

/// Consecutive failures, and distinct instances among them, after which the circuit of the endpoint opens.
const ENDPOINT_FAILURES: u32 = 8;
const ENDPOINT_INSTANCES: usize = 3;

/// How long a failure counts: longer than an attempt takes until its timeout, so that a hanging upstream opens the circuit too.
const MEMORY: Duration = Duration::from_secs(30);

/// Limit on tracked failing instances; the one that failed longest ago is evicted first.
const MAX_INSTANCES: usize = 1024;

/// Limit on tracked callers per open circuit. Beyond it, one more probe goes out per [`PROBE_INTERVAL`].
const MAX_PROBERS: usize = 32;

/// The breaker of one endpoint, shared by all workers.
#[derive(Debug)]
pub(super) struct Breaker {
    hasher: RandomState,
    /// Whether any failure counts. If not, admission is two atomic loads.
    suspect: AtomicBool,
    state: Mutex<State>,
    /// The last two credentials in use.
    identities: Mutex<Identities>,
    /// 1 while the circuit of the endpoint is open.
    endpoint_open: Gauge,
    /// The number of instances whose circuit is open.
    instances_open: Gauge,
}

#[derive(Debug, Default)]
struct State {
    instances: HashMap<u64, Instance>,
    /// The latest failures, oldest first: the order of eviction.
    order: VecDeque<(u64, Instant)>,
    endpoint: Endpoint,
}

/// An instance with failures since its last success.
#[derive(Debug)]
struct Instance {
    failures: u32,
    failed_at: Instant,
    /// The hash of the task that failed last.
    task: u64,
    /// When the next probe may go out if the circuit is open.
    next_probe_at: Instant,
    probers: Probers,
}

/// Failures of the endpoint since the last success.
#[derive(Debug, Default)]
struct Endpoint {
    failures: u32,
    failed_at: Option<Instant>,
    instances: HashSet<u64>,
    identities: HashSet<Identity>,
    open: bool,
    probers: Probers,
}

/// The callers with a probe in flight or a recently failed one.
#[derive(Debug, Default)]
struct Probers {
    callers: HashMap<Caller, Prober>,
    /// The last probe of a caller that is not tracked.
    untracked_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prober {
    Probing,
    FailedAt(Instant),
}

/// The last two credentials in use, to see whether there is more than one.
#[derive(Debug, Default)]
struct Identities {
    last: Option<(Identity, Instant)>,
    before: Option<(Identity, Instant)>,
}

/// An attempt that asks for admission.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt<'a> {
    pub(super) query: &'a TaskQuery,
    pub(super) identity: Identity,
    pub(super) caller: Caller,
}

/// Permission for one attempt. Has no effect if dropped without [`Admission::succeeded`] or [`Admission::failed`], for example by a
/// cancelled call; another call may then probe.
#[derive(Debug)]
pub(super) struct Admission<'a> {
    breaker: &'a Breaker,
    instance: u64,
    task: u64,
    identity: Identity,
    caller: Caller,
    probes_instance: bool,
    probes_endpoint: bool,
}

impl Breaker {
    pub(super) fn new(endpoint_open: Gauge, instances_open: Gauge) -> Self {
        Self {
            hasher: RandomState::new(),
            suspect: AtomicBool::new(false),
            state: Mutex::default(),
            identities: Mutex::default(),
            endpoint_open,
            instances_open,
        }
    }

    /// Admits an attempt.
    ///
    /// # Errors
    /// The time until the next probe.
    pub(super) fn admit(&self, attempt: Attempt<'_>) -> Result<Admission<'_>, Duration> {
        let TaskQuery {
            project_id,
            instance_id,
            workflow_id,
            workflow_name,
        } = attempt.query;
        let mut admission = Admission {
            breaker: self,
            instance: self.hasher.hash_one((project_id, instance_id)),
            task: self.hasher.hash_one((workflow_id, workflow_name)),
            identity: attempt.identity,
            caller: attempt.caller,
            probes_instance: false,
            probes_endpoint: false,
        };
        if self.suspect.load(Ordering::Acquire) {
            let now = Instant::now();
            let mut state = self.lock();
            state.remove_old(now);
            // Checks both levels before it changes either: a rejected call must not use up the other level's probe.
            let probes_endpoint = state.endpoint.check(attempt.caller, now)?;
            let probes_instance = state.check_instance(&admission, now)?;
            if probes_endpoint {
                state.endpoint.probers.start(attempt.caller, now);
            }
            if probes_instance && let Some(instance) = state.instances.get_mut(&admission.instance)
            {
                instance.probers.start(attempt.caller, now);
            }
            admission.probes_endpoint = probes_endpoint;
            admission.probes_instance = probes_instance;
        }
        Ok(admission)
    }

    /// Whether the attempt would be admitted now, without using up a probe.
    ///
    /// # Errors
    /// As [`Breaker::admit`].
    pub(super) fn check(&self, attempt: Attempt<'_>) -> Result<(), Duration> {
        self.admit(attempt).map(drop)
    }

    fn several_identities(&self, used: Identity, now: Instant) -> bool {
        let mut identities = self
            .identities
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match identities.last {
            Some((last, _)) if last != used => identities.before = identities.last,
            _ => {}
        }
        identities.last = Some((used, now));
        identities
            .before
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < MEMORY)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether the attempt is a probe of its instance.
    fn check_instance(&self, admission: &Admission<'_>, now: Instant) -> Result<bool, Duration> {
        let Some(instance) = self.instances.get(&admission.instance) else {
            return Ok(false);
        };
        if instance.failures < INSTANCE_FAILURES {
            return Ok(false);
        }
        // The failures may come from the task and not from the instance.
        if instance.task != admission.task {
            if !instance.probers.is_probing(admission.caller) {
                instance.probers.check(admission.caller, now)?;
            }
            return Ok(true);
        }
        let wait = instance.next_probe_at.saturating_duration_since(now);
        if !wait.is_zero() {
            return Err(wait);
        }
        if instance.probers.is_any_probing() {
            return Err(PROBE_INTERVAL);
        }
        Ok(true)
    }

    /// Counts a failure. An attempt that was admitted before the circuit opened does not delay the next probe.
    fn instance_failed(&mut self, admission: &Admission<'_>, now: Instant) {
        let entry = self
            .instances
            .entry(admission.instance)
            .or_insert(Instance {
                failures: 0,
                failed_at: now,
                task: admission.task,
                next_probe_at: now,
                probers: Probers::default(),
            });
        entry.failures = entry.failures.saturating_add(1);
        entry.failed_at = now;
        entry.task = admission.task;
        if entry.failures == INSTANCE_FAILURES || admission.probes_instance {
            entry.next_probe_at = now + PROBE_INTERVAL;
        }
        if admission.probes_instance {
            entry.probers.failed(admission.caller, now);
        }
        self.order.push_back((admission.instance, now));
        self.remove_old(now);
    }

    /// Removes failures that are too old to count, unless a probe is in flight, and the oldest instances beyond the limit.
    fn remove_old(&mut self, now: Instant) {
        self.endpoint.remove_old(now);
        for _ in 0..self.order.len() {
            let Some((instance, at)) = self.order.front().copied() else {
                break;
            };
            let is_old = now.saturating_duration_since(at) >= MEMORY;
            if !is_old
                && self.instances.len() <= MAX_INSTANCES
                && self.order.len() <= 4 * MAX_INSTANCES
            {
                break;
            }
            self.order.pop_front();
            match self.instances.get(&instance) {
                // It has failed again since, so it has a later entry.
                Some(entry) if entry.failed_at != at => {}
                Some(entry) if entry.probers.is_any_probing() => {
                    self.order.push_back((instance, at));
                }
                _ => {
                    self.instances.remove(&instance);
                }
            }
        }
    }

    fn open_instances(&self) -> i64 {
        let open = |instance: &&Instance| instance.failures >= INSTANCE_FAILURES;
        self.instances.values().filter(open).count() as i64
    }
}

impl Endpoint {
    /// Whether the caller's attempt is a probe of the endpoint.
    fn check(&self, caller: Caller, now: Instant) -> Result<bool, Duration> {
        if !self.open {
            return Ok(false);
        }
        self.probers.check(caller, now)?;
        Ok(true)
    }

    fn remove_old(&mut self, now: Instant) {
        let is_old = |at| now.saturating_duration_since(at) >= MEMORY;
        if self.failed_at.is_some_and(is_old) && !self.probers.is_any_probing() {
            *self = Self::default();
        }
    }

    /// Counts a failure.
    fn failed(&mut self, admission: &Admission<'_>, several_identities: bool, now: Instant) {
        self.failed_at = Some(now);
        self.failures = self.failures.saturating_add(1);
        if self.instances.len() < ENDPOINT_INSTANCES {
            self.instances.insert(admission.instance);
        }
        if self.identities.len() < 2 {
            self.identities.insert(admission.identity);
        }
        let identities = if several_identities { 2 } else { 1 };
        self.open |= self.failures >= ENDPOINT_FAILURES
            && self.instances.len() >= ENDPOINT_INSTANCES
            && self.identities.len() >= identities;
        // An attempt that was admitted before the circuit opened does not delay the caller's next probe.
        if self.open
            && (admission.probes_endpoint || !self.probers.callers.contains_key(&admission.caller))
        {
            self.probers.failed(admission.caller, now);
        }
    }
}

impl Prober {
    fn counts(self, now: Instant) -> bool {
        match self {
            Self::Probing => true,
            Self::FailedAt(at) => now.saturating_duration_since(at) < PROBE_INTERVAL,
        }
    }
}

impl Probers {
    /// Whether `caller` may probe.
    fn check(&self, caller: Caller, now: Instant) -> Result<(), Duration> {
        match self.callers.get(&caller) {
            Some(Prober::Probing) => Err(PROBE_INTERVAL),
            Some(Prober::FailedAt(at)) => {
                let waited = now.saturating_duration_since(*at);
                match PROBE_INTERVAL.checked_sub(waited) {
                    Some(rest) if !rest.is_zero() => Err(rest),
                    _ => Ok(()),
                }
            }
            None if self.tracked(now) < MAX_PROBERS => Ok(()),
            None => match self.untracked_at.map(|at| at + PROBE_INTERVAL) {
                Some(next) if next > now => Err(next - now),
                _ => Ok(()),
            },
        }
    }

    /// Callers whose probe is in flight or has failed less than an interval ago.
    fn tracked(&self, now: Instant) -> usize {
        let probers = self.callers.values();
        probers.filter(|prober| prober.counts(now)).count()
    }

    fn is_probing(&self, caller: Caller) -> bool {
        self.callers.get(&caller) == Some(&Prober::Probing)
    }

    fn is_any_probing(&self) -> bool {
        self.callers
            .values()
            .any(|prober| *prober == Prober::Probing)
    }

    fn start(&mut self, caller: Caller, now: Instant) {
        if !self.insert(caller, Prober::Probing, now) {
            self.untracked_at = Some(now);
        }
    }

    fn failed(&mut self, caller: Caller, now: Instant) {
        self.insert(caller, Prober::FailedAt(now), now);
    }

    /// Tracks the caller, if the limit allows it.
    fn insert(&mut self, caller: Caller, prober: Prober, now: Instant) -> bool {
        self.callers.retain(|_, prober| prober.counts(now));
        let fits = self.callers.len() < MAX_PROBERS || self.callers.contains_key(&caller);
        if fits {
            self.callers.insert(caller, prober);
        }
        fits
    }

    fn cancelled(&mut self, caller: Caller) {
        if self.is_probing(caller) {
            self.callers.remove(&caller);
        }
    }
}

impl Admission<'_> {
    /// Upstream replied, and not with 502, 503 or 504.
    pub(super) fn succeeded(self) {
        let now = Instant::now();
        self.breaker.several_identities(self.identity, now);
        if !self.breaker.suspect.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.breaker.lock();
        state.remove_old(now);
        state.instances.remove(&self.instance);
        state.endpoint = Endpoint::default();
        self.breaker.endpoint_open.set(0);
        self.breaker.instances_open.set(state.open_instances());
        self.breaker
            .suspect
            .store(!state.instances.is_empty(), Ordering::Release);
    }

    /// The attempt failed, as defined in the module's documentation.
    pub(super) fn failed(self) {
        let now = Instant::now();
        let several = self.breaker.several_identities(self.identity, now);
        let mut state = self.breaker.lock();
        state.instance_failed(&self, now);
        let was_open = state.endpoint.open;
        state.endpoint.failed(&self, several, now);
        if state.endpoint.open && !was_open {
            tracing::warn!(
                "the RDS endpoint is down: rejecting calls, except for probes, until one succeeds"
            );
        }
        self.breaker
            .endpoint_open
            .set(i64::from(state.endpoint.open));
        self.breaker.instances_open.set(state.open_instances());
        self.breaker.suspect.store(true, Ordering::Release);
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if !self.probes_instance && !self.probes_endpoint {
            return;
        }
        let mut state = self.breaker.lock();
        if self.probes_instance
            && let Some(instance) = state.instances.get_mut(&self.instance)
        {
            instance.probers.cancelled(self.caller);
        }
        if self.probes_endpoint {
            state.endpoint.probers.cancelled(self.caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    async fn old_failures_do_not_count() {
        let breaker = breaker();
        fail(&breaker, ANN, 1, INSTANCE_FAILURES - 1);
        tokio::time::advance(MEMORY).await;

        fail(&breaker, ANN, 1, INSTANCE_FAILURES - 1);

        assert!(admit(&breaker, ANN, 1, "t").is_ok());
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

        let hanging: Vec<_> = (200..300)
            .filter_map(|number| {
                admit(&breaker, Caller::Connection(number), number as usize, "t").ok()
            })
            .collect();
        assert_eq!(hanging.len(), MAX_PROBERS + 1);
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

        let state = breaker.lock();
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
}
