//! A scripted server in place of the quota store, over a pipe in memory, so that tests can use tokio's paused clock. Compiled into the unit
//! tests as `quota_store::scripted`, because it builds a [`QuotaStore`] from its parts.

use std::{io, ops::RangeInclusive, sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::Script;
use tokio::{
    io::{
        AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
        DuplexStream, split,
    },
    runtime::Handle,
    sync::{Semaphore, mpsc},
    task::{JoinSet, yield_now},
    time::{Instant, sleep, sleep_until},
};

use super::{
    MAX_WRITES, QuotaStore, SCRIPTS, Session, StoreUrl,
    connection::{Connection, Link, Target, connect_timeout, longest_wait},
    micros, random_id, results,
    seal::Keys,
};
use crate::{
    http_client::{self, SystemRoots},
    telemetry::metrics::Metrics,
};

/// The content of the key file.
const KEY: [u8; 32] = [7; 32];

/// How long the store stores results.
pub(crate) const RESULT_LIFETIME: Duration = Duration::from_secs(20);

/// A script that the program has run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) script: &'static str,
    pub(crate) args: Vec<Vec<u8>>,
    pub(crate) at: Instant,
}

impl Run {
    /// The argument with this number, counted from 1 as in the script.
    pub(crate) fn arg(&self, number: usize) -> &str {
        std::str::from_utf8(&self.args[number - 1]).expect("text")
    }
}

/// The reply to `admit`, `poll` or `share`. The other scripts get a number.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    kind: &'static str,
    number: u64,
    text: Vec<u8>,
    after: Duration,
    /// An encoded task in place of number and text, and its age.
    task: Option<(Vec<u8>, Duration)>,
}

/// A reply without a text, sent at once.
pub(crate) fn reply(kind: &'static str, number: u64) -> Reply {
    Reply {
        kind,
        number,
        text: Vec::new(),
        after: Duration::ZERO,
        task: None,
    }
}

/// The reply that there is a result, with this task.
pub(crate) fn result(task: &impl prost::Message, age: Duration) -> Reply {
    let task = Some((task.encode_to_vec(), age));
    Reply {
        task,
        ..reply("result", 0)
    }
}

impl Reply {
    /// The same with this text.
    pub(crate) fn with(self, text: &[u8]) -> Self {
        let text = text.to_vec();
        Self { text, ..self }
    }

    /// The same, sent later.
    pub(crate) fn after(self, after: Duration) -> Self {
        Self { after, ..self }
    }

    fn encode(self, first_key: &str) -> Vec<u8> {
        let (number, text) = match self.task {
            Some((task, age)) => results::stored(&Keys::derive(&KEY), first_key, age, task),
            None => (self.number, self.text),
        };
        let head = format!("*3\r\n+{}\r\n:{number}\r\n${}\r\n", self.kind, text.len());
        [head.as_bytes(), &text, b"\r\n"].concat()
    }
}

/// A quota store whose server is a script of the test.
pub(crate) struct Scripted {
    pub(crate) store: Arc<QuotaStore>,
    runs: Arc<Mutex<Vec<Run>>>,
    _tasks: JoinSet<()>,
}

impl Scripted {
    /// A store in use. `script` returns the reply to the run of `admit`, `poll` or `share` with this number, counted from 0.
    pub(crate) async fn start(
        attempt_timeout: Duration,
        script: impl FnMut(usize) -> Reply + Send + 'static,
    ) -> Self {
        let (near, far) = tokio::io::duplex(1 << 20);
        let runs = Arc::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(far, Arc::clone(&runs), script));
        let connection = Arc::new(Connection::over(near).await.expect("a connection"));
        let store = Arc::new(QuotaStore {
            keys: Arc::new(Keys::derive(&KEY)),
            upstream: "http://127.0.0.1:1/".to_owned(),
            target: Target {
                url: StoreUrl::parse("redis://127.0.0.1:1").expect("a URL"),
                http: http_client::Config {
                    tls: http_client::tls_config(SystemRoots::Ignored, None).expect("TLS"),
                    proxy: None,
                    connect_timeout: connect_timeout(),
                },
            },
            link: Link::new(Metrics::new()),
            instance: random_id(),
            replicas: Mutex::new((1, Instant::now())),
            attempt_timeout,
            result_lifetime: RESULT_LIFETIME,
            runtime: Handle::current(),
            writes: Arc::new(Semaphore::new(MAX_WRITES)),
        });
        store.link.open(&connection);
        let served = Arc::clone(&store);
        tasks.spawn(async move {
            served.link.serve(&connection, &served).await;
        });
        yield_now().await;
        Self {
            store,
            runs,
            _tasks: tasks,
        }
    }

    /// A session that may wait for the store as long as a call.
    pub(crate) fn session(&self) -> Session {
        Session {
            store: Arc::clone(&self.store),
            credential: "c".to_owned(),
            left: micros(longest_wait()).into(),
        }
    }

    /// The runs of this script so far. Scripts that write run in the background, so the clock moves by a millisecond first.
    pub(crate) async fn runs(&self, script: &str) -> Vec<Run> {
        sleep(Duration::from_millis(1)).await;
        let runs = self.runs.lock();
        let runs = runs.iter().filter(|run| run.script == script);
        runs.cloned().collect()
    }

    /// Records that the replica uses the store again from now on.
    pub(crate) fn came_back(&self) {
        self.store.link.came_back();
    }
}

async fn serve(
    stream: DuplexStream,
    runs: Arc<Mutex<Vec<Run>>>,
    mut script: impl FnMut(usize) -> Reply,
) {
    let (stream, mut replies) = split(stream);
    let (send, mut due) = mpsc::channel(64);
    let read = async move {
        let mut stream = BufReader::new(stream);
        let mut number = 0;
        while let Ok(words) = command(&mut stream).await {
            let now = Instant::now();
            let reply = match words[0].as_slice() {
                b"EVALSHA" => {
                    let name = name(&words[1]);
                    let keys: usize = text(&words[2]).parse().expect("a number");
                    let args = words[3 + keys..].to_vec();
                    runs.lock().push(Run {
                        script: name,
                        args,
                        at: now,
                    });
                    match name {
                        "admit" | "poll" | "share" => {
                            let reply = script(number);
                            number += 1;
                            (now + reply.after, reply.encode(text(&words[3])))
                        }
                        _ => (now, b":1\r\n".to_vec()),
                    }
                }
                _ => (now, b"+OK\r\n".to_vec()),
            };
            if send.send(reply).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, reply)) = due.recv().await {
            sleep_until(at).await;
            if replies.write_all(&reply).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

/// Reads the words of a command.
async fn command(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    for _ in 0..number(stream).await? {
        let mut word = vec![0; number(stream).await? + 2];
        stream.read_exact(&mut word).await?;
        word.truncate(word.len() - 2);
        words.push(word);
    }
    Ok(words)
}

/// Reads a line with a sign and a number.
async fn number(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<usize> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let number = line.get(1..).unwrap_or_default().trim().parse();
    number.map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The name of the script with this hash.
fn name(hash: &[u8]) -> &'static str {
    let scripts: [(_, &Script); 10] = [
        ("admit", &SCRIPTS.admit),
        ("poll", &SCRIPTS.poll),
        ("share", &SCRIPTS.share),
        ("publish", &SCRIPTS.publish),
        ("renew", &SCRIPTS.renew),
        ("throttle", &SCRIPTS.throttle),
        ("rejected", &SCRIPTS.rejected),
        ("accepted", &SCRIPTS.accepted),
        ("heartbeat", &SCRIPTS.heartbeat),
        ("remove", &SCRIPTS.remove),
    ];
    let mut known = scripts.into_iter();
    let known = known.find(|(_, script)| script.get_hash().as_bytes() == hash);
    known.expect("a script of the quota store").0
}

/// Asserts that runs follow each other after growing pauses, each multiplied by a random factor, and replies that took `reply`.
pub(crate) fn assert_pauses(
    runs: &[Run],
    reply: Duration,
    pauses: RangeInclusive<Duration>,
    factor: RangeInclusive<f64>,
) {
    assert!(runs.len() > 2, "{runs:?}");
    // Timers count milliseconds.
    let late = Duration::from_millis(1);
    let mut pause = *pauses.start();
    for pair in runs.windows(2) {
        let paused = pair[1].at - pair[0].at - reply;
        let expected = pause.mul_f64(*factor.start())..=pause.mul_f64(*factor.end()) + late;
        assert!(expected.contains(&paused), "{paused:?} {expected:?}");
        pause = (pause * 2).min(*pauses.end());
    }
}

fn text(word: &[u8]) -> &str {
    std::str::from_utf8(word).expect("text")
}
