//! A Redis server of a test, in place of the quota store.

use std::{
    io,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    sync::{Semaphore, SemaphorePermit},
};

use super::{Program, Upstream, free_address, within};

/// Set where a missing server is an error and not a reason to skip a test.
const REQUIRED: &str = "TESTS_REQUIRE_REDIS";

/// Limits the tests that use a store at the same time: each starts several processes.
static RUNNING: Semaphore = Semaphore::const_new(2);

/// A Redis server without persistence; killed when dropped.
pub(crate) struct Store {
    folder: TempDir,
    port: u16,
    args: Vec<String>,
    server: Option<Child>,
    _running: SemaphorePermit<'static>,
}

impl Store {
    /// Starts a server on a free port. `None` if none is installed; then the test is skipped.
    pub(crate) async fn start() -> Option<Self> {
        Self::start_with(&[]).await
    }

    /// As [`Self::start`], with further arguments.
    pub(crate) async fn start_with(args: &[&str]) -> Option<Self> {
        let running = RUNNING.acquire().await.expect("it is never closed");
        let port = free_address().port();
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("key"), [7; 32]).expect("a file");
        let mut store = Self {
            folder,
            port,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            server: None,
            _running: running,
        };
        match store.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                assert!(
                    std::env::var_os(REQUIRED).is_none(),
                    "redis-server is not installed, and {REQUIRED} is set"
                );
                eprintln!("skipped: redis-server is not installed");
                return None;
            }
            started => started.expect("redis-server starts"),
        }
        store.listens().await;
        Some(store)
    }

    fn spawn(&mut self) -> io::Result<()> {
        let port = self.port.to_string();
        let server = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(self.folder.path())
            .args(&self.args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        self.server = Some(server);
        Ok(())
    }

    async fn listens(&self) {
        within("redis-server listens", async {
            while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// Starts the server again, without its data.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        self.spawn().expect("redis-server starts");
        self.listens().await;
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// Sends a signal, by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.server.as_ref().expect("it runs").id().to_string();
        let done = Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(
            done.is_ok_and(|status| status.success()),
            "the signal is sent"
        );
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn key_file(&self) -> String {
        self.file("key")
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn file(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("an ASCII path").to_owned()
    }

    /// The flags of a replica.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flags = [
            "--quota-store",
            &self.url(),
            "--quota-store-key-file",
            &self.key_file(),
        ];
        flags.map(str::to_owned).to_vec()
    }

    /// Starts a replica before a scripted upstream, with a token of its own, whether or not it can use the store.
    pub(crate) fn start_replica(&self, upstream: &Upstream, args: &[&str]) -> Program {
        let flags = self.flags();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Program::over(&upstream.url(), &[&flags, args].concat())
    }

    /// Starts a replica, and waits until it uses the store.
    pub(crate) async fn replica(&self, upstream: &Upstream, args: &[&str]) -> Program {
        let [replica] = self.replicas(upstream, args).await;
        replica
    }

    /// Starts several replicas, and waits until all use the store.
    pub(crate) async fn replicas<const N: usize>(
        &self,
        upstream: &Upstream,
        args: &[&str],
    ) -> [Program; N] {
        let replicas = [(); N].map(|()| self.start_replica(upstream, args));
        for replica in &replicas {
            replica.uses_store(true).await;
        }
        replicas
    }

    /// Runs a command in the server, and returns the lines of its reply.
    pub(crate) fn command(&self, command: &[&str]) -> Vec<String> {
        let output = Command::new("redis-cli")
            .args(["-p", &self.port.to_string()])
            .args(command)
            .output()
            .expect("redis-cli is installed with the server");
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(str::to_owned).collect()
    }

    /// The leases that scripts have released so far. Those that expire do not count.
    pub(crate) fn released_leases(&self) -> usize {
        let stats = self.command(&["INFO", "commandstats"]);
        let deletions = stats.iter().find_map(|line| {
            let calls = line.strip_prefix("cmdstat_del:calls=")?;
            calls.split(',').next()?.parse().ok()
        });
        deletions.unwrap_or(0)
    }

    /// The names in the server that begin so.
    pub(crate) fn names(&self, kind: &str) -> Vec<String> {
        let names = self.command(&["KEYS", &format!("rtf1:{kind}:*")]);
        names.into_iter().filter(|name| !name.is_empty()).collect()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.kill();
    }
}
