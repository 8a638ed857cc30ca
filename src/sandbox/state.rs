//! The sandbox's state: bounded, behind one lock.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
    time::SystemTime,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use jiff::{SignedDuration, Timestamp};

use super::{ACCESS_KEY_ID, SECRET_ACCESS_KEY, SECURITY_TOKEN};

/// Maximum number of tokens, of temporary keys, of metadata tokens and of tasks with looks. The oldest is dropped first, or the task
/// that was looked at longest ago.
const MAX_ENTRIES: usize = 1024;

/// Task requests that `GET /sandbox/requests` shows.
const RECORDED_REQUESTS: usize = 32;

/// Life of tokens and temporary keys, as documented for IAM and the metadata service.
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// The state that requests read or change.
#[derive(Debug)]
pub(super) struct State {
    /// Offset of the sandbox's clock from the system's.
    pub(super) clock_offset: SignedDuration,
    pub(super) counts: RequestCounts,
    /// The last task requests, newest first.
    pub(super) requests: VecDeque<Request<Bytes>>,
    pub(super) tokens: VecDeque<IssuedToken>,
    /// The documented key, then the temporary keys.
    pub(super) keys: VecDeque<SigningKey>,
    /// Metadata tokens with their expiry.
    pub(super) metadata_tokens: VecDeque<(String, Timestamp)>,
    /// Hash of the ids of a task, number of its looks, time of the first one.
    pub(super) looks: VecDeque<(u64, u64, Timestamp)>,
    hasher: RandomState,
    pub(super) token_life: SignedDuration,
    pub(super) key_life: SignedDuration,
    /// Whether a temporary key requires a metadata token.
    pub(super) hardened: bool,
    pub(super) iam_error: InjectedError,
    pub(super) metadata_error: InjectedError,
    /// Delay of responses with tokens and keys.
    pub(super) credential_delay: std::time::Duration,
}

/// Counters since the start, as `GET /sandbox/counts` shows them.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct RequestCounts {
    pub(super) connections: u64,
    pub(super) task_requests: u64,
    pub(super) task_requests_in_flight: u64,
    pub(super) token_requests: u64,
    pub(super) key_requests: u64,
    pub(super) metadata_token_requests: u64,
    pub(super) bad_signatures: u64,
}

/// A request for a task whose response depends on the earlier ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// The number of earlier looks.
    pub(super) number: u64,
    /// The time of the first look.
    pub(super) first_at: Timestamp,
    /// The time since then.
    pub(super) elapsed: SignedDuration,
}

/// A token issued by the sandbox.
#[derive(Debug)]
pub(super) struct IssuedToken {
    pub(super) value: String,
    pub(super) expires_at: Timestamp,
    /// Whether it is scoped to a project, as RDS requires.
    pub(super) has_project: bool,
    pub(super) revoked: bool,
}

/// A signing key.
#[derive(Debug)]
pub(super) struct SigningKey {
    pub(super) access: String,
    pub(super) secret: String,
    pub(super) security_token: String,
    /// Whether requests must carry the security token; true for temporary keys.
    pub(super) security_token_required: bool,
    /// `None` if it never expires.
    pub(super) expires_at: Option<Timestamp>,
    /// Bad signatures since the last good one.
    pub(super) bad_signatures_in_a_row: u32,
    pub(super) locked_until: Option<Timestamp>,
}

/// The error status of the next requests to one service.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct InjectedError {
    pub(super) status: StatusCode,
    pub(super) times: u64,
}

impl InjectedError {
    /// Consumes one error, if any is left, and returns its status.
    pub(super) fn take(&mut self) -> Option<StatusCode> {
        self.times = self.times.checked_sub(1)?;
        Some(self.status)
    }
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            clock_offset: SignedDuration::ZERO,
            counts: RequestCounts::default(),
            requests: VecDeque::new(),
            tokens: VecDeque::new(),
            keys: VecDeque::from([SigningKey {
                access: ACCESS_KEY_ID.to_owned(),
                secret: SECRET_ACCESS_KEY.to_owned(),
                security_token: SECURITY_TOKEN.to_owned(),
                security_token_required: false,
                expires_at: None,
                bad_signatures_in_a_row: 0,
                locked_until: None,
            }]),
            metadata_tokens: VecDeque::new(),
            looks: VecDeque::new(),
            hasher: RandomState::new(),
            token_life: DAY,
            key_life: DAY,
            hardened: false,
            iam_error: InjectedError::default(),
            metadata_error: InjectedError::default(),
            credential_delay: std::time::Duration::ZERO,
        }
    }

    /// The sandbox's clock.
    pub(super) fn now(&self) -> Timestamp {
        system_now() + self.clock_offset
    }

    /// Counts and records a task request.
    pub(super) fn record(&mut self, request: &Request<Bytes>) {
        self.counts.task_requests += 1;
        self.requests.truncate(RECORDED_REQUESTS - 1);
        self.requests.push_front(request.clone());
    }

    /// Records a look at the task with these ids.
    pub(super) fn look(&mut self, ids: [&str; 3]) -> Look {
        let now = self.now();
        let ids = self.hasher.hash_one(ids);
        let known = self.looks.iter().position(|(known, ..)| *known == ids);
        let (number, first_at) = known
            .and_then(|index| self.looks.remove(index))
            .map_or((0, now), |(_, looks, first_at)| (looks, first_at));
        remember(&mut self.looks, 0, (ids, number + 1, first_at));
        Look {
            number,
            first_at,
            elapsed: now.duration_since(first_at),
        }
    }
}

/// Appends to a bounded queue. If it is full, drops the oldest item after the first `permanent` ones.
pub(super) fn remember<T>(queue: &mut VecDeque<T>, permanent: usize, item: T) {
    if queue.len() >= MAX_ENTRIES + permanent {
        queue.remove(permanent);
    }
    queue.push_back(item);
}

#[expect(clippy::disallowed_methods, reason = "the sandbox has its own clock")]
fn system_now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).expect("the system clock is within the range of jiff")
}
