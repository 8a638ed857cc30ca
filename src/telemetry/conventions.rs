//! Names of span attributes, from the OpenTelemetry semantic conventions 1.44. The RPC names are a release candidate and may change;
//! the names for HTTP, network and service are stable.

/// Identifies the version of these names, so that backends can translate them.
pub(super) const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

pub(super) const SERVICE_NAME: &str = "service.name";
pub(super) const SERVICE_VERSION: &str = "service.version";

/// Always `grpc`.
pub(super) const RPC_SYSTEM_NAME: &str = "rpc.system.name";
/// Service and method; [`OTHER`] for an unknown method.
pub(super) const RPC_METHOD: &str = "rpc.method";
/// The code's name in gRPC, such as `NOT_FOUND`.
pub(super) const RPC_RESPONSE_STATUS_CODE: &str = "rpc.response.status_code";
/// Replaces unknown method names, so that callers cannot add values.
pub(super) const OTHER: &str = "_OTHER";

pub(super) const ERROR_TYPE: &str = "error.type";
pub(super) const NETWORK_PEER_ADDRESS: &str = "network.peer.address";
pub(super) const NETWORK_PEER_PORT: &str = "network.peer.port";
pub(super) const USER_AGENT_ORIGINAL: &str = "user_agent.original";

pub(super) const HTTP_REQUEST_METHOD: &str = "http.request.method";
/// Earlier attempts of the same call; absent from the first attempt.
pub(super) const HTTP_REQUEST_RESEND_COUNT: &str = "http.request.resend_count";
pub(super) const HTTP_RESPONSE_STATUS_CODE: &str = "http.response.status_code";
pub(super) const SERVER_ADDRESS: &str = "server.address";
pub(super) const SERVER_PORT: &str = "server.port";
pub(super) const URL_FULL: &str = "url.full";
/// The path with placeholders for ids.
pub(super) const URL_TEMPLATE: &str = "url.template";

/// The request id of the call, `x-request-id`.
pub(super) const REQUEST_ID: &str = "rds_task_facade.request_id";
/// `ErrorInfo.reason` of a failed call.
pub(super) const REASON: &str = "rds_task_facade.reason";
/// Upstream attempts of the call.
pub(super) const ATTEMPTS: &str = "rds_task_facade.attempts";
/// The vendor's error code.
pub(super) const UPSTREAM_CODE: &str = "rds_task_facade.upstream_code";
/// The vendor's request id.
pub(super) const UPSTREAM_REQUEST_ID: &str = "rds_task_facade.upstream_request_id";
