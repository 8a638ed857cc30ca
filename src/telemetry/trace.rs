//! Spans: one for each call, and below it one for each upstream attempt. Without an export there is no [`Tracer`], and a call pays
//! for one look at an `Option`.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use jiff::Timestamp;
use tonic::Code;

use super::{
    Propagators, Sampler, Tracing,
    access::limited,
    attempt::AttemptRecord,
    context::Context,
    conventions as names,
    export::SpanQueue,
    metrics::AttemptOutcome,
    otlp::{KeyValue, Span, SpanKind, Status, StatusCode},
    record::{Facts, Record},
};
use crate::{code, method::Method, reason::Reason};

/// Makes spans and hands them to the export.
#[derive(Debug)]
pub struct Tracer {
    sampler: Sampler,
    accepted: Propagators,
    propagate_upstream: bool,
    queue: SpanQueue,
}

/// The span of one call, from its headers on.
#[derive(Debug)]
pub struct ServerSpan {
    tracer: Arc<Tracer>,
    context: Context,
    /// Zero for a root.
    parent_span_id: u64,
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
    /// A tracer that puts spans into `queue`.
    pub(super) fn new(config: &Tracing, propagate_upstream: bool, queue: SpanQueue) -> Arc<Self> {
        Arc::new(Self {
            sampler: config.sampler,
            accepted: config.propagators,
            propagate_upstream,
            queue,
        })
    }

    /// Exports the spans that have ended, for at most `limit`. Returns whether that was long enough.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.queue.finish(limit).await
    }

    /// The span of a call whose headers have arrived.
    pub fn server_span(self: &Arc<Self>, headers: &HeaderMap) -> Arc<ServerSpan> {
        let parent = Context::from_headers(headers, self.accepted);
        let trace_id = parent
            .as_ref()
            .map_or_else(|| fastrand::u128(1..), |parent| parent.trace_id);
        let sampled = self
            .sampler
            .samples(trace_id, parent.as_ref().map(|parent| parent.sampled));
        let parent_span_id = parent.as_ref().map_or(0, |parent| parent.span_id);
        Arc::new(ServerSpan {
            tracer: Arc::clone(self),
            context: Context {
                trace_id,
                span_id: fastrand::u64(1..),
                sampled,
                trace_state: parent.map(|parent| parent.trace_state).unwrap_or_default(),
            },
            parent_span_id,
            started: Timestamp::now(),
        })
    }
}

impl ServerSpan {
    /// How others refer to this span.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Exports the span of a call that is over. Called once.
    pub(super) fn end(&self, record: &Record, code: Code, took: Duration, facts: &Facts) {
        if !self.context.sampled {
            return;
        }
        let method = match record.method {
            Method::Other => names::OTHER,
            known => known.full_name(),
        };
        let failed = is_server_error(code);
        let code = code::name(code);
        let mut attributes = vec![
            KeyValue::text(names::RPC_SYSTEM_NAME, "grpc"),
            KeyValue::text(names::RPC_METHOD, method),
            KeyValue::text(names::RPC_RESPONSE_STATUS_CODE, code),
            KeyValue::text(names::REQUEST_ID, record.request_id.as_str()),
            KeyValue::number(names::ATTEMPTS, facts.attempts),
            KeyValue::text(
                names::NETWORK_PEER_ADDRESS,
                record.peer.address.ip().to_string(),
            ),
            KeyValue::number(names::NETWORK_PEER_PORT, record.peer.address.port()),
        ];
        if let Some(agent) = &record.user_agent {
            let agent = limited(agent.as_bytes());
            attributes.push(KeyValue::text(names::USER_AGENT_ORIGINAL, agent));
        }
        if let Some(reason) = record.reason {
            attributes.push(KeyValue::text(names::REASON, reason.as_str()));
        }
        if let Some(code) = &facts.upstream_code {
            let code = limited(code.as_bytes());
            attributes.push(KeyValue::text(names::UPSTREAM_CODE, code));
        }
        if let Some(id) = &facts.upstream_request_id {
            let id = limited(id.as_bytes());
            attributes.push(KeyValue::text(names::UPSTREAM_REQUEST_ID, id));
        }
        if failed {
            attributes.push(KeyValue::text(names::ERROR_TYPE, code));
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

    /// The span of an attempt that starts now, `resend_count` others of the same call before it.
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
    /// Writes the trace context into the attempt's request, where the operator wants that.
    pub(super) fn propagate(&self, headers: &mut HeaderMap) {
        if self.parent.tracer.propagate_upstream {
            let context = Context {
                span_id: self.span_id,
                ..self.parent.context.clone()
            };
            context.write(headers);
        }
    }

    /// Exports the span of an attempt that is over. Called once.
    pub(super) fn end(&self, end: &AttemptRecord<'_>, took: Duration) {
        if !self.parent.context.sampled {
            return;
        }
        let template = "/v3/{project_id}/instances/{instance_id}/task-center-detail";
        let mut attributes = vec![
            KeyValue::text(names::HTTP_REQUEST_METHOD, "POST"),
            KeyValue::text(
                names::SERVER_ADDRESS,
                end.url.host_str().unwrap_or_default(),
            ),
            KeyValue::number(
                names::SERVER_PORT,
                end.url.port_or_known_default().unwrap_or_default(),
            ),
            KeyValue::text(names::URL_FULL, end.url.as_str()),
            KeyValue::text(names::URL_TEMPLATE, template),
        ];
        if self.resend_count > 0 {
            attributes.push(KeyValue::number(
                names::HTTP_REQUEST_RESEND_COUNT,
                self.resend_count,
            ));
        }
        if let Some(status) = end.http_status {
            attributes.push(KeyValue::number(names::HTTP_RESPONSE_STATUS_CODE, status));
        }
        if let Some(id) = &end.upstream_request_id {
            attributes.push(KeyValue::text(names::UPSTREAM_REQUEST_ID, id.as_str()));
        }
        let error = match (end.outcome, end.http_status, end.reason) {
            (AttemptOutcome::Reply, Some(status), _) if status >= 400 => Some(status.to_string()),
            (AttemptOutcome::Reply, _, reason) => reason.map(|reason| reason.as_str().to_owned()),
            (AttemptOutcome::Timeout, ..) => Some("timeout".to_owned()),
            (AttemptOutcome::Cancelled, ..) => Some("cancelled".to_owned()),
            (AttemptOutcome::TransportError, _, reason) => {
                Some(reason.unwrap_or(Reason::UpstreamReset).as_str().to_owned())
            }
        };
        let failed = error.is_some();
        attributes.extend(error.map(|error| KeyValue::text(names::ERROR_TYPE, error)));
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

/// Codes that are the server's fault (semantic conventions for gRPC, "gRPC status").
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
