//! The sandbox as a separate process, with its control paths (docs/sandbox.md).

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use super::{
    http,
    program::{Logs, PROGRAM},
};

/// `rds-task-facade sandbox`, running; killed when dropped.
pub(crate) struct Sandbox {
    child: Child,
    address: SocketAddr,
}

impl Sandbox {
    /// On a free port.
    pub(crate) fn start() -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub(crate) fn start_at(listen: SocketAddr) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["sandbox", "--listen", &listen.to_string()])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let logs = Logs::default();
        logs.read(child.stdout.take().expect("stdout is piped"));
        let address = logs.wait_for(|lines| {
            let (_, address) = lines.first()?.rsplit_once("listen=")?;
            address.parse().ok()
        });
        Self {
            child,
            address: address.expect("the first line ends with the address"),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes a setting: what stands after `POST /sandbox/`.
    pub(crate) async fn set(&self, setting: &str) {
        self.control("POST", setting).await;
    }

    /// One of the counters.
    pub(crate) async fn count(&self, name: &str) -> u64 {
        let counts = self.control("GET", "counts").await;
        counts[name].as_u64().expect("a counter of the sandbox")
    }

    /// The headers of the last task request.
    pub(crate) async fn last_headers(&self) -> Vec<(String, String)> {
        let requests = self.control("GET", "requests").await;
        serde_json::from_value(requests[0]["headers"].clone()).expect("pairs of texts")
    }

    async fn control(&self, method: &str, path: &str) -> Value {
        let (status, body) =
            http::exchange(self.address, method, &format!("/sandbox/{path}")).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
