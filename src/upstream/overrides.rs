//! Error codes that are more specific than their HTTP status. The key is (HTTP status, error code), because the gateway uses one code with
//! several statuses and meanings; with any other status a code counts as unknown.
//! Meanings: RDS API reference, "Error Codes"; API request signing guide, "Error Codes"; IAM API reference, "Error Codes".

use tonic::Code;

use super::verdict::{BUSY_WAIT, Credential, Repeat, Resource, Verdict};
use crate::reason::Reason;

/// The meaning of an error code that came with this status; `None` where the status alone decides.
pub(super) fn find(error_code: &str, http_status: u16) -> Option<Verdict> {
    Some(match (http_status, error_code) {
        // One code for three cases: the task never existed, ended more than a month ago, or started seconds ago and is not registered
        // yet. 400 is the documented status, 404 that of the older interface.
        (400 | 404, "DBS.200543") => TASK_MISSING,
        (
            404,
            "DBS.200002" | "DBS.200045" | "DBS.200408" | "DBS.200602" | "DBS.201028" | "DBS.290005"
            | "DBS.290011",
        ) => INSTANCE_MISSING,
        (400, "IAM.1109") => NOT_FOUND.with_missing(Resource::Project),
        (
            400,
            "DBS.200042" | "DBS.200053" | "DBS.200823" | "DBS.200824" | "DBS.201203" | "DBS.212007"
            | "DBS.212012" | "DBS.280128" | "DBS.280214" | "DBS.280270",
        ) => NOT_FOUND.with_missing(Resource::Other),

        // The credential. `APIGW.0301` is also the code of a locked key, see `key_evidence`.
        (401, "APIGW.0301" | "APIGW.0307") => CREDENTIAL_RENEWABLE,
        (401, "IAM.0001" | "IAM.0063" | "IAM.0066" | "IAM.0067") => CREDENTIAL_RENEWABLE,
        (403, "DBS.280056") => CREDENTIAL_RENEWABLE,
        (400, "IAM.1108") => CREDENTIAL_RENEWABLE,
        (401, "APIGW.0303" | "APIGW.0305" | "APIGW.0311") => CREDENTIAL_REJECTED,
        // Further attempts keep the account locked.
        (401, "IAM.0061" | "IAM.0062") => CREDENTIAL_REJECTED,
        (400, "IAM.0009" | "IAM.1104" | "IAM.1105" | "IAM.1106" | "IAM.1107") => {
            CREDENTIAL_REJECTED
        }
        // The identity is valid, but lacks the permission.
        (401, "IAM.0064" | "IAM.0065") => PERMISSION_DENIED,

        // A state that lasts until somebody changes it.
        (409, "DBS.200316" | "DBS.200402" | "DBS.280406") => PRECONDITION_FAILED,
        (
            400,
            "DBS.01010220" | "DBS.200037" | "DBS.200038" | "DBS.200039" | "DBS.200076"
            | "DBS.200086" | "DBS.200825" | "DBS.201014" | "DBS.201208" | "DBS.212003"
            | "DBS.212032" | "DBS.280449",
        ) => PRECONDITION_FAILED,
        (403, "DBS.200810" | "DBS.200819" | "APIGW.0310") => PRECONDITION_FAILED,
        (405, "APIGW.0502") => PRECONDITION_FAILED,

        // Quotas of the account and the app, stock of the region.
        (405, "APIGW.0501") => QUOTA_EXHAUSTED,
        (
            400,
            "DBS.200056" | "DBS.200087" | "DBS.200303" | "DBS.212002" | "DBS.216028" | "DBS.280448"
            | "DBS.280450",
        ) => QUOTA_EXHAUSTED,

        // A state that ends without intervention.
        (
            409,
            "DBS.200011" | "DBS.200019" | "DBS.200047" | "DBS.201202" | "DBS.201205" | "DBS.212006",
        ) => INSTANCE_BUSY,
        (400, "DBS.212010") => INSTANCE_BUSY,
        (500, "DBS.280228") => INSTANCE_BUSY,
        // A conflict in the identity service, without a documented wait.
        (409, "IAM.0005") => Verdict::new(Code::Aborted, Reason::InstanceBusy),
        (409, "DBS.200022" | "DBS.200826" | "DBS.200827" | "DBS.200828" | "DBS.201201") => {
            Verdict::new(Code::AlreadyExists, Reason::AlreadyExists)
        }

        // Transient errors.
        (500, "DBS.280036") => UNAVAILABLE.with_wait(BUSY_WAIT),
        (500, "DBS.111205" | "APIGW.0605" | "APIGW.0606" | "APIGW.0608") => UNAVAILABLE_RETRIED,
        (502, "APIGW.0201" | "APIGW.0610") => UNAVAILABLE_RETRIED,
        // The gateway cannot reach IAM: the credential may be valid.
        (503, "APIGW.0613") => UNAVAILABLE_RETRIED,
        // IAM is failing over to another region, although 410 means "gone".
        (410, "IAM.0020") => UNAVAILABLE_RETRIED,

        // Errors that neither a retry nor the caller can fix.
        (404, "APIGW.0103") => INTERNAL,
        (400, "APIGW.0104" | "APIGW.0105" | "APIGW.0106" | "APIGW.0602" | "APIGW.0607") => INTERNAL,
        (403, "APIGW.0404") => INTERNAL,
        (500, "APIGW.0609" | "APIGW.0611" | "APIGW.0612" | "APIGW.0705") => INTERNAL,
        (494, "APIGW.0201") => INTERNAL,
        (
            400,
            "DBS.212004" | "DBS.212009" | "DBS.212011" | "DBS.212015" | "DBS.212016" | "DBS.212025",
        ) => INTERNAL,
        (500, "APIGW.0601") => INTERNAL.with_repeat(Repeat::Once),
        // "The instance could not be queried": a failure, not an argument.
        (400, "DBS.200203") => INTERNAL.with_repeat(Repeat::Once),

        // The API is not published here or not with this method; NOT_FOUND would mean the task.
        (404, "APIGW.0101") => Verdict::new(Code::Unimplemented, Reason::UpstreamApiNotFound),
        // The body or URI of this very request is too large, and stays so.
        (413 | 414, "APIGW.0201") => {
            Verdict::new(Code::InvalidArgument, Reason::UpstreamInvalidArgument)
        }

        _ => return None,
    })
}

const NOT_FOUND: Verdict = Verdict::new(Code::NotFound, Reason::ResourceNotFound);
const TASK_MISSING: Verdict =
    Verdict::new(Code::NotFound, Reason::TaskNotFound).with_missing(Resource::Task);
const INSTANCE_MISSING: Verdict =
    Verdict::new(Code::NotFound, Reason::InstanceNotFound).with_missing(Resource::Instance);
const CREDENTIAL_RENEWABLE: Verdict =
    Verdict::new(Code::Unauthenticated, Reason::CredentialRejected)
        .with_credential(Credential::Renewable);
const CREDENTIAL_REJECTED: Verdict =
    Verdict::new(Code::Unauthenticated, Reason::CredentialRejected)
        .with_credential(Credential::Rejected);
const PERMISSION_DENIED: Verdict = Verdict::new(Code::PermissionDenied, Reason::PermissionDenied);
const PRECONDITION_FAILED: Verdict =
    Verdict::new(Code::FailedPrecondition, Reason::PreconditionFailed);
const QUOTA_EXHAUSTED: Verdict = Verdict::new(Code::ResourceExhausted, Reason::QuotaExhausted);
const INSTANCE_BUSY: Verdict =
    Verdict::new(Code::Aborted, Reason::InstanceBusy).with_wait(BUSY_WAIT);
const UNAVAILABLE: Verdict = Verdict::new(Code::Unavailable, Reason::UpstreamUnavailable);
const UNAVAILABLE_RETRIED: Verdict = UNAVAILABLE.with_repeat(Repeat::Backoff);
const INTERNAL: Verdict = Verdict::new(Code::Internal, Reason::UpstreamInternal);
