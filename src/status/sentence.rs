//! What a person is told: a sentence of ours, or upstream's own text where it is safe and helps.

use crate::{
    credentials::Owner, error::Violation, reason::Reason, telemetry::Facts, upstream::Rejection,
};
use tonic::Code;

const MAX_CHARS: usize = 256;
/// Bytes of the message as `grpc-message` carries it, percent-encoded. With 5.5 KiB of encoded details all trailers stay
/// below 8 KiB, from where gRPC's C core drops them.
const MAX_ENCODED_BYTES: usize = 1536;

pub(super) const MALFORMED_TOKEN: &str =
    "x-auth-token is repeated or malformed: send one token, exactly as IAM issued it";
pub(super) const MESSAGE_TOO_LONG: &str =
    "the request message is too long: send only the fields of the proto";
pub(super) const UNKNOWN_ENCODING: &str = "the message encoding is not supported: send the message uncompressed or as grpc-accept-encoding says";
pub(super) const UNKNOWN_METHOD: &str =
    "no such method: check service and method name against the server's reflection or proto";
pub(super) const UNKNOWN_SERVICE: &str =
    "no such service: health is known of \"\" and huaweicloud.rds.task.v1.TaskService";
pub(super) const UNREADABLE_REQUEST: &str =
    "the request cannot be decoded: send one protobuf message as the proto defines it";

/// Our sentence for a reason, with the next step in it.
pub(super) fn for_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::TaskNotFound => {
            "rds knows no such task: check workflow_id; a task started seconds ago may not be registered yet"
        }
        Reason::InstanceNotFound => "rds knows no such instance: check instance_id and project_id",
        Reason::ResourceNotFound => {
            "rds does not find what the request names: check project_id, instance_id and workflow_id"
        }
        Reason::AlreadyExists => "rds says that it is already there: choose another name",
        Reason::InstanceBusy => "another operation is running on the instance: try again later",
        Reason::PreconditionFailed => {
            "the state of the instance, project or account forbids the call: change that state first"
        }
        Reason::PermissionDenied => {
            "rds denies the call: ask an administrator for the permission rds:task:listAll on the project"
        }
        Reason::QuotaExhausted => {
            "a quota or limit of the account is used up: raise it or free some of it"
        }
        Reason::Throttled => "too many calls for this identity: wait as long as RetryInfo says",
        Reason::UpstreamInvalidArgument => {
            "rds refuses an argument: check project_id, instance_id, workflow_id and workflow_name"
        }
        Reason::UpstreamUnavailable => "rds cannot answer at the moment: try again",
        Reason::UpstreamTimeout => "rds did not answer in time: try again",
        Reason::UpstreamInternal => {
            "rds failed: try again later, and report upstreamRequestId to its support if it stays"
        }
        Reason::UpstreamApiNotFound => {
            "the endpoint does not offer this call: the operator has to check region and endpoint"
        }
        Reason::UpstreamRejectedRequest => {
            "rds refuses the form of the request: the operator has to check endpoint, proxy and credential"
        }
        Reason::UpstreamUnexpectedStatus => {
            "the endpoint answered with a status that this call never has: the operator has to check it"
        }
        Reason::UpstreamRedirect => {
            "the endpoint answered with a redirect, which is never followed: the operator has to check it"
        }
        Reason::UpstreamUnknown => {
            "rds answered with an unknown error: look up upstreamCode and httpStatus in its documentation"
        }
        Reason::UpstreamDns => {
            "the name of the rds endpoint does not resolve: try again; the operator has to check it if it stays"
        }
        Reason::UpstreamConnect => {
            "no connection to the rds endpoint: try again; the operator has to check the network if it stays"
        }
        Reason::UpstreamTls => {
            "the tls handshake with the rds endpoint failed: the operator has to check certificate and clock"
        }
        Reason::UpstreamReset => "the connection to rds broke before an answer came: try again",
        Reason::UpstreamTruncated => "the answer of rds broke off: try again",
        Reason::UpstreamProtocol => {
            "the endpoint does not speak http as expected: try again; the operator has to check it if it stays"
        }
        Reason::UpstreamMalformedResponse => {
            "the answer of rds cannot be read as a task: report upstreamRequestId to its support"
        }
        Reason::UpstreamResponseTooLarge => {
            "the answer of rds is over 1 MiB: report upstreamRequestId to its support"
        }
        Reason::DeadlineExceeded => {
            "the deadline passed: the caller's own, or this service's limit where that is shorter"
        }
        Reason::InvalidRequest => "the request breaks the rules of the proto: correct it",
        Reason::ProjectNotAllowed => {
            "this server does not serve that project: use another project_id or ask the operator"
        }
        Reason::CredentialMissing => {
            "no credential: send your rds token in the metadata x-auth-token"
        }
        Reason::CredentialRejected => "the credential was refused: get a new one",
        Reason::CredentialLocked => {
            "the access key is locked after failed signatures: wait as long as RetryInfo says"
        }
        Reason::CredentialUnavailable => {
            "the server cannot get its own credential at the moment: wait as long as RetryInfo says"
        }
        Reason::ClockSkew => {
            "the clock of the server differs too much from that of rds: the operator has to set it"
        }
        Reason::Overloaded => {
            "the server has too many calls at once: wait as long as RetryInfo says"
        }
        Reason::ShuttingDown => "the server is shutting down: call again, another instance answers",
        Reason::CircuitOpen => {
            "rds failed too often, calls are held back: wait as long as RetryInfo says"
        }
        Reason::Internal => "the server failed: report x-request-id to its operator",
    }
}

/// As [`for_reason`], where it matters whose credential it was.
pub(super) fn for_credential(reason: Reason, owner: Owner) -> &'static str {
    match (reason, owner) {
        (Reason::CredentialRejected, Owner::Caller) => {
            "the token in x-auth-token was refused: get a new one for this project and region"
        }
        (Reason::CredentialRejected, Owner::Server) => {
            "the server's own credential was refused: its operator has to check it; yours is not at fault"
        }
        (Reason::PermissionDenied, Owner::Server) => {
            "rds denies the call to the server's own identity: its operator has to grant rds:task:listAll"
        }
        _ => for_reason(reason),
    }
}

/// All violations in one line, as far as there is room; `BadRequest` has them all.
pub(super) fn for_violations(violations: &[Violation]) -> String {
    let parts: Vec<String> = violations
        .iter()
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect();
    clean(&parts.join("; "))
}

/// Upstream's own text, cleaned; `None` where it is missing, no text for people, or may repeat a credential.
pub(super) fn for_rejection(rejection: &Rejection, facts: &Facts) -> Option<String> {
    let message = clean(&rejection.message);
    // Asked of both: the cut may hide a name that makes the rest suspect, and what is taken out may have parted one.
    if about_a_credential(rejection, facts)
        || repeats_a_header(&rejection.message)
        || repeats_a_header(&message)
    {
        return None;
    }
    let markup = message.starts_with('<');
    (!message.is_empty() && !markup).then_some(message)
}

/// The gateway's text on a failed authentication can repeat request headers and keys.
fn about_a_credential(rejection: &Rejection, facts: &Facts) -> bool {
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

/// One line of at most 256 characters: line ends become blanks, other control characters are taken out.
pub(super) fn clean(text: &str) -> String {
    let mut encoded_bytes = 0;
    let line: String = text
        .trim()
        .chars()
        .filter_map(|c| match c {
            '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => Some(' '),
            // Marks that turn the direction of writing let a text look like another one.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => None,
            c => (!c.is_control()).then_some(c),
        })
        .take(MAX_CHARS)
        .take_while(|c| {
            // Percent-encoding makes three bytes of one; which ASCII it spares does not matter for a bound.
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
