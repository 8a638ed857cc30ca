//! Metrics and span of one upstream attempt, written exactly once.

use std::sync::Arc;

use http::HeaderMap;
use tokio::time::Instant;
use url::Url;

use super::{
    metrics::{AttemptOutcome, Metrics},
    trace::{AttemptSpan, ServerSpan},
};
use crate::reason::Reason;

/// Metrics and span of one attempt. Written on drop; the outcome is `Cancelled` unless [`AttemptRecord::finish`] was called.
#[derive(Debug)]
pub struct AttemptRecord<'a> {
    metrics: &'a Metrics,
    /// Where the request goes.
    pub(super) url: &'a Url,
    span: Option<AttemptSpan>,
    started: Instant,
    pub(super) outcome: AttemptOutcome,
    /// The reply's status, once its head has arrived.
    pub(super) http_status: Option<u16>,
    /// Why the reply is missing or incomplete.
    pub(super) reason: Option<Reason>,
    /// The vendor's request id; stored only if there is a span.
    pub(super) upstream_request_id: Option<String>,
}

impl<'a> AttemptRecord<'a> {
    /// Starts the record of an attempt that `resend_count` attempts of the same lookup precede.
    pub fn start(
        metrics: &'a Metrics,
        url: &'a Url,
        parent: Option<&Arc<ServerSpan>>,
        resend_count: u32,
    ) -> Self {
        metrics.upstream_in_flight.inc();
        Self {
            metrics,
            url,
            span: parent.map(|parent| parent.attempt(resend_count)),
            started: Instant::now(),
            outcome: AttemptOutcome::Cancelled,
            http_status: None,
            reason: None,
            upstream_request_id: None,
        }
    }

    /// Adds the trace context to the attempt's request if `--propagate-trace-upstream` is set.
    pub fn propagate(&self, headers: &mut HeaderMap) {
        if let Some(span) = &self.span {
            span.propagate(headers);
        }
    }

    /// Records the head of the reply.
    pub fn replied(&mut self, http_status: u16, upstream_request_id: Option<&String>) {
        self.http_status = Some(http_status);
        if self.span.is_some() {
            self.upstream_request_id = upstream_request_id.cloned();
        }
    }

    /// Ends the attempt without a complete reply.
    pub fn fail(mut self, reason: Reason) {
        self.reason = Some(reason);
        self.finish(AttemptOutcome::TransportError);
    }

    /// Ends the attempt.
    pub fn finish(mut self, outcome: AttemptOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for AttemptRecord<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.metrics.upstream_in_flight.dec();
        self.metrics
            .upstream_attempt(self.outcome, self.http_status, took);
        if let Some(span) = &self.span {
            span.end(self, took);
        }
    }
}
