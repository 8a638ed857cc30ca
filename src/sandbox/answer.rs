//! Answers in the shapes that the vendor's services use, each written out by hand.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

/// One answer, whole. [`super`] adds `X-Request-Id` and `Date` to it.
pub(super) type Answer = Response<Bytes>;

/// An answer with a body of the given type.
pub(super) fn answer(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Answer {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// An answer with a JSON body.
pub(super) fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "application/json", body)
}

/// The error shape of RDS v3: the request id is in the header only.
pub(super) fn rds_error(status: StatusCode, code: &str, message: &str) -> Answer {
    let (code, message) = (quoted(code), quoted(message));
    json(
        status,
        format!(r#"{{"error_code":{code},"error_msg":{message}}}"#),
    )
}

/// The error shape of the API gateway.
pub(super) fn gateway_error(
    status: StatusCode,
    code: &str,
    message: &str,
    request_id: &str,
) -> Answer {
    let (code, message, request_id) = (quoted(code), quoted(message), quoted(request_id));
    json(
        status,
        format!(r#"{{"error_msg":{message},"error_code":{code},"request_id":{request_id}}}"#),
    )
}

/// The error shape of token issue (IAM, Keystone style): `code` is a number and repeats the status.
pub(super) fn keystone_error(status: StatusCode, message: &str) -> Answer {
    let number = status.as_u16();
    let message = quoted(message);
    let title = quoted(status.canonical_reason().unwrap_or("Error"));
    json(
        status,
        format!(r#"{{"error":{{"code":{number},"message":{message},"title":{title}}}}}"#),
    )
}

/// The gateway's answer to a path or method that is no API of it.
pub(super) fn no_such_api(request_id: &str) -> Answer {
    gateway_error(
        StatusCode::NOT_FOUND,
        "APIGW.0101",
        "The API does not exist or has not been published in the environment.",
        request_id,
    )
}

/// The text as a JSON string, quotation marks included.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
