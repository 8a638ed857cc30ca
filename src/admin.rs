//! The listener for operators: `/metrics`, `/livez` and `/readyz` over plain HTTP/1.1. No secrets and no ids are there.

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc, time::Duration};

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

fn address_or_off(text: &str) -> Parsed<Option<SocketAddr>> {
    match text {
        "off" => Ok(None),
        _ => options::address(text)
            .map(Some)
            .map_err(|problem| problem + ", or off"),
    }
}

/// Some probes and scrapers; a peer that opens more waits in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;

/// From connection to the end of the request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The whole exchange, so that a peer that reads slowly frees its place.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a failed accept: without file descriptors the next one would fail at once, over and over.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers until `shutdown` is over, then drops what is open. `ready` decides `/readyz`.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    ready: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Aborts the open connections when it is dropped.
    let mut connections = JoinSet::new();
    let accept = async {
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for /metrics");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            while connections.try_join_next().is_some() {}
            let exchange = exchange(stream, Arc::clone(&metrics), ready.clone());
            connections.spawn(async move {
                exchange.await;
                drop(place);
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = shutdown => {}
    }
}

/// One connection, one request: scrapes are rare, and an idle connection would take a place.
async fn exchange(stream: TcpStream, metrics: Arc<Metrics>, ready: watch::Receiver<bool>) {
    let service = service_fn(|request| {
        let answer = answer(&request, &metrics, *ready.borrow());
        async { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    // How a scraper's connection ends is of no interest.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
}

fn answer(request: &Request<Incoming>, metrics: &Metrics, ready: bool) -> Response<Full<Bytes>> {
    let known = matches!(request.uri().path(), "/metrics" | "/livez" | "/readyz");
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let mut response = text(StatusCode::OK, metrics.encode());
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static(OPEN_METRICS));
            response
        }
        (&Method::GET, "/livez") => text(StatusCode::OK, "ok\n"),
        (&Method::GET, "/readyz") if ready => text(StatusCode::OK, "ok\n"),
        (&Method::GET, "/readyz") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        _ if known => {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            response
                .headers_mut()
                .insert(header::ALLOW, HeaderValue::from_static("GET"));
            response
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /livez and /readyz\n",
        ),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::oneshot,
    };

    use super::*;

    struct Admin {
        address: std::net::SocketAddr,
        ready: watch::Sender<bool>,
        stop: oneshot::Sender<()>,
        task: tokio::task::JoinHandle<()>,
    }

    async fn start() -> Admin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, ready_seen) = watch::channel(false);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve(listener, Metrics::new(), ready_seen, async {
            let _ = stopped.await;
        }));
        Admin {
            address,
            ready,
            stop,
            task,
        }
    }

    async fn ask(address: std::net::SocketAddr, request_line: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{request_line} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn each_path_and_method_has_its_answer() {
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
            let answer = ask(admin.address, request).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request}: {answer}"
            );
        }
    }

    #[tokio::test]
    async fn readyz_follows_the_health() {
        let admin = start().await;

        admin.ready.send(true).unwrap();
        let serving = ask(admin.address, "GET /readyz").await;
        admin.ready.send(false).unwrap();
        let draining = ask(admin.address, "GET /readyz").await;

        assert!(serving.starts_with("HTTP/1.1 200 "), "{serving}");
        assert!(draining.starts_with("HTTP/1.1 503 "), "{draining}");
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_with_process_and_build() {
        let admin = start().await;

        let answer = ask(admin.address, "GET /metrics").await;

        assert!(
            answer.contains(&format!("content-type: {OPEN_METRICS}\r\n")),
            "{answer}"
        );
        assert!(answer.ends_with("# EOF\n"));
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
            assert!(answer.contains(name), "{name}: {answer}");
        }
    }

    #[tokio::test]
    async fn silent_peers_do_not_keep_it_from_stopping() {
        let admin = start().await;
        let mut silent = TcpStream::connect(admin.address).await.unwrap();

        admin.stop.send(()).unwrap();
        admin.task.await.unwrap();

        // The connection was dropped, or never accepted: either way it ends without an answer.
        let mut rest = Vec::new();
        let _ = silent.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn a_request_with_a_body_gets_one_answer_and_the_connection_ends() {
        let admin = start().await;
        let mut stream = TcpStream::connect(admin.address).await.unwrap();
        let pipelined =
            "GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /livez HTTP/1.1\r\nhost: x\r\n\r\n";

        stream.write_all(pipelined.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;

        let answers = String::from_utf8(answer)
            .unwrap()
            .matches("HTTP/1.1 200")
            .count();
        assert_eq!(answers, 1);
    }
}
