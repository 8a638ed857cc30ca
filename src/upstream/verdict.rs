//! Maps an error reply of the vendor to a [`Verdict`]: by its error code where [`super::overrides`] has a row for it, else by its HTTP
//! status. A pure function, independent of the HTTP client and of gRPC.

use std::time::Duration;

use tonic::Code;

use super::{envelope::BodyKind, known_codes, overrides};
use crate::reason::Reason;

/// The wait after a throttled call if the reply names none: RDS counts calls per minute and user.
/// Source: RDS API reference, "API Calling Restrictions".
pub const THROTTLED_WAIT: Duration = Duration::from_secs(60);

/// The wait if an instance is busy. The vendor's Terraform provider polls with the same interval.
pub const BUSY_WAIT: Duration = Duration::from_secs(10);

/// The meaning of one error reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The gRPC code.
    pub code: Code,
    /// The reason.
    pub reason: Reason,
    /// Whether the send loop retries.
    pub repeat: Repeat,
    /// What the reply shows about the credential.
    pub credential: Credential,
    /// The wait that the caller's `RetryInfo` names unless the reply has its own; `None` if waiting does not help.
    pub wait: Option<Duration>,
    /// The kind of resource that is missing, if any: the type for `ResourceInfo`.
    pub resource: Option<Resource>,
    /// Whether the breaker counts the reply as a failure.
    pub trips_breaker: bool,
}

/// Whether the send loop retries after a reply, within deadline, attempts and budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Never.
    Never,
    /// At most one retry for replies of this kind.
    Once,
    /// As long as attempts are left, with backoff.
    Backoff,
}

/// The meaning of a reply for the credential of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// The reply is not about the credential.
    NotInvolved,
    /// It is rejected, and a new one would not help.
    Rejected,
    /// It is rejected; one retry with a refreshed token may help. Signed requests are never retried.
    Renewable,
}

/// The kind of resource that a reply calls missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// The task; its name is the workflow id.
    Task,
    /// The instance; its name is the instance id.
    Instance,
    /// The project; its name is the project id.
    Project,
    /// Something else (flavor, backup, parameter, ...); its name is the vendor's code.
    Other,
}

/// The meaning of an error reply with this status, error code and kind of body. Covers every status.
///
/// A 200 comes here only with an error object, and takes the row of its code with the status that is documented for that code.
pub fn from_reply(http_status: u16, error_code: Option<&str>, body: BodyKind) -> Verdict {
    let row_status = match (http_status, error_code) {
        (200, Some(code)) => known_codes::documented_status(code).unwrap_or(http_status),
        _ => http_status,
    };
    let verdict = error_code
        .and_then(|code| overrides::find(code, row_status))
        .unwrap_or_else(|| by_status(row_status, body));
    Verdict {
        // Any other reply proves that the service is up.
        trips_breaker: matches!(http_status, 502..=504),
        ..verdict
    }
}

fn by_status(http_status: u16, body: BodyKind) -> Verdict {
    let verdict = Verdict::new;
    match http_status {
        400 | 422 => verdict(Code::InvalidArgument, Reason::UpstreamInvalidArgument),
        401 => verdict(Code::Unauthenticated, Reason::CredentialRejected)
            .with_credential(Credential::Renewable),
        402 | 412 | 423 | 428 => verdict(Code::FailedPrecondition, Reason::PreconditionFailed),
        403 | 451 => verdict(Code::PermissionDenied, Reason::PermissionDenied),
        // A page that is not the API's: it does not mean that the task is missing.
        404 if body == BodyKind::Other => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        404 | 410 => {
            verdict(Code::NotFound, Reason::ResourceNotFound).with_missing(Resource::Other)
        }
        405 | 501 => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        406 | 407 | 411 | 414 | 415 | 417 | 431 | 494 | 505 => {
            verdict(Code::Internal, Reason::UpstreamRejectedRequest)
        }
        408 | 425 | 502 | 503 => {
            verdict(Code::Unavailable, Reason::UpstreamUnavailable).with_repeat(Repeat::Backoff)
        }
        409 => verdict(Code::Aborted, Reason::InstanceBusy).with_wait(BUSY_WAIT),
        413 => verdict(Code::ResourceExhausted, Reason::QuotaExhausted),
        429 => verdict(Code::ResourceExhausted, Reason::Throttled).with_wait(THROTTLED_WAIT),
        500 => verdict(Code::Internal, Reason::UpstreamInternal).with_repeat(Repeat::Once),
        504 => verdict(Code::DeadlineExceeded, Reason::UpstreamTimeout).with_repeat(Repeat::Once),
        100..=199 | 201..=299 => verdict(Code::Internal, Reason::UpstreamUnexpectedStatus),
        300..=399 => verdict(Code::Internal, Reason::UpstreamRedirect),
        _ => verdict(Code::Unknown, Reason::UpstreamUnknown),
    }
}

impl Verdict {
    /// Final, silent about the credential, without a wait and without a missing resource.
    pub(super) const fn new(code: Code, reason: Reason) -> Self {
        Self {
            code,
            reason,
            repeat: Repeat::Never,
            credential: Credential::NotInvolved,
            wait: None,
            resource: None,
            trips_breaker: false,
        }
    }

    pub(super) const fn with_repeat(self, repeat: Repeat) -> Self {
        Self { repeat, ..self }
    }

    pub(super) const fn with_credential(self, credential: Credential) -> Self {
        Self { credential, ..self }
    }

    pub(super) const fn with_wait(self, wait: Duration) -> Self {
        Self {
            wait: Some(wait),
            ..self
        }
    }

    pub(super) const fn with_missing(self, resource: Resource) -> Self {
        Self {
            resource: Some(resource),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const DOCUMENTED: &str = include_str!("../../tests/fixtures/errors/error-codes.tsv");
    const EXPECTED: &str = include_str!("../../tests/fixtures/errors/expected.tsv");

    fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
        table.lines().skip(1).map(|line| line.split('\t').collect())
    }

    /// A verdict in the columns of `expected.tsv`.
    fn columns(verdict: &Verdict) -> Vec<String> {
        let repeat = match verdict.repeat {
            Repeat::Never => "never",
            Repeat::Once => "once",
            Repeat::Backoff => "backoff",
        };
        let credential = match verdict.credential {
            Credential::NotInvolved => "none",
            Credential::Rejected => "rejected",
            Credential::Renewable => "renewable",
        };
        let wait = verdict
            .wait
            .map_or("-".to_owned(), |wait| wait.as_secs().to_string());
        let resource = match verdict.resource {
            Some(Resource::Task) => "task",
            Some(Resource::Instance) => "instance",
            Some(Resource::Project) => "project",
            Some(Resource::Other) => "other",
            None => "-",
        };
        let code = crate::code::name(verdict.code);
        [
            code,
            verdict.reason.as_str(),
            repeat,
            credential,
            &wait,
            resource,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    #[test]
    fn every_documented_code_has_exactly_the_expected_meaning() {
        let documented: Vec<_> = rows(DOCUMENTED).map(|row| (row[0], row[1])).collect();
        let expected: Vec<_> = rows(EXPECTED).map(|row| (row[0], row[1])).collect();
        assert_eq!(documented.len(), 311);
        assert_eq!(documented, expected);

        for row in rows(EXPECTED) {
            let http_status = row[1].parse().unwrap();

            let verdict = from_reply(http_status, Some(row[0]), BodyKind::JsonObject);

            assert_eq!(columns(&verdict), row[2..], "{} with {}", row[0], row[1]);
        }
    }

    #[test]
    fn a_code_in_a_200_takes_the_row_of_its_documented_status() {
        for row in rows(EXPECTED) {
            let verdict = from_reply(200, Some(row[0]), BodyKind::JsonObject);

            // This code has six meanings by status, and 200 selects none of them.
            if row[0] == "APIGW.0201" {
                assert_eq!(verdict.reason, Reason::UpstreamUnknown);
            } else {
                assert_eq!(columns(&verdict), row[2..], "{}", row[0]);
            }
            assert!(!verdict.trips_breaker, "{}", row[0]);
        }
        for busy in ["DBS.200080", "DBS.201206", "DBS.280011", "DBS.280816"] {
            let verdict = from_reply(200, Some(busy), BodyKind::JsonObject);
            assert_eq!(
                (verdict.reason, verdict.wait),
                (Reason::InstanceBusy, Some(BUSY_WAIT)),
                "{busy}"
            );
        }
        let unknown = from_reply(200, Some("DBS.999999"), BodyKind::JsonObject);
        assert_eq!(
            (unknown.code, unknown.reason),
            (Code::Unknown, Reason::UpstreamUnknown)
        );
    }

    #[test]
    fn a_code_with_a_status_that_its_row_does_not_expect_is_judged_by_status_alone() {
        let documented: HashSet<_> = rows(DOCUMENTED)
            .map(|row| (row[0].to_owned(), row[1].parse::<u16>().unwrap()))
            .collect();
        let codes: HashSet<_> = documented.iter().map(|(code, _)| code.as_str()).collect();

        for code in codes {
            for http_status in (100..600).filter(|status| *status != 200) {
                let older_interface = (code, http_status) == ("DBS.200543", 404);
                if older_interface || documented.contains(&(code.to_owned(), http_status)) {
                    continue;
                }
                assert_eq!(
                    from_reply(http_status, Some(code), BodyKind::JsonObject),
                    from_reply(http_status, None, BodyKind::JsonObject),
                    "{code} with {http_status}"
                );
            }
        }
        assert_eq!(
            from_reply(404, Some("DBS.200543"), BodyKind::JsonObject).reason,
            Reason::TaskNotFound
        );
    }

    #[test]
    fn every_status_has_the_meaning_of_the_contract() {
        for http_status in 0..=u16::MAX {
            let expected = match http_status {
                400 | 422 => "INVALID_ARGUMENT UPSTREAM_INVALID_ARGUMENT never none - -",
                401 => "UNAUTHENTICATED CREDENTIAL_REJECTED never renewable - -",
                402 | 412 | 423 | 428 => "FAILED_PRECONDITION PRECONDITION_FAILED never none - -",
                403 | 451 => "PERMISSION_DENIED PERMISSION_DENIED never none - -",
                404 | 410 => "NOT_FOUND RESOURCE_NOT_FOUND never none - other",
                405 | 501 => "UNIMPLEMENTED UPSTREAM_API_NOT_FOUND never none - -",
                406 | 407 | 411 | 414 | 415 | 417 | 431 | 494 | 505 => {
                    "INTERNAL UPSTREAM_REJECTED_REQUEST never none - -"
                }
                408 | 425 | 502 | 503 => "UNAVAILABLE UPSTREAM_UNAVAILABLE backoff none - -",
                409 => "ABORTED INSTANCE_BUSY never none 10 -",
                413 => "RESOURCE_EXHAUSTED QUOTA_EXHAUSTED never none - -",
                429 => "RESOURCE_EXHAUSTED THROTTLED never none 60 -",
                500 => "INTERNAL UPSTREAM_INTERNAL once none - -",
                504 => "DEADLINE_EXCEEDED UPSTREAM_TIMEOUT once none - -",
                200 => "UNKNOWN UPSTREAM_UNKNOWN never none - -",
                100..=299 => "INTERNAL UPSTREAM_UNEXPECTED_STATUS never none - -",
                300..=399 => "INTERNAL UPSTREAM_REDIRECT never none - -",
                _ => "UNKNOWN UPSTREAM_UNKNOWN never none - -",
            };
            for body in [BodyKind::JsonObject, BodyKind::Empty, BodyKind::Other] {
                let verdict = from_reply(http_status, None, body);

                let page = http_status == 404 && body == BodyKind::Other;
                let expected = if page {
                    "UNIMPLEMENTED UPSTREAM_API_NOT_FOUND never none - -"
                } else {
                    expected
                };
                assert_eq!(
                    columns(&verdict).join(" "),
                    expected,
                    "{http_status} {body:?}"
                );
                assert_eq!(
                    verdict.trips_breaker,
                    [502, 503, 504].contains(&http_status),
                    "{http_status}"
                );
            }
        }
    }

    #[test]
    fn the_breaker_counts_by_status_for_any_code() {
        assert!(from_reply(503, Some("APIGW.0613"), BodyKind::JsonObject).trips_breaker);
        assert!(!from_reply(500, Some("DBS.111205"), BodyKind::JsonObject).trips_breaker);
        assert!(!from_reply(410, Some("IAM.0020"), BodyKind::JsonObject).trips_breaker);
    }
}
