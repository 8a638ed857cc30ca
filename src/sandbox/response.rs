//! Responses in the formats of the vendor's services.

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

/// A response, to which [`super`] adds `X-Request-Id` and `Date`.
pub(super) type Response = http::Response<Bytes>;

/// An error reply of the gateway or of RDS.
pub(super) struct ErrorReply {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
}

/// A response with a body of the given type.
pub(super) fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A response with a JSON body.
pub(super) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response {
    response(status, "application/json", body)
}

/// An error in the format of RDS v3, with the request id in the header only.
pub(super) fn rds_error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({"error_code": code, "error_msg": message});
    json(status, body.to_string())
}

/// An error in the format of the API gateway.
pub(super) fn gateway_error(
    status: StatusCode,
    code: &str,
    message: &str,
    request_id: &str,
) -> Response {
    let body = json!({"error_msg": message, "error_code": code, "request_id": request_id});
    json(status, body.to_string())
}

/// An error in the format of IAM's token service (Keystone): `code` is the status as a number.
pub(super) fn keystone_error(status: StatusCode, message: &str) -> Response {
    let title = status.canonical_reason().unwrap_or("Error");
    let error = json!({"code": status.as_u16(), "message": message, "title": title});
    json(status, json!({"error": error}).to_string())
}

/// The gateway's response to an unknown path or method.
pub(super) fn no_such_api(request_id: &str) -> Response {
    gateway_error(
        StatusCode::NOT_FOUND,
        "APIGW.0101",
        "The API does not exist or has not been published in the environment.",
        request_id,
    )
}
