//! Admission of attempts and polls: throttle windows, the rest of a key, and the rate, in one round trip.

use std::{sync::atomic::Ordering, time::Duration};

use redis::{Script, ScriptInvocation};
use tokio::time::{Instant, sleep};

use super::{
    MAX_WAIT, SCRIPTS, Session, TaskName, micros, millis, random_id,
    results::{MIN_POLL_LEASE, POLL_LEASE},
};
use crate::{
    credentials::{
        AccessKey,
        key_guard::{KEY_LOCK, PROBE_PATIENCE, REJECTIONS_BEFORE_REST},
    },
    deadline::Deadline,
    telemetry::metrics::StoreOperation,
};

/// How long a key counts as proven after the last report.
const PROOF_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// An attempt stops waiting for probes this long before its deadline, a little before pacing rejects attempts that wait for the rate.
const PROBE_SLACK: Duration = Duration::from_millis(60);

/// The pauses between two looks while another replica tries a key out or asks RDS.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// A start that a rate limiter asks for.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Starts in a window; 0 for no rate.
    pub calls: u32,
    /// How long a start counts.
    pub window: Duration,
    /// The time between two starts of which the second has waited.
    pub spacing: Duration,
    /// The limit on first polls in a window, for a first poll.
    pub limit_of_first: Option<u32>,
    /// The start has waited already.
    pub has_waited: bool,
    /// The longest acceptable wait.
    pub longest: Duration,
}

impl Slot {
    /// No rate: only the other checks.
    pub const UNLIMITED: Self = Self {
        calls: 0,
        window: Duration::ZERO,
        spacing: Duration::ZERO,
        limit_of_first: None,
        has_waited: false,
        longest: Duration::ZERO,
    };
}

/// What the store replies to an attempt or a poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It may start after this wait.
    Start(Duration),
    /// It could start only after this wait, which is longer than acceptable. No start is used.
    Late(Duration),
    /// A throttle window, and the word for its subject.
    Throttled(Duration, String),
    /// The key rests.
    Rests(Duration),
    /// Another replica has a young result of the task.
    Fresh,
    /// Another replica polls the task.
    Busy,
    /// Probes of the key were still in flight shortly before the deadline.
    Probed,
    /// No usable reply: local rules apply.
    Unavailable,
}

impl Answer {
    /// Reads an untrusted reply; `None` if another replica tries the key out.
    pub fn from_reply(reply: Option<Reply>, slot: Slot) -> Option<Self> {
        let Some((kind, number, subject)) = reply else {
            return Some(Self::Unavailable);
        };
        let number = u64::try_from(number).unwrap_or(0);
        let in_millis = Duration::from_millis(number).min(MAX_WAIT);
        let in_micros = Duration::from_micros(number).min(MAX_WAIT);
        Some(match kind.as_str() {
            "start" if in_micros <= slot.longest => Self::Start(in_micros),
            "start" | "late" => Self::Late(in_micros),
            "throttled" => Self::Throttled(in_millis, subject),
            "rests" => Self::Rests(in_millis),
            "fresh" => Self::Fresh,
            "busy" => Self::Busy,
            "probed" => return None,
            _ => Self::Unavailable,
        })
    }
}

/// What an attempt is for and with.
#[derive(Debug, Clone, Copy)]
pub struct AttemptContext<'a> {
    /// The instance, if throttle windows and evidence about keys are kept for each.
    pub instance: Option<&'a str>,
    /// The key that signs it, if a key does.
    pub key: Option<&'a AccessKey>,
    /// A random number if the attempt has to be a probe, because this replica has not proven the key.
    pub probe: Option<u64>,
    /// When the attempt must start.
    pub deadline: Deadline,
}

/// What a start is for.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// An attempt.
    Attempt(AttemptContext<'a>),
    /// A poll of a task, for which a result younger than `max_age` is as good.
    Poll {
        /// The task.
        task: &'a TaskName,
        /// See above.
        max_age: Duration,
    },
}

impl Request<'_> {
    /// The same request after the store has assigned a start to it, and registered its probe if it is one.
    pub fn again(self) -> Self {
        match self {
            Self::Attempt(attempt) => Self::Attempt(AttemptContext {
                probe: None,
                ..attempt
            }),
            poll @ Self::Poll { .. } => poll,
        }
    }
}

impl Session {
    /// Admits an attempt or a poll.
    pub async fn admit(&self, request: Request<'_>, slot: Slot) -> Answer {
        match request {
            Request::Attempt(attempt) => self.admit_attempt(attempt, slot).await,
            Request::Poll { task, max_age } => self.admit_poll(task, max_age, slot).await,
        }
    }

    /// Admits an attempt. While probes of an unproven key keep it waiting, waits for their outcome.
    async fn admit_attempt(&self, attempt: AttemptContext<'_>, slot: Slot) -> Answer {
        let begun = Instant::now();
        let patience = self.left.load(Ordering::Relaxed);
        let mut pause = FIRST_PAUSE;
        loop {
            let left = Slot {
                longest: slot.longest.saturating_sub(begun.elapsed()),
                ..slot
            };
            let mut script = self.slot_script(&SCRIPTS.admit, "rate", left);
            script
                .key(self.throttle_name(attempt.instance, false))
                .key(self.throttle_name(attempt.instance, true));
            if let Some(key) = attempt.key {
                for name in self.key_names(attempt.instance, key).into_iter().take(4) {
                    script.key(name);
                }
            }
            script
                .arg(probe_name(attempt))
                .arg(micros(PROBE_PATIENCE))
                .arg(micros(self.store.attempt_timeout));
            let reply = match pause == FIRST_PAUSE {
                true => self.call(StoreOperation::Admit, &script).await,
                false => self.call_meanwhile(StoreOperation::Admit, &script).await,
            };
            match Answer::from_reply(reply, left) {
                Some(answer) => {
                    // It waits for the rate anyway.
                    if matches!(answer, Answer::Late(_))
                        || matches!(answer, Answer::Start(wait) if !wait.is_zero())
                    {
                        self.left.store(patience, Ordering::Relaxed);
                    }
                    return answer;
                }
                // A faulty store.
                None if attempt.probe.is_none() => return Answer::Unavailable,
                None => {
                    let left = attempt.deadline.remaining().saturating_sub(PROBE_SLACK);
                    if left.is_zero() {
                        return Answer::Probed;
                    }
                    sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0).min(left)).await;
                }
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn admit_poll(&self, task: &TaskName, max_age: Duration, slot: Slot) -> Answer {
        let mut script = self.slot_script(&SCRIPTS.poll, "poll-rate", slot);
        script.key(&task.result).key(&task.poll);
        let lease = POLL_LEASE.min(max_age.max(MIN_POLL_LEASE));
        script
            .arg(millis(max_age))
            .arg(millis(lease.min(self.store.attempt_timeout)).max(1))
            .arg(&task.holder);
        // No call waits for this, but a poll may ask many times.
        let reply = self.call_meanwhile(StoreOperation::Poll, &script).await;
        Answer::from_reply(reply, slot).unwrap_or(Answer::Unavailable)
    }

    fn slot_script(
        &self,
        script: &'static Script,
        kind: &str,
        slot: Slot,
    ) -> ScriptInvocation<'static> {
        let mut script = script.key(self.name(kind, &[]));
        script.key(self.name(kind, &[b"first"]));
        script
            .arg(slot.calls)
            .arg(micros(slot.window))
            .arg(micros(slot.spacing))
            .arg(slot.limit_of_first.unwrap_or(0))
            .arg(u8::from(slot.has_waited))
            .arg(micros(slot.longest.min(MAX_WAIT)))
            .arg(random_id());
        script
    }

    /// Stores a throttle window: of the credential, or of the whole API.
    pub fn throttled(&self, instance: Option<&str>, wait: Duration, subject: &str, is_api: bool) {
        let mut script = SCRIPTS.throttle.key(self.throttle_name(instance, is_api));
        script.arg(millis(wait.min(MAX_WAIT))).arg(subject);
        self.store.write(StoreOperation::Throttle, script);
    }

    /// Stores that the gateway has rejected a signature of a key that it may have accepted from this replica before.
    pub fn key_rejected(&self, attempt: AttemptContext<'_>, is_proven: bool) {
        let evidence = if is_proven { "proven" } else { "unproven" };
        self.report_rejection(attempt, evidence);
    }

    /// Stores that the gateway has locked the key.
    pub fn key_locked(&self, attempt: AttemptContext<'_>) {
        self.report_rejection(attempt, "locked");
    }

    fn report_rejection(&self, attempt: AttemptContext<'_>, evidence: &str) {
        let Some(key) = attempt.key else { return };
        let [key, ak, proof, probe, count] = self.key_names(attempt.instance, key);
        let mut script = SCRIPTS.rejected.key(key);
        script.key(ak).key(proof).key(probe).key(count);
        script
            .arg(millis(KEY_LOCK))
            .arg(REJECTIONS_BEFORE_REST)
            .arg(evidence);
        self.store.write(StoreOperation::Key, script);
    }

    /// Removes the probe of an attempt, so that another replica may try the key out at once.
    pub fn probe_ended(&self, attempt: AttemptContext<'_>) {
        let Some(key) = attempt.key else { return };
        let [_, _, _, probes, _] = self.key_names(attempt.instance, key);
        let mut script = SCRIPTS.remove.key(probes);
        script.arg(probe_name(attempt));
        self.store.write(StoreOperation::Key, script);
    }

    /// Stores that the gateway has accepted the key.
    pub fn key_accepted(&self, attempt: AttemptContext<'_>) {
        let Some(key) = attempt.key else { return };
        let [_, _, proof, probe, count] = self.key_names(attempt.instance, key);
        let mut script = SCRIPTS.accepted.key(proof);
        script.key(probe).key(count).arg(millis(PROOF_LIFETIME));
        self.store.write(StoreOperation::Key, script);
    }

    fn throttle_name(&self, instance: Option<&str>, is_api: bool) -> String {
        let instance = instance.unwrap_or_default().as_bytes();
        match is_api {
            true => self.store.name("api-window", &[instance]),
            false => self.name("window", &[instance]),
        }
    }

    /// The rest of the key, the rest of its AK, the mark of a proven key, its probes, and the count of rejections of the AK. The gateway
    /// counts bad signatures by AK, with any secret.
    fn key_names(&self, instance: Option<&str>, key: &AccessKey) -> [String; 5] {
        let instance = instance.unwrap_or_default().as_bytes();
        let (ak, tag) = (key.access_key_id.as_bytes(), key.secret_tag());
        let by_secret = |kind| self.store.name(kind, &[instance, ak, &tag]);
        let by_ak = |kind| self.store.name(kind, &[instance, ak]);
        [
            by_secret("key-rest"),
            by_ak("ak-rest"),
            by_secret("key-proof"),
            by_secret("key-probes"),
            by_ak("ak-count"),
        ]
    }
}

/// The name of an attempt among the probes of its key; empty if it is not a probe.
fn probe_name(attempt: AttemptContext<'_>) -> String {
    attempt
        .probe
        .map_or_else(String::new, |number| number.to_string())
}

/// The reply of a script: its kind, a number, a text.
pub type Reply = (String, i64, String);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota_store::{
        connection::longest_wait,
        scripted::{self, Scripted, reply},
    };

    const SECOND: Duration = Duration::from_secs(1);
    const LATE: Duration = Duration::from_millis(10);
    const SLOT: Slot = Slot {
        longest: Duration::from_millis(100),
        ..Slot::UNLIMITED
    };

    fn attempt(timeout: Duration) -> AttemptContext<'static> {
        AttemptContext {
            instance: None,
            key: None,
            probe: Some(7),
            deadline: Deadline::after(timeout),
        }
    }

    #[test]
    fn replies_are_read_with_limits() {
        let millis = Duration::from_millis;
        let read = |kind: &str, number| {
            Answer::from_reply(Some((kind.to_owned(), number, "api".to_owned())), SLOT)
        };
        let cases = [
            ("start", 0, Answer::Start(Duration::ZERO)),
            ("start", 100_000, Answer::Start(millis(100))),
            (
                "start",
                100_001,
                Answer::Late(Duration::from_micros(100_001)),
            ),
            ("start", -1, Answer::Start(Duration::ZERO)),
            ("late", 50_000, Answer::Late(millis(50))),
            ("late", i64::MAX, Answer::Late(MAX_WAIT)),
            (
                "throttled",
                7,
                Answer::Throttled(millis(7), "api".to_owned()),
            ),
            ("rests", 7, Answer::Rests(millis(7))),
            ("rests", i64::MAX, Answer::Rests(MAX_WAIT)),
            ("fresh", 0, Answer::Fresh),
            ("busy", 0, Answer::Busy),
            ("other", 0, Answer::Unavailable),
        ];

        for (kind, number, answer) in cases {
            assert_eq!(read(kind, number), Some(answer), "{kind} {number}");
        }
        assert_eq!(read("probed", 0), None);
        assert_eq!(Answer::from_reply(None, SLOT), Some(Answer::Unavailable));
    }

    #[test]
    fn the_second_request_for_a_start_needs_no_probe() {
        let Request::Attempt(again) = Request::Attempt(attempt(SECOND)).again() else {
            panic!("a poll");
        };

        assert_eq!(again.probe, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_of_a_reply_counts_unless_the_attempt_waits_for_the_rate_anyway() {
        for (kind, wait, left) in [
            ("start", 0, longest_wait() - LATE),
            ("start", 1, longest_wait()),
            ("late", 1, longest_wait()),
            ("throttled", 1, longest_wait() - LATE),
        ] {
            let store = Scripted::start(SECOND, move |_| reply(kind, wait).after(LATE)).await;
            let session = store.session();

            session.admit(Request::Attempt(attempt(SECOND)), SLOT).await;

            let found = session.left.load(Ordering::Relaxed);
            assert_eq!(found, micros(left), "{kind} {wait}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_waits_while_another_replica_tries_the_key_out() {
        let store = Scripted::start(SECOND, |number| {
            let kind = if number < 8 { "probed" } else { "start" };
            reply(kind, 0).after(LATE)
        })
        .await;
        let session = store.session();
        let slot = Slot {
            longest: 10 * SECOND,
            ..SLOT
        };
        let begun = Instant::now();

        let request = Request::Attempt(attempt(10 * SECOND));
        let answer = session.admit(request, slot).await;

        assert_eq!(answer, Answer::Start(Duration::ZERO));
        let runs = store.runs("admit").await;
        scripted::assert_pauses(&runs, LATE, FIRST_PAUSE..=LONGEST_PAUSE, 0.75..=1.25);
        for run in &runs {
            let longest = 10 * SECOND - (run.at - begun);
            assert_eq!(run.arg(6), micros(longest).to_string());
        }
        // Only the first reply counts: the attempt waits meanwhile.
        assert_eq!(
            session.left.load(Ordering::Relaxed),
            micros(longest_wait() - LATE)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_stops_waiting_for_another_replica_before_its_deadline() {
        let store = Scripted::start(SECOND, |number| match number {
            0..50 => reply("probed", 0),
            _ => reply("start", 0),
        })
        .await;
        let begun = Instant::now();

        let request = Request::Attempt(attempt(SECOND));
        let answer = store.session().admit(request, SLOT).await;

        assert_eq!(answer, Answer::Probed);
        assert_eq!(begun.elapsed(), SECOND - PROBE_SLACK);
    }

    #[tokio::test(start_paused = true)]
    async fn evidence_about_keys_is_stored_with_its_kind() {
        let store = Scripted::start(SECOND, |_| reply("start", 0)).await;
        let session = store.session();
        let key = AccessKey::parse("an-ak", "an-sk", None).unwrap();
        let attempt = AttemptContext {
            key: Some(&key),
            ..attempt(SECOND)
        };

        session.key_rejected(attempt, false);
        session.key_rejected(attempt, true);
        session.key_locked(attempt);
        session.key_accepted(attempt);

        let rejected = store.runs("rejected").await;
        let evidence: Vec<_> = rejected.iter().map(|run| run.arg(3)).collect();
        assert_eq!(evidence, ["unproven", "proven", "locked"]);
        assert_eq!(store.runs("accepted").await.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_lease_of_a_poll_depends_on_the_age_that_counts() {
        for (max_age, lease) in [(0, "1000"), (2000, "2000"), (60_000, "3000")] {
            let store = Scripted::start(10 * SECOND, |_| reply("busy", 0)).await;
            let session = store.session();
            let task = session.task(&[b"task"]);
            let request = Request::Poll {
                task: &task,
                max_age: Duration::from_millis(max_age),
            };

            let answer = session.admit(request, SLOT).await;

            assert_eq!(answer, Answer::Busy);
            let runs = store.runs("poll").await;
            let asked = [8, 9, 10].map(|number| runs[0].arg(number));
            assert_eq!(asked, [&max_age.to_string(), lease, &task.holder]);
        }
    }
}
