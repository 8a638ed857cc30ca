//! The request of `ShowTaskDetail`, built once per call: method, URL and body are the same for every attempt, the
//! credential headers are not.

use std::time::SystemTime;

use bytes::Bytes;
use http::{
    HeaderValue, Method,
    header::{CONTENT_TYPE, HeaderName},
};
use reqwest::Url;
use serde::Serialize;

use super::TaskQuery;
use crate::credentials::{Auth, signer};

const APPLICATION_JSON: HeaderValue = HeaderValue::from_static("application/json");

/// `POST {endpoint}/v3/{project_id}/instances/{instance_id}/task-center-detail`
/// (RDS API reference, "Obtaining Task Information").
#[derive(Debug)]
pub(super) struct TaskRequest {
    url: Url,
    host: String,
    project_id: String,
    body: Bytes,
}

#[derive(Serialize)]
struct Body<'a> {
    workflow_id: &'a str,
    // Whether upstream accepts an absent name is not documented; what the caller left out is not made up.
    #[serde(skip_serializing_if = "Option::is_none")]
    workflow_name: Option<&'a str>,
}

impl TaskRequest {
    pub(super) fn new(endpoint: &Url, query: &TaskQuery) -> Self {
        let path = format!(
            "/v3/{}/instances/{}/task-center-detail",
            query.project_id, query.instance_id
        );
        let mut url = endpoint.clone();
        url.set_path(&path);
        // The ids' alphabet has nothing that a URL parser rewrites, and the signature covers this very path.
        debug_assert_eq!(url.path(), path);
        let body = Body {
            workflow_id: &query.workflow_id,
            workflow_name: query.workflow_name.as_deref(),
        };
        let body = serde_json::to_vec(&body).expect("two strings serialize");
        Self {
            host: host(&url),
            url,
            project_id: query.project_id.clone(),
            body: Bytes::from(body),
        }
    }

    /// The request of one attempt, with its credential: a token as it is, or a signature of this moment.
    pub(super) fn with(&self, auth: &Auth, signed_at: SystemTime) -> reqwest::Request {
        let mut request = reqwest::Request::new(Method::POST, self.url.clone());
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, APPLICATION_JSON);
        match auth {
            Auth::Token(token) => {
                headers.insert(HeaderName::from_static("x-auth-token"), token.header());
            }
            Auth::Key(key) => {
                let unsigned = signer::Request {
                    method: "POST",
                    path: self.url.path(),
                    host: &self.host,
                    project_id: &self.project_id,
                    body: &self.body,
                };
                for (name, value) in signer::sign(&unsigned, key, signed_at) {
                    headers.insert(name, value);
                }
            }
        }
        *request.body_mut() = Some(self.body.clone().into());
        request
    }
}

/// The value that the HTTP client will send as `Host`: the port only where it is not the scheme's own.
fn host(url: &Url) -> String {
    let host = url.host_str().expect("an endpoint has a host");
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}
