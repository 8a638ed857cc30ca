//! A scripted HTTP server in the place of RDS, IAM, the metadata service, the trace collector or a proxy. It sends exactly the
//! bytes that a test gives it, because no HTTP library produces broken replies.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustls::{
    ServerConfig,
    server::{Acceptor, ClientHello},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tokio_util::either::Either;

use super::wait::within;

/// One request as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Received {
    /// Method, target and version.
    pub(crate) line: String,
    /// Names in lower case, in the order received.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
    /// Head and body as received.
    pub(crate) text: String,
    /// Index of its connection.
    pub(crate) connection: usize,
    /// Index among all requests.
    pub(crate) number: usize,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

/// One action in reply to a request. Every step ends early when the peer closes the connection.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    WaitFor(Gate),
    /// Sends nothing more, and waits for the peer to close the connection.
    Hold,
    /// Ends the connection with a TCP reset.
    Reset,
    /// Ends the connection in order.
    Close,
    /// Forwards bytes to and from this address, as a proxy does.
    Tunnel(SocketAddr),
}

/// Holds replies back until the test opens it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub(crate) fn open(&self) {
        self.0.send_replace(true);
    }

    async fn opened(&self) {
        let mut open = self.0.subscribe();
        let _ = open.wait_for(|open| *open).await;
    }
}

/// A complete HTTP reply.
pub(crate) fn reply(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<Step> {
    let body = body.as_ref();
    let mut bytes =
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    // These never have a body, even with a content-length.
    if !matches!(status, 100..=199 | 204 | 304) {
        bytes.extend_from_slice(body);
    }
    vec![Step::Send(bytes)]
}

/// The vendor page's example reply.
pub(crate) const EXAMPLE: &str = r#"{"instance_id":"1ffc4167903840cb93a3da56d28c14fdin01","instance_name":"rds-mysql-2","job_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","job_name":"CreateMysqlSingleHAInstance"}"#;

pub(crate) fn example() -> Vec<Step> {
    reply(200, &[("content-type", "application/json")], EXAMPLE)
}

/// The example reply, sent once the gate opens.
pub(crate) fn gated_example(gate: &Gate) -> Vec<Step> {
    [vec![Step::WaitFor(gate.clone())], example()].concat()
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connections {
    pub(crate) opened: usize,
    pub(crate) closed: usize,
}

/// A running scripted upstream; stops when dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    scheme_and_host: &'static str,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

type Script = Box<dyn Fn(&Received) -> Vec<Step> + Send + Sync>;

struct Shared {
    script: Script,
    requests: watch::Sender<Vec<Received>>,
    connections: watch::Sender<Connections>,
    /// Whether the listener is closed, or is to be.
    refuses: watch::Sender<bool>,
    hellos: Mutex<Vec<String>>,
}

impl Upstream {
    /// Replies to every request with the steps that `script` returns for it.
    pub(crate) async fn start(
        script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), script).await
    }

    /// Like [`Self::start`], on this address.
    pub(crate) async fn start_at(
        address: SocketAddr,
        script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        Self::listen(address, None, Box::new(script)).await
    }

    /// Replies to every request with the same steps.
    pub(crate) async fn always(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone()).await
    }

    /// Like [`Self::always`], over TLS.
    pub(crate) async fn always_over_tls(config: Arc<ServerConfig>, steps: Vec<Step>) -> Self {
        let any = "127.0.0.1:0".parse().expect("an address");
        Self::listen(any, Some(config), Box::new(move |_| steps.clone())).await
    }

    async fn listen(address: SocketAddr, tls: Option<Arc<ServerConfig>>, script: Script) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener
            .local_addr()
            .expect("a bound listener has an address");
        let scheme_and_host = match tls {
            Some(_) => "https://localhost",
            None => "http://127.0.0.1",
        };
        let shared = Arc::new(Shared {
            script,
            requests: watch::Sender::default(),
            connections: watch::Sender::default(),
            refuses: watch::Sender::default(),
            hellos: Mutex::default(),
        });
        let task_context = Arc::clone(&shared);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let shared = task_context;
            let mut peers = JoinSet::new();
            let mut refuses = shared.refuses.subscribe();
            for number in 0.. {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = refuses.wait_for(|refuses| *refuses) => break,
                };
                let Ok((stream, _)) = accepted else {
                    return;
                };
                shared.connections.send_modify(|count| count.opened += 1);
                let (shared, tls) = (Arc::clone(&shared), tls.clone());
                peers.spawn(async move {
                    let _ = serve(stream, tls, number, &shared).await;
                    shared.connections.send_modify(|count| count.closed += 1);
                });
            }
            drop((listener, refuses));
            peers.join_all().await;
        });
        Self {
            address,
            scheme_and_host,
            shared,
            _tasks: tasks,
        }
    }

    /// Accepts no more connections, so that another upstream can take the address. Open connections stay.
    pub(crate) async fn stop_accepting(&self) {
        self.shared.refuses.send_replace(true);
        // The task drops its receiver after the listener.
        within("the listener is closed", self.shared.refuses.closed()).await;
    }

    pub(crate) fn url(&self) -> String {
        format!("{}:{}", self.scheme_and_host, self.address.port())
    }

    /// All requests so far.
    pub(crate) fn requests(&self) -> Vec<Received> {
        self.shared.requests.borrow().clone()
    }

    /// Server name and protocols of each TLS client hello so far.
    pub(crate) fn hellos(&self) -> Vec<String> {
        self.shared.hellos.lock().expect("no panic").clone()
    }

    pub(crate) fn connections(&self) -> Connections {
        *self.shared.connections.borrow()
    }

    /// Waits until `count` requests have arrived in total.
    pub(crate) async fn wait_for_requests(&self, count: usize) {
        let mut requests = self.shared.requests.subscribe();
        let arrived = requests.wait_for(|requests| requests.len() >= count);
        let arrived = within(&format!("{count} requests"), arrived).await;
        arrived.expect("the upstream runs");
    }

    /// Waits until `count` connections have been closed in total, by the peer or by the script.
    pub(crate) async fn wait_for_closed(&self, count: usize) {
        let mut connections = self.shared.connections.subscribe();
        let closed = connections.wait_for(|connections| connections.closed >= count);
        let closed = within(&format!("{count} closed connections"), closed).await;
        closed.expect("the upstream runs");
    }
}

type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

async fn serve(
    stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    connection: usize,
    shared: &Shared,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = match tls {
        Some(config) => Either::Right(Box::new(handshake(stream, config, shared).await?)),
        None => Either::Left(stream),
    };
    let mut buffer = Vec::new();
    while let Some(mut request) = read_request(&mut stream, &mut buffer).await? {
        request.connection = connection;
        shared.requests.send_modify(|requests| {
            request.number = requests.len();
            requests.push(request.clone());
        });
        for step in (shared.script)(&request) {
            match step {
                Step::Send(bytes) => {
                    stream.write_all(&bytes).await?;
                    stream.flush().await?;
                }
                Step::Wait(time) => tokio::select! {
                    () = tokio::time::sleep(time) => {}
                    _ = stream.read_u8() => return Ok(()),
                },
                Step::WaitFor(gate) => tokio::select! {
                    () = gate.opened() => {}
                    _ = stream.read_u8() => return Ok(()),
                },
                Step::Hold => {
                    while stream.read(&mut [0; 1024]).await? > 0 {}
                    return Ok(());
                }
                Step::Reset => {
                    let tcp = match &stream {
                        Either::Left(tcp) => tcp,
                        Either::Right(tls) => tls.get_ref().0,
                    };
                    return tcp.set_zero_linger();
                }
                Step::Close => return Ok(()),
                Step::Tunnel(address) => {
                    let mut next = TcpStream::connect(address).await?;
                    copy_bidirectional(&mut stream, &mut next).await?;
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

async fn handshake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    shared: &Shared,
) -> io::Result<TlsStream<TcpStream>> {
    let started = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let hello = name_and_protocols(&started.client_hello());
    shared.hellos.lock().expect("no panic").push(hello);
    started.into_stream(config).await
}

fn name_and_protocols(hello: &ClientHello<'_>) -> String {
    let mut words = vec![hello.server_name().unwrap_or("no name").to_owned()];
    let protocols = hello.alpn().into_iter().flatten();
    words.extend(protocols.map(|protocol| String::from_utf8_lossy(protocol).into_owned()));
    words.join(" ")
}

/// The next request. Bytes that are not HTTP, such as a TLS client hello, count as one as far as they have arrived.
async fn read_request(stream: &mut Stream, buffer: &mut Vec<u8>) -> io::Result<Option<Received>> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
        if !buffer[0].is_ascii_uppercase() {
            let line = String::from_utf8_lossy(buffer).into_owned();
            buffer.clear();
            return Ok(Some(Received {
                line,
                ..Received::default()
            }));
        }
    };
    let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default().to_owned();
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let length = headers
        .iter()
        .find(|(name, _)| name == "content-length")
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0);
    while buffer.len() < head_end + 4 + length {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    let end = head_end + 4 + length;
    let body = String::from_utf8_lossy(&buffer[head_end + 4..end]).into_owned();
    let text = String::from_utf8_lossy(&buffer[..end]).into_owned();
    buffer.drain(..end);
    Ok(Some(Received {
        line,
        headers,
        body,
        text,
        ..Received::default()
    }))
}
