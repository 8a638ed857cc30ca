//! A scripted issuer of credentials, whose requests and responses are texts.

use crate::test_support::upstream::{Step, Upstream};

pub(super) struct FakeIssuer {
    /// Its base URL.
    pub(super) endpoint: String,
    upstream: Upstream,
}

impl FakeIssuer {
    /// `response` takes the number of the request, from 1, and its text, and returns the complete response.
    pub(super) async fn start(
        response: impl Fn(usize, &str) -> String + Send + Sync + 'static,
    ) -> Self {
        let upstream = Upstream::start(move |request| {
            let response = response(request.number + 1, &request.text);
            vec![Step::Send(response.into_bytes()), Step::Close]
        })
        .await;
        Self {
            endpoint: upstream.url(),
            upstream,
        }
    }

    /// The requests so far: head and body.
    pub(super) fn requests(&self) -> Vec<String> {
        let requests = self.upstream.requests();
        requests.into_iter().map(|request| request.text).collect()
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
pub(super) fn response(status: &str, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
        body.len()
    )
}
