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

mod probers;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use self::probers::{PROBE_INTERVAL, Probers};
use super::TaskQuery;
use crate::{caller::Caller, credentials::Identity};

/// Consecutive failures after which the circuit of an instance opens.
const INSTANCE_FAILURES: u32 = 8;

/// Consecutive failures, and distinct instances among them, after which the circuit of the endpoint opens.
const ENDPOINT_FAILURES: u32 = 8;
const ENDPOINT_INSTANCES: usize = 3;

/// How long a failure counts: longer than an attempt takes until its timeout, so that a hanging upstream opens the circuit too.
const MEMORY: Duration = Duration::from_secs(30);

/// Limit on tracked failing instances; the one that failed longest ago is evicted first.
const MAX_INSTANCES: usize = 1024;

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
            let mut state = self.state.lock();
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
        let mut identities = self.identities.lock();
        match identities.last {
            Some((last, _)) if last != used => identities.before = identities.last,
            _ => {}
        }
        identities.last = Some((used, now));
        identities
            .before
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < MEMORY)
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

impl Admission<'_> {
    /// Upstream replied, and not with 502, 503 or 504.
    pub(super) fn succeeded(self) {
        let now = Instant::now();
        self.breaker.several_identities(self.identity, now);
        if !self.breaker.suspect.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.breaker.state.lock();
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
        let mut state = self.breaker.state.lock();
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
        let mut state = self.breaker.state.lock();
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
