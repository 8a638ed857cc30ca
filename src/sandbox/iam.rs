//! Issues IAM tokens: IAM API reference, "Obtaining a User Token Through Password Authentication".

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    DOMAIN, EXAMPLE_PROJECT_ID, PASSWORD, USER, control,
    response::{self, Response, keystone_error},
    state::{IssuedToken, State, remember},
};

/// Real tokens are several KB of base64.
const TOKEN_LENGTH: usize = 4096;

/// Responds to `POST /v3/auth/tokens`.
pub(super) fn issue_token(request: &Request<Bytes>, state: &mut State) -> Response {
    state.counts.token_requests += 1;
    if let Some(status) = state.iam_error.take() {
        return injected_error(status);
    }
    let Some(token_request) = TokenRequest::parse(request.body()) else {
        return keystone_error(
            StatusCode::BAD_REQUEST,
            "The request body is invalid: password authentication of user, password and domain is expected.",
        );
    };
    let known = token_request.user == USER
        && token_request.password == PASSWORD
        && token_request.domain == DOMAIN;
    if !known {
        return keystone_error(
            StatusCode::UNAUTHORIZED,
            "The username or password is wrong.",
        );
    }

    let issued_at = state.now();
    let expires_at = issued_at + state.token_life;
    let token = format!("MII{}", random_text(TOKEN_LENGTH - 3));
    let with_catalog = control::parameter(request.uri(), "nocatalog").is_none_or(str::is_empty);
    let body = response_body(&token_request, issued_at, expires_at, with_catalog);
    let mut response = response::json(StatusCode::CREATED, body.to_string());
    response.headers_mut().insert(
        "x-subject-token",
        HeaderValue::from_str(&token).expect("letters and digits are a valid header value"),
    );
    remember(
        &mut state.tokens,
        0,
        IssuedToken {
            value: token,
            expires_at,
            has_project: token_request.project.is_some(),
            revoked: false,
        },
    );
    response
}

/// A request for a token.
struct TokenRequest {
    user: String,
    password: String,
    domain: String,
    project: Option<Project>,
}

struct Project {
    id: String,
    name: String,
}

impl TokenRequest {
    /// `None` if the body does not have the documented format.
    fn parse(body: &[u8]) -> Option<Self> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let identity = body.pointer("/auth/identity")?;
        if identity.pointer("/methods")?.as_array()?.as_slice() != [Value::from("password")] {
            return None;
        }
        let user = identity.pointer("/password/user")?;
        let project = match body.pointer("/auth/scope/project") {
            Some(project) => Some(Project::parse(project)?),
            None => None,
        };
        Some(Self {
            user: text(user, "/name")?,
            password: text(user, "/password")?,
            domain: text(user, "/domain/name")?,
            project,
        })
    }
}

impl Project {
    fn parse(project: &Value) -> Option<Self> {
        let (id, name) = (text(project, "/id"), text(project, "/name"));
        if id.is_none() && name.is_none() {
            return None;
        }
        Some(Self {
            id: id.unwrap_or_else(|| EXAMPLE_PROJECT_ID.to_owned()),
            name: name.unwrap_or_else(|| "cn-north-4".to_owned()),
        })
    }
}

fn text(value: &Value, pointer: &str) -> Option<String> {
    let text = value.pointer(pointer)?.as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// The body of a successful response.
fn response_body(
    request: &TokenRequest,
    issued_at: Timestamp,
    expires_at: Timestamp,
    with_catalog: bool,
) -> Value {
    let domain = json!({"id": "d78cbac186b744899480f25bd022f468", "name": request.domain});
    let catalog = match with_catalog {
        true => {
            json!([{"id": "f3db3c3ee2c14d1a9e1b2a1e1f0a7d11", "name": "rds", "type": "rds", "endpoints": []}])
        }
        false => json!([]),
    };
    let mut token = json!({
        "expires_at": time(expires_at),
        "issued_at": time(issued_at),
        "methods": ["password"],
        "roles": [{"id": "0", "name": "rds_adm"}],
        "user": {
            "id": "7116d09f88fa41908676fdd4b039e95b",
            "name": request.user,
            "domain": domain,
            "password_expires_at": "",
        },
        "catalog": catalog,
    });
    match &request.project {
        Some(Project { id, name }) => {
            token["project"] = json!({"id": id, "name": name, "domain": domain});
        }
        None => token["domain"] = domain,
    }
    json!({"token": token})
}

/// The error injected with `fail-iam` of [`control`].
fn injected_error(status: StatusCode) -> Response {
    if status == StatusCode::TOO_MANY_REQUESTS {
        return response::json(
            status,
            r#"{"error_msg":"The throttling threshold has been reached. Threshold: 10 times per 60 seconds","error_code":"IAM.0012"}"#,
        );
    }
    keystone_error(status, "This error was injected.")
}

/// A point in time as IAM writes it: UTC with six decimals.
pub(super) fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// Random letters and digits.
pub(super) fn random_text(length: usize) -> String {
    std::iter::repeat_with(fastrand::alphanumeric)
        .take(length)
        .collect()
}
