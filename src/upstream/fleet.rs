//! Attempts in a fleet: admission by the quota store, and what an attempt shows to the other replicas.

use std::time::Duration;

use super::{
    Client, Rejection,
    attempt::{FailedAttempt, key_unavailable, throttled},
    throttle::Throttled,
    throttling_text::Subject,
};
use crate::{
    caller::Caller,
    credentials::{
        self, AccessKey, Identity,
        key_guard::{KeyGuard, Rejected},
    },
    deadline::Deadline,
    quota_store::{Answer, AttemptContext, Request, Session, Slot},
    reason::Reason,
};

/// How often a proven key is reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// An attempt as the quota store sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFleet<'a> {
    context: AttemptContext<'a>,
    guard: Option<&'a KeyGuard>,
}

impl<'a> InFleet<'a> {
    /// An attempt for which a key, if any, has been admitted by its guard.
    pub(super) fn new(
        key: Option<(&'a AccessKey, &'a KeyGuard)>,
        instance: Option<&'a str>,
        deadline: Deadline,
    ) -> Self {
        Self {
            context: AttemptContext {
                instance,
                key: key.map(|(key, _)| key),
                probe: key
                    .filter(|(_, guard)| !guard.is_proven())
                    .map(|_| fastrand::u64(..)),
                deadline,
            },
            guard: key.map(|(_, guard)| guard),
        }
    }

    /// To be held from before admission until the outcome has been reported; `None` unless the attempt is a probe.
    pub(super) fn probe(self, session: &'a Session) -> Option<Probe<'a>> {
        let context = self.context;
        context.probe.map(|_| Probe { session, context })
    }

    /// The gateway has accepted the key. Reported when that is news, and from time to time.
    pub(super) fn accepted(self, store: Option<&Session>) {
        if let (Some(session), Some(guard)) = (store, self.guard)
            && (self.context.probe.is_some() || guard.is_report_due(REPORT_INTERVAL))
        {
            session.key_accepted(self.context);
        }
    }

    /// The gateway has rejected the key.
    pub(super) fn rejected(self, store: Option<&Session>, rejected: Rejected) {
        if let Some(session) = store
            && rejected != Rejected::Uncounted
        {
            // Otherwise even the first rejection makes it rest.
            let is_proven = rejected == Rejected::Counted;
            session.key_rejected(self.context, is_proven);
        }
    }

    /// The gateway has locked the key.
    pub(super) fn locked(self, store: Option<&Session>) {
        if let Some(session) = store {
            session.key_locked(self.context);
        }
    }
}

/// An attempt with a key that this replica has not proven. Dropping it ends the probe in the store.
pub(super) struct Probe<'a> {
    session: &'a Session,
    context: AttemptContext<'a>,
}

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        self.session.probe_ended(self.context);
    }
}

impl Client {
    /// Waits until the fleet has room for an attempt.
    pub(super) async fn admit_in_fleet(
        &self,
        session: &Session,
        attempt: InFleet<'_>,
        identity: Identity,
        caller: Caller,
    ) -> Result<(), FailedAttempt> {
        let endpoint = &*self.endpoint;
        let InFleet { context, guard } = attempt;
        let request = Request::Attempt(context);
        let answer = match &endpoint.pacing {
            Some(pacing) => {
                let deadline = context.deadline;
                let waiting = pacing.wait_in_fleet(identity, caller, deadline, session, request);
                waiting.await
            }
            None => session.admit(request, Slot::UNLIMITED).await,
        };
        match answer {
            Answer::Late(retry_after) => Err(throttled(Throttled {
                retry_after,
                subject: None,
            })),
            Answer::Throttled(retry_after, subject) => {
                let subject = subject.parse().ok();
                let throttle = &endpoint.throttle;
                throttle.open(identity, context.instance, retry_after, subject);
                Err(throttled(Throttled {
                    retry_after,
                    subject,
                }))
            }
            Answer::Rests(retry_after) => {
                if let Some(guard) = guard {
                    guard.rest_for(retry_after);
                }
                Err(key_unavailable(credentials::Error::Locked { retry_after }))
            }
            Answer::Probed => Err(key_unavailable(credentials::Error::DeadlineExceeded)),
            Answer::Start(_) | Answer::Unavailable | Answer::Fresh | Answer::Busy => Ok(()),
        }
    }
}

/// Stores the throttle window that a rejection opens, if any. A window by address concerns this replica only.
pub(super) fn record(session: &Session, instance: Option<&str>, rejection: &Rejection) {
    if rejection.verdict.reason == Reason::Throttled
        && let Some(wait) = rejection.retry_after
        && rejection.throttled_subject != Some(Subject::Ip)
    {
        let subject = rejection.throttled_subject;
        let word = subject.map_or("", Subject::as_str);
        session.throttled(instance, wait, word, subject == Some(Subject::Api));
    }
}
