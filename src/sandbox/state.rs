//! What the sandbox remembers, all of it behind one lock and all of it bounded.

use std::{collections::VecDeque, time::SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use jiff::{SignedDuration, Timestamp};

use super::{ACCESS_KEY_ID, SECRET_ACCESS_KEY, SECURITY_TOKEN};

/// Issued tokens, temporary keys, metadata tokens and flaky tasks that are remembered; the oldest is forgotten first.
const REMEMBERED: usize = 1024;

/// Task requests that `GET /sandbox/requests` shows.
const RECORDED_REQUESTS: usize = 32;

/// Life of tokens and temporary keys, as IAM and the metadata service document it.
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// Everything the sandbox remembers.
#[derive(Debug)]
pub(super) struct State {
    /// How far the sandbox's clock is ahead of the machine's.
    pub(super) clock_offset: SignedDuration,
    /// When the task in progress began.
    pub(super) started_at: Timestamp,
    pub(super) counts: Counts,
    pub(super) requests: VecDeque<Recorded>,
    pub(super) tokens: VecDeque<Token>,
    /// The documented key first, then the temporary ones.
    pub(super) keys: VecDeque<Key>,
    /// Tokens of the metadata service's hardened mode, and their ends.
    pub(super) metadata_tokens: VecDeque<(String, Timestamp)>,
    /// Answers that the flaky tasks have still to spoil: instance id, workflow id, number.
    flaky: VecDeque<(String, String, u64)>,
    pub(super) token_life: SignedDuration,
    pub(super) key_life: SignedDuration,
    /// Whether temporary keys are given out only against a metadata token.
    pub(super) hardened: bool,
    pub(super) iam_failure: Failure,
    pub(super) metadata_failure: Failure,
    /// How long token and key requests take.
    pub(super) credential_delay: std::time::Duration,
}

/// What happened so far.
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

/// A task request as it came, credentials included.
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
    /// Whether it is scoped to a project; without that it is no good for RDS.
    pub(super) has_project: bool,
    pub(super) revoked: bool,
}

/// A key that may sign.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) access: String,
    pub(super) secret: String,
    pub(super) security_token: String,
    /// Whether requests must carry the security token: so with temporary keys.
    pub(super) security_token_required: bool,
    /// `None`: never.
    pub(super) expires_at: Option<Timestamp>,
    /// Bad signatures since the last good one.
    pub(super) bad_signatures_in_a_row: u32,
    pub(super) locked_until: Option<Timestamp>,
}

/// How the next requests to one service fail.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    pub(super) times: u64,
}

impl Failure {
    /// The status with which the request at hand fails, if it does.
    pub(super) fn take(&mut self) -> Option<StatusCode> {
        self.times = self.times.checked_sub(1)?;
        Some(self.status)
    }
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            clock_offset: SignedDuration::ZERO,
            started_at: machine_now(),
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
            iam_failure: Failure::default(),
            metadata_failure: Failure::default(),
            credential_delay: std::time::Duration::ZERO,
        }
    }

    /// The sandbox's own time.
    pub(super) fn now(&self) -> Timestamp {
        machine_now() + self.clock_offset
    }

    /// Counts and keeps a task request.
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

    pub(super) fn remember_token(&mut self, token: Token) {
        forget_oldest(&mut self.tokens, 0);
        self.tokens.push_back(token);
    }

    pub(super) fn remember_key(&mut self, key: Key) {
        forget_oldest(&mut self.keys, 1);
        self.keys.push_back(key);
    }

    pub(super) fn remember_metadata_token(&mut self, token: String, expires_at: Timestamp) {
        forget_oldest(&mut self.metadata_tokens, 0);
        self.metadata_tokens.push_back((token, expires_at));
    }

    /// Whether this request for a flaky task is one of the first `failures` for it.
    pub(super) fn flakes(&mut self, instance_id: &str, workflow_id: &str, failures: u64) -> bool {
        let known = self
            .flaky
            .iter_mut()
            .find(|(instance, workflow, _)| instance == instance_id && workflow == workflow_id);
        if let Some((_, _, left)) = known {
            let flakes = *left > 0;
            *left = left.saturating_sub(1);
            return flakes;
        }
        forget_oldest(&mut self.flaky, 0);
        let left = failures.saturating_sub(1);
        self.flaky
            .push_back((instance_id.to_owned(), workflow_id.to_owned(), left));
        failures > 0
    }
}

/// Makes room for one more behind the first `kept`, which stay.
fn forget_oldest<T>(queue: &mut VecDeque<T>, kept: usize) {
    if queue.len() >= REMEMBERED + kept {
        queue.remove(kept);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the sandbox is a world of its own, with its own clock"
)]
fn machine_now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).expect("the machine's clock is within the years of jiff")
}
