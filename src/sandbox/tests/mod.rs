//! Tests of the sandbox over loopback sockets.

mod authentication;
mod course;
mod credentials;
mod scenarios;
mod task;

use std::{future::pending, net::SocketAddr};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A sandbox, and a client for it.
struct TestSandbox {
    base: String,
    client: reqwest::Client,
}

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

const EXAMPLE_BODY: &str = r#"{"workflow_id":"102772a9-31fa-4129-b9f8-7638e2792f3b"}"#;

async fn start() -> TestSandbox {
    let sandbox = Sandbox::bind(LOOPBACK).await.unwrap();
    let base = format!("http://{}", sandbox.local_addr());
    tokio::spawn(sandbox.serve(pending()));
    TestSandbox {
        base,
        client: reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap(),
    }
}

fn task_path(instance_id: &str) -> String {
    format!("/v3/{EXAMPLE_PROJECT_ID}/instances/{instance_id}/task-center-detail")
}

impl TestSandbox {
    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A request for the example task with this instance id and the valid token.
    fn task_request(&self, instance_id: &str) -> reqwest::RequestBuilder {
        self.task_request_with(TOKEN, instance_id)
    }

    /// A request for the example task with this token.
    fn task_request_with(&self, token: &str, instance_id: &str) -> reqwest::RequestBuilder {
        self.client
            .post(self.url(&task_path(instance_id)))
            .header("Content-Type", "application/json")
            .header("X-Auth-Token", token)
            .body(EXAMPLE_BODY)
    }

    /// Posts to a control path, which must succeed.
    async fn control(&self, path: &str) {
        let response = self.client.post(self.url(path)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
    }

    async fn count(&self, name: &str) -> u64 {
        self.get("/sandbox/counts").await[name].as_u64().unwrap()
    }

    async fn get(&self, path: &str) -> Value {
        let response = self.client.get(self.url(path)).send().await.unwrap();
        serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
    }
}

/// Sends a request, and returns status and JSON body of the response.
async fn send(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let body = response.bytes().await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn addresses_beyond_loopback_are_rejected() {
    for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
        let error = Sandbox::bind(address.parse().unwrap()).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address}");
        assert!(error.to_string().contains("loopback"), "{address}: {error}");
    }
}

#[tokio::test]
async fn shutdown_closes_connections() {
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
async fn counts_and_the_last_requests_are_readable() {
    let sandbox = start().await;
    for _ in 0..40 {
        sandbox
            .task_request(EXAMPLE_INSTANCE_ID)
            .send()
            .await
            .unwrap();
    }
    sandbox.task_request("finished").send().await.unwrap();

    let requests = sandbox.get("/sandbox/requests").await;

    assert_eq!(requests.as_array().unwrap().len(), 32);
    let last = &requests[0];
    assert_eq!(last["method"], "POST");
    assert_eq!(last["path"], task_path("finished"));
    assert_eq!(last["body"], EXAMPLE_BODY);
    let headers = last["headers"].as_array().unwrap();
    assert!(headers.contains(&serde_json::json!(["x-auth-token", TOKEN])));
    assert_eq!(sandbox.count("task_requests").await, 41);
    assert_eq!(sandbox.count("task_requests_in_flight").await, 0);
    assert!(sandbox.count("connections").await > 0);
}

#[tokio::test]
async fn invalid_control_parameters_are_rejected() {
    let sandbox = start().await;

    for path in [
        "/sandbox/clock",
        "/sandbox/clock?offset-seconds=soon",
        "/sandbox/token-life?seconds=99999999999",
        "/sandbox/hardened?on=yes",
        "/sandbox/fail-iam?status=200&times=1",
        "/sandbox/fail-iam?status=503",
        "/sandbox/slow-credentials?ms=60001",
    ] {
        let (status, body) = send(sandbox.client.post(sandbox.url(path))).await;

        assert_eq!(status, 400, "{path}");
        assert!(body["error"].is_string(), "{path}");
    }
}

#[tokio::test]
async fn control_paths_reject_requests_that_a_web_page_can_send() {
    let sandbox = start().await;
    let address = sandbox.base.trim_start_matches("http://");
    let (_, port) = address.rsplit_once(':').unwrap();
    let own = "127.0.0.1:PORT";
    let cases: &[(&[&str], &[&str], u16)] = &[
        (&[own], &[], 200),
        (&["localhost:PORT"], &[], 200),
        (&["LocalHost:PORT"], &[], 200),
        (&["[::1]:PORT"], &[], 200),
        (&["127.0.0.53:PORT"], &[], 200),
        // A forwarded port, as with ssh.
        (&["localhost:9000"], &[], 200),
        (&["localhost"], &[], 200),
        (&[own], &["http://127.0.0.1:PORT"], 200),
        (&[], &[], 403),
        (&[""], &[], 403),
        (&["evil.example:PORT"], &[], 403),
        (&["127.0.0.1.evil.example:PORT"], &[], 403),
        (&["localhost.evil.example:PORT"], &[], 403),
        (&["10.0.0.1:PORT"], &[], 403),
        (&["0.0.0.0:PORT"], &[], 403),
        (&["[fe80::1]:PORT"], &[], 403),
        (&["evil.example@127.0.0.1:PORT"], &[], 403),
        (&[own, "evil.example:PORT"], &[], 403),
        (&[own], &["http://evil.example"], 403),
        (&[own], &["http://127.0.0.1:PORT.evil.example"], 403),
        (&[own], &["http://127.0.0.1:1"], 403),
        (&[own], &["http://localhost:PORT"], 403),
        (&[own], &["https://127.0.0.1:PORT"], 403),
        (&[own], &["null"], 403),
        (&[own], &[""], 403),
        (
            &[own],
            &["http://127.0.0.1:PORT", "http://evil.example"],
            403,
        ),
    ];

    for (hosts, origins, status) in cases {
        for line in ["POST /sandbox/revoke-tokens", "GET /sandbox/counts"] {
            let mut request = format!("{line} HTTP/1.1\r\nConnection: close\r\n");
            for host in *hosts {
                request += &format!("Host: {host}\r\n");
            }
            for origin in *origins {
                request += &format!("Origin: {origin}\r\n");
            }
            request += "Content-Length: 0\r\n\r\n";
            let request = request.replace("PORT", port);
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();

            let head = format!("HTTP/1.1 {status} ");
            assert!(response.starts_with(&head), "{request}{response}");
        }
    }
}
