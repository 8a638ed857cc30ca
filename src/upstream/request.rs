//! The request of `ShowTaskDetail`. Method, URL and body are built once per call, the credential headers per attempt.

use std::time::SystemTime;

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use http_body_util::Full;
use serde::Serialize;
use url::{Position, Url};

use super::TaskQuery;
use crate::{
    credentials::{
        Auth,
        signer::{self, SigningRequest},
    },
    telemetry::AttemptRecord,
};

const APPLICATION_JSON: &str = "application/json";

/// `POST {endpoint}/v3/{project_id}/instances/{instance_id}/task-center-detail`
/// (RDS API reference, "Obtaining Task Information").
#[derive(Debug)]
pub(super) struct TaskRequest<'a> {
    url: Url,
    /// The path of the URL.
    target: Uri,
    project_id: &'a str,
    body: Bytes,
}

#[derive(Serialize)]
struct Body<'a> {
    workflow_id: &'a str,
    // The vendor does not document whether the name is optional; an absent one is not replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    workflow_name: Option<&'a str>,
}

impl<'a> TaskRequest<'a> {
    pub(super) fn new(endpoint: &Url, query: &'a TaskQuery) -> Self {
        let (project_id, instance_id) = (query.project_id.as_str(), query.instance_id.as_str());
        let path = [
            "/v3/",
            project_id,
            "/instances/",
            instance_id,
            "/task-center-detail",
        ]
        .concat();
        let mut url = endpoint.clone();
        url.set_path(&path);
        // The URL parser must not rewrite the path, because the signature covers it. The alphabet of the ids ensures that.
        debug_assert_eq!(url.path(), path);
        let body = Body {
            workflow_id: &query.workflow_id,
            workflow_name: query.workflow_name.as_deref(),
        };
        let body = serde_json::to_vec(&body).expect("two strings serialize");
        Self {
            url,
            target: path
                .try_into()
                .expect("a path of letters, digits, '-', '_' and '/'"),
            project_id,
            body: Bytes::from(body),
        }
    }

    /// The URL of every attempt.
    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// The request of one attempt with its credential: the token, or a signature of `signed_at`. Includes the trace context of `record` if
    /// propagation to upstream is on.
    pub(super) fn with(
        &self,
        auth: &Auth,
        signed_at: SystemTime,
        record: &AttemptRecord<'_>,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.target.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(APPLICATION_JSON));
        match auth {
            Auth::Token(token) => {
                headers.insert("x-auth-token", token.value.clone());
            }
            Auth::Key(key) => {
                // As the HTTP client sends it: with the port unless it is the scheme's default.
                let host = &self.url[Position::BeforeHost..Position::AfterPort];
                // Signs no header that the HTTP client or a proxy may change.
                let unsigned = SigningRequest {
                    method: "POST",
                    path: self.url.path(),
                    query: &[],
                    headers: &[
                        ("content-type", APPLICATION_JSON),
                        ("host", host),
                        ("x-project-id", self.project_id),
                    ],
                    body: &self.body,
                };
                let signed = signer::sign(&unsigned, key, signed_at);
                let project_id =
                    HeaderValue::from_str(self.project_id).expect("a project id is ASCII");
                headers.insert("x-project-id", project_id);
                headers.insert("x-sdk-date", signed.x_sdk_date);
                headers.insert(AUTHORIZATION, signed.authorization);
                if let Some(token) = signed.x_security_token {
                    headers.insert("x-security-token", token);
                }
            }
        }
        record.propagate(headers);
        request
    }
}
