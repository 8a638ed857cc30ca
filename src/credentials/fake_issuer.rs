//! An issuer of credentials for tests: a real socket on loopback that answers each request from a script.

use std::sync::{Arc, Mutex};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

/// Answers requests until it is dropped.
pub(super) struct FakeIssuer {
    /// Its base URL.
    pub(super) endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
    _serving: AbortOnDropHandle<()>,
}

impl FakeIssuer {
    /// `answer` takes the number of the request, from 1, and its text, and returns the complete response.
    pub(super) async fn start(
        answer: impl Fn(usize, &str) -> String + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let request = read_request(&mut connection).await;
                let answer = {
                    let mut seen = seen.lock().unwrap();
                    seen.push(request.clone());
                    answer(seen.len(), &request)
                };
                // A client that has read enough may close before it is all written.
                let _ = connection.write_all(answer.as_bytes()).await;
            }
        });
        Self {
            endpoint,
            requests,
            _serving: AbortOnDropHandle::new(serving),
        }
    }

    /// The requests so far: head and body.
    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// The first lines of the requests so far, without the version.
    pub(super) fn request_lines(&self) -> Vec<String> {
        self.requests()
            .iter()
            .map(|request| request.split(" HTTP/1.1").next().unwrap().to_owned())
            .collect()
    }
}

/// A response with this status line, these header lines and this body.
pub(super) fn answer(status: &str, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
        body.len()
    )
}

async fn read_request(connection: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .to_lowercase()
                .lines()
                .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
                .unwrap_or(0);
            if body.len() >= length {
                return text;
            }
        }
        if connection.read_buf(&mut bytes).await.unwrap() == 0 {
            return text;
        }
    }
}
