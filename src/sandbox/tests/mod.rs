//! The sandbox over real loopback sockets.

mod authentication;
mod credentials;
mod scenarios;
mod task;

use std::{future::pending, net::SocketAddr};

use serde_json::Value;

use super::*;

/// A sandbox of its own for one test, and a client for it.
struct Running {
    base: String,
    client: reqwest::Client,
}

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

const EXAMPLE_BODY: &str = r#"{"workflow_id":"102772a9-31fa-4129-b9f8-7638e2792f3b"}"#;

async fn start() -> Running {
    let sandbox = Sandbox::bind(LOOPBACK).await.unwrap();
    let base = format!("http://{}", sandbox.local_addr());
    tokio::spawn(sandbox.serve(pending()));
    Running {
        base,
        client: reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tls_certs_only([])
            .build()
            .unwrap(),
    }
}

fn task_path(instance_id: &str) -> String {
    format!("/v3/{EXAMPLE_PROJECT_ID}/instances/{instance_id}/task-center-detail")
}

impl Running {
    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A request for the example task of this instance, with the token that is always good.
    fn ask(&self, instance_id: &str) -> reqwest::RequestBuilder {
        self.ask_with(TOKEN, instance_id)
    }

    /// The same with another token.
    fn ask_with(&self, token: &str, instance_id: &str) -> reqwest::RequestBuilder {
        self.client
            .post(self.url(&task_path(instance_id)))
            .header("Content-Type", "application/json")
            .header("X-Auth-Token", token)
            .body(EXAMPLE_BODY)
    }

    /// Uses a control path; the request must be understood.
    async fn control(&self, path: &str) {
        let answer = self.client.post(self.url(path)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }

    async fn count(&self, name: &str) -> u64 {
        self.get("/sandbox/counts").await[name].as_u64().unwrap()
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.client.get(self.url(path)).send().await.unwrap();
        serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
    }
}

/// Status and JSON body of the answer.
async fn exchange(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.bytes().await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn an_address_beyond_loopback_is_refused() {
    for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
        let error = Sandbox::bind(address.parse().unwrap()).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address}");
        assert!(error.to_string().contains("loopback"), "{address}: {error}");
    }
}

#[tokio::test]
async fn the_shutdown_ends_open_connections() {
    let sandbox = Sandbox::bind(LOOPBACK).await.unwrap();
    let address = sandbox.local_addr();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(sandbox.serve(async { stopped.await.unwrap() }));
    let mut idle = tokio::net::TcpStream::connect(address).await.unwrap();

    stop.send(()).unwrap();
    serving.await.unwrap();

    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut idle, &mut byte).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test]
async fn the_last_requests_and_the_counts_can_be_read() {
    let running = start().await;
    for _ in 0..40 {
        running.ask(EXAMPLE_INSTANCE_ID).send().await.unwrap();
    }
    running.ask("finished").send().await.unwrap();

    let requests = running.get("/sandbox/requests").await;

    assert_eq!(requests.as_array().unwrap().len(), 32);
    let last = &requests[0];
    assert_eq!(last["method"], "POST");
    assert_eq!(last["path"], task_path("finished"));
    assert_eq!(last["body"], EXAMPLE_BODY);
    let headers = last["headers"].as_array().unwrap();
    assert!(headers.contains(&serde_json::json!(["x-auth-token", TOKEN])));
    assert_eq!(running.count("task_requests").await, 41);
    assert_eq!(running.count("task_requests_in_flight").await, 0);
    assert!(running.count("connections").await > 0);
}

#[tokio::test]
async fn a_control_path_with_a_bad_parameter_says_so() {
    let running = start().await;

    for path in [
        "/sandbox/clock",
        "/sandbox/clock?offset-seconds=soon",
        "/sandbox/token-life?seconds=99999999999",
        "/sandbox/hardened?on=yes",
        "/sandbox/fail-iam?status=200&times=1",
        "/sandbox/fail-iam?status=503",
        "/sandbox/slow-credentials?ms=60001",
    ] {
        let (status, body) = exchange(running.client.post(running.url(path))).await;

        assert_eq!(status, 400, "{path}");
        assert!(body["error"].is_string(), "{path}");
    }
}
