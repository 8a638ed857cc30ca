//! Takes finished spans to the collector, over OTLP with HTTP and protobuf, on a thread of its own. A collector that is
//! dead, slow or full costs spans, which are counted, and never a waiting call.

use std::{
    fmt,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use http::{HeaderMap, StatusCode, header};
use prost::Message as _;

use super::{
    Tracing, conventions as names,
    metrics::Metrics,
    otlp::{
        ExportTraceServiceRequest, ExportTraceServiceResponse, KeyValue, Resource, ResourceSpans,
        Scope, ScopeSpans, Span,
    },
};
use crate::{
    http::{BuildError, SystemRoots, build, client_builder, small_body, tls_config},
    wait::{date, retry_after},
};

/// The pause before the first repeated export; it doubles to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What is read of a collector's answer, which is empty or a few bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Why the export cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file of certificates cannot be used.
    #[error("OTEL_EXPORTER_OTLP_CERTIFICATE: the file holds no readable PEM certificate")]
    Certificate,
    /// No system roots, most often.
    #[error(
        "the client for the collector cannot be set up; most often the system has no CA certificates"
    )]
    Client,
}

impl From<BuildError> for Error {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Roots => Self::Certificate,
            BuildError::Proxy | BuildError::Tls => Self::Client,
        }
    }
}

enum Order {
    Span(Box<Span>),
    /// Export everything before this, then answer.
    Finish(SyncSender<()>),
}

/// Where finished spans go. Clones lead to the same collector.
#[derive(Clone)]
pub(super) struct Queue {
    orders: SyncSender<Order>,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Queue {
    /// Starts the thread that exports.
    ///
    /// # Errors
    /// [`Error`] for a setting that cannot be used.
    ///
    /// # Panics
    /// When the process is out of threads.
    pub(super) fn start(config: &Tracing, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let exporter = Exporter {
            client: client(config)?,
            config: config.clone(),
            metrics: Arc::clone(&metrics),
        };
        let (orders, waiting) = sync_channel(config.queue_spans);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made while the program starts");
        thread::Builder::new()
            .name("spans".to_owned())
            .spawn(move || exporter.run(&waiting, &runtime))
            .expect("a thread can be started while the program starts");
        Ok(Self { orders, metrics })
    }

    /// Hands one span over. Never waits.
    pub(super) fn put(&self, span: Span) {
        if self.orders.try_send(Order::Span(Box::new(span))).is_err() {
            self.metrics.spans_dropped[QUEUE_FULL].inc();
        }
    }

    /// Waits until everything handed over is exported, for at most `limit`. Whether it was.
    pub(super) fn finish(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let (done, answer) = sync_channel(1);
        let mut order = Order::Finish(done);
        while let Err(TrySendError::Full(returned)) = self.orders.try_send(order) {
            if Instant::now() >= until {
                return false;
            }
            order = returned;
            thread::sleep(Duration::from_millis(5));
        }
        let left = until.saturating_duration_since(Instant::now());
        answer.recv_timeout(left).is_ok()
    }
}

/// Indices of [`Metrics::spans_dropped`].
const QUEUE_FULL: usize = 0;
const EXPORT_FAILED: usize = 1;

fn client(config: &Tracing) -> Result<reqwest::Client, Error> {
    // As OpenTelemetry's own exporters do: a file of certificates replaces the system's.
    let https = config.endpoint.starts_with("https:");
    let system = if https && config.certificate_pem.is_none() {
        SystemRoots::Trusted
    } else {
        SystemRoots::Ignored
    };
    let builder = client_builder(&crate::http::Config {
        tls: tls_config(system, config.certificate_pem.as_deref())?,
        https_only: https,
        proxy: None,
        connect_timeout: config.timeout,
    })?;
    Ok(build(builder)?)
}

struct Exporter {
    client: reqwest::Client,
    config: Tracing,
    metrics: Arc<Metrics>,
}

impl Exporter {
    /// Exports until every [`Queue`] is gone.
    fn run(&self, waiting: &Receiver<Order>, runtime: &tokio::runtime::Runtime) {
        let mut batch = Vec::new();
        let mut until = None;
        loop {
            let order = match until {
                None => waiting.recv().map_err(RecvTimeoutError::from),
                Some(until) => {
                    waiting.recv_timeout(Instant::saturating_duration_since(&until, Instant::now()))
                }
            };
            match order {
                Ok(Order::Span(span)) => {
                    batch.push(*span);
                    until.get_or_insert_with(|| Instant::now() + self.config.delay);
                    if batch.len() < self.config.batch_spans {
                        continue;
                    }
                }
                Ok(Order::Finish(done)) => {
                    self.export(std::mem::take(&mut batch), runtime);
                    // Whoever asked may have stopped waiting.
                    let _ = done.try_send(());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.export(std::mem::take(&mut batch), runtime);
            until = None;
        }
    }

    fn export(&self, spans: Vec<Span>, runtime: &tokio::runtime::Runtime) {
        if spans.is_empty() {
            return;
        }
        let count = spans.len() as u64;
        let body = self.request(spans).encode_to_vec();
        let delivered = runtime.block_on(async {
            tokio::time::timeout(self.config.timeout, self.deliver(body)).await
        });
        match delivered {
            Ok(Ok(rejected)) => {
                let rejected = rejected.min(count);
                self.metrics.spans_exported.inc_by(count - rejected);
                self.metrics.spans_dropped[EXPORT_FAILED].inc_by(rejected);
            }
            Ok(Err(fault)) => self.lost(count, &fault),
            Err(_) => self.lost(count, "no success within the timeout"),
        }
    }

    fn lost(&self, spans: u64, fault: &str) {
        self.metrics.spans_dropped[EXPORT_FAILED].inc_by(spans);
        tracing::warn!(spans, fault, "spans cannot be exported");
    }

    /// Sends one body until the collector takes it, counting what it rejects of it, or refuses it for good.
    async fn deliver(&self, body: Vec<u8>) -> Result<u64, String> {
        let body = bytes::Bytes::from(body);
        let mut pause = FIRST_PAUSE;
        loop {
            let sent = self
                .client
                .post(&self.config.endpoint)
                .headers(self.headers())
                .body(body.clone())
                .send()
                .await;
            let wait = match sent {
                Ok(mut answer) if answer.status().is_success() => {
                    let body = small_body(&mut answer, MAX_ANSWER_BYTES).await;
                    return Ok(rejected(&body.ok().flatten().unwrap_or_default()));
                }
                Ok(answer) if is_passing(answer.status()) => {
                    retry_after(answer.headers(), date(answer.headers()))
                }
                Ok(answer) => {
                    return Err(format!(
                        "the collector answers {}",
                        answer.status().as_u16()
                    ));
                }
                Err(_) => None,
            };
            tokio::time::sleep(wait.unwrap_or_default().max(pause)).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    fn headers(&self) -> HeaderMap {
        let mut headers: HeaderMap = self.config.headers.iter().cloned().collect();
        let protobuf = http::HeaderValue::from_static("application/x-protobuf");
        headers.insert(header::CONTENT_TYPE, protobuf);
        headers
    }

    fn request(&self, spans: Vec<Span>) -> ExportTraceServiceRequest {
        let attributes = self.config.resource.iter();
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: attributes
                        .map(|(key, value)| KeyValue::text(key, value))
                        .chain([KeyValue::text(
                            names::SERVICE_NAME,
                            &self.config.service_name,
                        )])
                        .chain([KeyValue::text(
                            names::SERVICE_VERSION,
                            env!("CARGO_PKG_VERSION"),
                        )])
                        .collect(),
                }),
                scope_spans: vec![ScopeSpans {
                    scope: Some(Scope {
                        name: env!("CARGO_PKG_NAME").to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                    }),
                    spans,
                    schema_url: names::SCHEMA_URL.to_owned(),
                }],
                schema_url: names::SCHEMA_URL.to_owned(),
            }],
        }
    }
}

/// Spans that the collector did not take of a request that it accepted as a whole.
fn rejected(body: &[u8]) -> u64 {
    ExportTraceServiceResponse::decode(body)
        .ok()
        .and_then(|answer| answer.partial_success)
        .map_or(0, |partial| {
            u64::try_from(partial.rejected_spans).unwrap_or_default()
        })
}

/// Statuses that a client may repeat (OTLP specification, "Failures" of OTLP/HTTP).
fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 502 | 503 | 504)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::otlp::PartialSuccess;

    #[test]
    fn what_a_collector_rejects_of_a_batch_is_read_from_its_answer() {
        let partial = |rejected_spans| {
            ExportTraceServiceResponse {
                partial_success: Some(PartialSuccess { rejected_spans }),
            }
            .encode_to_vec()
        };
        let cases = [
            (Vec::new(), 0),
            (partial(0), 0),
            (partial(7), 7),
            (partial(-1), 0),
            (b"<html>".to_vec(), 0),
        ];

        for (body, expected) in cases {
            assert_eq!(rejected(&body), expected, "{body:?}");
        }
    }
}
