//! The listener for operators: `/metrics`, `/livez` and `/readyz` over plain HTTP/1.1. Its replies contain no secrets and no ids.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::{
    accept::Accept,
    options::{self, Parsed},
    telemetry::metrics::Metrics,
};

/// The options of the listener for operators.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Metrics and probes")]
pub struct Options {
    // The full path keeps clap from reading the type as an optional flag.
    /// Address for /metrics, /livez and /readyz over plain HTTP; off for none
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464", value_parser = address_or_off)]
    pub metrics_listen: std::option::Option<SocketAddr>,
}

/// Parses an address, or `off`.
///
/// # Errors
/// The rest of an error sentence.
pub fn address_or_off(text: &str) -> Parsed<Option<SocketAddr>> {
    match text {
        "off" => Ok(None),
        _ => options::address(text)
            .map(Some)
            .map_err(|problem| problem + ", or off"),
    }
}

/// Open connections; further ones wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;

/// The time from accept to the end of the request headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The time from accept to the end of the response, so that a slow reader releases its permit.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until the future is dropped, which also drops the open connections. `ready` decides the status of `/readyz`.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    ready: watch::Receiver<bool>,
) -> Infallible {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Aborts the open connections when it is dropped.
    let mut connections = JoinSet::new();
    let mut accept = Accept::new("metrics");
    loop {
        let permit = Arc::clone(&permits)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, _) = accept.next(&listener).await;
        while connections.try_join_next().is_some() {}
        let connection = serve_connection(stream, Arc::clone(&metrics), ready.clone());
        connections.spawn(async move {
            connection.await;
            drop(permit);
        });
    }
}

/// Serves one request and closes the connection: scrapes are rare, and an idle connection would hold a permit.
async fn serve_connection(stream: TcpStream, metrics: Arc<Metrics>, ready: watch::Receiver<bool>) {
    let service = service_fn(|request| {
        let response = respond(&request, &metrics, *ready.borrow());
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    // An error here is the scraper's or the network's.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
}

fn respond(request: &Request<Incoming>, metrics: &Metrics, ready: bool) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/livez" | "/readyz") {
        let body = "not found; try /metrics, /livez or /readyz\n";
        return response(StatusCode::NOT_FOUND, TEXT, body);
    }
    if request.method() != Method::GET {
        let mut response = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n");
        let headers = response.headers_mut();
        headers.insert(header::ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    match path {
        "/metrics" => response(StatusCode::OK, OPEN_METRICS, metrics.encode()),
        "/readyz" if !ready => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n"),
        _ => response(StatusCode::OK, TEXT, "ok\n"),
    }
}

fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        task::JoinHandle,
    };

    use super::*;

    struct Admin {
        address: std::net::SocketAddr,
        ready: watch::Sender<bool>,
        task: JoinHandle<Infallible>,
    }

    async fn start() -> Admin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, ready_seen) = watch::channel(false);
        let task = tokio::spawn(serve(listener, Metrics::new(), ready_seen));
        Admin {
            address,
            ready,
            task,
        }
    }

    async fn send(address: std::net::SocketAddr, request_line: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{request_line} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn each_path_and_method_has_its_status() {
        let admin = start().await;
        let cases = [
            ("GET /livez", "200"),
            ("GET /livez?verbose", "200"),
            ("GET /readyz", "503"),
            ("GET /metrics", "200"),
            ("POST /metrics", "405"),
            ("DELETE /livez", "405"),
            ("GET /", "404"),
            ("GET /metrics/", "404"),
            ("GET /debug/pprof", "404"),
        ];

        for (request, status) in cases {
            let response = send(admin.address, request).await;
            assert!(
                response.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request}: {response}"
            );
        }
    }

    #[tokio::test]
    async fn readyz_follows_the_health_status() {
        let admin = start().await;

        admin.ready.send(true).unwrap();
        let serving = send(admin.address, "GET /readyz").await;
        admin.ready.send(false).unwrap();
        let draining = send(admin.address, "GET /readyz").await;

        assert!(serving.starts_with("HTTP/1.1 200 "), "{serving}");
        assert!(draining.starts_with("HTTP/1.1 503 "), "{draining}");
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_with_process_and_build_information() {
        let admin = start().await;

        let response = send(admin.address, "GET /metrics").await;

        assert!(
            response.contains(&format!("content-type: {OPEN_METRICS}\r\n")),
            "{response}"
        );
        assert!(response.ends_with("# EOF\n"));
        let names = [
            "\nbuild_info{version=\"",
            "\nprocess_cpu_seconds_total ",
            "\nprocess_start_time_seconds ",
            "\nprocess_resident_memory_bytes ",
            "\nprocess_open_fds ",
            "\nprocess_max_fds ",
            "\ngrpc_server_started_total{",
            "\nlog_lines_dropped_total 0",
        ];
        for name in names {
            assert!(response.contains(name), "{name}: {response}");
        }
    }

    #[tokio::test]
    async fn dropping_the_server_closes_silent_connections() {
        let admin = start().await;
        let mut silent = TcpStream::connect(admin.address).await.unwrap();

        admin.task.abort();
        admin.task.await.unwrap_err();

        // The connection was dropped or never accepted: it ends without a response in both cases.
        let mut rest = Vec::new();
        let _ = silent.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn a_connection_serves_one_request() {
        let admin = start().await;
        let mut stream = TcpStream::connect(admin.address).await.unwrap();
        let pipelined =
            "GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /livez HTTP/1.1\r\nhost: x\r\n\r\n";

        stream.write_all(pipelined.as_bytes()).await.unwrap();
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received).await;

        let responses = String::from_utf8(received)
            .unwrap()
            .matches("HTTP/1.1 200")
            .count();
        assert_eq!(responses, 1);
    }
}
