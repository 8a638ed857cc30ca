//! The server over real sockets. Clients use the h2 crate, or hand-written frames for what the crate does not send.

mod connections;
mod floods;
mod frames;
mod late_data;
mod lifecycle;
mod limits;
mod requests;
mod tls;

use std::{
    collections::HashMap,
    net::SocketAddr,
    panic::Location,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use prost::Message as _;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Error, Options, Server, Timings};
use crate::{
    call::Call,
    code, error,
    options::defaults,
    pb::{GetTaskDetailRequest, GetTaskDetailResponse, WatchTaskDetailRequest},
    rpc::Service,
    task::Task,
    telemetry::{Access, Sinks, metrics::Metrics},
    test_support::wait::{self, PATIENCE},
    watch::WatchStream,
};

const GET_TASK_DETAIL: &str = "/huaweicloud.rds.task.v1.TaskService/GetTaskDetail";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// A limit longer than the deadline of every wait, so that nothing that a test waits for is caused by this limit.
const LONGER_THAN_PATIENCE: Duration = PATIENCE.saturating_mul(4);

/// A service whose behaviour depends on the instance id: `hang` waits until released, `panic` panics, `big-N` replies with N bytes;
/// any other id gets a reply at once.
#[derive(Clone, Default)]
struct Script {
    entered: watch::Sender<usize>,
    left: watch::Sender<usize>,
    released: watch::Sender<bool>,
    /// The number of calls on each thread.
    threads: Arc<Mutex<HashMap<String, usize>>>,
}

impl Script {
    async fn entered(&self, count: usize) {
        reaches(&self.entered, count).await;
    }

    async fn left(&self, count: usize) {
        reaches(&self.left, count).await;
    }
}

async fn reaches(value: &watch::Sender<usize>, count: usize) {
    let mut value = value.subscribe();
    let reached = value.wait_for(|value| *value >= count);
    within(reached).await.unwrap();
}

/// Counts a call when it returns or is dropped.
struct Leaving(watch::Sender<usize>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count += 1);
    }
}

impl Service for Script {
    fn token_hash(&self, metadata: &HeaderMap) -> Option<[u8; 16]> {
        let mut hash = [0; 16];
        let token = metadata.get("x-auth-token")?.as_bytes();
        hash[..token.len()].copy_from_slice(token);
        Some(hash)
    }

    async fn get_task_detail(
        &self,
        _call: &mut Call,
        _metadata: &HeaderMap,
        request: GetTaskDetailRequest,
    ) -> Result<Arc<Task>, error::Error> {
        let thread = std::thread::current().name().unwrap().to_owned();
        *self.threads.lock().unwrap().entry(thread).or_default() += 1;
        self.entered.send_modify(|count| *count += 1);
        let _leaving = Leaving(self.left.clone());
        let mut reply = GetTaskDetailResponse {
            job_id: request.workflow_id,
            ..GetTaskDetailResponse::default()
        };
        match request.instance_id.as_str() {
            "hang" => {
                let mut released = self.released.subscribe();
                released.wait_for(|released| *released).await.unwrap();
            }
            "panic" => panic!("on purpose"),
            id => {
                if let Some(size) = id.strip_prefix("big-") {
                    reply.job_name = "x".repeat(size.parse().unwrap());
                }
            }
        }
        Ok(Arc::new(Task::new(reply)))
    }

    async fn watch_task_detail(
        &self,
        _call: &mut Call,
        _metadata: &HeaderMap,
        _request: WatchTaskDetailRequest,
    ) -> Result<WatchStream, error::Error> {
        // The service tests watch the whole program.
        Err(error::Error::Internal)
    }
}

/// A running server.
struct Running {
    address: SocketAddr,
    script: Script,
    metrics: Arc<Metrics>,
    ready: watch::Sender<bool>,
    serving: watch::Receiver<bool>,
    stop: oneshot::Sender<()>,
    done: JoinHandle<Result<(), Error>>,
}

/// Starts a server with one worker, so that a test sees every connection in one place.
fn start(options: Options) -> Running {
    start_with_workers(options, 1)
}

fn start_with_workers(options: Options, workers: usize) -> Running {
    start_on(bind(), options, workers, true)
}

fn start_with_ready(options: Options, is_ready: bool) -> Running {
    start_on(bind(), options, 1, is_ready)
}

fn bind() -> std::net::TcpListener {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap()
}

fn start_on(
    listener: std::net::TcpListener,
    options: Options,
    workers: usize,
    is_ready: bool,
) -> Running {
    let address = listener.local_addr().unwrap();
    let script = Script::default();
    let metrics = Metrics::new();
    let (ready, is_ready) = watch::channel(is_ready);
    let (set_serving, serving) = watch::channel(false);
    let (stop, stopped) = oneshot::channel::<()>();
    let services = vec![script.clone(); workers];
    let sinks = Arc::new(Sinks {
        metrics: Arc::clone(&metrics),
        access: Access::off(),
        tracer: None,
    });
    let done = tokio::spawn(async move {
        let server = Server::start(listener, options, services, set_serving, sinks).await?;
        let shutdown = async {
            let _ = stopped.await;
        };
        server.run(is_ready, shutdown).await;
        Ok(())
    });
    Running {
        address,
        script,
        metrics,
        ready,
        serving,
        stop,
        done,
    }
}

fn options() -> Options {
    Options {
        timeout: LONGER_THAN_PATIENCE,
        shutdown_grace: LONGER_THAN_PATIENCE,
        ..defaults()
    }
}

fn with_timings(change: impl FnOnce(&mut Timings)) -> Options {
    let mut options = options();
    change(&mut options.timings);
    options
}

impl Running {
    /// The value of the metric in the line that starts with `line`; 0 if absent.
    fn metric(&self, line: &str) -> u64 {
        let text = self.metrics.encode();
        let value = text.lines().find_map(|found| found.strip_prefix(line));
        value.map_or(0, |value| value.trim().parse::<f64>().unwrap() as u64)
    }

    /// The number of connections that were closed before HTTP/2 for this reason.
    fn refused(&self, reason: &str) -> u64 {
        self.metric(&format!(
            "grpc_server_connections_refused_total{{reason=\"{reason}\"}} "
        ))
    }

    /// Waits for `count` finished calls and returns the codes of all finished calls, sorted.
    async fn ended(&self, count: usize) -> Vec<Code> {
        eventually(|| ended(&self.metrics).len() >= count).await;
        ended(&self.metrics)
    }

    async fn stop(self) -> Duration {
        let started = std::time::Instant::now();
        self.stop.send(()).unwrap();
        within(self.done).await.unwrap().unwrap();
        started.elapsed()
    }
}

/// The codes of all finished calls, sorted.
fn ended(metrics: &Metrics) -> Vec<Code> {
    let text = metrics.encode();
    let handled = text
        .lines()
        .filter(|line| line.starts_with("grpc_server_handled_total"));
    let mut codes: Vec<Code> = handled
        .flat_map(|line| {
            let (labels, number) = line.rsplit_once(' ').unwrap();
            let named = |code: &Code| {
                labels.ends_with(&format!("grpc_code=\"{}\"}}", code::go_name(*code)))
            };
            let code = (0..17).map(Code::from).find(named).unwrap();
            std::iter::repeat_n(code, number.parse().unwrap())
        })
        .collect();
    codes.sort_by_key(|code| *code as i32);
    codes
}

/// Awaits the event; panics after [`PATIENCE`], naming the line that waits.
#[track_caller]
fn within<F: Future>(event: F) -> impl Future<Output = F::Output> {
    let caller = Location::caller().to_string();
    async move { wait::within(&caller, event).await }
}

/// Polls the condition until it holds; panics after [`PATIENCE`], naming the line that waits.
#[track_caller]
fn eventually(condition: impl Fn() -> bool) -> impl Future<Output = ()> {
    let caller = Location::caller().to_string();
    async move { wait::eventually(&caller, async || condition()).await }
}

/// Waits until the client has received a GOAWAY and therefore accepts no new call.
async fn goaway(client: &Client) {
    within(async {
        while client.clone().ready().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

type Client = h2::client::SendRequest<Bytes>;

/// Waits until the other side closes or resets the connection, and returns the bytes received before.
async fn until_closed(socket: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = within(socket.read_to_end(&mut bytes)).await;
    bytes
}

/// A client connection, and the task that drives it.
async fn connect(address: SocketAddr) -> (Client, JoinHandle<Result<(), h2::Error>>) {
    let socket = TcpStream::connect(address).await.unwrap();
    let handshake = h2::client::Builder::new().handshake(socket);
    let (client, connection) = within(handshake).await.unwrap();
    (client, tokio::spawn(connection))
}

/// The headers of a valid call.
fn head(path: &str) -> Request<()> {
    Request::post(format!("http://facade{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

fn head_with(name: &str, value: impl AsRef<[u8]>) -> Request<()> {
    let mut head = head(GET_TASK_DETAIL);
    let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
    let value = http::HeaderValue::from_bytes(value.as_ref()).unwrap();
    head.headers_mut().insert(name, value);
    head
}

fn framed(flag: u8, message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(flag);
    bytes.put_u32(message.len() as u32);
    bytes.put_slice(message);
    bytes.freeze()
}

/// A request message for an instance.
fn instance(id: &str) -> Bytes {
    let request = GetTaskDetailRequest {
        project_id: "p".to_owned(),
        instance_id: id.to_owned(),
        workflow_id: "w".to_owned(),
        workflow_name: None,
    };
    framed(0, &request.encode_to_vec())
}

/// The response to one request.
#[derive(Debug)]
struct Reply {
    http: u16,
    headers: HeaderMap,
    data: Bytes,
    /// The trailers, or the headers of a trailers-only response.
    trailers: HeaderMap,
}

impl Reply {
    fn code(&self) -> Code {
        self.status().code()
    }

    fn status(&self) -> Status {
        Status::from_header_map(&self.trailers).expect("every call ends with a status")
    }

    /// Asserts a failure with this code, with details, and with the same request id in headers and details.
    #[track_caller]
    fn assert_failed(&self, code: Code, name: &str) {
        let status = self.status();
        assert_eq!(status.code(), code, "{name}: {status:?}");
        let details = status.get_error_details();
        assert!(details.error_info().is_some(), "{name}: {status:?}");
        let request_id = details.request_info().unwrap().request_id.clone();
        assert_eq!(self.headers["x-request-id"], request_id, "{name}");
        assert!(status.message().len() <= 256, "{name}");
    }
}

/// Sends a complete request: the head and the pieces of its body.
async fn send(client: &Client, head: Request<()>, pieces: &[Bytes]) -> Result<Reply, h2::Error> {
    let mut client = within(client.clone().ready()).await?;
    let (response, mut body) = client.send_request(head, pieces.is_empty())?;
    for (index, piece) in pieces.iter().enumerate() {
        // The server may reply before it has read everything; the rest cannot be sent then.
        let _ = body.send_data(piece.clone(), index + 1 == pieces.len());
    }
    receive(response).await
}

async fn receive(response: h2::client::ResponseFuture) -> Result<Reply, h2::Error> {
    let (head, mut body) = within(response).await?.into_parts();
    let mut data = BytesMut::new();
    while let Some(piece) = within(body.data()).await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        data.extend_from_slice(&piece);
    }
    let trailers = within(body.trailers()).await?;
    Ok(Reply {
        http: head.status.as_u16(),
        trailers: trailers.unwrap_or_else(|| head.headers.clone()),
        headers: head.headers,
        data: data.freeze(),
    })
}

async fn call(client: &Client, id: &str) -> Result<Reply, h2::Error> {
    send(client, head(GET_TASK_DETAIL), &[instance(id)]).await
}

/// Starts a call that hangs, and waits until the service has received it.
async fn hanging(running: &Running, client: &Client) -> h2::client::ResponseFuture {
    let count = *running.script.entered.borrow() + 1;
    let mut client = within(client.clone().ready()).await.unwrap();
    let (response, mut body) = client.send_request(head(GET_TASK_DETAIL), false).unwrap();
    body.send_data(instance("hang"), true).unwrap();
    running.script.entered(count).await;
    response
}
