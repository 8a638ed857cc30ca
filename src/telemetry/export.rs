//! Exports ended spans to a collector on a dedicated thread, as OTLP over HTTP with protobuf. If the collector is down, slow or
//! full, spans are dropped and counted; calls are never delayed.
//!
//! Written by hand because the OpenTelemetry SDK's exporter reads the environment a second time, silently ignores invalid values
//! and does not count the spans that its queue drops.

use std::{mem, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Uri, header::CONTENT_TYPE};
use http_body_util::Full;
use prost::Message as _;
use tokio::{
    sync::mpsc::{Receiver, Sender, channel},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{
    Tracing,
    metrics::Metrics,
    otlp::{
        ExportTraceServiceRequest, ExportTraceServiceResponse, InstrumentationScope, KeyValue,
        Resource, ResourceSpans, ScopeSpans, Span,
    },
    trace::SCHEMA_URL,
};
use crate::{
    http_client::{self, BuildError, Client, Reuse, SystemRoots, tls_config},
    supervise::Task,
    wait::{date, retry_after},
};

/// The pause before the first retry; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Longest response body that is read. A successful response has a body of a few bytes at most.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Indices of [`Metrics::spans_dropped`].
const QUEUE_FULL: usize = 0;
const EXPORT_FAILED: usize = 1;

/// The bounded queue of ended spans, emptied by the exporter's thread.
#[derive(Debug)]
pub(super) struct SpanQueue {
    spans: Sender<Span>,
    /// Cancelled when the process ends: the exporter empties the queue and stops.
    shutdown: CancellationToken,
    metrics: Arc<Metrics>,
}

impl SpanQueue {
    /// Starts the exporter's thread.
    ///
    /// # Errors
    /// [`BuildError`] for an https endpoint without CA certificates.
    ///
    /// # Panics
    /// When no thread can be started.
    pub(super) fn start(config: &Tracing, metrics: Arc<Metrics>) -> Result<Self, BuildError> {
        let endpoint = Url::parse(&config.endpoint).map_err(|_| BuildError::Url)?;
        let mut exporter = Exporter {
            client: client(config, &endpoint)?,
            path: endpoint.path().parse().map_err(|_| BuildError::Url)?,
            config: config.clone(),
            metrics: Arc::clone(&metrics),
        };
        let protobuf = HeaderValue::from_static("application/x-protobuf");
        exporter.config.headers.insert(CONTENT_TYPE, protobuf);
        let (spans, mut queue) = channel(config.queue_spans);
        let shutdown = CancellationToken::new();
        let until = shutdown.clone();
        let exporting = async move {
            let background = &exporter.metrics.background;
            while background
                .catch(Task::Spans, exporter.run(&mut queue, &until))
                .await
                .is_none()
            {}
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the runtime starts");
        thread::Builder::new()
            .name("spans".to_owned())
            .spawn(move || runtime.block_on(exporting))
            .expect("the thread starts");
        Ok(Self {
            spans,
            shutdown,
            metrics,
        })
    }

    /// Queues a span; drops and counts it if the queue is full. Never blocks.
    pub(super) fn put(&self, span: Span) {
        if self.spans.try_send(span).is_err() {
            self.metrics.spans_dropped[QUEUE_FULL].inc();
        }
    }

    /// Exports the queued spans and stops the exporter. Returns whether that took at most `limit`.
    pub(super) async fn finish(&self, limit: Duration) -> bool {
        self.shutdown.cancel();
        timeout(limit, self.spans.closed()).await.is_ok()
    }
}

fn client(config: &Tracing, endpoint: &Url) -> Result<Client, BuildError> {
    // A certificate file replaces the system's roots, as in OpenTelemetry's exporters.
    let system = if endpoint.scheme() == "https" && config.certificate_pem.is_none() {
        SystemRoots::Trusted
    } else {
        SystemRoots::Ignored
    };
    let direct = http_client::Config {
        tls: tls_config(system, config.certificate_pem.as_deref())?,
        proxy: None,
        connect_timeout: config.timeout,
    };
    Client::new(&direct, endpoint, 0)
}

struct Exporter {
    client: Client,
    path: Uri,
    config: Tracing,
    metrics: Arc<Metrics>,
}

impl Exporter {
    /// Exports batches until `shutdown`, then the remaining spans of the queue.
    async fn run(&self, queue: &mut Receiver<Span>, shutdown: &CancellationToken) {
        let mut batch = Vec::new();
        loop {
            let filling = self.fill(&mut batch, queue);
            if shutdown.run_until_cancelled(filling).await.is_none() {
                while batch.len() < self.config.batch_spans
                    && let Ok(span) = queue.try_recv()
                {
                    batch.push(span);
                }
            }
            if batch.is_empty() {
                return;
            }
            self.export(mem::take(&mut batch)).await;
        }
    }

    /// Waits for a span, then for the rest of the batch for at most the configured delay.
    async fn fill(&self, batch: &mut Vec<Span>, queue: &mut Receiver<Span>) {
        batch.extend(queue.recv().await);
        let rest = async {
            while batch.len() < self.config.batch_spans
                && let Some(span) = queue.recv().await
            {
                batch.push(span);
            }
        };
        let _ = timeout(self.config.delay, rest).await;
    }

    async fn export(&self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let body = self.request(spans).encode_to_vec();
        let mut last_error = "the collector does not reply".to_owned();
        let delivering = self.deliver(body.into(), &mut last_error);
        let delivered = timeout(self.config.timeout, delivering).await;
        let dropped = match delivered {
            Ok(Some(rejected)) => rejected.min(count),
            Ok(None) | Err(_) => {
                tracing::warn!(
                    spans = count,
                    error = last_error,
                    "spans cannot be exported"
                );
                count
            }
        };
        self.metrics.spans_exported.inc_by(count - dropped);
        self.metrics.spans_dropped[EXPORT_FAILED].inc_by(dropped);
    }

    /// Sends the body until the collector accepts it or fails permanently, and sets the error of each attempt. Returns the number of
    /// rejected spans.
    async fn deliver(&self, body: Bytes, last_error: &mut String) -> Option<u64> {
        let mut pause = FIRST_PAUSE;
        loop {
            let mut request = Request::new(Full::new(body.clone()));
            *request.method_mut() = Method::POST;
            *request.uri_mut() = self.path.clone();
            *request.headers_mut() = self.config.headers.clone();
            let wait = match self.client.send(request, Reuse::Forbidden).await {
                Ok(mut response) if (200..300).contains(&response.status()) => {
                    let body = response.body_up_to(MAX_BODY_BYTES).await;
                    return Some(rejected(&body.unwrap_or_default()));
                }
                Ok(response) => {
                    let status = response.status();
                    *last_error = format!("the collector replied with HTTP {status}");
                    if !is_transient(status) {
                        return None;
                    }
                    retry_after(response.headers(), date(response.headers()))
                }
                Err(error) => {
                    *last_error = self.explain(error);
                    None
                }
            };
            sleep(wait.unwrap_or_default().max(pause)).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// The cause of an attempt without a response. A port that speaks another protocol than HTTP/1.1 is probably the one for gRPC.
    fn explain(&self, error: http_client::Error) -> String {
        let is_connect = error.is_connect();
        let cause = error.cause;
        // A TLS port for gRPC accepts only HTTP/2.
        if is_connect && !cause.contains("NoApplicationProtocol") {
            return cause;
        }
        let endpoint = &self.config.endpoint;
        let hint = "the port does not speak HTTP/1.1; OTLP over HTTP usually has port 4318, not the port 4317 of gRPC";
        match endpoint.starts_with("https:") {
            true => format!("{cause}: {hint}"),
            false => format!("{cause}: {hint}; for a port with TLS, use https"),
        }
    }

    fn request(&self, spans: Vec<Span>) -> ExportTraceServiceRequest {
        let (name, version) = (env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        let resource = self.config.resource.iter();
        let resource = resource.map(|(key, value)| (key.as_str(), value.as_str()));
        let service = [
            ("service.name", self.config.service_name.as_str()),
            ("service.version", version),
        ];
        let attributes = resource.chain(service);
        let attributes = attributes.map(|(key, value)| KeyValue::text(key, value));
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: attributes.collect(),
                    ..Resource::default()
                }),
                scope_spans: vec![ScopeSpans {
                    scope: Some(InstrumentationScope {
                        name: name.to_owned(),
                        version: version.to_owned(),
                        ..InstrumentationScope::default()
                    }),
                    spans,
                    schema_url: SCHEMA_URL.to_owned(),
                }],
                schema_url: SCHEMA_URL.to_owned(),
            }],
        }
    }
}

/// The number of rejected spans in a successful response.
pub fn rejected(body: &[u8]) -> u64 {
    let response = ExportTraceServiceResponse::decode(body).unwrap_or_default();
    let rejected = response
        .partial_success
        .map(|partial| partial.rejected_spans);
    rejected.unwrap_or_default().try_into().unwrap_or_default()
}

/// Whether OTLP permits a retry after this status (OTLP specification, "Failures" of OTLP/HTTP).
fn is_transient(status: u16) -> bool {
    matches!(status, 429 | 502 | 503 | 504)
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, net::SocketAddr};

    use http::{HeaderMap, Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use hyper::{body::Incoming, server::conn::http1, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::net::TcpListener;

    use super::*;
    use crate::{
        telemetry::otlp::ExportTracePartialSuccess,
        telemetry::{Propagators, Sampler, Tracing},
    };

    /// Starts a collector that accepts every request. Returns its address and the span names of each request.
    async fn collector() -> (SocketAddr, Receiver<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, received) = channel(100);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = service_fn(async |request: Request<Incoming>| {
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let request = ExportTraceServiceRequest::decode(body).unwrap();
                    let spans = &request.resource_spans[0].scope_spans[0].spans;
                    let names = spans.iter().map(|span| span.name.clone()).collect();
                    requests.send(names).await.unwrap();
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                // A client may close the connection at any time.
                let _ = connection.await;
            }
        });
        (address, received)
    }

    fn settings(address: SocketAddr, queue_spans: usize) -> Tracing {
        Tracing {
            endpoint: format!("http://{address}/v1/traces"),
            headers: HeaderMap::new(),
            timeout: Duration::from_secs(30),
            certificate_pem: None,
            sampler: Sampler {
                parent_based: false,
                ratio: 1.0,
            },
            propagators: Propagators {
                w3c: true,
                b3: false,
            },
            service_name: "test".to_owned(),
            resource: Vec::new(),
            queue_spans,
            batch_spans: 2,
            delay: Duration::from_secs(3600),
        }
    }

    fn span(name: &str) -> Span {
        Span {
            name: name.to_owned(),
            ..Span::default()
        }
    }

    #[tokio::test]
    async fn full_batch_is_exported_at_once_and_the_rest_on_shutdown() {
        let (address, mut received) = collector().await;
        let metrics = Metrics::new();
        let queue = SpanQueue::start(&settings(address, 100), Arc::clone(&metrics)).unwrap();

        for name in ["a", "b", "c"] {
            queue.put(span(name));
        }
        let limit = Duration::from_secs(30);
        let first = timeout(limit, received.recv()).await;
        let finished = queue.finish(limit).await;

        assert_eq!(
            first.expect("a full batch does not wait").unwrap(),
            ["a", "b"]
        );
        assert!(finished);
        assert_eq!(received.recv().await.unwrap(), ["c"]);
        assert_eq!(metrics.spans_exported.get(), 3);
    }

    #[tokio::test]
    async fn silent_collector_drops_counted_spans_and_does_not_block_shutdown() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metrics = Metrics::new();
        let config = settings(silent.local_addr().unwrap(), 5);
        let queue = SpanQueue::start(&config, Arc::clone(&metrics)).unwrap();

        for _ in 0..100 {
            queue.put(span("a"));
        }

        // Five spans fit into the queue, at most two into the exporter's batch.
        let dropped = metrics.spans_dropped[QUEUE_FULL].get();
        assert!((93..=95).contains(&dropped), "{dropped}");
        assert!(!queue.finish(Duration::from_millis(50)).await);
    }

    #[test]
    fn rejected_spans_are_read_from_the_response() {
        let partial = |rejected_spans| {
            ExportTraceServiceResponse {
                partial_success: Some(ExportTracePartialSuccess {
                    rejected_spans,
                    ..ExportTracePartialSuccess::default()
                }),
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
