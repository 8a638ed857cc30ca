//! The listener for operators: `/metrics`, `/livez` and `/readyz` over plain HTTP/1.1. Its replies contain no secrets and no ids.

mod exposition;

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet, yield_now},
    time::Instant,
};

use self::exposition::Format;
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

/// Connections whose request has not arrived. A further one closes the oldest of them, so that slow clients leave room for probes. High
/// enough that a request arrives before clients that reconnect all the time can close its connection.
const MAX_WAITING: usize = 256;

/// With more waiting connections than this, those that have waited for [`BUSY_HEADER_TIMEOUT`] are closed.
const BUSY: usize = 32;
const BUSY_HEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// Responses of `/metrics` that are being sent, which a slow reader can delay. Those of the other paths fit into the socket.
const MAX_SCRAPES: usize = 8;

/// The time from accept to the end of the request headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The time from accept to the end of the response, so that a slow reader releases its permit.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

const TEXT: &str = "text/plain; charset=utf-8";

/// What the connections share.
#[derive(Debug)]
struct Admin {
    metrics: Arc<Metrics>,
    /// Decides the status of `/readyz`.
    ready: watch::Receiver<bool>,
    /// Permits for [`MAX_SCRAPES`].
    scrapes: Arc<Semaphore>,
}

/// Serves until the future is dropped, which also drops the open connections. `ready` decides the status of `/readyz`.
pub async fn serve(
    listener: &TcpListener,
    metrics: Arc<Metrics>,
    ready: watch::Receiver<bool>,
) -> Infallible {
    let admin = Arc::new(Admin {
        metrics,
        ready,
        scrapes: Arc::new(Semaphore::new(MAX_SCRAPES)),
    });
    // Aborts the open connections when it is dropped.
    let mut connections = JoinSet::new();
    // The oldest first.
    let mut waiting: VecDeque<(Arc<AtomicBool>, AbortHandle, Instant)> = VecDeque::new();
    let mut accept = Accept::new("metrics");
    loop {
        let (stream, _) = accept.next(listener).await;
        while connections.try_join_next().is_some() {}
        waiting.retain(|(is_waiting, task, _)| is_waiting.load(Relaxed) && !task.is_finished());
        while let Some((_, oldest, since)) = waiting.front()
            && (waiting.len() >= MAX_WAITING
                || waiting.len() > BUSY && since.elapsed() >= BUSY_HEADER_TIMEOUT)
        {
            oldest.abort();
            waiting.pop_front();
        }
        let is_waiting = Arc::new(AtomicBool::new(true));
        let connection = serve_connection(stream, Arc::clone(&admin), Arc::clone(&is_waiting));
        let task = connections.spawn(connection);
        waiting.push_back((is_waiting, task, Instant::now()));
        // Lets the connection read a request that has arrived already, before further ones can close it.
        yield_now().await;
    }
}

/// Serves one request and closes the connection: scrapes are rare, and an idle connection would use a descriptor.
async fn serve_connection(stream: TcpStream, admin: Arc<Admin>, is_waiting: Arc<AtomicBool>) {
    // Held until the response has been sent.
    let scrape = OnceLock::new();
    let service = service_fn(|request: Request<Incoming>| {
        is_waiting.store(false, Relaxed);
        if request.uri().path() == "/metrics"
            && let Ok(permit) = Arc::clone(&admin.scrapes).try_acquire_owned()
        {
            // One request per connection.
            let _ = scrape.set(permit);
        }
        let response = admin.respond(&request, scrape.get().is_some());
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

impl Admin {
    fn respond(&self, request: &Request<Incoming>, may_scrape: bool) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if !matches!(path, "/metrics" | "/livez" | "/readyz") {
            let body = "not found; try /metrics, /livez or /readyz\n";
            return response(StatusCode::NOT_FOUND, TEXT, body);
        }
        // The HTTP library leaves out the body of a response to HEAD.
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n");
            let headers = response.headers_mut();
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/metrics" if !may_scrape => {
                response(StatusCode::SERVICE_UNAVAILABLE, TEXT, "too many scrapes\n")
            }
            "/metrics" => {
                let format = Format::negotiate(request.headers());
                let text = format.convert(self.metrics.encode());
                response(StatusCode::OK, format.content_type(), text)
            }
            "/readyz" if !*self.ready.borrow() => {
                response(StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n")
            }
            _ => response(StatusCode::OK, TEXT, "ok\n"),
        }
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
    use crate::test_support::wait;

    struct Running {
        address: std::net::SocketAddr,
        ready: watch::Sender<bool>,
        task: JoinHandle<Infallible>,
    }

    async fn start() -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, ready_seen) = watch::channel(false);
        let serving = async move { serve(&listener, Metrics::new(), ready_seen).await };
        let task = tokio::spawn(serving);
        Running {
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
            response.contains(
                "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"
            ),
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
    async fn head_is_get_without_the_body() {
        let admin = start().await;

        for path in ["/livez", "/readyz", "/metrics", "/other"] {
            let get = send(admin.address, &format!("GET {path}")).await;
            let head = send(admin.address, &format!("HEAD {path}")).await;

            let (headers, body) = get.split_once("\r\n\r\n").unwrap();
            let (head, nothing) = head.split_once("\r\n\r\n").unwrap();
            assert_eq!(nothing, "", "{path}");
            assert!(!body.is_empty(), "{path}");
            // The metrics change from one scrape to the next.
            let fields = |text: &str| {
                let lines = text.split("\r\n").map(str::to_owned);
                let kept = |line: &String| !line.starts_with("date:") && path != "/metrics";
                lines.filter(kept).collect::<Vec<_>>()
            };
            assert_eq!(fields(head), fields(headers), "{path}");
            assert!(head.contains("content-length: "), "{path}");
        }
    }

    #[tokio::test]
    async fn a_scraper_without_open_metrics_gets_the_classic_format() {
        let admin = start().await;
        let mut stream = TcpStream::connect(admin.address).await.unwrap();
        let request =
            "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: text/plain;version=0.0.4\r\n\r\n";

        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();

        let content_type = "content-type: text/plain; version=0.0.4; charset=utf-8\r\n";
        assert!(response.contains(content_type), "{response}");
        assert!(!response.contains("# EOF"), "{response}");
    }

    #[tokio::test]
    async fn slow_clients_leave_room_for_probes() {
        let admin = start().await;
        let address = admin.address;
        let mut slow = JoinSet::new();
        for number in 0..MAX_WAITING + 100 {
            slow.spawn(async move {
                // Never completes a request, and comes back when it is closed.
                loop {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    let part = ["", "GET /livez HTTP/1.1\r\nh"][number % 2];
                    let _ = stream.write_all(part.as_bytes()).await;
                    let _ = stream.read(&mut [0]).await;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            });
        }
        // Clients that do not read the metrics.
        let mut unread = Vec::new();
        for _ in 0..2 * MAX_SCRAPES {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream
                .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
                .await;
            unread.push(stream);
        }

        // Without room for them, each probe waits until a slow client reaches its timeout of five seconds.
        let probes = wait::within("twelve probes", async {
            let mut probes = Vec::new();
            for path in ["/livez", "/readyz"].repeat(6) {
                probes.push(send(address, &format!("GET {path}")).await);
            }
            probes
        });

        let probes = probes.await;
        for (number, probe) in probes.iter().enumerate() {
            let status = ["200", "503"][number % 2];
            assert!(probe.starts_with(&format!("HTTP/1.1 {status} ")), "{probe}");
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
