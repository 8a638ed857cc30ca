//! Spans: one for each RPC, and below it one for each upstream attempt. Where nothing is exported there is no [`Tracer`],
//! and an RPC pays one look at an `Option`.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use jiff::Timestamp;
use tonic::Code;

use super::{
    Propagators, Sampler, Tracing,
    access::{AccessLine, Peer, limited},
    context::Context,
    conventions as names,
    export::Queue,
    metrics::AttemptOutcome,
    otlp::{KeyValue, Span, SpanKind, Status, StatusCode},
};
use crate::{code, reason::Reason};

/// Makes spans and hands them to the export.
#[derive(Debug)]
pub struct Tracer {
    sampler: Sampler,
    accepted: Propagators,
    propagate_upstream: bool,
    queue: Queue,
}

/// The span of one RPC, from its headers on.
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
pub struct AttemptSpan {
    parent: Arc<ServerSpan>,
    span_id: u64,
    started: Timestamp,
    resend_count: u32,
}

/// How an attempt ended, for its span.
#[derive(Debug)]
pub struct AttemptEnd<'a> {
    /// Where the request went.
    pub url: &'a reqwest::Url,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// The answer's status, where its head came.
    pub http_status: Option<u16>,
    /// Why no whole answer came.
    pub reason: Option<Reason>,
    /// The vendor's request id.
    pub upstream_request_id: Option<String>,
    /// From sending to the end.
    pub took: Duration,
}

impl Tracer {
    /// A tracer that puts spans into `queue`.
    pub(super) fn new(config: &Tracing, propagate_upstream: bool, queue: Queue) -> Arc<Self> {
        Arc::new(Self {
            sampler: config.sampler,
            accepted: config.propagators,
            propagate_upstream,
            queue,
        })
    }

    /// Waits until every ended span is exported, for at most `limit`. Whether all were.
    pub fn finish(&self, limit: Duration) -> bool {
        self.queue.finish(limit)
    }

    /// The span of an RPC whose headers have come.
    pub fn server_span(self: &Arc<Self>, headers: &HeaderMap) -> Arc<ServerSpan> {
        let parent = Context::of_headers(headers, self.accepted);
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

    /// Ends the span with what the access line says. Called once.
    pub fn end(&self, line: &AccessLine<'_>) {
        if !self.context.sampled {
            return;
        }
        let method = match line.grpc_method {
            "other" => names::OTHER,
            name => name,
        };
        let code = code::name(line.grpc_code);
        let mut attributes = vec![
            KeyValue::text(names::RPC_SYSTEM_NAME, "grpc"),
            KeyValue::text(names::RPC_METHOD, method),
            KeyValue::text(names::RPC_RESPONSE_STATUS_CODE, code),
            KeyValue::text(names::REQUEST_ID, line.request_id),
            KeyValue::number(names::ATTEMPTS, line.attempts),
        ];
        if let Some(peer) = line.peer.map(Peer::address) {
            attributes.push(KeyValue::text(
                names::NETWORK_PEER_ADDRESS,
                peer.ip().to_string(),
            ));
            attributes.push(KeyValue::number(names::NETWORK_PEER_PORT, peer.port()));
        }
        if let Some(agent) = line.user_agent {
            attributes.push(KeyValue::text(names::USER_AGENT_ORIGINAL, limited(agent)));
        }
        if let Some(reason) = line.reason {
            attributes.push(KeyValue::text(names::REASON, reason.as_str()));
        }
        if let Some(code) = line.upstream_code {
            attributes.push(KeyValue::text(
                names::UPSTREAM_CODE,
                limited(code.as_bytes()),
            ));
        }
        if let Some(id) = line.upstream_request_id {
            attributes.push(KeyValue::text(
                names::UPSTREAM_REQUEST_ID,
                limited(id.as_bytes()),
            ));
        }
        let failed = is_server_error(line.grpc_code);
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
            ..self.span(self.context.span_id, self.started, line.duration)
        });
    }

    /// The span of an attempt that starts now, `resend_count` others of the same call before it.
    pub fn attempt(self: &Arc<Self>, resend_count: u32) -> AttemptSpan {
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
    pub fn propagate(&self, headers: &mut HeaderMap) {
        if self.parent.tracer.propagate_upstream {
            let context = Context {
                span_id: self.span_id,
                ..self.parent.context.clone()
            };
            context.write(headers);
        }
    }

    /// Ends the span. Called once.
    pub fn end(&self, end: AttemptEnd<'_>) {
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
        if let Some(id) = end.upstream_request_id {
            attributes.push(KeyValue::text(names::UPSTREAM_REQUEST_ID, id));
        }
        let error = match (end.outcome, end.http_status, end.reason) {
            (AttemptOutcome::Answer, Some(status), _) if status >= 400 => Some(status.to_string()),
            (AttemptOutcome::Answer, _, reason) => reason.map(|reason| reason.as_str().to_owned()),
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
            ..self.parent.span(self.span_id, self.started, end.took)
        });
    }
}

fn status(failed: bool) -> Option<Status> {
    failed.then(|| Status {
        code: StatusCode::Error.into(),
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
