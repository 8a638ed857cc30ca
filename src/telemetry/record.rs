//! Metrics, access line and span of one call: collected while the call runs, written exactly once at its end.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::Code;

use super::{
    access::Access,
    metrics::{CallerFault, Metrics},
    trace::{ServerSpan, Tracer},
};
use crate::{method::Method, reason::Reason};

/// A shorter deadline leaves RDS no fair time for a reply. The objective for the duration of calls, as in `deploy/monitoring`.
const FAIR_TIME: Duration = Duration::from_millis(2500);

/// The destinations of all call records.
pub struct Sinks {
    /// Counters and histograms.
    pub metrics: Arc<Metrics>,
    /// The access log.
    pub access: Access,
    /// The trace export, if enabled.
    pub tracer: Option<Arc<Tracer>>,
}

impl fmt::Debug for Sinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sinks").finish_non_exhaustive()
    }
}

/// Metrics, access line and span of one call. Written on drop; the code is CANCELLED unless [`Record::code`] was set.
#[derive(Debug)]
pub struct Record {
    sinks: Arc<Sinks>,
    pub(super) method: Method,
    /// The call's `x-request-id`: 1 to 128 of `[A-Za-z0-9._-]`.
    pub request_id: String,
    /// The call's span, if traces are exported.
    pub span: Option<Arc<ServerSpan>>,
    /// The caller's `traceparent` as sent.
    pub(super) traceparent: Option<HeaderValue>,
    pub(super) peer: Arc<Peer>,
    /// The caller's `user-agent` as sent: any bytes that a header may hold.
    pub(super) user_agent: Option<HeaderValue>,
    /// The start of the keyed hash of the caller's token, if it sent one.
    pub token_hash: Option<[u8; 6]>,
    /// The project of the request, once its id has been validated.
    pub project_id: Option<String>,
    started: Instant,
    /// The caller's timeout or `--timeout`, whichever is shorter.
    pub(super) timeout: Duration,
    /// Whether the caller chose the deadline, or used it up before its request was complete.
    pub is_callers_deadline: bool,
    /// The lookup that the call waits for, or that produced its reply.
    pub progress: Option<Arc<Progress>>,
    /// Why the call failed.
    pub reason: Option<Reason>,
    /// The code that was passed to HTTP/2. Later connection errors do not change it.
    pub code: Option<Code>,
    /// Messages of a watch that were passed to HTTP/2.
    pub messages: u64,
    /// Bytes of reply messages, with their prefixes, that were passed to HTTP/2.
    pub bytes: u64,
}

impl Record {
    /// Starts the record of a call whose headers have arrived, and counts it.
    pub fn start(
        sinks: &Arc<Sinks>,
        method: Method,
        request_id: String,
        timeout: Duration,
        peer: Arc<Peer>,
        headers: &HeaderMap,
    ) -> Self {
        sinks.metrics.call_started(method);
        Self {
            method,
            request_id,
            span: sinks
                .tracer
                .as_ref()
                .map(|tracer| tracer.start(headers, None)),
            traceparent: headers.get("traceparent").cloned(),
            peer,
            user_agent: headers.get(header::USER_AGENT).cloned(),
            token_hash: None,
            project_id: None,
            started: Instant::now(),
            timeout,
            is_callers_deadline: false,
            progress: None,
            reason: None,
            code: None,
            messages: 0,
            bytes: 0,
            sinks: Arc::clone(sinks),
        }
    }

    /// The facts of the lookup so far.
    pub fn facts(&self) -> Facts {
        self.progress
            .as_ref()
            .map(|progress| progress.facts())
            .unwrap_or_default()
    }

    /// Counts that the credential of the call, the facade's own or the caller's, was rejected or is locked.
    pub fn credential_rejected(&self, is_own: bool) {
        self.sinks.metrics.credential_rejected(is_own);
    }

    /// Why the caller alone is responsible for this error code, if that is so.
    pub(super) fn caller_fault(&self, code: Code, facts: &Facts) -> Option<CallerFault> {
        let no_fair_time = self.timeout < FAIR_TIME || facts.attempts == 0;
        // A watch of a task that is not over ends with the caller's deadline. A poll has a deadline of its own.
        let is_expected = match self.method {
            Method::WatchTaskDetail => self.started.elapsed() >= self.timeout,
            _ => no_fair_time,
        };
        match (code, self.reason?) {
            (Code::Unknown, Reason::InvalidRequest) => Some(CallerFault::Http),
            (Code::DeadlineExceeded, Reason::DeadlineExceeded)
                if self.is_callers_deadline && is_expected =>
            {
                Some(CallerFault::Deadline)
            }
            _ => None,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let took = self.started.elapsed();
        let facts = self.facts();
        let metrics = &self.sinks.metrics;
        metrics.call_handled(self.method, code, took);
        if self.method == Method::GetTaskDetail
            && took > FAIR_TIME
            && took.saturating_sub(facts.paced) <= FAIR_TIME
        {
            metrics.paced.inc();
        }
        if let (Some(reason), Method::GetTaskDetail | Method::WatchTaskDetail) =
            (self.reason, self.method)
        {
            metrics.call_failed(reason);
        }
        match self.caller_fault(code, &facts) {
            // The error rate, from which it is subtracted, has only calls of this method.
            Some(CallerFault::Deadline) if self.method != Method::GetTaskDetail => {}
            Some(fault) => metrics.caller_fault(fault),
            None => {}
        }
        self.sinks.access.write(self, code, took, &facts);
        if let Some(span) = &self.span {
            span.end(self, code, took, &facts);
        }
    }
}

/// The peer of a connection. Formatted once per connection, not once per line.
#[derive(Debug)]
pub struct Peer {
    pub(super) address: SocketAddr,
    pub(super) text: String,
}

impl Peer {
    /// The peer at `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            text: address.to_string(),
        }
    }
}

/// Results of the attempts of one lookup, for log, trace and status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Number of attempts sent.
    pub attempts: u32,
    /// HTTP status of the last reply.
    pub http_status: Option<u16>,
    /// The vendor's error code in the last reply, for example `DBS.200543`. At most 64 printable ASCII characters.
    pub upstream_code: Option<String>,
    /// The vendor's request id of the last attempt. At most 128 printable ASCII characters.
    pub upstream_request_id: Option<String>,
    /// The time for which the lookup has waited for the rate limiter.
    pub paced: Duration,
}

/// The [`Facts`] of a lookup, readable during its attempts.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Facts>);

impl Progress {
    /// The facts of a finished lookup.
    pub fn finished(facts: Facts) -> Arc<Self> {
        Arc::new(Self(Mutex::new(facts)))
    }

    /// The facts so far.
    pub fn facts(&self) -> Facts {
        self.0.lock().clone()
    }

    /// Changes the facts.
    pub fn update(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.0.lock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_the_callers_fault_if_the_caller_chose_it_and_left_no_fair_time() {
        let sinks = Arc::new(Sinks {
            metrics: Metrics::new(),
            access: Access::off(),
            tracer: None,
        });
        let peer = Arc::new(Peer::new("127.0.0.1:4711".parse().unwrap()));
        let deadline = (Code::DeadlineExceeded, Some(Reason::DeadlineExceeded));
        let upstream = (Code::DeadlineExceeded, Some(Reason::UpstreamTimeout));
        let fault = Some(CallerFault::Deadline);
        let cases = [
            (deadline, true, 1, 0, fault),
            (deadline, true, 2499, 3, fault),
            (deadline, true, 2500, 1, None),
            (deadline, true, 30_000, 0, fault),
            (deadline, false, 1, 0, None),
            (upstream, true, 1, 1, None),
            ((Code::Ok, None), true, 1, 1, None),
            ((Code::Cancelled, None), true, 1, 0, None),
        ];

        for ((code, reason), is_callers, milliseconds, attempts, expected) in cases {
            let timeout = Duration::from_millis(milliseconds);
            let method = Method::GetTaskDetail;
            let id = String::new();
            let headers = HeaderMap::new();
            let mut record = Record::start(&sinks, method, id, timeout, peer.clone(), &headers);
            record.reason = reason;
            if is_callers {
                record.is_callers_deadline = true;
            }
            let facts = Facts {
                attempts,
                ..Facts::default()
            };
            let case = format!("{code:?} {reason:?} {is_callers} {milliseconds} {attempts}");
            assert_eq!(record.caller_fault(code, &facts), expected, "{case}");
        }
    }
}
