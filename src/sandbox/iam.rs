//! IAM's token issue: IAM API reference, "Obtaining a User Token Through Password Authentication".

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode};
use jiff::Timestamp;
use serde_json::Value;

use super::{
    DOMAIN, EXAMPLE_PROJECT_ID, PASSWORD, USER,
    answer::{Answer, json, keystone_error, quoted},
    control,
    state::{State, Token},
};

/// Real tokens are several KB of base64 text.
const TOKEN_LENGTH: usize = 4096;

/// Answers `POST /v3/auth/tokens`.
pub(super) fn issue_token(request: &Request<Bytes>, state: &mut State) -> Answer {
    state.counts.token_requests += 1;
    if let Some(status) = state.iam_failure.take() {
        return failure(status);
    }
    let Some(asked) = Asked::read(request.body()) else {
        return keystone_error(
            StatusCode::BAD_REQUEST,
            "The request body is invalid: password authentication of user, password and domain is expected.",
        );
    };
    if (
        asked.user.as_str(),
        asked.password.as_str(),
        asked.domain.as_str(),
    ) != (USER, PASSWORD, DOMAIN)
    {
        return keystone_error(
            StatusCode::UNAUTHORIZED,
            "The username or password is wrong.",
        );
    }

    let issued_at = state.now();
    let expires_at = issued_at + state.token_life;
    let token = format!("MII{}", random_text(TOKEN_LENGTH - 3));
    let mut answer = json(
        StatusCode::CREATED,
        description(
            &asked,
            issued_at,
            expires_at,
            control::parameter(request.uri(), "nocatalog").is_none_or(str::is_empty),
        ),
    );
    answer.headers_mut().insert(
        "x-subject-token",
        HeaderValue::from_str(&token).expect("letters and digits make a header value"),
    );
    state.remember_token(Token {
        value: token,
        expires_at,
        has_project: asked.project.is_some(),
        revoked: false,
    });
    answer
}

/// What a request for a token says.
struct Asked {
    user: String,
    password: String,
    domain: String,
    project: Option<Project>,
}

struct Project {
    id: String,
    name: String,
}

impl Asked {
    /// `None` when it is not a request of the documented form.
    fn read(body: &[u8]) -> Option<Self> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let identity = body.pointer("/auth/identity")?;
        if identity.pointer("/methods")?.as_array()?.as_slice() != [Value::from("password")] {
            return None;
        }
        let user = identity.pointer("/password/user")?;
        let project = match body.pointer("/auth/scope/project") {
            Some(project) => Some(Project::read(project)?),
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
    fn read(project: &Value) -> Option<Self> {
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

/// The body that goes with a new token.
fn description(
    asked: &Asked,
    issued_at: Timestamp,
    expires_at: Timestamp,
    with_catalog: bool,
) -> String {
    let domain = format!(
        r#"{{"id":"d78cbac186b744899480f25bd022f468","name":{}}}"#,
        quoted(&asked.domain)
    );
    let scope = match &asked.project {
        Some(project) => format!(
            r#""project":{{"id":{},"name":{},"domain":{domain}}}"#,
            quoted(&project.id),
            quoted(&project.name)
        ),
        None => format!(r#""domain":{domain}"#),
    };
    let catalog = if with_catalog {
        r#"[{"id":"f3db3c3ee2c14d1a9e1b2a1e1f0a7d11","name":"rds","type":"rds","endpoints":[]}]"#
    } else {
        "[]"
    };
    format!(
        r#"{{"token":{{"expires_at":"{}","issued_at":"{}","methods":["password"],{scope},"roles":[{{"id":"0","name":"rds_adm"}}],"user":{{"id":"7116d09f88fa41908676fdd4b039e95b","name":{},"domain":{domain},"password_expires_at":""}},"catalog":{catalog}}}}}"#,
        time(expires_at),
        time(issued_at),
        quoted(&asked.user),
    )
}

/// A failure that the control surface asked for, in the shape that fits its status.
fn failure(status: StatusCode) -> Answer {
    if status == StatusCode::TOO_MANY_REQUESTS {
        return json(
            status,
            r#"{"error_msg":"The throttling threshold has been reached. Threshold: 10 times per 60 seconds","error_code":"IAM.0012"}"#,
        );
    }
    keystone_error(status, "The sandbox was told to fail.")
}

/// A point in time as IAM writes it: UTC with six decimals.
pub(super) fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// Letters and digits that nobody guesses by accident.
pub(super) fn random_text(length: usize) -> String {
    std::iter::repeat_with(fastrand::alphanumeric)
        .take(length)
        .collect()
}
