//! One attempt: admission, one exchange, and what its end means for the caller, the breaker and the key.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_ENCODING};
use tokio::time::Instant;

use super::{
    Client, Error, Rejection, breaker,
    rejection::{self, KEY_LOCK},
    request::TaskRequest,
    retry,
    verdict::{Credential, Repeat},
    wire::{NotATask, TaskDetail, parse_task_detail},
};
use crate::{
    credentials::{self, Auth, Identity, key_guard},
    deadline::SharedDeadline,
    http_client::{Error as HttpError, Response},
    reason::Reason,
    telemetry::{AttemptRecord, Facts, Progress, ServerSpan, metrics::AttemptOutcome},
    wait,
};

/// An attempt does not start with less than this left: no answer could come in time.
const FLOOR: Duration = Duration::from_millis(2);

/// Stands for a body that says nothing: no JSON, so that only the status counts.
const UNREADABLE: &[u8] = b"?";

/// Why an attempt failed, and what can be done about it.
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
    RefreshCredential,
    /// A signature of the corrected time.
    SignAgain,
}

/// When an attempt was signed.
#[derive(Debug, Clone, Copy)]
struct Signed {
    at: SystemTime,
    /// An earlier attempt of this lookup has corrected the clock.
    clock_corrected: bool,
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
            reason => Error::Transport(reason),
        };
        let advice = retry::Advice {
            // A stale pooled connection, most often: a fresh one is the whole remedy.
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

fn backoff_if(repeatable: bool) -> retry::Advice {
    retry::Advice::repeat(if repeatable {
        Repeat::Backoff
    } else {
        Repeat::Never
    })
}

impl Client {
    pub(super) async fn attempt(
        &self,
        request: &TaskRequest<'_>,
        auth: &Auth,
        clock_corrected: bool,
        deadline: &SharedDeadline,
        progress: &Progress,
        span: Option<&Arc<ServerSpan>>,
    ) -> Result<TaskDetail, FailedAttempt> {
        let endpoint = &*self.endpoint;
        if deadline.deadline().remaining() < FLOOR {
            return Err(FailedAttempt::permanent(
                Error::DeadlineExceeded,
                Reason::DeadlineExceeded,
            ));
        }
        self.admit(auth.identity(), deadline).await?;
        let key = match auth {
            Auth::Token(_) => None,
            Auth::Key(key) => Some(
                key.guard
                    .admit(deadline.deadline())
                    .await
                    .map_err(refused)?,
            ),
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
        let mut record = AttemptRecord::start(&endpoint.metrics, request.url(), span, resend_count);
        let until = Instant::now() + endpoint.options.attempt_timeout;
        let message = request.with(auth, signed.at, &record);
        let mut answer = match tokio::time::timeout_at(until, self.http.send(message)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(failure)) => return Err(end_without_answer(record, admission, failure)),
            Err(_) => {
                record.finish(AttemptOutcome::Timeout);
                return Err(FailedAttempt::timeout(true));
            }
        };
        progress.update(|facts| {
            facts.http_status = Some(answer.status());
            facts.upstream_request_id = rejection::request_id(answer.headers());
            facts.upstream_code = None;
            record.replied(answer.status(), facts.upstream_request_id.as_ref());
        });
        let body = match tokio::time::timeout_at(until, answer.body()).await {
            Ok(Ok(body)) => body,
            // An error's status says what it has to say even if its body is cut off, stalls or is a huge page.
            Ok(Err(_)) | Err(_) if answer.status() != 200 => Bytes::from_static(UNREADABLE),
            Ok(Err(failure)) => return Err(end_without_answer(record, admission, failure)),
            Err(_) => {
                record.finish(AttemptOutcome::Timeout);
                return Err(FailedAttempt::timeout(false));
            }
        };
        record.finish(AttemptOutcome::Answer);
        let understood = self.understand(&answer, &body, signed, admission, key, progress);
        if let Err(FailedAttempt {
            error: Error::Rejected(rejection),
            ..
        }) = &understood
        {
            endpoint.throttle.learn(auth.identity(), rejection);
        }
        understood
    }

    /// Waits until neither the vendor's rate nor our own holds the identity back.
    async fn admit(
        &self,
        identity: Identity,
        deadline: &SharedDeadline,
    ) -> Result<(), FailedAttempt> {
        let endpoint = &*self.endpoint;
        endpoint.throttle.check(identity).map_err(held_back)?;
        if let Some(rate) = &endpoint.rate {
            // An attempt that the breaker stops takes no turn. The place of a probe is free again at once.
            endpoint.breaker.admit().map_err(circuit_open)?;
            let turn = rate.turn(identity, deadline.deadline());
            turn.await.map_err(held_back)?;
            // The vendor may have throttled another call in the meantime.
            endpoint.throttle.check(identity).map_err(held_back)?;
        }
        Ok(())
    }

    fn understand(
        &self,
        answer: &Response,
        body: &[u8],
        signed: Signed,
        admission: breaker::Admission<'_>,
        key: Option<key_guard::Admission<'_>>,
        progress: &Progress,
    ) -> Result<TaskDetail, FailedAttempt> {
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
    ) -> FailedAttempt {
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
            return FailedAttempt::rejected(rejection);
        }
        let learn = |date| self.endpoint.clock.learn(date, signed.at);
        let skewed = wait::date(headers).is_some_and(learn);
        // A wrong clock says nothing about the key, unless the corrected one is refused too.
        if !skewed || signed.clock_corrected {
            key.signature_refused(false);
        }
        if skewed || signed.clock_corrected {
            return FailedAttempt {
                remedy: Remedy::SignAgain,
                ..FailedAttempt::permanent(Error::ClockSkew, Reason::ClockSkew)
            };
        }
        // A temporary key may have been withdrawn. This call is not repeated all the same: keys never are.
        FailedAttempt {
            remedy: Remedy::RefreshCredential,
            ..FailedAttempt::rejected(rejection)
        }
    }
}

fn held_back(retry_after: Duration) -> FailedAttempt {
    FailedAttempt::permanent(Error::Throttled { retry_after }, Reason::Throttled)
}

fn circuit_open(retry_after: Duration) -> FailedAttempt {
    FailedAttempt::permanent(Error::CircuitOpen { retry_after }, Reason::CircuitOpen)
}

fn malformed(admission: breaker::Admission<'_>) -> FailedAttempt {
    admission.answered();
    FailedAttempt::permanent(Error::Malformed, Reason::UpstreamMalformedResponse)
}

fn with_token(rejection: Rejection) -> FailedAttempt {
    let renewable = rejection.verdict.credential == Credential::Renewable;
    FailedAttempt {
        remedy: if renewable {
            Remedy::RefreshCredential
        } else {
            Remedy::None
        },
        ..FailedAttempt::rejected(rejection)
    }
}

fn refused(error: credentials::Error) -> FailedAttempt {
    FailedAttempt::permanent(Error::Credentials(error), Reason::CredentialLocked)
}

fn end_without_answer(
    record: AttemptRecord<'_>,
    admission: breaker::Admission<'_>,
    failure: HttpError,
) -> FailedAttempt {
    record.fail(failure.reason);
    if failure.reason == Reason::UpstreamResponseTooLarge {
        admission.answered();
    } else {
        admission.failed();
    }
    FailedAttempt::transport(failure)
}

/// No encoding was asked for, so none can be undone.
fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_ENCODING)
        .is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
}
