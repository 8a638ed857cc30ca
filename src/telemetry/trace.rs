//! Spans: one per call, with one child per upstream attempt. Without trace export there is no [`Tracer`].
//!
//! The names of their attributes are from the OpenTelemetry semantic conventions 1.44, except those that begin with `rds_task_facade`. The RPC
//! names are a release candidate and may change; the names for HTTP, network and service are stable.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use jiff::Timestamp;
use tonic::Code;

use super::{
    Propagators, Sampler, Tracing,
    access::limited,
    attempt::AttemptRecord,
    context::Context,
    export::SpanQueue,
    metrics::AttemptOutcome,
    otlp::{KeyValue, Link, Span, SpanKind, Status, StatusCode},
    record::{Facts, Record},
};
use crate::{code, method::Method, reason::Reason};

/// Identifies the version of the attributes' names, so that backends can translate them.
pub(super) const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// Creates spans and queues them for export.
#[derive(Debug)]
pub struct Tracer {
    sampler: Sampler,
    accepted: Propagators,
    propagate_upstream: bool,
    queue: SpanQueue,
}

/// The span of one call.
#[derive(Debug)]
pub struct ServerSpan {
    tracer: Arc<Tracer>,
    context: Context,
    /// Zero for a root span.
    parent_span_id: u64,
    /// The stream that a poll belongs to.
    link: Option<Link>,
    started: Timestamp,
}

/// The span of one upstream attempt.
#[derive(Debug)]
pub(super) struct AttemptSpan {
    parent: Arc<ServerSpan>,
    span_id: u64,
    started: Timestamp,
    resend_count: u32,
}

impl Tracer {
    /// A tracer that exports through `queue`.
    pub(super) fn new(config: &Tracing, propagate_upstream: bool, queue: SpanQueue) -> Arc<Self> {
        Arc::new(Self {
            sampler: config.sampler,
            accepted: config.propagators,
            propagate_upstream,
            queue,
        })
    }

    /// Exports all ended spans. Returns whether that took at most `limit`.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.queue.finish(limit).await
    }

    /// Starts the span of a call with these headers, or of a poll of the watch to which it is linked.
    pub(super) fn start(
        self: &Arc<Self>,
        headers: &HeaderMap,
        link: Option<Link>,
    ) -> Arc<ServerSpan> {
        let parent = Context::from_headers(headers, self.accepted);
        let decision = match &parent {
            Some(parent) => Some(parent.sampled),
            None => Context::decision_from_headers(headers, self.accepted),
        };
        let (trace_id, parent_span_id, trace_state) = match parent {
            Some(parent) => (parent.trace_id, parent.span_id, parent.trace_state),
            None => (fastrand::u128(1..), 0, String::new()),
        };
        Arc::new(ServerSpan {
            tracer: Arc::clone(self),
            context: Context {
                trace_id,
                span_id: fastrand::u64(1..),
                sampled: self.sampler.samples(trace_id, decision),
                trace_state,
            },
            parent_span_id,
            link,
            started: Timestamp::now(),
        })
    }
}

impl ServerSpan {
    /// The identity of this span.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Starts the span of a poll for this watch: the root of a trace of its own, linked to the watch, because a watch can last for hours.
    pub fn poll(&self) -> Arc<Self> {
        let link = Link {
            trace_id: self.context.trace_id.to_be_bytes().to_vec(),
            span_id: self.context.span_id.to_be_bytes().to_vec(),
            ..Link::default()
        };
        self.tracer.start(&HeaderMap::new(), Some(link))
    }

    /// Exports the span of a poll, which failed for this reason, if any. Called once.
    pub fn end_poll(&self, took: Duration, reason: Option<Reason>) {
        if !self.context.sampled {
            return;
        }
        let reason = reason.map(Reason::as_str);
        let attributes = [("rds_task_facade.reason", reason), ("error.type", reason)];
        let attribute = |(name, value): (_, Option<_>)| Some(KeyValue::text(name, value?));
        self.tracer.queue.put(Span {
            name: "poll".to_owned(),
            kind: SpanKind::Internal.into(),
            attributes: attributes.into_iter().filter_map(attribute).collect(),
            links: self.link.iter().cloned().collect(),
            status: status(reason.is_some()),
            ..self.span(self.context.span_id, self.started, took)
        });
    }

    /// Exports the span at the end of the call. Called once.
    pub(super) fn end(&self, record: &Record, code: Code, took: Duration, facts: &Facts) {
        if !self.context.sampled {
            return;
        }
        let method = match record.method {
            // Callers cannot add values.
            Method::Other => "_OTHER",
            known => known.full_name(),
        };
        let failed = is_server_error(code) && record.caller_fault(code, facts).is_none();
        let code = code::name(code);
        let mut attributes = vec![
            KeyValue::text("rpc.system.name", "grpc"),
            KeyValue::text("rpc.method", method),
            KeyValue::text("rpc.response.status_code", code),
            KeyValue::text("rds_task_facade.request_id", record.request_id.as_str()),
            KeyValue::number("rds_task_facade.attempts", facts.attempts),
            KeyValue::text("network.peer.address", record.peer.address.ip().to_string()),
            KeyValue::number("network.peer.port", record.peer.address.port()),
        ];
        let agent = record.user_agent.as_ref().map(|agent| agent.as_bytes());
        let upstream_code = facts.upstream_code.as_ref().map(String::as_bytes);
        let upstream_id = facts.upstream_request_id.as_ref().map(String::as_bytes);
        let optional = [
            ("user_agent.original", agent.map(limited)),
            (
                "rds_task_facade.reason",
                record.reason.map(|reason| reason.as_str().into()),
            ),
            ("rds_task_facade.upstream_code", upstream_code.map(limited)),
            (
                "rds_task_facade.upstream_request_id",
                upstream_id.map(limited),
            ),
            ("error.type", failed.then(|| code.into())),
        ];
        for (name, value) in optional {
            attributes.extend(value.map(|value| KeyValue::text(name, value)));
        }
        self.tracer.queue.put(Span {
            parent_span_id: match self.parent_span_id {
                0 => Vec::new(),
                id => id.to_be_bytes().to_vec(),
            },
            name: method.to_owned(),
            kind: SpanKind::Server.into(),
            attributes,
            status: status(failed),
            ..self.span(self.context.span_id, self.started, took)
        });
    }

    /// Starts the span of an attempt that `resend_count` attempts of the same call precede.
    pub(super) fn attempt(self: &Arc<Self>, resend_count: u32) -> AttemptSpan {
        AttemptSpan {
            parent: Arc::clone(self),
            span_id: fastrand::u64(1..),
            started: Timestamp::now(),
            resend_count,
        }
    }

    fn span(&self, span_id: u64, started: Timestamp, took: Duration) -> Span {
        let start = u64::try_from(started.as_nanosecond()).unwrap_or_default();
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        Span {
            trace_id: self.context.trace_id.to_be_bytes().to_vec(),
            span_id: span_id.to_be_bytes().to_vec(),
            trace_state: self.context.trace_state.clone(),
            start_time_unix_nano: start,
            end_time_unix_nano: start.saturating_add(nanoseconds),
            ..Span::default()
        }
    }
}

impl AttemptSpan {
    /// Adds the trace context to the attempt's request if `--propagate-trace-upstream` is set.
    pub(super) fn propagate(&self, headers: &mut HeaderMap) {
        if self.parent.tracer.propagate_upstream {
            let context = Context {
                span_id: self.span_id,
                ..self.parent.context.clone()
            };
            context.write(headers);
        }
    }

    /// Exports the span at the end of the attempt. Called once.
    pub(super) fn end(&self, attempt: &AttemptRecord<'_>, took: Duration) {
        if !self.parent.context.sampled {
            return;
        }
        let template = "/v3/{project_id}/instances/{instance_id}/task-center-detail";
        let mut attributes = vec![
            KeyValue::text("http.request.method", "POST"),
            KeyValue::text("server.address", attempt.url.host_str().unwrap_or_default()),
            KeyValue::number(
                "server.port",
                attempt.url.port_or_known_default().unwrap_or_default(),
            ),
            KeyValue::text("url.full", attempt.url.as_str()),
            KeyValue::text("url.template", template),
        ];
        if self.resend_count > 0 {
            let count = KeyValue::number("http.request.resend_count", self.resend_count);
            attributes.push(count);
        }
        if let Some(status) = attempt.http_status {
            attributes.push(KeyValue::number("http.response.status_code", status));
        }
        if let Some(id) = &attempt.upstream_request_id {
            attributes.push(KeyValue::text(
                "rds_task_facade.upstream_request_id",
                id.as_str(),
            ));
        }
        let error = match (attempt.outcome, attempt.http_status, attempt.reason) {
            (AttemptOutcome::Reply, Some(status), _) if status >= 400 => Some(status.to_string()),
            (AttemptOutcome::Reply, _, reason) => reason.map(|reason| reason.as_str().to_owned()),
            (AttemptOutcome::Timeout, ..) => Some("timeout".to_owned()),
            (AttemptOutcome::Cancelled, ..) => Some("cancelled".to_owned()),
            (AttemptOutcome::TransportError, _, reason) => {
                Some(reason.unwrap_or(Reason::UpstreamReset).as_str().to_owned())
            }
        };
        let failed = error.is_some();
        attributes.extend(error.map(|error| KeyValue::text("error.type", error)));
        self.parent.tracer.queue.put(Span {
            parent_span_id: self.parent.context.span_id.to_be_bytes().to_vec(),
            name: format!("POST {template}"),
            kind: SpanKind::Client.into(),
            attributes,
            status: status(failed),
            ..self.parent.span(self.span_id, self.started, took)
        });
    }
}

fn status(failed: bool) -> Option<Status> {
    failed.then(|| Status {
        code: StatusCode::Error.into(),
        ..Status::default()
    })
}

/// Codes that mark a server span as failed (semantic conventions for gRPC, "gRPC status").
fn is_server_error(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}
