//! OTLP messages, generated from the published protos (`third_party/opentelemetry-proto`), and constructors for attributes.

use generated::opentelemetry::proto::common::v1::{AnyValue, any_value::Value};
pub(super) use generated::opentelemetry::proto::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{InstrumentationScope, KeyValue},
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span, Status,
        span::{Link, SpanKind},
        status::StatusCode,
    },
};

#[cfg(test)]
pub(super) use generated::opentelemetry::proto::collector::trace::v1::ExportTracePartialSuccess;

// The protos define more messages than this program uses.
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::doc_markdown
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/otlp.rs"));
}

impl KeyValue {
    pub(super) fn text(key: &str, value: impl Into<String>) -> Self {
        Self::new(key, Value::StringValue(value.into()))
    }

    pub(super) fn number(key: &str, value: impl Into<i64>) -> Self {
        Self::new(key, Value::IntValue(value.into()))
    }

    fn new(key: &str, value: Value) -> Self {
        Self {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(value) }),
            ..Self::default()
        }
    }
}
