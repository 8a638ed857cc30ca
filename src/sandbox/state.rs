//! The state of the sandbox: bounded, and behind one lock.

use std::{collections::VecDeque, time::SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use jiff::{SignedDuration, Timestamp};

use super::{ACCESS_KEY_ID, SECRET_ACCESS_KEY, SECURITY_TOKEN};

/// Most issued tokens, temporary keys, metadata tokens and flaky tasks, each; the oldest is dropped first.
const REMEMBERED: usize = 1024;

/// Task requests that `GET /sandbox/requests` shows.
const RECORDED_REQUESTS: usize = 32;

/// Life of tokens and temporary keys, as IAM and the metadata service document it.
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// Everything that requests read or change.
#[derive(Debug)]
pub(super) struct State {
    /// Offset of the sandbox's clock from the system's.
    pub(super) clock_offset: SignedDuration,
    /// When the task in progress began.
    pub(super) started_at: Timestamp,
    pub(super) counts: Counts,
    pub(super) requests: VecDeque<Recorded>,
    pub(super) tokens: VecDeque<Token>,
    /// The documented key first, then the temporary ones.
    pub(super) keys: VecDeque<Key>,
    /// Tokens of the metadata service's hardened mode, and when they expire.
    pub(super) metadata_tokens: VecDeque<(String, Timestamp)>,
    /// Requests for flaky tasks that are still to fail: instance id, workflow id, number.
    flaky: VecDeque<(String, String, u64)>,
    pub(super) token_life: SignedDuration,
    pub(super) key_life: SignedDuration,
    /// Whether a temporary key requires a metadata token.
    pub(super) hardened: bool,
    pub(super) iam_failure: InjectedFailure,
    pub(super) metadata_failure: InjectedFailure,
    /// Delay of the responses to requests for tokens and keys.
    pub(super) credential_delay: std::time::Duration,
}

/// Counters since the start.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    pub(super) connections: u64,
    pub(super) task_requests: u64,
    pub(super) task_requests_in_flight: u64,
    pub(super) token_requests: u64,
    pub(super) key_requests: u64,
    pub(super) metadata_token_requests: u64,
    pub(super) bad_signatures: u64,
}

/// A task request as received, credentials included.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// A token that the sandbox issued.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) value: String,
    pub(super) expires_at: Timestamp,
    /// Whether it is scoped to a project, as RDS requires.
    pub(super) has_project: bool,
    pub(super) revoked: bool,
}

/// A signing key.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) access: String,
    pub(super) secret: String,
    pub(super) security_token: String,
    /// Whether requests must carry the security token, as with temporary keys.
    pub(super) security_token_required: bool,
    /// `None`: never expires.
    pub(super) expires_at: Option<Timestamp>,
    /// Bad signatures since the last good one.
    pub(super) bad_signatures_in_a_row: u32,
    pub(super) locked_until: Option<Timestamp>,
}

/// How the next requests to one service fail.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct InjectedFailure {
    pub(super) status: StatusCode,
    pub(super) times: u64,
}

impl InjectedFailure {
    /// Uses up one failure, if any is left, and returns its status.
    pub(super) fn take(&mut self) -> Option<StatusCode> {
        self.times = self.times.checked_sub(1)?;
        Some(self.status)
    }
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            clock_offset: SignedDuration::ZERO,
            started_at: system_now(),
            counts: Counts::default(),
            requests: VecDeque::new(),
            tokens: VecDeque::new(),
            keys: VecDeque::from([Key {
                access: ACCESS_KEY_ID.to_owned(),
                secret: SECRET_ACCESS_KEY.to_owned(),
                security_token: SECURITY_TOKEN.to_owned(),
                security_token_required: false,
                expires_at: None,
                bad_signatures_in_a_row: 0,
                locked_until: None,
            }]),
            metadata_tokens: VecDeque::new(),
            flaky: VecDeque::new(),
            token_life: DAY,
            key_life: DAY,
            hardened: false,
            iam_failure: InjectedFailure::default(),
            metadata_failure: InjectedFailure::default(),
            credential_delay: std::time::Duration::ZERO,
        }
    }

    /// The sandbox's own time.
    pub(super) fn now(&self) -> Timestamp {
        system_now() + self.clock_offset
    }

    /// Counts and records a task request.
    pub(super) fn record(&mut self, request: &Request<Bytes>) {
        self.counts.task_requests += 1;
        self.requests.truncate(RECORDED_REQUESTS - 1);
        self.requests.push_front(Recorded {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            body: request.body().clone(),
        });
    }

    /// Whether this request for a flaky task is one of its first `failures`.
    pub(super) fn flakes(&mut self, instance_id: &str, workflow_id: &str, failures: u64) -> bool {
        let known = self
            .flaky
            .iter_mut()
            .find(|(instance, workflow, _)| instance == instance_id && workflow == workflow_id);
        if let Some((_, _, left)) = known {
            let fails = *left > 0;
            *left = left.saturating_sub(1);
            return fails;
        }
        let left = failures.saturating_sub(1);
        let task = (instance_id.to_owned(), workflow_id.to_owned(), left);
        remember(&mut self.flaky, 0, task);
        failures > 0
    }
}

/// Appends to a bounded queue: a full one loses its oldest item after the first `kept`.
pub(super) fn remember<T>(queue: &mut VecDeque<T>, kept: usize, item: T) {
    if queue.len() >= REMEMBERED + kept {
        queue.remove(kept);
    }
    queue.push_back(item);
}

#[expect(
    clippy::disallowed_methods,
    reason = "the sandbox has its own clock, independent of the rest of the crate"
)]
fn system_now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).expect("the system clock is within the range of jiff")
}
