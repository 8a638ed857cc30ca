//! One upstream attempt: waits for admission, sends the request, and reports the result to the breaker, the throttle windows and the key
//! guard.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_ENCODING};
use tokio::time::Instant;

use super::{
    Client, Error, Rejection,
    breaker::{self, Breaker},
    client::LookupContext,
    clock,
    fleet::{self, InFleet},
    key_evidence::{self, KeyEvidence},
    redaction::{Secrets, is_secret, redact_facts, redact_rejection},
    rejection::{self, KEY_LOCK},
    request::TaskRequest,
    retry,
    throttle::Throttled,
    verdict::{Credential, Repeat},
    wire::{BYTES_PER_STEP, NotATask, parse_with_pauses},
};
use crate::{
    credentials::{self, Auth, Token, TokenEvidence, key_guard},
    deadline::{Deadline, SharedDeadline},
    http_client::{Error as HttpError, Response, Reuse},
    lateness::is_late,
    quota_store::Session,
    reason::Reason,
    task::Task,
    telemetry::{AttemptRecord, Facts, metrics::AttemptOutcome},
    wait,
};

/// An attempt does not start with less than this left before the deadline: no reply could arrive in time.
const FLOOR: Duration = Duration::from_millis(2);

/// Replaces a body that cannot be read. It is not JSON, so the reply is judged by its status alone.
const UNREADABLE: &[u8] = b"?";

/// A failed attempt: its error, and whether another attempt may succeed.
pub(super) struct FailedAttempt {
    pub(super) error: Error,
    pub(super) reason: Reason,
    pub(super) advice: retry::Advice,
    pub(super) remedy: Remedy,
}

/// What has to change for another attempt to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    None,
    /// Another credential.
    RefreshCredential(TokenEvidence),
    /// A signature of the corrected time.
    SignAgain,
}

/// The credential of an attempt, until its reply.
enum Used<'a> {
    Token(&'a Token),
    Key(key_guard::SigningPermit<'a>),
}

/// The body of a reply.
enum Content<'a> {
    /// Of a 200, parsed.
    Task(Result<Arc<Task>, NotATask>),
    /// Of any other status.
    Other(&'a [u8]),
}

/// The credential and the times of an attempt.
#[derive(Debug, Clone, Copy)]
struct Signed<'a> {
    auth: &'a Auth,
    /// The time in the signature.
    at: SystemTime,
    sent_at: Instant,
    /// Whether an earlier attempt of this lookup has corrected the clock.
    clock_corrected: bool,
    /// The attempt as the quota store sees it.
    in_fleet: InFleet<'a>,
}

/// When an attempt ends at the latest.
#[derive(Debug, Clone, Copy)]
struct Limits<'a> {
    connect: Instant,
    attempt: Instant,
    deadline: &'a SharedDeadline,
}

impl Limits<'_> {
    /// Whether the deadline has passed before this limit: then the process got no CPU time to end the call at its deadline.
    fn is_behind_deadline(&self, limit: Instant) -> bool {
        self.deadline.deadline().at() < limit
    }
}

impl FailedAttempt {
    fn permanent(error: Error, reason: Reason) -> Self {
        Self {
            error,
            reason,
            advice: retry::Advice::repeat(Repeat::Never),
            remedy: Remedy::None,
        }
    }

    fn transport(failure: HttpError) -> Self {
        let error = match failure.reason {
            Reason::UpstreamResponseTooLarge => Error::TooLarge,
            reason => Error::Transport(reason, failure.obstacle),
        };
        let advice = retry::Advice {
            // Usually a stale pooled connection, and then a new connection is enough.
            at_once: matches!(
                failure.reason,
                Reason::UpstreamReset | Reason::UpstreamTruncated
            ),
            ..backoff_if(failure.retryable)
        };
        Self {
            advice,
            ..Self::permanent(error, failure.reason)
        }
    }

    fn timeout(before_head: bool) -> Self {
        Self {
            advice: backoff_if(before_head),
            ..Self::permanent(Error::AttemptTimeout, Reason::UpstreamTimeout)
        }
    }

    fn rejected(rejection: Rejection) -> Self {
        let advice = retry::Advice {
            retry_after: rejection.retry_after,
            ..retry::Advice::repeat(rejection.verdict.repeat)
        };
        let reason = rejection.verdict.reason;
        Self {
            advice,
            ..Self::permanent(Error::Rejected(Box::new(rejection)), reason)
        }
    }
}

fn backoff_if(retryable: bool) -> retry::Advice {
    retry::Advice::repeat(if retryable {
        Repeat::Backoff
    } else {
        Repeat::Never
    })
}

impl Client {
    /// Makes one attempt.
    ///
    /// # Errors
    /// [`FailedAttempt`], without a request sent if the deadline is near, a throttle window or the circuit is open, or the key rests.
    pub(super) async fn attempt(
        &self,
        request: &TaskRequest<'_>,
        auth: &Auth,
        reuse: Reuse,
        clock_corrected: bool,
        breaker: &Breaker,
        lookup: &LookupContext<'_>,
    ) -> Result<Arc<Task>, FailedAttempt> {
        let endpoint = &*self.endpoint;
        let instance = endpoint.scope.instance(lookup.query);
        let deadline = lookup.deadline.deadline();
        check_remaining(deadline)?;
        let identity = auth.identity();
        let attempt = breaker::Attempt {
            query: lookup.query,
            identity,
            caller: lookup.caller,
        };
        let check_throttle = || {
            let checked = endpoint.throttle.check(identity, instance);
            checked.map_err(throttled)
        };
        check_throttle()?;
        let guard;
        let (used, in_fleet) = match auth {
            Auth::Token(token) => (Used::Token(token), InFleet::new(None, instance, deadline)),
            Auth::Key(key) => {
                guard = key.guard.scoped(instance);
                let admission = guard.admit(&lookup.query.project_id, lookup.caller, deadline);
                let permit = admission.await.map_err(key_unavailable)?;
                let in_fleet = InFleet::new(Some((key, &guard)), instance, deadline);
                (Used::Key(permit), in_fleet)
            }
        };
        let queued_at = Instant::now();
        let _probe;
        if let Some(session) = lookup.store {
            breaker.check(attempt).map_err(circuit_open)?;
            _probe = in_fleet.probe(session);
            let admitted = self.admit_in_fleet(session, in_fleet, identity, lookup.caller);
            // Boxed, so that calls without a store do not pay for its size.
            Box::pin(admitted).await?;
        } else if let Some(pacing) = &endpoint.pacing {
            // An attempt that the breaker would reject must not use up the rate.
            breaker.check(attempt).map_err(circuit_open)?;
            let start = pacing.wait(identity, lookup.caller, deadline).await;
            start.map_err(|retry_after| {
                throttled(Throttled {
                    retry_after,
                    subject: None,
                })
            })?;
        }
        // Another call may have been throttled, and the deadline may have come near, while this one waited.
        check_throttle()?;
        check_remaining(deadline)?;
        let admission = breaker.admit(attempt).map_err(circuit_open)?;

        let signed = Signed {
            auth,
            at: endpoint.clock.now(),
            sent_at: Instant::now(),
            clock_corrected,
            in_fleet,
        };
        let progress = lookup.progress;
        let mut resend_count = 0;
        progress.update(|facts| {
            resend_count = facts.attempts;
            facts.attempts += 1;
            facts.paced += signed.sent_at - queued_at;
        });
        let mut record =
            AttemptRecord::start(&endpoint.metrics, request.url(), lookup.span, resend_count);
        let limits = Limits {
            connect: signed.sent_at + endpoint.options.connect_timeout,
            attempt: signed.sent_at + endpoint.options.attempt_timeout,
            deadline: lookup.deadline,
        };
        let until = limits.attempt;
        let message = request.with(auth, signed.at, &record);
        let secrets = self.secrets(auth);
        let mut reply = match tokio::time::timeout_at(until, self.http.send(message, reuse)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(failure)) => {
                return Err(failed_request(record, admission, failure, limits));
            }
            Err(_) => {
                self.http.timed_out();
                return Err(timed_out(record, admission, limits, true));
            }
        };
        progress.update(|facts| {
            facts.http_status = Some(reply.status());
            facts.upstream_request_id = rejection::request_id(reply.headers());
            facts.upstream_code = None;
            redact_facts(facts, secrets);
            record.replied(reply.status(), facts.upstream_request_id.as_ref());
        });
        let body = match tokio::time::timeout_at(until, reply.body()).await {
            Ok(Ok(body)) => body,
            // A non-200 reply is judged by its status even if its body cannot be read, unless its meaning depends on the body.
            Ok(Err(HttpError {
                reason: Reason::UpstreamResponseTooLarge,
                ..
            })) if reply.status() != 200 => Bytes::from_static(UNREADABLE),
            Ok(Err(_)) | Err(_) if !matches!(reply.status(), 200 | 400 | 403 | 404 | 409) => {
                Bytes::from_static(UNREADABLE)
            }
            Ok(Err(failure)) => {
                return Err(failed_request(record, admission, failure, limits));
            }
            Err(_) => return Err(timed_out(record, admission, limits, false)),
        };
        record.finish(AttemptOutcome::Reply);
        let _permit = if body.len() > BYTES_PER_STEP {
            self.large_replies.acquire().await.ok()
        } else {
            None
        };
        let content = match (reply.status(), is_encoded(reply.headers())) {
            (200, true) => Content::Task(Err(NotATask::Malformed)),
            (200, false) => Content::Task(
                parse_with_pauses(&body, &is_secret(secrets))
                    .await
                    .map(Arc::new),
            ),
            (_, true) => Content::Other(UNREADABLE),
            (_, false) => Content::Other(&body),
        };
        let mut outcome = self.interpret(&reply, content, signed, admission, used, lookup);
        if let Ok(task) = &outcome
            && !task.message().instance_id.is_empty()
            && task.message().instance_id != lookup.query.instance_id
        {
            // Perhaps the reply to an earlier request on this connection, which is closed before it delivers the next one.
            endpoint.metrics.mismatched_replies.inc();
            tracing::warn!(
                "upstream replied about another instance than requested; the connection is not used again"
            );
        } else {
            reply.release();
        }
        if let Err(FailedAttempt {
            error: Error::Rejected(rejection),
            ..
        }) = &mut outcome
        {
            redact_rejection(rejection, secrets);
        }
        outcome
    }

    fn secrets<'a>(&'a self, auth: &'a Auth) -> Secrets<'a> {
        Secrets {
            auth,
            proxy: self.endpoint.proxy_password.as_ref(),
        }
    }

    fn interpret(
        &self,
        reply: &Response,
        content: Content<'_>,
        signed: Signed<'_>,
        admission: breaker::Admission<'_>,
        used: Used<'_>,
        lookup: &LookupContext<'_>,
    ) -> Result<Arc<Task>, FailedAttempt> {
        let (headers, now) = (reply.headers(), self.endpoint.clock.now());
        let (rejection, mut facts) = match content {
            Content::Task(Ok(task)) => {
                admission.succeeded();
                match used {
                    Used::Token(token) => self.credentials.accepted(token, signed.sent_at),
                    Used::Key(key) => {
                        key.accepted();
                        signed.in_fleet.accepted(lookup.store);
                    }
                }
                return Ok(task);
            }
            Content::Task(Err(NotATask::Malformed)) => {
                admission.succeeded();
                let (error, reason) = (Error::Malformed, Reason::UpstreamMalformedResponse);
                return Err(FailedAttempt::permanent(error, reason));
            }
            Content::Task(Err(NotATask::TooManyParts)) => {
                admission.succeeded();
                let (error, reason) = (Error::TooLarge, Reason::UpstreamResponseTooLarge);
                return Err(FailedAttempt::permanent(error, reason));
            }
            Content::Task(Err(NotATask::ErrorObject(envelope))) => {
                rejection::from_envelope(200, headers, envelope, now)
            }
            Content::Other(body) => rejection::from_reply(reply.status(), headers, body, now),
        };
        if rejection.verdict.trips_breaker {
            admission.failed();
        } else {
            admission.succeeded();
        }
        redact_facts(&mut facts, self.secrets(signed.auth));
        lookup.progress.update(|known| {
            *known = Facts {
                attempts: known.attempts,
                paced: known.paced,
                ..facts.clone()
            };
        });
        let identity = signed.auth.identity();
        let instance = self.endpoint.scope.instance(lookup.query);
        // Before the permit of a key is dropped, because calls that wait for it must find the throttle window.
        self.endpoint
            .throttle
            .record(identity, instance, &rejection);
        if let Some(session) = lookup.store {
            fleet::record(session, instance, &rejection);
        }
        Err(match used {
            Used::Key(key) => {
                self.rejected_with_key(rejection, &facts, headers, signed, key, lookup.store)
            }
            Used::Token(token) => self.rejected_with_token(rejection, &facts, signed, token),
        })
    }

    /// A rejected token may have a successor.
    fn rejected_with_token(
        &self,
        rejection: Rejection,
        facts: &Facts,
        signed: Signed<'_>,
        token: &Token,
    ) -> FailedAttempt {
        let code = facts.upstream_code.as_deref();
        let remedy = if rejection.verdict.credential == Credential::Renewable {
            let evidence = key_evidence::about_token(code, &rejection.message);
            Remedy::RefreshCredential(evidence)
        } else {
            // The service itself replied, so the gateway has accepted the token.
            if code.unwrap_or_default().starts_with("DBS.") {
                self.credentials.accepted(token, signed.sent_at);
            }
            Remedy::None
        };
        FailedAttempt {
            remedy,
            ..FailedAttempt::rejected(rejection)
        }
    }

    /// A rejected signature is never retried, because rejections lock the key. The exception is a wrong clock, which gets one more attempt.
    fn rejected_with_key(
        &self,
        rejection: Rejection,
        facts: &Facts,
        headers: &HeaderMap,
        signed: Signed<'_>,
        key: key_guard::SigningPermit<'_>,
        store: Option<&Session>,
    ) -> FailedAttempt {
        let clock = &self.endpoint.clock;
        let clock_skew = |remedy| FailedAttempt {
            remedy,
            ..FailedAttempt::permanent(Error::ClockSkew, Reason::ClockSkew)
        };
        // `Date` may come from a proxy, so it counts only if it explains the rejection.
        let date = wait::date(headers).filter(|date| clock::is_skewed(*date, signed.at));
        match rejection.key_evidence {
            KeyEvidence::None => {
                // The service itself replied, so the gateway has accepted the signature.
                let code = facts.upstream_code.as_deref().unwrap_or_default();
                if code.starts_with("DBS.") {
                    key.accepted();
                    signed.in_fleet.accepted(store);
                }
                FailedAttempt::rejected(rejection)
            }
            KeyEvidence::Locked => {
                key.locked();
                signed.in_fleet.locked(store);
                key_unavailable(credentials::Error::Locked {
                    retry_after: KEY_LOCK,
                })
            }
            // A signature of a wrong time is not evidence against the key.
            KeyEvidence::Expired { .. } if signed.clock_corrected => {
                clock.reset();
                clock_skew(Remedy::None)
            }
            KeyEvidence::Expired { server_time } => {
                let is_corrected = server_time
                    .or(date)
                    .is_some_and(|gateway| clock.correct(gateway));
                // Without the gateway's time, an offset in use is the likely cause.
                clock_skew(if is_corrected || clock.reset() {
                    Remedy::SignAgain
                } else {
                    Remedy::None
                })
            }
            KeyEvidence::Rejected if signed.clock_corrected => {
                clock.reset();
                signed.in_fleet.rejected(store, key.rejected());
                clock_skew(Remedy::None)
            }
            KeyEvidence::Rejected => {
                let rejected = key.rejected();
                signed.in_fleet.rejected(store, rejected);
                if rejected != key_guard::Rejected::Rests
                    && date.is_some_and(|gateway| clock.correct(gateway))
                {
                    return clock_skew(Remedy::SignAgain);
                }
                // Requests a new key, in case a temporary one was revoked, but does not retry this call.
                FailedAttempt {
                    remedy: Remedy::RefreshCredential(TokenEvidence::Unclear),
                    ..FailedAttempt::rejected(rejection)
                }
            }
        }
    }
}

fn deadline_exceeded() -> FailedAttempt {
    FailedAttempt::permanent(Error::DeadlineExceeded, Reason::DeadlineExceeded)
}

fn check_remaining(deadline: Deadline) -> Result<(), FailedAttempt> {
    if deadline.remaining() < FLOOR {
        return Err(deadline_exceeded());
    }
    Ok(())
}

pub(super) fn throttled(throttled: Throttled) -> FailedAttempt {
    let Throttled {
        retry_after,
        subject,
    } = throttled;
    let error = Error::Throttled {
        retry_after,
        subject,
    };
    FailedAttempt::permanent(error, Reason::Throttled)
}

fn circuit_open(retry_after: Duration) -> FailedAttempt {
    FailedAttempt::permanent(Error::CircuitOpen { retry_after }, Reason::CircuitOpen)
}

pub(super) fn key_unavailable(error: credentials::Error) -> FailedAttempt {
    FailedAttempt::permanent(Error::Credentials(error), Reason::CredentialLocked)
}

fn failed_request(
    record: AttemptRecord<'_>,
    admission: breaker::Admission<'_>,
    failure: HttpError,
    limits: Limits<'_>,
) -> FailedAttempt {
    tracing::warn!(
        reason = failure.reason.as_str(),
        cause = failure.cause,
        "no complete reply from RDS"
    );
    record.fail(failure.reason);
    match failure.reason {
        // Upstream is up if it replies, even if the reply cannot be read.
        Reason::UpstreamResponseTooLarge | Reason::UpstreamProtocol => admission.succeeded(),
        // Out of descriptors, which shows nothing about upstream.
        Reason::Overloaded => drop(admission),
        // Connecting may have waited for CPU time of this process or for other connects, not for upstream.
        _ if failure.timed_out && is_late(limits.connect) => drop(admission),
        _ => admission.failed(),
    }
    match failure.timed_out && limits.is_behind_deadline(limits.connect) {
        true => deadline_exceeded(),
        false => FailedAttempt::transport(failure),
    }
}

fn timed_out(
    record: AttemptRecord<'_>,
    admission: breaker::Admission<'_>,
    limits: Limits<'_>,
    before_head: bool,
) -> FailedAttempt {
    record.finish(AttemptOutcome::Timeout);
    // The reply may have arrived, but this process got no CPU time to read it.
    if !is_late(limits.attempt) {
        admission.failed();
    }
    match limits.is_behind_deadline(limits.attempt) {
        true => deadline_exceeded(),
        false => FailedAttempt::timeout(before_head),
    }
}

/// Requests accept no content encoding, so an encoded body cannot be read.
fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_ENCODING)
        .is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
}
