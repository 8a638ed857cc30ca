//! The connection to the quota store, and the rule for its failures: no call waits for a store that does not reply.
//!
//! A background task connects, and sends a heartbeat every five seconds. When a call fails, later calls skip the store until a heartbeat,
//! which the task sends at once, has succeeded. After three failures in a row, or if the connection is closed, the task gives the
//! connection up, and connects again after five seconds. Calls use a new connection once a heartbeat on it has succeeded in the time that
//! a call may wait. So no call probes a store that does not reply.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, FromRedisValue, RedisConnectionInfo, RedisError, ScriptInvocation,
    Value, aio::MultiplexedConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{QuotaStore, options::StoreUrl, scripts::SCRIPTS};
use crate::{
    http_client,
    lateness::is_late,
    telemetry::metrics::{Metrics, StoreOperation, StoreOutcome},
};

/// The longest wait of a call for the store, in all its round trips together. Service tests, which run several debug builds per processor,
/// set another number of milliseconds, so that no reply is too late because a process waits for CPU time.
pub(super) fn longest_wait() -> Duration {
    let millis = || {
        let millis = std::env::var_os("TESTS_STORE_WAIT_MS")?;
        millis.to_str()?.parse().ok()
    };
    let tests = cfg!(debug_assertions).then(millis).flatten();
    Duration::from_millis(tests.unwrap_or(50))
}

/// Failures in a row after which the connection is given up.
const MAX_FAILURES: u32 = 3;

/// The time between two heartbeats, and between two attempts to connect.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

/// Time to connect and to authenticate: a second, unless a test waits longer for the store.
pub(super) fn connect_timeout() -> Duration {
    Duration::from_secs(1).max(longest_wait())
}

/// Commands that wait to be written to the connection.
const BUFFERED_COMMANDS: usize = 1024;

/// The bytes of replies that the store may send for each byte of a command: the shortest command may ask for the longest entry.
const CREDIT_PER_BYTE: usize = 256;

/// The limit on the bytes of replies that may be outstanding.
const MAX_CREDIT: usize = 8 << 20;

/// Why the store cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is a cluster, which distributes names over its nodes.
    #[error("it is a cluster, which is not supported; use one primary with replicas")]
    Cluster,
    /// It rejects the credential.
    #[error("it rejects user or password")]
    Credential,
    /// A replica of the store that does not accept writes.
    #[error("it is read-only; connect to the primary")]
    ReadOnly,
    /// It stores nothing more.
    #[error("it is out of memory (maxmemory with noeviction)")]
    OutOfMemory,
    /// The access rules forbid a command or a name.
    #[error("its access rules (ACL) forbid a command or a name; see docs/fleet.md")]
    Forbidden,
    /// It replied with another error.
    #[error("it replies with the error {0}")]
    Error(String),
    /// It did not reply in time.
    #[error("it does not reply within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// No connection, or it was closed.
    #[error("no connection: {0}")]
    Connection(String),
}

impl From<RedisError> for Problem {
    fn from(error: RedisError) -> Self {
        match error.code() {
            Some("NOAUTH" | "WRONGPASS") => Self::Credential,
            Some("READONLY") => Self::ReadOnly,
            Some("OOM") => Self::OutOfMemory,
            Some("NOPERM") => Self::Forbidden,
            Some("ERR") => Self::from_script(error.detail().unwrap_or_default()),
            // The text of an untrusted server is not logged.
            Some(code) if code.len() <= 16 && code.bytes().all(|b| b.is_ascii_uppercase()) => {
                Self::Error(code.to_owned())
            }
            _ if error.kind() == redis::ErrorKind::AuthenticationFailed => Self::Credential,
            // The text of the system or of the TLS library.
            _ if error.is_io_error() => Self::Connection(error.to_string()),
            _ => Self::Error(error.category().to_owned()),
        }
    }
}

impl Problem {
    /// The problem behind the code `ERR`, which hides the cause if a script has failed: because of a forbidden command or name (the first
    /// two texts are those of Redis 6.2 and 7.0), and in Redis 6.2 for any reason.
    fn from_script(text: &str) -> Self {
        let forbidden = [
            "script can't run",
            "script can't access",
            "ACL failure in script",
        ];
        match text {
            _ if forbidden.iter().any(|known| text.contains(known)) => Self::Forbidden,
            _ if text.contains("READONLY ") => Self::ReadOnly,
            _ if text.contains("OOM ") => Self::OutOfMemory,
            _ => Self::Error("ERR".to_owned()),
        }
    }
}

/// How the store is reached.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) url: StoreUrl,
    pub(super) http: http_client::Config,
}

/// An open connection, closed when dropped.
#[derive(Debug)]
pub(super) struct Connection {
    handle: MultiplexedConnection,
    _driver: AbortOnDropHandle<()>,
}

#[cfg(test)]
impl Connection {
    /// A connection over this stream, without authentication and without loading the scripts.
    pub(super) async fn over(stream: tokio::io::DuplexStream) -> Result<Self, Problem> {
        let info = RedisConnectionInfo::default().set_skip_set_lib_name();
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let (handle, driver) =
            MultiplexedConnection::new_with_config(&info, stream, config).await?;
        let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
        Ok(Self { handle, _driver })
    }
}

impl Target {
    /// Connects and authenticates.
    pub(super) async fn connect(&self) -> Result<Connection, Problem> {
        let patience = connect_timeout();
        let opened = timeout(patience, self.open()).await;
        opened.unwrap_or(Err(Problem::Timeout(patience)))
    }

    async fn open(&self) -> Result<Connection, Problem> {
        let stream = http_client::connect(&self.http, &self.url.origin).await;
        let stream = Metered {
            stream: stream.map_err(Problem::Connection)?,
            credit: MAX_CREDIT,
        };
        let mut info = RedisConnectionInfo::default()
            .set_db(self.url.database.into())
            .set_skip_set_lib_name();
        if let Some(user) = &self.url.user {
            info = info.set_username(user);
        }
        if let Some(password) = &self.url.password {
            info = info.set_password(password.as_str());
        }
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_pipeline_buffer_size(BUFFERED_COMMANDS);
        let (mut handle, driver) =
            MultiplexedConnection::new_with_config(&info, stream, config).await?;
        let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
        // Without permission for the command, the store counts as a single server.
        let hello: Result<Value, _> = redis::cmd("HELLO").query_async(&mut handle).await;
        if hello.is_ok_and(|hello| is_cluster(&hello)) {
            return Err(Problem::Cluster);
        }
        SCRIPTS.load(&handle).await?;
        Ok(Connection { handle, _driver })
    }
}

/// Whether the reply to `HELLO`, a list of names and values, has the mode `cluster`.
pub fn is_cluster(hello: &Value) -> bool {
    let Value::Array(fields) = hello else {
        return false;
    };
    let is = |value: &Value, text: &str| match value {
        Value::BulkString(bytes) => bytes == text.as_bytes(),
        Value::SimpleString(string) => string == text,
        _ => false,
    };
    let mut pairs = fields.chunks_exact(2);
    pairs.any(|pair| is(&pair[0], "mode") && is(&pair[1], "cluster"))
}

/// The connection in use, if the store is up.
#[derive(Debug)]
pub(super) struct Link {
    connection: ArcSwapOption<Connection>,
    /// A call has failed, and no heartbeat has succeeded since.
    is_suspect: AtomicBool,
    /// Notified when a call has failed.
    failed: Notify,
    /// The store rejects requests of calls on this connection, perhaps all while heartbeats succeed, and that has been logged.
    is_logged: AtomicBool,
    /// When the store came back after this replica has been without it.
    back_since: Mutex<Option<Instant>>,
    pub(super) metrics: Arc<Metrics>,
}

impl Link {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            connection: ArcSwapOption::empty(),
            is_suspect: AtomicBool::new(false),
            failed: Notify::new(),
            is_logged: AtomicBool::new(false),
            back_since: Mutex::default(),
            metrics,
        }
    }

    /// Lets calls use the connection.
    pub(super) fn open(&self, connection: &Arc<Connection>) {
        self.is_suspect.store(false, Ordering::Relaxed);
        self.is_logged.store(false, Ordering::Relaxed);
        self.connection.store(Some(Arc::clone(connection)));
        self.metrics.store_up.set(1);
    }

    /// Lets calls use the open connection as long as heartbeats on it succeed, and returns why they no longer do.
    pub(super) async fn serve(&self, connection: &Arc<Connection>, store: &QuotaStore) -> Problem {
        let mut failures = 0;
        let problem = loop {
            if failures == 0 {
                tokio::select! {
                    () = sleep(HEARTBEAT) => {}
                    () = self.failed.notified() => failures = 1,
                }
            }
            let due = Instant::now() + longest_wait();
            match store.heartbeat(connection, longest_wait()).await {
                Ok(()) => {
                    failures = 0;
                    self.is_suspect.store(false, Ordering::Relaxed);
                }
                Err(Problem::Timeout(_)) if is_late(due) => {}
                Err(problem) => {
                    failures += 1;
                    self.is_suspect.store(true, Ordering::Relaxed);
                    if failures >= MAX_FAILURES || matches!(problem, Problem::Connection(_)) {
                        break problem;
                    }
                }
            }
        };
        self.connection.store(None);
        self.metrics.store_up.set(0);
        problem
    }

    /// Records that this replica has been without the store until now.
    pub(super) fn came_back(&self) {
        *self.back_since.lock() = Some(Instant::now());
    }

    /// When the store came back after this replica has been without it, if ever.
    pub(super) fn back_since(&self) -> Option<Instant> {
        *self.back_since.lock()
    }

    /// Runs a script, for at most `patience`; `None` if the store is down, does not reply in time, or replies with something else.
    pub(super) async fn call<T: FromRedisValue>(
        &self,
        operation: StoreOperation,
        script: &ScriptInvocation<'_>,
        patience: Duration,
    ) -> Option<T> {
        let is_usable = !patience.is_zero() && !self.is_suspect.load(Ordering::Relaxed);
        let connection = self.connection.load_full().filter(|_| is_usable);
        let Some(connection) = connection else {
            self.metrics.store_skipped(operation);
            return None;
        };
        let due = Instant::now() + patience;
        let called = self.run(operation, &connection, script, patience).await;
        if let Err(problem @ (Problem::Forbidden | Problem::Error(_))) = &called
            && !self.is_logged.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("the quota store rejects requests of calls: {problem}");
        }
        let is_evidence = match &called {
            Ok(_) => false,
            // With most of its time used up, a call may give up too soon, and a thread without CPU time does not see a reply.
            Err(Problem::Timeout(waited)) => *waited >= longest_wait() / 2 && !is_late(due),
            Err(_) => true,
        };
        if is_evidence {
            self.is_suspect.store(true, Ordering::Relaxed);
            self.failed.notify_one();
        }
        called.ok()
    }

    /// Runs a script on a connection, and counts it.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        operation: StoreOperation,
        connection: &Connection,
        script: &ScriptInvocation<'_>,
        patience: Duration,
    ) -> Result<T, Problem> {
        let begun = Instant::now();
        let mut handle = connection.handle.clone();
        let called = match timeout(patience, script.invoke_async(&mut handle)).await {
            Ok(called) => called.map_err(Problem::from),
            Err(_) => Err(Problem::Timeout(patience)),
        };
        let outcome = match &called {
            Ok(_) => StoreOutcome::Ok,
            Err(Problem::Timeout(_)) => StoreOutcome::Timeout,
            Err(_) => StoreOutcome::Error,
        };
        self.metrics
            .store_request(operation, outcome, begun.elapsed());
        called
    }
}

/// A stream whose peer may send only so many bytes for each byte that it gets: the client library reads replies of any length.
struct Metered<S> {
    stream: S,
    credit: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.credit == 0 {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        self.credit = self.credit.saturating_sub(read);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.credit = (self.credit + written * CREDIT_PER_BYTE).min(MAX_CREDIT);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_scripts_are_recognized_in_the_words_of_each_version() {
        let of_6_2 = "Error running script (call to f_a8e0): @user_script:1: @user_script: 1: ";
        let cases = [
            (
                format!("{of_6_2}-READONLY You can't write against a read only replica."),
                Problem::ReadOnly,
            ),
            (
                format!("{of_6_2}-OOM command not allowed when used memory > 'maxmemory'."),
                Problem::OutOfMemory,
            ),
            (
                "The user executing the script can't run this command or subcommand".to_owned(),
                Problem::Forbidden,
            ),
            (
                "The user executing the script can't access at least one of the keys".to_owned(),
                Problem::Forbidden,
            ),
            (
                "ACL failure in script: User default has no permissions to run it".to_owned(),
                Problem::Forbidden,
            ),
            (
                "unknown command 'x'".to_owned(),
                Problem::Error("ERR".to_owned()),
            ),
        ];

        for (text, problem) in cases {
            assert_eq!(Problem::from_script(&text), problem, "{text}");
        }
    }
}
