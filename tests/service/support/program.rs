//! The built program as a child process.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use rds_task_facade::pb::{
    GetTaskDetailRequest, GetTaskDetailResponse, task_service_client::TaskServiceClient,
};
use tonic::{Request, Response, Status, transport::Channel};
use tonic_health::pb::health_client::HealthClient;

use super::{Failure, LONGER_THAN_PATIENCE, PATIENCE, Upstream, eventually, http};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_rds-task-facade");

/// A token for tests that need one and say nothing about it.
pub(crate) const TOKEN: &str = "a-token-of-the-tests";

/// The vendor page's example task.
pub(crate) fn example_request() -> GetTaskDetailRequest {
    GetTaskDetailRequest {
        project_id: "0483b6b16e954cb88930a360d2c4e663".into(),
        instance_id: "1ffc4167903840cb93a3da56d28c14fdin01".into(),
        workflow_id: "102772a9-31fa-4129-b9f8-7638e2792f3b".into(),
        workflow_name: Some("CreateMysqlSingleHAInstance".into()),
    }
}

/// A request with a distinct workflow id, so that calls are not coalesced.
pub(crate) fn numbered(number: usize) -> GetTaskDetailRequest {
    let mut request = example_request();
    request.workflow_id = format!("w-{number}");
    request
}

/// The variable for the longest wait of a call for the quota store, in milliseconds.
const WAIT_FOR_STORE: &str = "TESTS_STORE_WAIT_MS";

/// `rds-task-facade serve`, running; killed when dropped.
pub(crate) struct Program {
    child: Child,
    logs: Logs,
    pub(crate) grpc: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// What the program has written to standard output and standard error until now.
#[derive(Clone, Default)]
pub(super) struct Logs(Arc<(Mutex<Vec<String>>, Condvar)>);

impl Logs {
    pub(super) fn read(&self, pipe: impl std::io::Read + Send + 'static) {
        let logs = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                logs.0.0.lock().expect("no panic under the lock").push(line);
                logs.0.1.notify_all();
            }
        });
    }

    pub(super) fn wait_for<T>(&self, mut find: impl FnMut(&[String]) -> Option<T>) -> Option<T> {
        let end = Instant::now() + PATIENCE;
        let mut lines = self.0.0.lock().expect("no panic under the lock");
        loop {
            if let Some(found) = find(&lines) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            lines = self
                .0
                .1
                .wait_timeout(lines, left)
                .expect("no panic under the lock")
                .0;
        }
    }
}

impl Program {
    /// Starts `serve` on free ports with JSON logs and nothing of this process's environment but `env`.
    pub(crate) fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_under(&[], "127.0.0.1:0", args, env)
    }

    /// Starts `serve` on a separate address, run by another program, such as a shell that sets limits first.
    pub(crate) fn start_under(
        wrapper: &[&str],
        listen: &str,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Self {
        let line = [wrapper, &[PROGRAM]].concat();
        let mut child = Command::new(line[0])
            .args(&line[1..])
            .args([
                "serve",
                "--listen",
                listen,
                "--metrics-listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
            ])
            .args(args)
            .env_clear()
            .env(WAIT_FOR_STORE, "10000")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let logs = Logs::default();
        logs.read(child.stdout.take().expect("stdout is piped"));
        logs.read(child.stderr.take().expect("stderr is piped"));
        let addresses = logs.wait_for(|lines| {
            lines.iter().find_map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).ok()?;
                let address = |field: &str| line.get(field)?.as_str()?.parse().ok();
                Some((address("listen")?, address("metrics_listen")?))
            })
        });
        let Some((grpc, admin)) = addresses else {
            let _ = child.kill();
            panic!(
                "no start line with addresses in {:?}",
                logs.0.0.lock().expect("no panic under the lock")
            );
        };
        Self {
            child,
            logs,
            grpc,
            admin,
        }
    }

    /// Against a scripted upstream, with a separate token.
    pub(crate) fn over(upstream: &str, args: &[&str]) -> Self {
        let mut all = vec!["--endpoint", upstream, "--credentials", "token"];
        all.extend_from_slice(args);
        Self::start(&all, &[("RDS_TASK_FACADE_TOKEN", TOKEN)])
    }

    /// Against a scripted upstream, with the URL and the key file of a quota store, for whose replies it waits so many milliseconds.
    pub(crate) fn impatient(
        millis: &str,
        upstream: &Upstream,
        [url, key_file]: [String; 2],
        args: &[&str],
    ) -> Self {
        let upstream = upstream.url();
        let mut all = vec!["--endpoint", &upstream, "--credentials", "token"];
        all.extend(["--quota-store", &url, "--quota-store-key-file", &key_file]);
        all.extend_from_slice(args);
        let env = [("RDS_TASK_FACADE_TOKEN", TOKEN), (WAIT_FOR_STORE, millis)];
        Self::start(&all, &env)
    }

    /// Against a scripted upstream, with timeouts longer than any test, so that none of them ends a call.
    pub(crate) fn patient(upstream: &str, args: &[&str]) -> Self {
        let timeouts = ["--timeout", "--attempt-timeout"].map(|name| [name, LONGER_THAN_PATIENCE]);
        Self::over(upstream, &[timeouts.as_flattened(), args].concat())
    }

    /// Against the embedded sandbox.
    pub(crate) fn sandboxed(args: &[&str]) -> Self {
        let mut all = vec!["--sandbox"];
        all.extend_from_slice(args);
        Self::start(&all, &[])
    }

    /// A client with a separate connection.
    pub(crate) async fn client(&self) -> TaskServiceClient<Channel> {
        TaskServiceClient::new(self.channel().await)
    }

    /// A client of the health service.
    pub(crate) async fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel().await)
    }

    /// The client's own timeout keeps a test from hanging; the program does not see it.
    async fn channel(&self) -> Channel {
        let channel = Channel::from_shared(format!("http://{}", self.grpc))
            .expect("an address makes a URL")
            .connect_timeout(PATIENCE)
            .timeout(2 * PATIENCE);
        channel.connect().await.expect("the program listens")
    }

    /// One call on a separate connection.
    pub(crate) async fn call(
        &self,
        request: GetTaskDetailRequest,
    ) -> Result<Response<GetTaskDetailResponse>, Status> {
        self.client().await.get_task_detail(request).await
    }

    /// One call with metadata.
    pub(crate) async fn call_with(
        &self,
        request: GetTaskDetailRequest,
        metadata: &[(&'static str, &str)],
    ) -> Result<Response<GetTaskDetailResponse>, Status> {
        let mut request = Request::new(request);
        for (name, value) in metadata {
            request
                .metadata_mut()
                .append(*name, value.parse().expect("test metadata is ASCII"));
        }
        self.client().await.get_task_detail(request).await
    }

    /// One call that must fail.
    pub(crate) async fn failure(&self, request: GetTaskDetailRequest) -> Failure {
        Failure::from_status(&self.call(request).await.expect_err("the call fails"))
    }

    /// One call for the example task with a deadline.
    pub(crate) async fn call_within(
        &self,
        timeout: Duration,
    ) -> Result<Response<GetTaskDetailResponse>, Status> {
        let mut request = Request::new(example_request());
        request.set_timeout(timeout);
        self.client().await.get_task_detail(request).await
    }

    /// `(status, body)` of a path of the metrics listener.
    pub(crate) async fn admin(&self, path: &str) -> (u16, String) {
        http::exchange(self.admin, "GET", path).await
    }

    /// All samples of `/metrics` whose value is not zero.
    pub(crate) async fn metrics(&self) -> BTreeMap<String, f64> {
        let (_, text) = self.admin("/metrics").await;
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(series, value)| Some((series.to_owned(), value.parse().ok()?)))
            .filter(|(_, value)| *value != 0.0)
            .collect()
    }

    /// The value of one series, 0 when it is absent or zero.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        self.metrics()
            .await
            .get(series)
            .copied()
            .unwrap_or_default()
    }

    /// Waits until calls use the quota store, or until they do not.
    pub(crate) async fn uses_store(&self, uses: bool) {
        eventually(&format!("calls use the store: {uses}"), async || {
            (self.metric("quota_store_up").await == 1.0) == uses
        })
        .await;
    }

    /// How many connections were closed before HTTP/2 for this reason.
    pub(crate) async fn refused(&self, reason: &str) -> f64 {
        let series = format!("grpc_server_connections_refused_total{{reason=\"{reason}\"}}");
        self.metric(&series).await
    }

    /// How many `GetTaskDetail` RPCs ended with `code`, in Go's spelling.
    pub(crate) async fn handled(&self, code: &str) -> f64 {
        self.metric(&format!(
            "grpc_server_handled_total{{grpc_type=\"unary\",grpc_service=\"huaweicloud.rds.task.v1.TaskService\",\
             grpc_method=\"GetTaskDetail\",grpc_code=\"{code}\"}}"
        ))
        .await
    }

    /// All lines written until now.
    pub(crate) fn logs(&self) -> Vec<String> {
        self.logs
            .0
            .0
            .lock()
            .expect("no panic under the lock")
            .clone()
    }

    /// Waits for a line that `wanted` accepts.
    pub(crate) fn wait_for_log(
        &self,
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        self.logs
            .wait_for(|lines| {
                lines
                    .iter()
                    .find_map(|line| serde_json::from_str(line).ok().filter(&wanted))
            })
            .unwrap_or_else(|| panic!("no such line in {:#?}", self.logs()))
    }

    /// Waits for the access line of the RPC with this request id.
    pub(crate) fn access_line(&self, request_id: &str) -> serde_json::Value {
        self.wait_for_log(|line| {
            line["request_id"] == request_id && line.get("grpc_code").is_some()
        })
    }

    /// Sends a signal, by name.
    pub(crate) fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status();
        assert!(
            done.is_ok_and(|status| status.success()),
            "the signal is sent"
        );
    }

    /// Waits for the end of the program.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self
                .child
                .try_wait()
                .expect("this process started the child")
            {
                return status;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("not ended within {PATIENCE:?}: {:#?}", self.logs());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the program to its end: exit code, standard output, standard error.
pub(crate) fn run(args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let child = Command::new(PROGRAM)
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let pid = child.id().to_string();
    let (ended, running) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if running.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
    });
    let output = child
        .wait_with_output()
        .expect("this process started the child");
    drop(ended);
    watchdog.join().expect("no panic");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let (out, err) = (text(output.stdout), text(output.stderr));
    let code = output.status.code();
    let code = code.unwrap_or_else(|| panic!("{args:?} not ended within {PATIENCE:?}: {out}{err}"));
    (code, out, err)
}
