//! The messages of statuses: a sentence of this module, or the text of RDS where it is safe and helps.

use crate::{
    credentials::Owner, error::Violation, http_client::Obstacle, reason::Reason, telemetry::Facts,
    upstream::Rejection,
};
use tonic::Code;

const MAX_CHARS: usize = 256;
/// The size limit of the message in bytes, percent-encoded as in `grpc-message`. With 5.5 KiB of encoded details, all trailers stay
/// below 8 KiB, from which on gRPC's C core drops them.
const MAX_ENCODED_BYTES: usize = 1536;

pub(super) const MALFORMED_TOKEN: &str =
    "x-auth-token is repeated or malformed: send one token, exactly as IAM issued it";
pub(super) const MESSAGE_TOO_LONG: &str =
    "the request message is too long: send only the fields of the proto";
pub(crate) const UNKNOWN_ENCODING: &str = "the message encoding is not supported: send the message uncompressed or in an encoding of grpc-accept-encoding";
pub(crate) const UNKNOWN_METHOD: &str =
    "unknown method: check service and method name against the server's reflection or proto";
pub(super) const UNKNOWN_SERVICE: &str =
    "unknown service: check the health of \"\" or huaweicloud.rds.task.v1.TaskService";
pub(crate) const UNREADABLE_REQUEST: &str =
    "the request cannot be decoded: send one protobuf message as the proto defines it";

/// The message for a reason; it names the next step.
pub(super) fn for_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::TaskNotFound => {
            "RDS does not find the task: check workflow_id; a task started seconds ago may not be registered yet"
        }
        Reason::InstanceNotFound => {
            "RDS does not find the instance: check instance_id and project_id"
        }
        Reason::ResourceNotFound => {
            "RDS does not find a resource that the request names: check project_id, instance_id and workflow_id"
        }
        Reason::AlreadyExists => "the resource already exists in RDS: choose another name",
        Reason::InstanceBusy => "another operation is running on the instance: try again later",
        Reason::PreconditionFailed => {
            "the state of the instance, project or account forbids the call: change that state first"
        }
        Reason::PermissionDenied => {
            "RDS denies the call: ask an administrator for the permission rds:task:listAll on the project"
        }
        Reason::QuotaExhausted => {
            "a quota or limit of the account is used up: raise it or release resources"
        }
        Reason::Throttled => "too many calls for this identity: wait for the delay in RetryInfo",
        Reason::UpstreamInvalidArgument => {
            "RDS rejected an argument: check project_id, instance_id, workflow_id and workflow_name"
        }
        Reason::UpstreamUnavailable => "RDS is temporarily unavailable: try again",
        Reason::UpstreamTimeout => "RDS did not reply in time: try again",
        Reason::UpstreamInternal => {
            "RDS had an internal error: try again later, and report upstreamRequestId to RDS support if it persists"
        }
        Reason::UpstreamApiNotFound => {
            "the endpoint does not offer this call: the operator has to check region and endpoint"
        }
        Reason::UpstreamRejectedRequest => {
            "RDS rejected the form of the request: the operator has to check endpoint, proxy and credential"
        }
        Reason::UpstreamUnexpectedStatus => {
            "the endpoint replied with an HTTP status that RDS never returns: the operator has to check the endpoint"
        }
        Reason::UpstreamRedirect => {
            "the endpoint replied with a redirect, which is never followed: the operator has to check the endpoint"
        }
        Reason::UpstreamUnknown => {
            "RDS replied with an unknown error: look up upstreamCode and httpStatus in the RDS documentation"
        }
        Reason::UpstreamDns => {
            "the name of the RDS endpoint does not resolve: try again; the operator has to check it if the error persists"
        }
        Reason::UpstreamConnect => {
            "no connection to the RDS endpoint: try again; the operator has to check the network if the error persists"
        }
        Reason::UpstreamTls => {
            "the TLS handshake with the RDS endpoint failed: the operator has to look up the cause in the server's log"
        }
        Reason::UpstreamReset => "the connection to RDS closed before a reply arrived: try again",
        Reason::UpstreamTruncated => "the reply of RDS is incomplete: try again",
        Reason::UpstreamProtocol => {
            "the endpoint violates HTTP: try again; the operator has to check the endpoint if the error persists"
        }
        Reason::UpstreamMalformedResponse => {
            "the reply of RDS cannot be decoded as a task: report upstreamRequestId to RDS support"
        }
        Reason::UpstreamResponseTooLarge => {
            "the reply of RDS is too large (over 1 MiB or 10 000 parts; for a watch, over 64 KiB): report upstreamRequestId to RDS support"
        }
        Reason::DeadlineExceeded => {
            "the deadline passed: the caller's, or the server's limit if that is shorter"
        }
        Reason::InvalidRequest => "the request breaks the rules of the proto: correct it",
        Reason::ProjectNotAllowed => {
            "this server does not allow the project: use another project_id or ask the operator"
        }
        Reason::CredentialMissing => {
            "no credential: send your RDS token in the metadata x-auth-token"
        }
        Reason::CredentialRejected => "the credential was rejected: get a new one",
        Reason::CredentialLocked => {
            "the access key is locked after failed signatures: wait for the delay in RetryInfo"
        }
        Reason::CredentialUnavailable => {
            "the server cannot get its credential at the moment: wait for the delay in RetryInfo"
        }
        Reason::ClockSkew => {
            "the clocks of the server and RDS differ too much: the operator has to set the server's clock"
        }
        Reason::Overloaded => {
            "the server has too many calls or connections: wait for the delay in RetryInfo"
        }
        Reason::WatchExpired => {
            "the watch has reached its longest duration: continue it with the etag of the last message"
        }
        Reason::ShuttingDown => {
            "the server is shutting down: try again; another replica will serve the call"
        }
        Reason::CircuitOpen => {
            "RDS failed too often, so calls are paused: wait for the delay in RetryInfo"
        }
        Reason::Internal => "internal error of the server: report x-request-id to its operator",
    }
}

/// As [`for_reason`], for an attempt without a reply: names the obstacle to the connection, if it is known.
pub(super) fn for_transport(reason: Reason, obstacle: Option<Obstacle>) -> &'static str {
    match obstacle {
        None => for_reason(reason),
        Some(Obstacle::ProxyUnreachable) => {
            "no connection to the server's proxy: try again; the operator has to check --upstream-proxy if the error persists"
        }
        Some(Obstacle::ProxyLogin) => {
            "the server's proxy requires another login (HTTP 407): the operator has to check user and password of the proxy"
        }
        Some(Obstacle::ProxyRejection) => {
            "the server's proxy rejected the connection to the RDS endpoint: the operator has to check the proxy's rules and log"
        }
        Some(Obstacle::CertificateDates) => {
            "the certificate of the RDS endpoint has expired or is not yet valid: the operator has to check certificate and clock"
        }
        Some(Obstacle::CertificateIssuer) => {
            "no trusted authority issued the certificate of the RDS endpoint: the operator has to check --upstream-ca and the endpoint"
        }
        Some(Obstacle::CertificateName) => {
            "the certificate is for another name than that of the RDS endpoint: the operator has to check the endpoint"
        }
        Some(Obstacle::Certificate) => {
            "the certificate of the RDS endpoint is invalid: the operator has to look up the cause in the server's log"
        }
        Some(Obstacle::NoCommonTls) => {
            "the RDS endpoint accepts no TLS version and cipher of the server: the operator has to check the endpoint and what intercepts TLS"
        }
        Some(Obstacle::NotTls) => {
            "the RDS endpoint does not speak TLS: the operator has to check scheme and port of the endpoint"
        }
    }
}

/// As [`for_reason`], for reasons whose message depends on the owner of the credential.
pub(super) fn for_credential(reason: Reason, owner: Owner) -> &'static str {
    match (reason, owner) {
        (Reason::CredentialRejected, Owner::Caller) => {
            "the token in x-auth-token was rejected: get a new one for this project and region"
        }
        (Reason::CredentialRejected, Owner::Server) => {
            "the server's credential was rejected, not the caller's: the operator of the server has to check it"
        }
        (Reason::PermissionDenied, Owner::Server) => {
            "RDS denies the call to the server's identity: the operator has to grant rds:task:listAll"
        }
        _ => for_reason(reason),
    }
}

/// The violations in one line, cut to the size limit; `BadRequest` lists them all.
pub(super) fn for_violations(violations: &[Violation]) -> String {
    let parts: Vec<String> = violations
        .iter()
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect();
    clean(&parts.join("; "))
}

/// The cleaned message of RDS; `None` if it is missing, is markup, or may repeat a credential.
pub(super) fn for_rejection(rejection: &Rejection, facts: &Facts) -> Option<String> {
    let message = clean(&rejection.message);
    // Checks both: cutting can remove a header name, and removing control characters can join the parts of one.
    if is_about_credential(rejection, facts)
        || repeats_a_header(&rejection.message)
        || repeats_a_header(&message)
    {
        return None;
    }
    let markup = message.starts_with('<');
    (!message.is_empty() && !markup).then_some(message)
}

/// Whether the reply reports a failed authentication: the gateway's text can then repeat request headers and keys.
fn is_about_credential(rejection: &Rejection, facts: &Facts) -> bool {
    let gateway = facts
        .upstream_code
        .as_deref()
        .is_some_and(|code| code.starts_with("APIGW.03"));
    rejection.verdict.code == Code::Unauthenticated
        || facts.http_status == Some(401)
        || (gateway && rejection.verdict.reason != Reason::Throttled)
}

fn repeats_a_header(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    [
        "authorization:",
        "sdk-hmac",
        "x-auth-token",
        "x-security-token",
        "signature=",
    ]
    .iter()
    .any(|name| message.contains(name))
}

/// One line of at most 256 characters: line breaks become blanks, other control characters are removed.
pub(super) fn clean(text: &str) -> String {
    let mut encoded_bytes = 0;
    let line: String = text
        .trim()
        .chars()
        .filter_map(|c| match c {
            '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => Some(' '),
            // Marks that change the writing direction can make a text look like another one.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => None,
            c => (!c.is_control()).then_some(c),
        })
        .take(MAX_CHARS)
        .take_while(|c| {
            // Percent-encoding triples a byte; counting all punctuation as encoded is good enough for a bound.
            encoded_bytes += if c.is_ascii_alphanumeric() {
                1
            } else {
                3 * c.len_utf8()
            };
            encoded_bytes <= MAX_ENCODED_BYTES
        })
        .collect();
    line.trim().to_owned()
}
