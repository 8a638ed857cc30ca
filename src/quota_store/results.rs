//! Results that replicas share, and the leases that let one replica ask RDS while the others wait for its result.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost::Message as _;
use tokio::time::{Instant, sleep};

use super::{
    QuotaStore, SCRIPTS, Session,
    admission::{FIRST_PAUSE, LONGEST_PAUSE},
    millis, random_id,
    seal::Keys,
};
use crate::{deadline::Deadline, telemetry::metrics::StoreOperation};

/// The longest stored result. Also bounds what is decoded.
const MAX_BYTES: usize = 64 << 10;

/// The digits of the time before a result, in milliseconds.
const STAMP: usize = 13;

/// The version of [`SharedResult`].
const VERSION: u32 = 1;

/// The lease of a replica that asks RDS ends this long after the replica has died.
const LEASE: Duration = Duration::from_secs(2);

/// The same for a replica that polls a watched task, unless the task is polled more often.
pub(super) const POLL_LEASE: Duration = Duration::from_secs(3);

/// The shortest lease of a poll, which RDS usually answers sooner.
pub(super) const MIN_POLL_LEASE: Duration = Duration::from_secs(1);

/// How far the clocks of two replicas may differ.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);

/// After this many results that cannot be used, a call asks RDS alone.
const MAX_REJECTED: u32 = 2;

/// A result as the replicas store it, sealed: a task, or RDS's reply that there is no such task.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SharedResult {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// When RDS replied, by the clock of the store, in milliseconds since 1970.
    #[prost(uint64, tag = "2")]
    store_time: u64,
    /// The same by the clock of the replica: the store cannot make an old result young.
    #[prost(uint64, tag = "3")]
    replica_time: u64,
    /// The status of RDS's reply.
    #[prost(uint32, tag = "4")]
    pub http_status: u32,
    /// The vendor's request id.
    #[prost(string, optional, tag = "5")]
    pub request_id: Option<String>,
    /// The encoded task; `None` if RDS does not know it.
    #[prost(bytes = "vec", optional, tag = "6")]
    pub task: Option<Vec<u8>>,
    /// The vendor's error code.
    #[prost(string, optional, tag = "7")]
    pub error_code: Option<String>,
    /// The vendor's text.
    #[prost(string, tag = "8")]
    pub error_message: String,
}

/// The names of a task's entries for one credential.
#[derive(Debug, Clone)]
pub struct TaskName {
    pub(super) result: String,
    lease: String,
    pub(super) poll: String,
    /// The holder of the leases that are claimed with this value.
    pub(super) holder: String,
}

/// What a lookup may do.
#[derive(Debug)]
pub enum Claim {
    /// Use the result, of this age.
    Result(Box<SharedResult>, Duration),
    /// Ask RDS, and publish the result.
    Ask(Lease),
    /// Ask RDS: the store is not available.
    Alone,
}

/// The right to publish a result. While it is held, other replicas wait for the result. Dropping it releases it.
#[derive(Debug)]
pub struct Lease {
    store: Arc<QuotaStore>,
    task: TaskName,
    /// Whether other replicas wait. Not after this replica has waited too long for another one.
    is_held: bool,
    /// The time of the store, in milliseconds, at a moment of this process.
    clock: (u64, Instant),
}

impl Session {
    /// The names of a task with these parts.
    pub fn task(&self, parts: &[&[u8]]) -> TaskName {
        TaskName {
            result: self.name("result", parts),
            lease: self.name("lease", parts),
            poll: self.name("poll", parts),
            holder: random_id(),
        }
    }

    /// Looks for a result younger than `max_age`, or for the right to ask RDS. Waits while another replica asks RDS, for at most an
    /// attempt and half of the time until the deadline.
    pub async fn claim(&self, task: &TaskName, max_age: Duration, deadline: Deadline) -> Claim {
        let lease = LEASE.min(self.store.attempt_timeout);
        let until = Instant::now() + self.store.attempt_timeout.min(deadline.remaining() / 2);
        let mut pause = FIRST_PAUSE;
        let mut rejected = 0;
        let mut rejected_at: Option<Instant> = None;
        loop {
            // A result that was rejected is not looked at again.
            let max_age = rejected_at.map_or(max_age, |at| max_age.min(at.elapsed()));
            let mut script = SCRIPTS.share.key(&task.result);
            script
                .key(&task.lease)
                .arg(millis(max_age))
                .arg(millis(lease).max(1))
                .arg(&task.holder)
                .arg(MAX_BYTES);
            let reply: Option<(String, u64, Vec<u8>)> = match pause == FIRST_PAUSE {
                true => self.call(StoreOperation::Share, &script).await,
                false => self.call_meanwhile(StoreOperation::Share, &script).await,
            };
            let Some((kind, now, entry)) = reply else {
                return Claim::Alone;
            };
            let lease = |is_held| Lease {
                store: Arc::clone(&self.store),
                task: task.clone(),
                is_held,
                clock: (now, Instant::now()),
            };
            match kind.as_str() {
                "result" | "long" => {
                    let used =
                        SharedResult::open(&self.store.keys, &task.result, &entry, now, max_age);
                    if let Some((result, age)) = used {
                        return Claim::Result(Box::new(result), age);
                    }
                    let metrics = &self.store.link.metrics;
                    metrics.store_rejected(StoreOperation::Share);
                    rejected += 1;
                    if rejected > MAX_REJECTED {
                        return Claim::Alone;
                    }
                    rejected_at = Some(Instant::now());
                }
                "lease" => return Claim::Ask(lease(true)),
                "busy" if Instant::now() + pause < until => {
                    sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                "busy" => return Claim::Ask(lease(false)),
                _ => return Claim::Alone,
            }
        }
    }

    /// Ends the lease of a poll.
    pub fn release_poll(&self, task: &TaskName) {
        let mut script = SCRIPTS.publish.key(&task.result);
        script.key(&task.poll).arg("").arg(0).arg(&task.holder);
        self.store.write(StoreOperation::Publish, script);
    }
}

impl Lease {
    /// Does the work of the lease and renews it meanwhile, for at most an attempt.
    pub async fn hold<F: Future>(&self, work: F) -> F::Output {
        let length = LEASE.min(self.store.attempt_timeout);
        let until = Instant::now() + self.store.attempt_timeout;
        let renewals = async {
            while self.is_held && Instant::now() + length < until {
                sleep(length / 3).await;
                let mut script = SCRIPTS.renew.key(&self.task.lease);
                script.arg(&self.task.holder).arg(millis(length));
                self.store.write(StoreOperation::Publish, script);
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        tokio::select! {
            biased;
            done = work => done,
            never = renewals => match never {},
        }
    }

    /// Stores the result that RDS has returned now, and releases the lease.
    pub fn publish(mut self, mut result: SharedResult) {
        let (then, at) = self.clock;
        result.version = VERSION;
        result.store_time = then.saturating_add(millis(at.elapsed()));
        result.replica_time = wall_clock();
        let entry = result.seal(&self.store.keys, &self.task.result);
        if entry.len() <= MAX_BYTES {
            self.is_held = false;
            self.write(&entry);
        }
    }

    /// Stores an entry, if not empty, and releases the lease.
    fn write(&self, entry: &[u8]) {
        let mut script = SCRIPTS.publish.key(&self.task.result);
        script
            .key(&self.task.lease)
            .arg(entry)
            .arg(millis(self.store.result_lifetime).max(1))
            .arg(&self.task.holder);
        self.store.write(StoreOperation::Publish, script);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.is_held {
            self.write(&[]);
        }
    }
}

impl SharedResult {
    /// The entry with this name: the time, for the scripts, and the sealed result.
    pub fn seal(&self, keys: &Keys, name: &str) -> Vec<u8> {
        let sealed = keys.seal(name, &self.encode_to_vec());
        [format!("{:013}", self.store_time).as_bytes(), &sealed].concat()
    }

    /// Opens an untrusted entry, and returns its age. `None` if it is not authentic, or if it is not younger than `max_age` by the clock
    /// of the store, whose time is `now`, and by the clocks of the replicas.
    pub fn open(
        keys: &Keys,
        name: &str,
        entry: &[u8],
        now: u64,
        max_age: Duration,
    ) -> Option<(Self, Duration)> {
        if entry.len() > MAX_BYTES {
            return None;
        }
        let content = keys.open(name, entry.get(STAMP..)?)?;
        let result = Self::decode(content.as_slice()).ok()?;
        let tolerance = i128::from(millis(CLOCK_TOLERANCE));
        let by_store = i128::from(now) - i128::from(result.store_time);
        let by_replica = i128::from(wall_clock()) - i128::from(result.replica_time);
        let max_age = i128::from(millis(max_age));
        let is_young = (-tolerance..max_age).contains(&by_store)
            && (-tolerance..max_age + tolerance).contains(&by_replica);
        let age = by_store.max(by_replica - tolerance).max(0);
        let age = Duration::from_millis(u64::try_from(age).ok()?);
        (result.version == VERSION && is_young).then_some((result, age))
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "replicas compare the ages of results, which they exchange"
)]
fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, millis)
}

/// The time of the store, and the sealed entry of a task that RDS returned `age` ago.
#[cfg(test)]
pub(super) fn stored(keys: &Keys, name: &str, age: Duration, task: Vec<u8>) -> (u64, Vec<u8>) {
    let now = wall_clock();
    let result = SharedResult {
        version: VERSION,
        store_time: now - millis(age),
        replica_time: now - millis(age),
        http_status: 200,
        task: Some(task),
        ..SharedResult::default()
    };
    (now, result.seal(keys, name))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::quota_store::{
        connection::longest_wait,
        micros,
        scripted::{self, RESULT_LIFETIME, Scripted, reply},
    };

    const NAME: &str = "rtf1:result:1";
    const MAX_AGE: Duration = Duration::from_secs(10);
    const ATTEMPT: Duration = Duration::from_secs(10);
    const MINUTE: Duration = Duration::from_secs(60);

    async fn claim(session: &Session, timeout: Duration) -> Claim {
        let task = session.task(&[b"task"]);
        let deadline = Deadline::after(timeout);
        let claimed = session.claim(&task, MAX_AGE, deadline);
        let claimed = tokio::time::timeout(MINUTE, claimed).await;
        claimed.expect("it waits for half of the time")
    }

    /// The lease that a lookup gets. Panics if it gets anything else.
    async fn lease(store: &Scripted) -> Lease {
        match claim(&store.session(), MINUTE).await {
            Claim::Ask(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_result_is_used_only_if_it_is_authentic_and_young_by_both_clocks() {
        let keys = Keys::derive(&[1; 32]);
        let now = wall_clock();
        let result = |version, store_age: i64, replica_age: i64| SharedResult {
            version,
            store_time: now.saturating_add_signed(-store_age),
            replica_time: now.saturating_add_signed(-replica_age),
            ..SharedResult::default()
        };
        let entry =
            |store_age, replica_age| result(VERSION, store_age, replica_age).seal(&keys, NAME);
        let of_length = |length: usize| {
            let mut long = result(VERSION, 0, 0);
            // With four bytes for the number of the field and the length of the text.
            long.error_message = "x".repeat(length - entry(0, 0).len() - 4);
            let entry = long.seal(&keys, NAME);
            assert_eq!(entry.len(), length);
            entry
        };
        let cases = [
            ("young", entry(1000, 1000), true),
            (
                "a clock of a replica that is 4 s behind",
                entry(9000, 13_000),
                true,
            ),
            ("too old by the store", entry(10_001, 1000), false),
            (
                "an old result that the store calls young",
                entry(0, 16_000),
                false,
            ),
            ("from the future, by the store", entry(-6000, 0), false),
            ("from the future, by the replica", entry(0, -60_000), false),
            (
                "another version",
                result(VERSION + 1, 0, 0).seal(&keys, NAME),
                false,
            ),
            (
                "another name",
                result(VERSION, 0, 0).seal(&keys, "rtf1:result:2"),
                false,
            ),
            (
                "another key",
                result(VERSION, 0, 0).seal(&Keys::derive(&[2; 32]), NAME),
                false,
            ),
            ("of the greatest length", of_length(MAX_BYTES), true),
            ("too long", of_length(MAX_BYTES + 1), false),
            ("empty", Vec::new(), false),
        ];

        for (case, entry, is_used) in cases {
            let opened = SharedResult::open(&keys, NAME, &entry, now, MAX_AGE);

            assert_eq!(opened.is_some(), is_used, "{case}");
        }
    }

    #[test]
    fn the_age_of_a_result_is_the_greater_one_by_the_two_clocks() {
        let keys = Keys::derive(&[1; 32]);
        let now = wall_clock();
        for (by_store, by_replica, expected) in [(3000, 1000, 3000), (1000, 9000, 4000), (0, 0, 0)]
        {
            let result = SharedResult {
                version: VERSION,
                store_time: now - by_store,
                replica_time: now - by_replica,
                ..SharedResult::default()
            };
            let entry = result.seal(&keys, NAME);

            let (_, age) = SharedResult::open(&keys, NAME, &entry, now, MAX_AGE).expect("young");

            // The clock of the replica goes on.
            let late = age.checked_sub(Duration::from_millis(expected));
            assert!(late.is_some_and(|late| late < MAX_AGE / 2), "{age:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_waits_for_another_replica_for_half_of_its_time_with_growing_pauses() {
        let late = Duration::from_millis(10);
        let store = Scripted::start(ATTEMPT, move |_| reply("busy", 1).after(late)).await;
        let session = store.session();
        let begun = Instant::now();

        let claimed = claim(&session, Duration::from_secs(8)).await;

        let waited = begun.elapsed();
        assert!(
            matches!(&claimed, Claim::Ask(lease) if !lease.is_held),
            "{claimed:?}"
        );
        // The next pause may end at most a quarter of it late.
        let half = Duration::from_secs(4);
        let expected = half - LONGEST_PAUSE..half + LONGEST_PAUSE / 2;
        assert!(expected.contains(&waited), "{waited:?}");
        let runs = store.runs("share").await;
        scripted::assert_pauses(&runs, late, FIRST_PAUSE..=LONGEST_PAUSE, 0.75..=1.25);
        // Only the first look counts: later ones take place while it waits anyway.
        assert_eq!(
            session.left.load(Ordering::Relaxed),
            micros(longest_wait() - late)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_asks_alone_after_three_results_that_it_rejects() {
        let store = Scripted::start(ATTEMPT, |number| match number {
            0..10 => reply("result", 1).with(b"0000000000001-forged"),
            _ => reply("lease", 1),
        })
        .await;

        let claimed = claim(&store.session(), MINUTE).await;

        assert!(matches!(claimed, Claim::Alone), "{claimed:?}");
        let ages = store.runs("share").await;
        let ages: Vec<&str> = ages.iter().map(|run| run.arg(1)).collect();
        assert_eq!(ages, ["10000", "0", "0"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_lease_is_renewed_for_at_most_an_attempt() {
        for (kind, renewals) in [("lease", 12), ("busy", 0)] {
            let late = Duration::from_millis(10);
            let store = Scripted::start(ATTEMPT, move |_| reply(kind, 1).after(late)).await;
            let lease = lease(&store).await;

            lease.hold(sleep(MINUTE)).await;

            let renewed = store.runs("renew").await;
            assert_eq!(renewed.len(), renewals, "{kind}");
            assert!(renewed.iter().all(|run| run.arg(2) == "2000"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_published_result_has_the_time_of_the_store_and_releases_the_lease_once() {
        let store = Scripted::start(ATTEMPT, |_| reply("lease", 1_000_000)).await;
        let lease = lease(&store).await;
        let holder = lease.task.holder.clone();
        tokio::time::advance(Duration::from_millis(500)).await;

        lease.publish(SharedResult::default());

        let published = store.runs("publish").await;
        assert_eq!(published.len(), 1);
        let lifetime = millis(RESULT_LIFETIME).to_string();
        assert!(published[0].args[0].starts_with(b"0000001000500"));
        assert_eq!(
            (published[0].arg(2), published[0].arg(3)),
            (lifetime.as_str(), holder.as_str())
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_that_is_too_long_is_not_published_but_releases_the_lease() {
        let store = Scripted::start(ATTEMPT, |_| reply("lease", 1)).await;
        let result = SharedResult {
            error_message: "x".repeat(MAX_BYTES),
            ..SharedResult::default()
        };

        lease(&store).await.publish(result);

        let published = store.runs("publish").await;
        let entries: Vec<usize> = published.iter().map(|run| run.args[0].len()).collect();
        assert_eq!(entries, [0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_poll_releases_its_lease() {
        let store = Scripted::start(ATTEMPT, |_| reply("lease", 1)).await;
        let session = store.session();
        let task = session.task(&[b"task"]);

        session.release_poll(&task);

        let released = store.runs("publish").await;
        let released: Vec<_> = released
            .iter()
            .map(|run| (run.arg(1), run.arg(3)))
            .collect();
        assert_eq!(released, [("", task.holder.as_str())]);
    }
}
