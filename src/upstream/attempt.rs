//! One attempt: admission, one exchange, and what its end means for the caller, the breaker and the key.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_ENCODING};
use tokio::time::Instant;

use super::{
    Client, ErrorKind, Facts, Progress, Rejection, breaker,
    rejection::{self, KEY_LOCK},
    request::TaskRequest,
    retry,
    verdict::{Credential, Repeat},
    wire::{NotATask, TaskDetail, parse_task_detail},
};
use crate::{
    credentials::{self, Auth, Identity, key_guard},
    deadline::Limit,
    http::{Answer, Failure},
    reason::Reason,
    telemetry::{
        AttemptEnd, AttemptSpan, ServerSpan,
        metrics::{AttemptOutcome, Metrics},
    },
    wait,
};

/// An attempt does not start with less than this left: no answer could come in time.
const FLOOR: Duration = Duration::from_millis(2);

/// Stands for a body that says nothing: no JSON, so that only the status counts.
const UNREADABLE: &[u8] = b"?";

/// How an attempt failed, and what can be done about it.
pub(super) struct Failed {
    pub(super) kind: ErrorKind,
    pub(super) reason: Reason,
    pub(super) policy: retry::Failed,
    pub(super) remedy: Remedy,
}

/// What would make a repeated attempt succeed, beside luck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    None,
    /// Another credential.
    Renew,
    /// A signature of the corrected time.
    SignAgain,
}

/// When an attempt was signed.
#[derive(Debug, Clone, Copy)]
struct Signed {
    at: SystemTime,
    /// The call learnt the gateway's time before.
    clock_corrected: bool,
}

impl Failed {
    fn lasting(kind: ErrorKind, reason: Reason) -> Self {
        let policy = retry::Failed {
            repeat: Repeat::Never,
            at_once: false,
            retry_after: None,
        };
        Self {
            kind,
            reason,
            policy,
            remedy: Remedy::None,
        }
    }

    fn transport(failure: Failure) -> Self {
        let kind = match failure.reason {
            Reason::UpstreamResponseTooLarge => ErrorKind::TooLarge,
            reason => ErrorKind::Transport(reason),
        };
        let repeat = if failure.repeatable {
            Repeat::Backoff
        } else {
            Repeat::Never
        };
        // A stale pooled connection, most often: a fresh one is the whole remedy.
        let at_once = matches!(
            failure.reason,
            Reason::UpstreamReset | Reason::UpstreamTruncated
        );
        let policy = retry::Failed {
            repeat,
            at_once,
            retry_after: None,
        };
        Self {
            kind,
            reason: failure.reason,
            policy,
            remedy: Remedy::None,
        }
    }

    fn timeout(before_head: bool) -> Self {
        let repeat = if before_head {
            Repeat::Backoff
        } else {
            Repeat::Never
        };
        let policy = retry::Failed {
            repeat,
            at_once: false,
            retry_after: None,
        };
        Self {
            policy,
            ..Self::lasting(ErrorKind::AttemptTimeout, Reason::UpstreamTimeout)
        }
    }

    fn rejected(rejection: Rejection) -> Self {
        let policy = retry::Failed {
            repeat: rejection.verdict.repeat,
            at_once: false,
            retry_after: rejection.retry_after,
        };
        Self {
            reason: rejection.verdict.reason,
            kind: ErrorKind::Rejected(Box::new(rejection)),
            policy,
            remedy: Remedy::None,
        }
    }
}

impl Client {
    pub(super) async fn attempt(
        &self,
        request: &TaskRequest<'_>,
        auth: &Auth,
        clock_corrected: bool,
        limit: &Limit,
        progress: &Progress,
        span: Option<&Arc<ServerSpan>>,
    ) -> Result<TaskDetail, Failed> {
        let endpoint = &*self.endpoint;
        if limit.deadline().remaining() < FLOOR {
            return Err(Failed::lasting(
                ErrorKind::DeadlineExceeded,
                Reason::DeadlineExceeded,
            ));
        }
        self.admit(auth.identity(), limit).await?;
        let key = match auth {
            Auth::Token(_) => None,
            Auth::Key(key) => Some(key.guard.admit(limit.deadline()).await.map_err(refused)?),
        };
        let admission = endpoint.breaker.admit().map_err(circuit_open)?;

        let signed = Signed {
            at: endpoint.clock.now(),
            clock_corrected,
        };
        let mut resend_count = 0;
        progress.update(|facts| {
            resend_count = facts.attempts;
            facts.attempts += 1;
        });
        let span = span.map(|span| span.attempt(resend_count));
        let mut record = Record::start(&endpoint.metrics, request, span);
        let until = Instant::now() + endpoint.options.attempt_timeout;
        let message = request.with(auth, signed.at, record.span.as_ref());
        let mut answer = match tokio::time::timeout_at(until, self.http.send(message)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(failure)) => return Err(end_without_answer(record, admission, failure)),
            Err(_) => {
                record.end(AttemptOutcome::Timeout);
                return Err(Failed::timeout(true));
            }
        };
        record.http_status = Some(answer.status());
        progress.update(|facts| {
            facts.http_status = record.http_status;
            facts.upstream_request_id = rejection::request_id(answer.headers());
            if record.span.is_some() {
                record.upstream_request_id = facts.upstream_request_id.clone();
            }
            facts.upstream_code = None;
        });
        let body = match tokio::time::timeout_at(until, answer.body()).await {
            Ok(Ok(body)) => body,
            // An error's status says what it has to say even if its body is cut off, stalls or is a huge page.
            Ok(Err(_)) | Err(_) if answer.status() != 200 => Bytes::from_static(UNREADABLE),
            Ok(Err(failure)) => return Err(end_without_answer(record, admission, failure)),
            Err(_) => {
                record.end(AttemptOutcome::Timeout);
                return Err(Failed::timeout(false));
            }
        };
        record.end(AttemptOutcome::Answer);
        let understood = self.understand(&answer, &body, signed, admission, key, progress);
        if let Err(Failed {
            kind: ErrorKind::Rejected(rejection),
            ..
        }) = &understood
        {
            endpoint.throttle.learn(auth.identity(), rejection);
        }
        understood
    }

    /// Waits until neither the vendor's rate nor our own holds the identity back.
    async fn admit(&self, identity: Identity, limit: &Limit) -> Result<(), Failed> {
        let endpoint = &*self.endpoint;
        endpoint.throttle.check(identity).map_err(held_back)?;
        if let Some(rate) = &endpoint.rate {
            // An attempt that the breaker stops takes no turn. The place of a probe is free again at once.
            endpoint.breaker.admit().map_err(circuit_open)?;
            let turn = rate.turn(identity, limit.deadline());
            turn.await.map_err(held_back)?;
            // The vendor may have throttled another call in the meantime.
            endpoint.throttle.check(identity).map_err(held_back)?;
        }
        Ok(())
    }

    fn understand(
        &self,
        answer: &Answer,
        body: &[u8],
        signed: Signed,
        admission: breaker::Admission<'_>,
        key: Option<key_guard::Admission<'_>>,
        progress: &Progress,
    ) -> Result<TaskDetail, Failed> {
        let (headers, now) = (answer.headers(), self.endpoint.clock.now());
        let (rejection, facts) = match (answer.status(), is_encoded(headers)) {
            (200, true) => return Err(malformed(admission)),
            (200, false) => match parse_task_detail(body) {
                Ok(task) => {
                    admission.answered();
                    if let Some(key) = key {
                        key.accepted();
                    }
                    return Ok(task);
                }
                Err(NotATask::Malformed) => return Err(malformed(admission)),
                Err(NotATask::ErrorObject(envelope)) => {
                    rejection::of_envelope(200, headers, envelope, now)
                }
            },
            (status, false) => rejection::of_answer(status, headers, body, now),
            (status, true) => rejection::of_answer(status, headers, UNREADABLE, now),
        };
        if rejection.verdict.trips_breaker {
            admission.failed();
        } else {
            admission.answered();
        }
        progress.update(|known| {
            *known = Facts {
                attempts: known.attempts,
                ..facts.clone()
            };
        });
        Err(match key {
            Some(key) => self.with_key(rejection, &facts, headers, signed, key),
            None => with_token(rejection),
        })
    }

    /// A refused signature is never repeated, because failures lock the key; only a wrong clock is worth one more.
    fn with_key(
        &self,
        rejection: Rejection,
        facts: &Facts,
        headers: &HeaderMap,
        signed: Signed,
        key: key_guard::Admission<'_>,
    ) -> Failed {
        if rejection.lock_announced {
            key.signature_refused(true);
            return refused(credentials::Error::Locked {
                retry_after: KEY_LOCK,
            });
        }
        if !rejection.signature_refused {
            // The service itself answered, so the gateway has let the signature pass.
            if facts
                .upstream_code
                .as_deref()
                .is_some_and(|code| code.starts_with("DBS."))
            {
                key.accepted();
            }
            return Failed::rejected(rejection);
        }
        let learn = |date| self.endpoint.clock.learn(date, signed.at);
        let skewed = wait::date(headers).is_some_and(learn);
        // A wrong clock says nothing about the key, unless the corrected one is refused too.
        if !skewed || signed.clock_corrected {
            key.signature_refused(false);
        }
        if skewed || signed.clock_corrected {
            return Failed {
                remedy: Remedy::SignAgain,
                ..Failed::lasting(ErrorKind::ClockSkew, Reason::ClockSkew)
            };
        }
        // A temporary key may have been withdrawn. This call is not repeated all the same: keys never are.
        Failed {
            remedy: Remedy::Renew,
            ..Failed::rejected(rejection)
        }
    }
}

fn held_back(retry_after: Duration) -> Failed {
    Failed::lasting(ErrorKind::Throttled { retry_after }, Reason::Throttled)
}

fn circuit_open(retry_after: Duration) -> Failed {
    Failed::lasting(ErrorKind::CircuitOpen { retry_after }, Reason::CircuitOpen)
}

fn malformed(admission: breaker::Admission<'_>) -> Failed {
    admission.answered();
    Failed::lasting(ErrorKind::Malformed, Reason::UpstreamMalformedResponse)
}

fn with_token(rejection: Rejection) -> Failed {
    let renewable = rejection.verdict.credential == Credential::Renewable;
    Failed {
        remedy: if renewable {
            Remedy::Renew
        } else {
            Remedy::None
        },
        ..Failed::rejected(rejection)
    }
}

fn refused(error: credentials::Error) -> Failed {
    Failed::lasting(ErrorKind::Credentials(error), Reason::CredentialLocked)
}

fn end_without_answer(
    mut record: Record<'_>,
    admission: breaker::Admission<'_>,
    failure: Failure,
) -> Failed {
    record.reason = Some(failure.reason);
    record.end(AttemptOutcome::TransportError);
    if failure.reason == Reason::UpstreamResponseTooLarge {
        admission.answered();
    } else {
        admission.failed();
    }
    Failed::transport(failure)
}

/// No encoding was asked for, so none can be undone.
fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_ENCODING)
        .is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// Counts an attempt and ends its span once, as cancelled when it is dropped before its end.
struct Record<'a> {
    metrics: &'a Metrics,
    request: &'a TaskRequest<'a>,
    span: Option<AttemptSpan>,
    started: Instant,
    outcome: AttemptOutcome,
    http_status: Option<u16>,
    /// Why there is no whole answer.
    reason: Option<Reason>,
    upstream_request_id: Option<String>,
}

impl<'a> Record<'a> {
    fn start(
        metrics: &'a Metrics,
        request: &'a TaskRequest<'a>,
        span: Option<AttemptSpan>,
    ) -> Self {
        metrics.upstream_in_flight.inc();
        Self {
            metrics,
            request,
            span,
            started: Instant::now(),
            outcome: AttemptOutcome::Cancelled,
            http_status: None,
            reason: None,
            upstream_request_id: None,
        }
    }

    fn end(mut self, outcome: AttemptOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.metrics.upstream_in_flight.dec();
        self.metrics
            .upstream_attempt(self.outcome, self.http_status, took);
        if let Some(span) = &self.span {
            span.end(AttemptEnd {
                url: self.request.url(),
                outcome: self.outcome,
                http_status: self.http_status,
                reason: self.reason,
                upstream_request_id: self.upstream_request_id.take(),
                took,
            });
        }
    }
}
