//! Keeps the gateway from locking a wrong key, and fails calls at once while a key is locked.
//!
//! The gateway locks a key for five minutes after more than five bad signatures in a row ("API request signing guide"), for every
//! program that uses it. So a key that has never been accepted in this process rests after its first rejection, and any other key
//! after its third rejection in a row. Until a key is accepted, and again after a rejection, one request is in flight at a time; if it gets
//! no reply within a second, another caller may send one too, so that one hanging instance does not block all callers. A quota store
//! limits these probes for all replicas together. A permit for a proven key costs one atomic load.
//!
//! A rejection may be about the project of the call and not about the key: a project for which the key has never been accepted, although
//! it has been for another one, counts once. A success that was sent after the rejections clears them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use super::Error;
use crate::{caller::Caller, deadline::Deadline};

/// How long the gateway locks a key after too many bad signatures. Source: "API request signing guide", FAQ.
pub const KEY_LOCK: Duration = Duration::from_secs(5 * 60);

/// Rejections in a row after which a proven key rests. The gateway allows five; the rest is for other programs that use the key.
pub const REJECTIONS_BEFORE_REST: usize = 3;

/// How long the probe of one caller keeps the probes of others waiting. The gateway rejects a signature faster.
pub const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// Limit on concurrent probes: all of them may be rejected.
const MAX_PROBES: usize = 3;

/// Projects that are remembered as accepted.
const MAX_PROJECTS: usize = 64;

/// Instances with a guard of their own. Beyond it, all of them start again without evidence.
const MAX_INSTANCES: usize = 1024;

/// The guard of one key.
#[derive(Debug, Default)]
pub struct KeyGuard {
    /// The latest evidence is an accepted signature, and the key does not rest.
    proven: AtomicBool,
    /// Counts the rejections. A request whose permit has an older count was sent before the last rejection.
    epoch: AtomicU64,
    evidence: Mutex<Evidence>,
    /// Wakes the calls that wait for a permit.
    changed: Notify,
    /// The end of the rest of a key that was never accepted: the server is not ready before it.
    unproven_rest: watch::Sender<Option<Instant>>,
    /// The guards that [`KeyGuard::scoped`] has created.
    instances: Mutex<HashMap<String, Arc<KeyGuard>>>,
    /// When the key was last reported to the other replicas as accepted.
    reported: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Evidence {
    /// The callers with a request in flight whose outcome other calls wait for, and since when.
    probes: HashMap<Caller, Instant>,
    /// The projects of the rejections since the last accepted signature.
    rejections: Vec<String>,
    /// Projects for which the key has been accepted.
    accepted: Vec<String>,
    /// The next rejection starts a rest: the key has rested since its last accepted signature.
    wary: bool,
    rests_until: Option<Instant>,
}

impl KeyGuard {
    /// The guard of the key in requests for `instance`, if evidence is kept for each instance; else this guard.
    pub fn scoped(self: &Arc<Self>, instance: Option<&str>) -> Arc<Self> {
        let Some(instance) = instance else {
            return Arc::clone(self);
        };
        let mut guards = self.instances.lock();
        if guards.len() >= MAX_INSTANCES && !guards.contains_key(instance) {
            guards.clear();
        }
        let guard = guards.entry(instance.to_owned()).or_insert_with(|| {
            Arc::new(Self {
                unproven_rest: self.unproven_rest.clone(),
                ..Self::default()
            })
        });
        Arc::clone(guard)
    }

    /// The end of the rest of a key that was never accepted, if it has rested.
    pub fn unproven_rest(&self) -> watch::Receiver<Option<Instant>> {
        self.unproven_rest.subscribe()
    }

    /// Waits until a request for `project_id` may be signed with the key.
    ///
    /// # Errors
    /// - [`Error::Locked`]: the key rests; no call waits for that.
    /// - [`Error::DeadlineExceeded`]: the requests of other calls that try the key out took too long.
    pub async fn admit<'a>(
        &'a self,
        project_id: &'a str,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<SigningPermit<'a>, Error> {
        loop {
            if self.proven.load(Ordering::Acquire) {
                return Ok(self.admission(project_id, None));
            }
            // Registers before the check, so that the end of a probe between the two wakes this call.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(admitted) = self.try_probe(project_id, caller) {
                return admitted;
            }
            if let Ok(bounded) = timeout(PROBE_PATIENCE, deadline.bound(changed)).await {
                bounded.map_err(|_| Error::DeadlineExceeded)?;
            }
        }
    }

    /// Admits a call whose request tries the key out. `None` while other probes are in flight.
    fn try_probe<'a>(
        &'a self,
        project_id: &'a str,
        caller: Caller,
    ) -> Option<Result<SigningPermit<'a>, Error>> {
        let now = Instant::now();
        let mut evidence = self.evidence.lock();
        if let Some(until) = evidence.rests_until {
            let retry_after = until.saturating_duration_since(now);
            if !retry_after.is_zero() {
                return Some(Err(Error::Locked { retry_after }));
            }
            evidence.rests_until = None;
        }
        // The key may have been proven before this call took the mutex.
        if self.proven.load(Ordering::Acquire) {
            return Some(Ok(self.admission(project_id, None)));
        }
        let is_slow = |at: &Instant| now.saturating_duration_since(*at) >= PROBE_PATIENCE;
        let probes = &mut evidence.probes;
        if probes.contains_key(&caller)
            || probes.len() >= MAX_PROBES
            || !probes.values().all(is_slow)
        {
            return None;
        }
        probes.insert(caller, now);
        Some(Ok(self.admission(project_id, Some(caller))))
    }

    fn admission<'a>(&'a self, project_id: &'a str, probe: Option<Caller>) -> SigningPermit<'a> {
        SigningPermit {
            guard: self,
            project_id,
            epoch: self.epoch.load(Ordering::Acquire),
            probe,
        }
    }

    /// Another replica has evidence for which the key rests.
    pub fn rest_for(&self, time: Duration) {
        self.rest(self.evidence.lock(), time);
    }

    /// Whether the latest evidence is an accepted signature.
    pub fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Acquire)
    }

    /// Whether the other replicas have got no report of an accepted signature within `interval`. If so, one is made now.
    pub fn is_report_due(&self, interval: Duration) -> bool {
        let mut reported = self.reported.lock();
        let is_due = reported.is_none_or(|at| at.elapsed() >= interval);
        if is_due {
            *reported = Some(Instant::now());
        }
        is_due
    }

    fn rest(&self, mut evidence: MutexGuard<'_, Evidence>, time: Duration) {
        let until = Instant::now() + time;
        evidence.wary = true;
        evidence.rests_until = Some(until);
        if evidence.accepted.is_empty() {
            self.unproven_rest.send_replace(Some(until));
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.proven.store(false, Ordering::Release);
        drop(evidence);
        self.changed.notify_waiters();
    }
}

impl Evidence {
    /// Whether a rejection for this project counts: a project that may be the cause counts once.
    fn counts(&self, project_id: &str) -> bool {
        let accepted = |projects: &[String]| projects.iter().any(|known| known == project_id);
        let is_foreign = !self.accepted.is_empty() && !accepted(&self.accepted);
        !(is_foreign && accepted(&self.rejections))
    }
}

/// What a rejected signature means for the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejected {
    /// Nothing: the project may be the cause.
    Uncounted,
    /// Evidence against the key.
    Counted,
    /// The key rests.
    Rests,
}

/// Permission to sign one request. Dropping it (after a timeout or a broken connection) leaves the evidence about the key unchanged.
#[derive(Debug)]
#[must_use = "hold it until the reply is there"]
pub struct SigningPermit<'a> {
    guard: &'a KeyGuard,
    project_id: &'a str,
    epoch: u64,
    /// The caller if the request is a probe.
    probe: Option<Caller>,
}

impl SigningPermit<'_> {
    /// The gateway accepted the signature. The rest of the reply does not matter.
    pub fn accepted(self) {
        let guard = self.guard;
        let is_proven = guard.proven.load(Ordering::Acquire);
        let mut evidence = guard.evidence.lock();
        if !evidence
            .accepted
            .iter()
            .any(|known| known == self.project_id)
        {
            if evidence.accepted.len() == MAX_PROJECTS {
                evidence.accepted.remove(0);
            }
            evidence.accepted.push(self.project_id.to_owned());
        }
        // The reply to a request that was sent before the last rejection proves nothing.
        let is_current = self.epoch == guard.epoch.load(Ordering::Acquire);
        if is_current && !is_proven && evidence.rests_until.is_none() {
            evidence.rejections.clear();
            evidence.wary = false;
            guard.proven.store(true, Ordering::Release);
            drop(evidence);
            guard.changed.notify_waiters();
        }
    }

    /// The gateway rejected the signature or the key. Returns whether that counts, and whether the key rests.
    pub fn rejected(self) -> Rejected {
        let guard = self.guard;
        let mut evidence = guard.evidence.lock();
        if !evidence.counts(self.project_id) {
            return Rejected::Uncounted;
        }
        evidence.rejections.push(self.project_id.to_owned());
        let is_unproven = evidence.accepted.is_empty();
        let rests =
            is_unproven || evidence.wary || evidence.rejections.len() >= REJECTIONS_BEFORE_REST;
        if rests {
            guard.rest(evidence, KEY_LOCK);
        } else {
            guard.epoch.fetch_add(1, Ordering::AcqRel);
            guard.proven.store(false, Ordering::Release);
        }
        match rests {
            true => Rejected::Rests,
            false => Rejected::Counted,
        }
    }

    /// The gateway has locked the key.
    pub fn locked(self) {
        self.guard.rest(self.guard.evidence.lock(), KEY_LOCK);
    }
}

impl Drop for SigningPermit<'_> {
    fn drop(&mut self) {
        if let Some(caller) = self.probe {
            self.guard.evidence.lock().probes.remove(&caller);
            self.guard.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, poll, stream::FuturesUnordered};
    use proptest::prelude::*;

    use super::*;
    use crate::credentials::auth::AccessKey;

    const ANN: Caller = Caller::Connection(1);
    const BOB: Caller = Caller::Connection(2);

    fn in_seconds(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds))
    }

    async fn admit(guard: &KeyGuard) -> SigningPermit<'_> {
        admit_for(guard, "p").await
    }

    async fn admit_for<'a>(guard: &'a KeyGuard, project_id: &'a str) -> SigningPermit<'a> {
        guard.admit(project_id, ANN, in_seconds(1)).await.unwrap()
    }

    async fn proven() -> KeyGuard {
        let guard = KeyGuard::default();
        admit(&guard).await.accepted();
        guard
    }

    async fn rejected_times(guard: &KeyGuard, times: u32) {
        for _ in 0..times {
            admit(guard).await.rejected();
        }
    }

    async fn remaining_rest(guard: &KeyGuard) -> Duration {
        match guard.admit("p", ANN, in_seconds(1)).await.unwrap_err() {
            Error::Locked { retry_after } => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn until_the_first_accepted_reply_one_request_is_in_flight_at_a_time() {
        let guard = KeyGuard::default();
        let first = admit(&guard).await;

        assert_eq!(
            guard.admit("p", ANN, in_seconds(5)).await.unwrap_err(),
            Error::DeadlineExceeded
        );

        drop(first);
        let second = admit(&guard).await;
        let (third, ()) = tokio::join!(guard.admit("p", ANN, in_seconds(1)), async {
            second.accepted()
        });
        let fourth = guard.admit("p", ANN, in_seconds(1)).await;
        assert!(third.is_ok() && fourth.is_ok(), "both in flight at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_without_a_reply_keeps_other_callers_waiting_for_a_second_only() {
        let guard = KeyGuard::default();
        let _hangs = admit(&guard).await;
        let begun = Instant::now();
        let anns = (0..100).map(|_| guard.admit("p", ANN, in_seconds(30)));
        let mut anns = anns.collect::<FuturesUnordered<_>>();
        assert!(poll!(anns.next()).is_pending());

        let bobs = guard.admit("p", BOB, in_seconds(30)).await.unwrap();

        assert_eq!(begun.elapsed(), PROBE_PATIENCE);
        assert!(poll!(anns.next()).is_pending());
        bobs.accepted();
        assert!(anns.next().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_with_a_key_that_was_never_accepted_sends_one_request_and_with_any_other_three()
    {
        for (guard, expected) in [(KeyGuard::default(), 1), (proven().await, 3)] {
            let guard = Arc::new(guard);
            // The first rejection ends the time of many requests at once.
            if expected == 3 {
                rejected_times(&guard, 1).await;
            }
            let calls: Vec<_> = (0..100)
                .map(|_| {
                    let guard = guard.clone();
                    tokio::spawn(async move {
                        let admission = guard.admit("p", ANN, in_seconds(30)).await?;
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        admission.rejected();
                        Ok::<(), Error>(())
                    })
                })
                .collect();

            let mut sent = expected / 2;
            for call in calls {
                match call.await.unwrap() {
                    Ok(()) => sent += 1,
                    Err(error) => assert_eq!(
                        error,
                        Error::Locked {
                            retry_after: KEY_LOCK
                        }
                    ),
                }
            }

            assert_eq!(sent, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn evidence_of_another_replica_makes_the_key_rest() {
        let guard = KeyGuard::default();
        let reported = guard.unproven_rest();

        guard.rest_for(Duration::from_secs(60));

        assert_eq!(remaining_rest(&guard).await, Duration::from_secs(60));
        assert_eq!(
            *reported.borrow(),
            Some(Instant::now() + Duration::from_secs(60))
        );
        tokio::time::advance(Duration::from_secs(60)).await;
        admit(&guard).await.accepted();
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_rest_of_a_key_that_was_never_accepted_is_reported() {
        let (unproven, proven) = (KeyGuard::default(), proven().await);
        let reports = [unproven.unproven_rest(), proven.unproven_rest()];

        rejected_times(&unproven, 1).await;
        rejected_times(&proven, 3).await;

        assert_eq!(remaining_rest(&proven).await, KEY_LOCK);
        let until = Instant::now() + KEY_LOCK;
        assert_eq!(reports.map(|report| *report.borrow()), [Some(until), None]);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_rest_one_probe_goes_out_and_its_rejection_starts_another_rest() {
        let guard = proven().await;
        rejected_times(&guard, 3).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(remaining_rest(&guard).await, Duration::from_secs(240));

        tokio::time::sleep(Duration::from_secs(240)).await;
        let probe = admit(&guard).await;
        assert_eq!(
            guard.admit("p", ANN, in_seconds(1)).await.unwrap_err(),
            Error::DeadlineExceeded
        );
        probe.rejected();
        assert_eq!(remaining_rest(&guard).await, KEY_LOCK);

        tokio::time::sleep(KEY_LOCK).await;
        admit(&guard).await.accepted();
        rejected_times(&guard, 2).await;
        admit(&guard).await.accepted();
    }

    #[tokio::test(start_paused = true)]
    async fn an_announced_lock_rests_even_a_proven_key_at_once() {
        let guard = proven().await;

        admit(&guard).await.locked();
        assert_eq!(remaining_rest(&guard).await, KEY_LOCK);

        tokio::time::sleep(KEY_LOCK).await;
        admit(&guard).await.rejected();
        assert_eq!(remaining_rest(&guard).await, KEY_LOCK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_to_an_older_request_neither_ends_a_rest_nor_proves_a_rejected_key() {
        let guard = proven().await;
        let (older, another) = (admit(&guard).await, admit(&guard).await);

        admit(&guard).await.rejected();
        older.accepted();
        let probe = admit(&guard).await;
        assert_eq!(
            guard.admit("p", ANN, in_seconds(1)).await.unwrap_err(),
            Error::DeadlineExceeded
        );
        another.locked();
        probe.accepted();

        assert_eq!(remaining_rest(&guard).await, KEY_LOCK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_that_was_sent_after_the_rejections_clears_them() {
        let guard = proven().await;
        for _ in 0..5 {
            rejected_times(&guard, 2).await;
            admit(&guard).await.accepted();
        }

        assert!(guard.admit("p", ANN, in_seconds(1)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_project_for_which_the_key_was_never_accepted_counts_once() {
        let guard = proven().await;

        for _ in 0..100 {
            admit_for(&guard, "foreign").await.rejected();
        }
        admit(&guard).await.accepted();
        assert!(guard.proven.load(Ordering::Acquire));
        for project_id in ["foreign", "another", "third"] {
            admit_for(&guard, project_id).await.rejected();
        }

        assert_eq!(
            remaining_rest(&guard).await,
            KEY_LOCK,
            "three projects are about the key"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn each_rejection_for_a_further_accepted_project_counts() {
        let guard = proven().await;
        admit_for(&guard, "further").await.accepted();

        for _ in 0..REJECTIONS_BEFORE_REST {
            admit_for(&guard, "further").await.rejected();
        }

        assert_eq!(remaining_rest(&guard).await, KEY_LOCK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_gives_up_does_not_take_the_turn_of_the_next() {
        let guard = KeyGuard::default();
        let probe = admit(&guard).await;
        let ten_milliseconds = Duration::from_millis(10);

        let (_, patient, ()) = tokio::join!(
            async {
                guard
                    .admit("p", ANN, Deadline::after(ten_milliseconds))
                    .await
                    .map(drop)
            },
            guard.admit("p", ANN, in_seconds(5)),
            async {
                tokio::time::sleep(ten_milliseconds).await;
                drop(probe);
            }
        );

        assert!(patient.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn only_another_secret_of_an_accepted_key_rests_after_its_first_rejection() {
        let key = |secret| AccessKey::parse("AK", secret, None).unwrap();
        let previous = key("accepted");
        admit(&previous.guard).await.accepted();

        let same = key("accepted").following(Some(&previous));
        admit(&same.guard).await.rejected();
        admit(&same.guard).await.accepted();
        let another = key("another").following(Some(&previous));
        admit(&another.guard).await.rejected();

        assert_eq!(remaining_rest(&another.guard).await, KEY_LOCK);
        admit(&same.guard).await.accepted();
    }

    #[tokio::test(start_paused = true)]
    async fn evidence_for_an_instance_affects_no_other_and_is_reported_for_the_key() {
        let key = Arc::new(KeyGuard::default());
        let report = key.unproven_rest();

        admit(&key.scoped(Some("i"))).await.rejected();

        assert_eq!(remaining_rest(&key.scoped(Some("i"))).await, KEY_LOCK);
        for instance in [Some("j"), None] {
            admit(&key.scoped(instance)).await.accepted();
        }
        assert_eq!(remaining_rest(&key.scoped(Some("i"))).await, KEY_LOCK);
        assert_eq!(*report.borrow(), Some(Instant::now() + KEY_LOCK));
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_proven_from_an_accepted_signature_until_a_rejected_one() {
        let guard = KeyGuard::default();
        assert!(!guard.is_proven());

        admit(&guard).await.accepted();
        assert!(guard.is_proven());
        admit(&guard).await.rejected();

        assert!(!guard.is_proven());
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_signature_is_reported_once_in_each_interval() {
        let (guard, interval) = (KeyGuard::default(), Duration::from_secs(60));

        for _ in 0..3 {
            assert!(guard.is_report_due(interval));
            assert!(!guard.is_report_due(interval));
            tokio::time::advance(interval).await;
        }
    }

    #[test]
    fn the_guards_of_instances_are_limited() {
        let key = Arc::new(KeyGuard::default());

        for number in 0..3 * MAX_INSTANCES {
            key.scoped(Some(&number.to_string()));
        }

        assert!(key.instances.lock().len() <= MAX_INSTANCES);
    }

    proptest! {
        /// In any order of admissions and replies: no more than three rejected signatures in a row reach the gateway with a proven key,
        /// beyond those that were in flight when the first of them came, and only one with a key that was never accepted.
        #[test]
        fn rejected_signatures_are_few(
            steps in prop::collection::vec((any::<bool>(), 0..3u8, 0..4usize), 1..100),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(async {
                let guard = KeyGuard::default();
                let mut in_flight = Vec::new();
                // Rejections of requests that were sent after the last accepted reply.
                let (mut rejected, mut accepted_once) = (0, false);
                for (sends, reply, index) in steps {
                    if sends {
                        let brief = Deadline::after(Duration::from_millis(1));
                        if let Ok(admission) = guard.admit("p", ANN, brief).await {
                            in_flight.push((admission, rejected));
                        }
                    } else if !in_flight.is_empty() {
                        let (admission, rejected_at_sending) = in_flight.remove(index % in_flight.len());
                        match reply {
                            0 => {
                                accepted_once = true;
                                rejected = 0;
                                admission.accepted();
                            }
                            1 => {
                                if rejected_at_sending > 0 || !accepted_once {
                                    rejected += 1;
                                } else {
                                    rejected = rejected.max(1);
                                }
                                admission.rejected();
                            }
                            _ => drop(admission),
                        }
                    }
                    prop_assert!(rejected <= 3, "{rejected}");
                    prop_assert!(accepted_once || rejected <= 1, "{rejected}");
                }
                Ok(())
            })?;
        }
    }
}
