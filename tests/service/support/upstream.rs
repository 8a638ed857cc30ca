//! An upstream that does exactly what a test says, byte for byte: real failures are not in any HTTP library's repertoire.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// One request as it came over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    /// Method, target and version.
    pub(crate) line: String,
    /// Names in lower case, in the order received.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
    /// Which connection it came on, counted from 0.
    pub(crate) connection: usize,
    /// Which request it is of all, counted from 0.
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

/// What is done with a request.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    /// Nothing more until the peer leaves.
    Hold,
    /// The connection ends with a TCP reset.
    Reset,
    /// The connection ends in order.
    Close,
}

/// A whole HTTP answer.
pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<Step> {
    let body = body.as_ref();
    let mut bytes =
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    // These never have a body, whatever content-length says.
    if !matches!(status, 100..=199 | 204 | 304) {
        bytes.extend_from_slice(body);
    }
    vec![Step::Send(bytes)]
}

/// The vendor page's example answer.
pub(crate) const EXAMPLE: &str = r#"{"instance_id":"1ffc4167903840cb93a3da56d28c14fdin01","instance_name":"rds-mysql-2","job_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","job_name":"CreateMysqlSingleHAInstance"}"#;

pub(crate) fn example() -> Vec<Step> {
    answer(200, &[("content-type", "application/json")], EXAMPLE)
}

/// The same after half a second.
pub(crate) fn slow_example() -> Vec<Step> {
    [vec![Step::Wait(Duration::from_millis(500))], example()].concat()
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connections {
    pub(crate) opened: usize,
    pub(crate) closed: usize,
}

/// A scripted upstream; it ends when dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<Received>>>,
    arrived: watch::Receiver<usize>,
    connections: watch::Receiver<Connections>,
    _tasks: JoinSet<()>,
}

impl Upstream {
    /// Answers every request with the steps that `script` returns for it.
    pub(crate) async fn start(
        script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener
            .local_addr()
            .expect("a bound listener has an address");
        let (arrived_at, arrived) = watch::channel(0);
        let (connections_at, connections) = watch::channel(Connections::default());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::new(Shared {
            script: Box::new(script),
            requests: Arc::clone(&requests),
            arrived: arrived_at,
            connections: connections_at,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut peers = JoinSet::new();
            for number in 0.. {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                shared.connections.send_modify(|count| count.opened += 1);
                let shared = Arc::clone(&shared);
                peers.spawn(async move {
                    let _ = serve(stream, number, &shared).await;
                    shared.connections.send_modify(|count| count.closed += 1);
                });
            }
        });
        Self {
            address,
            requests,
            arrived,
            connections,
            _tasks: tasks,
        }
    }

    /// Answers every request alike.
    pub(crate) async fn always(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone()).await
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests until now.
    pub(crate) fn requests(&self) -> Vec<Received> {
        self.requests
            .lock()
            .expect("no panic under the lock")
            .clone()
    }

    /// Waits until `count` requests have come in all.
    pub(crate) async fn wait_for_requests(&self, count: usize) {
        let mut arrived = self.arrived.clone();
        within(arrived.wait_for(|arrived| *arrived >= count))
            .await
            .expect("the upstream runs");
    }

    /// Waits until `count` connections were closed by the peer or by the script.
    pub(crate) async fn wait_for_closed(&self, count: usize) {
        let mut connections = self.connections.clone();
        within(connections.wait_for(|connections| connections.closed >= count))
            .await
            .expect("the upstream runs");
    }

    pub(crate) fn connections(&self) -> Connections {
        *self.connections.borrow()
    }
}

async fn within<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), event)
        .await
        .expect("the event comes within 20 s")
}

type Script = Box<dyn Fn(&Received) -> Vec<Step> + Send + Sync>;

struct Shared {
    script: Script,
    requests: Arc<Mutex<Vec<Received>>>,
    arrived: watch::Sender<usize>,
    connections: watch::Sender<Connections>,
}

async fn serve(mut stream: TcpStream, connection: usize, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        let Some(mut request) = read_request(&mut stream, &mut buffer).await? else {
            return Ok(());
        };
        request.connection = connection;
        {
            let mut requests = shared.requests.lock().expect("no panic under the lock");
            request.number = requests.len();
            requests.push(request.clone());
        }
        shared.arrived.send_modify(|count| *count += 1);
        for step in (shared.script)(&request) {
            match step {
                Step::Send(bytes) => stream.write_all(&bytes).await?,
                Step::Wait(time) => {
                    // A peer that leaves ends the script.
                    let mut byte = [0];
                    if let Ok(read) = tokio::time::timeout(time, stream.read(&mut byte)).await {
                        read?;
                        return Ok(());
                    }
                }
                Step::Hold => {
                    while stream.read(&mut [0; 1024]).await? > 0 {}
                    return Ok(());
                }
                Step::Reset => {
                    stream.set_zero_linger()?;
                    return Ok(());
                }
                Step::Close => return Ok(()),
            }
        }
    }
}

async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Received>> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
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
    let body = String::from_utf8_lossy(&buffer[head_end + 4..head_end + 4 + length]).into_owned();
    buffer.drain(..head_end + 4 + length);
    Ok(Some(Received {
        line,
        headers,
        body,
        connection: 0,
        number: 0,
    }))
}
