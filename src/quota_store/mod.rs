//! The quota store: a Valkey or Redis server in which the replicas of a fleet share what protects the vendor's quota. Without one, no
//! code here runs.
//!
//! - [`Session`]: what one lookup asks the store, within the time that it may wait
//! - `connection`: connects, measures failures; `seal`: names and sealed entries
//! - `admission`: throttle windows, rates and rests; `results`: results and leases; `scripts/`: the scripts that the server runs
//!
//! Every decision is made by a script with the server's clock. What the store returns is untrusted: waits are capped, results are
//! authenticated and their age is checked twice.

pub mod admission;
pub mod connection;
mod options;
mod results;
#[cfg(test)]
#[path = "../../tests/support/scripted_store.rs"]
pub(crate) mod scripted;
mod scripts;
pub mod seal;

use std::{
    mem::discriminant,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use redis::ScriptInvocation;
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    time::{Instant, sleep},
};
use url::Url;

pub use self::{
    admission::{Answer, AttemptContext, Request, Slot},
    connection::Problem,
    options::{Options, StoreUrl},
    results::{Claim, Lease, SharedResult, TaskName},
};
use self::{
    connection::{Connection, HEARTBEAT, Link, Target, connect_timeout, longest_wait},
    scripts::SCRIPTS,
    seal::Keys,
};
use crate::{
    credentials::SharedIdentity,
    deadline::Deadline,
    http_client::{self, BuildError, SystemRoots},
    supervise::Task,
    telemetry::metrics::{Metrics, StoreOperation},
};

/// A replica counts for this long after its last heartbeat.
const REPLICA_LIFETIME: Duration = Duration::from_secs(15);

/// The most replicas that a reply of the store is believed.
const MAX_REPLICAS: u32 = 1000;

/// Limit on writes in progress. They are not waited for, and further ones are dropped.
const MAX_WRITES: usize = 256;

/// The longest that a write may take, and the pause before the second attempt: a heartbeat may show meanwhile that the store is up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);
const WRITE_PAUSE: Duration = Duration::from_millis(200);

/// No wait that the store asks for is longer.
const MAX_WAIT: Duration = Duration::from_secs(5 * 60);

/// The quota store cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has answered at start, and cannot be used.
    #[error("--quota-store: {0}")]
    Unfit(Problem),
    /// TLS cannot be set up.
    #[error("--quota-store: {0}")]
    Tls(#[from] BuildError),
    /// The file with roots cannot be read.
    #[error("--quota-store-ca: {0}")]
    Roots(std::io::Error),
}

/// The quota store of this process.
#[derive(Debug)]
pub struct QuotaStore {
    keys: Arc<Keys>,
    /// The base URL of RDS, a part of every name.
    upstream: String,
    target: Target,
    link: Link,
    /// The name of this replica.
    instance: String,
    /// The replicas last seen, 0 before the store was seen, and when. A smaller number counts only after the lifetime of a replica: a store
    /// without its data has to see all of them again.
    replicas: Mutex<(u32, Instant)>,
    attempt_timeout: Duration,
    /// How long a result is stored.
    result_lifetime: Duration,
    runtime: Handle,
    writes: Arc<Semaphore>,
}

/// The result of the first attempt to connect.
#[derive(Debug)]
pub struct Opened(Result<Arc<Connection>, Problem>);

impl Opened {
    /// Why the store cannot be used now, if it cannot.
    pub fn problem(&self) -> Option<&Problem> {
        self.0.as_ref().err()
    }

    /// Closes the connection of a program that does not serve calls, and removes the program from the count of replicas.
    pub async fn close(self, store: &QuotaStore) {
        if let Ok(connection) = self.0 {
            let (operation, script) = (StoreOperation::Heartbeat, store.leave_script());
            let leaving = store
                .link
                .run::<u32>(operation, &connection, &script, longest_wait());
            // Without it, the heartbeat expires.
            let _ = leaving.await;
        }
    }
}

impl QuotaStore {
    /// Connects to the configured store, if any, for at most a second. [`Self::start`] takes the store and the result.
    ///
    /// # Errors
    /// [`Error`]: the store is a cluster, or TLS cannot be set up. A store that does not reply is no error.
    pub async fn open(
        options: &Options,
        upstream: &Url,
        attempt_timeout: Duration,
        result_lifetime: Duration,
        metrics: &Arc<Metrics>,
    ) -> Result<Option<(Arc<Self>, Opened)>, Error> {
        let (Some(url), Some(keys)) = (&options.quota_store, &options.keys) else {
            return Ok(None);
        };
        let roots = options.quota_store_ca.as_ref().map(std::fs::read);
        let roots = roots.transpose().map_err(Error::Roots)?;
        let system = match url.origin.scheme() {
            "https" => SystemRoots::Trusted,
            _ => SystemRoots::Ignored,
        };
        let mut tls = http_client::tls_config(system, roots.as_deref())?;
        // The protocol of Redis has no name for ALPN.
        tls.alpn_protocols.clear();
        let http = http_client::Config {
            tls,
            proxy: None,
            connect_timeout: connect_timeout(),
        };
        let store = Arc::new(Self {
            keys: Arc::clone(keys),
            upstream: upstream.as_str().to_owned(),
            target: Target {
                url: url.clone(),
                http,
            },
            link: Link::new(Arc::clone(metrics)),
            instance: random_id(),
            replicas: Mutex::new((0, Instant::now())),
            attempt_timeout,
            result_lifetime,
            runtime: Handle::current(),
            writes: Arc::new(Semaphore::new(MAX_WRITES)),
        });
        match store.connect().await {
            Err(Problem::Cluster) => Err(Error::Unfit(Problem::Cluster)),
            opened => Ok(Some((store, Opened(opened)))),
        }
    }

    /// Lets calls use the connection, starts the task that keeps it open, and logs a failed first attempt to connect.
    pub fn start(self: &Arc<Self>, Opened(opened): Opened) {
        match &opened {
            Ok(connection) => self.link.open(connection),
            Err(problem) => tracing::warn!(
                store = %self.target.url,
                "the quota store cannot be used: {problem}; until it can, this replica counts as the only one and uses the whole rates"
            ),
        }
        let (running, mut first) = (Arc::clone(self), Some(opened));
        tokio::spawn(async move {
            let background = &running.link.metrics.background;
            let run = || Arc::clone(&running).run(first.take());
            background.supervise(Task::QuotaStore, run).await
        });
    }

    /// Connects. The connection is usable if the store replies fast enough.
    async fn connect(&self) -> Result<Arc<Connection>, Problem> {
        let connection = self.target.connect().await?;
        self.replicas.lock().1 = Instant::now();
        self.heartbeat(&connection, longest_wait()).await?;
        Ok(Arc::new(connection))
    }

    async fn heartbeat(&self, connection: &Connection, patience: Duration) -> Result<(), Problem> {
        let mut script = SCRIPTS.heartbeat.key(self.name("replicas", &[]));
        script.arg(&self.instance).arg(millis(REPLICA_LIFETIME));
        let operation = StoreOperation::Heartbeat;
        let replicas = self.link.run(operation, connection, &script, patience);
        let replicas: u32 = replicas.await?;
        let replicas = replicas.clamp(1, MAX_REPLICAS);
        let mut seen = self.replicas.lock();
        if replicas >= seen.0 || seen.1.elapsed() > REPLICA_LIFETIME {
            *seen = (replicas, Instant::now());
        }
        self.link.metrics.store_replicas.set(seen.0.into());
        Ok(())
    }

    /// Keeps a connection, for ever. `connected` is the result of the first attempt to connect.
    async fn run(self: Arc<Self>, mut connected: Option<Result<Arc<Connection>, Problem>>) {
        let mut known = None;
        loop {
            let connection = match connected.take() {
                Some(first) => first,
                None => {
                    let connected = self.connect().await;
                    self.link.came_back();
                    if let Ok(connection) = &connected {
                        self.link.open(connection);
                    }
                    connected
                }
            };
            let problem = match connection {
                Ok(connection) => {
                    tracing::info!(
                        store = %self.target.url,
                        replicas = self.replicas(),
                        "the quota store is in use"
                    );
                    known = None;
                    let problem = self.link.serve(&connection, &self).await;
                    self.warn(&problem);
                    problem
                }
                Err(problem) => {
                    if known.is_some_and(|known| known != discriminant(&problem)) {
                        self.warn(&problem);
                    }
                    problem
                }
            };
            // After the end of a connection, perhaps by a restart, the first attempt to connect is made soon.
            let pause = match (&known, &problem) {
                (None, Problem::Connection(_)) => HEARTBEAT / 10,
                _ => HEARTBEAT,
            };
            known = Some(discriminant(&problem));
            sleep(pause).await;
        }
    }

    fn warn(&self, problem: &Problem) {
        tracing::warn!(
            store = %self.target.url,
            replicas = self.replicas(),
            "the quota store cannot be used: {problem}; until it can, this replica uses its share of the rates"
        );
    }

    /// The replicas last seen, at least this one.
    pub fn replicas(&self) -> u32 {
        self.replicas.lock().0.max(1)
    }

    /// Removes this replica from the count of replicas. Waits for the store as long as a call does.
    pub async fn leave(&self) {
        let (operation, script) = (StoreOperation::Heartbeat, self.leave_script());
        let _: Option<u32> = self.link.call(operation, &script, longest_wait()).await;
    }

    fn leave_script(&self) -> ScriptInvocation<'static> {
        let mut script = SCRIPTS.remove.key(self.name("replicas", &[]));
        script.arg(&self.instance);
        script
    }

    /// The session of one lookup with this credential. A lookup with little time waits for the store for at most half of it.
    pub fn session(self: &Arc<Self>, identity: &SharedIdentity, deadline: Deadline) -> Session {
        let patience = longest_wait().min(deadline.remaining() / 2);
        Session {
            credential: self.name("credential", &[identity.as_bytes()]),
            store: Arc::clone(self),
            left: AtomicU64::new(micros(patience)),
        }
    }

    fn name(&self, kind: &str, parts: &[&[u8]]) -> String {
        let parts = [&[self.upstream.as_bytes()], parts].concat();
        self.keys.name(kind, &parts)
    }

    /// Runs a script that writes, without waiting for it.
    fn write(self: &Arc<Self>, operation: StoreOperation, script: ScriptInvocation<'static>) {
        let Ok(permit) = Arc::clone(&self.writes).try_acquire_owned() else {
            self.link.metrics.store_skipped(operation);
            return;
        };
        let store = Arc::clone(self);
        self.runtime.spawn(async move {
            for pause in [WRITE_PAUSE, Duration::ZERO] {
                let written = store.link.call(operation, &script, WRITE_TIMEOUT).await;
                let written: Option<redis::Value> = written;
                if written.is_some() {
                    break;
                }
                sleep(pause).await;
            }
            drop(permit);
        });
    }
}

/// What one lookup asks the quota store. All its questions together wait for at most 50 ms.
#[derive(Debug)]
pub struct Session {
    store: Arc<QuotaStore>,
    /// Stands for the credential in names.
    credential: String,
    /// The rest of the time that the lookup may wait, in microseconds.
    left: AtomicU64,
}

impl Session {
    /// The replicas last seen, at least this one.
    pub fn replicas(&self) -> u32 {
        self.store.replicas()
    }

    /// When the store came back after this replica has been without it, if ever.
    pub fn back_since(&self) -> Option<Instant> {
        self.store.link.back_since()
    }

    /// Runs a script in the time that is left.
    async fn call<T: redis::FromRedisValue>(
        &self,
        operation: StoreOperation,
        script: &ScriptInvocation<'_>,
    ) -> Option<T> {
        let begun = Instant::now();
        let left = self.left.load(Ordering::Relaxed);
        let patience = Duration::from_micros(left);
        let reply = self.store.link.call(operation, script, patience).await;
        let left = left.saturating_sub(micros(begun.elapsed()));
        self.left.store(left, Ordering::Relaxed);
        reply
    }

    /// As [`Self::call`] while the lookup waits for another replica anyway: only a failure uses up time.
    async fn call_meanwhile<T: redis::FromRedisValue>(
        &self,
        operation: StoreOperation,
        script: &ScriptInvocation<'_>,
    ) -> Option<T> {
        let left = self.left.load(Ordering::Relaxed);
        let reply = self.call(operation, script).await;
        if reply.is_some() {
            self.left.store(left, Ordering::Relaxed);
        }
        reply
    }

    fn name(&self, kind: &str, parts: &[&[u8]]) -> String {
        let parts = [&[self.credential.as_bytes()], parts].concat();
        self.store.name(kind, &parts)
    }
}

/// A random name, for a replica, a start or the holder of a lease.
fn random_id() -> String {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system has random bytes");
    format!("{:032x}", u128::from_be_bytes(bytes))
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}
