//! What an error answer of the vendor means: first the row of its error code in [`super::overrides`], then its HTTP status.
//! Knows nothing of HTTP clients or of what a status to the caller looks like: facts in, [`Verdict`] out.

use std::time::Duration;

use tonic::Code;

use super::{envelope::BodyKind, known_codes, overrides};
use crate::reason::Reason;

/// RDS counts calls per minute and user, so a throttled call that is told nothing better waits one minute.
/// Source: RDS API reference, "API Calling Restrictions".
pub const THROTTLED_WAIT: Duration = Duration::from_secs(60);

/// A busy instance is looked at again after this time, as the vendor's own infrastructure provider does.
pub const BUSY_WAIT: Duration = Duration::from_secs(10);

/// What one error answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The gRPC code.
    pub code: Code,
    /// The reason.
    pub reason: Reason,
    /// Whether the facade itself repeats the call.
    pub repeat: Repeat,
    /// Whether the answer speaks against the credential that was used.
    pub credential: Credential,
    /// Whether `RetryInfo` goes with it, and the wait when the answer names none.
    pub retry_info: Option<Duration>,
    /// What is missing, where that is known: the type for `ResourceInfo`.
    pub resource: Option<Resource>,
    /// Whether the breaker counts it.
    pub trips_breaker: bool,
}

/// Whether the facade repeats a call after an answer, within deadline, attempts and budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Never.
    Never,
    /// At most one more attempt for this kind of answer.
    Once,
    /// As long as attempts are left, with backoff.
    Backoff,
}

/// What an answer says about the credential of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    Silent,
    /// It is refused, and a new one would not help.
    Rejected,
    /// It is refused; a renewed token may help, once. Never repeated with keys.
    Renewable,
}

/// The kind of thing that an answer calls missing.
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

/// What an error answer with this status, error code and kind of body means. Every status has a meaning.
///
/// A 200 is expected here only with an error object in it: it takes the row of its code, whatever status that row expects.
pub fn of_answer(http_status: u16, error_code: Option<&str>, body: BodyKind) -> Verdict {
    let row_status = match (http_status, error_code) {
        (200, Some(code)) => known_codes::documented_status(code).unwrap_or(http_status),
        _ => http_status,
    };
    let verdict = error_code
        .and_then(|code| overrides::find(code, row_status))
        .unwrap_or_else(|| by_status(row_status, body));
    Verdict {
        // Transport failures are counted where they are seen; any other answer proves that the service is there.
        trips_breaker: matches!(http_status, 502..=504),
        ..verdict
    }
}

fn by_status(http_status: u16, body: BodyKind) -> Verdict {
    let verdict = Verdict::new;
    match http_status {
        400 | 422 => verdict(Code::InvalidArgument, Reason::UpstreamInvalidArgument),
        401 => verdict(Code::Unauthenticated, Reason::CredentialRejected)
            .against(Credential::Renewable),
        402 | 412 | 423 | 428 => verdict(Code::FailedPrecondition, Reason::PreconditionFailed),
        403 | 451 => verdict(Code::PermissionDenied, Reason::PermissionDenied),
        // A page of something that is not the API says nothing about the task.
        404 if body == BodyKind::Other => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        404 | 410 => verdict(Code::NotFound, Reason::ResourceNotFound).missing(Resource::Other),
        405 | 501 => verdict(Code::Unimplemented, Reason::UpstreamApiNotFound),
        406 | 407 | 411 | 414 | 415 | 417 | 431 | 494 | 505 => {
            verdict(Code::Internal, Reason::UpstreamRejectedRequest)
        }
        408 | 425 | 502 | 503 => {
            verdict(Code::Unavailable, Reason::UpstreamUnavailable).repeated(Repeat::Backoff)
        }
        409 => verdict(Code::Aborted, Reason::InstanceBusy).after(BUSY_WAIT),
        413 => verdict(Code::ResourceExhausted, Reason::QuotaExhausted),
        429 => verdict(Code::ResourceExhausted, Reason::Throttled).after(THROTTLED_WAIT),
        500 => verdict(Code::Internal, Reason::UpstreamInternal).repeated(Repeat::Once),
        504 => verdict(Code::DeadlineExceeded, Reason::UpstreamTimeout).repeated(Repeat::Once),
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
            credential: Credential::Silent,
            retry_info: None,
            resource: None,
            trips_breaker: false,
        }
    }

    pub(super) const fn repeated(self, repeat: Repeat) -> Self {
        Self { repeat, ..self }
    }

    pub(super) const fn against(self, credential: Credential) -> Self {
        Self { credential, ..self }
    }

    pub(super) const fn after(self, wait: Duration) -> Self {
        Self {
            retry_info: Some(wait),
            ..self
        }
    }

    pub(super) const fn missing(self, resource: Resource) -> Self {
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
            Credential::Silent => "silent",
            Credential::Rejected => "refused",
            Credential::Renewable => "renewable",
        };
        let wait = verdict
            .retry_info
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

            let verdict = of_answer(http_status, Some(row[0]), BodyKind::JsonObject);

            assert_eq!(columns(&verdict), row[2..], "{} with {}", row[0], row[1]);
        }
    }

    #[test]
    fn a_code_in_a_200_takes_the_row_of_its_documented_status() {
        for row in rows(EXPECTED) {
            let verdict = of_answer(200, Some(row[0]), BodyKind::JsonObject);

            // This code has six meanings by status, and 200 tells none of them.
            if row[0] == "APIGW.0201" {
                assert_eq!(verdict.reason, Reason::UpstreamUnknown);
            } else {
                assert_eq!(columns(&verdict), row[2..], "{}", row[0]);
            }
            assert!(!verdict.trips_breaker, "{}", row[0]);
        }
        let unknown = of_answer(200, Some("DBS.999999"), BodyKind::JsonObject);
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
                    of_answer(http_status, Some(code), BodyKind::JsonObject),
                    of_answer(http_status, None, BodyKind::JsonObject),
                    "{code} with {http_status}"
                );
            }
        }
        assert_eq!(
            of_answer(404, Some("DBS.200543"), BodyKind::JsonObject).reason,
            Reason::TaskNotFound
        );
    }

    #[test]
    fn every_status_has_the_meaning_of_the_contract() {
        for http_status in 0..=u16::MAX {
            let expected = match http_status {
                400 | 422 => "INVALID_ARGUMENT UPSTREAM_INVALID_ARGUMENT never silent - -",
                401 => "UNAUTHENTICATED CREDENTIAL_REJECTED never renewable - -",
                402 | 412 | 423 | 428 => "FAILED_PRECONDITION PRECONDITION_FAILED never silent - -",
                403 | 451 => "PERMISSION_DENIED PERMISSION_DENIED never silent - -",
                404 | 410 => "NOT_FOUND RESOURCE_NOT_FOUND never silent - other",
                405 | 501 => "UNIMPLEMENTED UPSTREAM_API_NOT_FOUND never silent - -",
                406 | 407 | 411 | 414 | 415 | 417 | 431 | 494 | 505 => {
                    "INTERNAL UPSTREAM_REJECTED_REQUEST never silent - -"
                }
                408 | 425 | 502 | 503 => "UNAVAILABLE UPSTREAM_UNAVAILABLE backoff silent - -",
                409 => "ABORTED INSTANCE_BUSY never silent 10 -",
                413 => "RESOURCE_EXHAUSTED QUOTA_EXHAUSTED never silent - -",
                429 => "RESOURCE_EXHAUSTED THROTTLED never silent 60 -",
                500 => "INTERNAL UPSTREAM_INTERNAL once silent - -",
                504 => "DEADLINE_EXCEEDED UPSTREAM_TIMEOUT once silent - -",
                200 => "UNKNOWN UPSTREAM_UNKNOWN never silent - -",
                100..=299 => "INTERNAL UPSTREAM_UNEXPECTED_STATUS never silent - -",
                300..=399 => "INTERNAL UPSTREAM_REDIRECT never silent - -",
                _ => "UNKNOWN UPSTREAM_UNKNOWN never silent - -",
            };
            for body in [BodyKind::JsonObject, BodyKind::Empty, BodyKind::Other] {
                let verdict = of_answer(http_status, None, body);

                let page = http_status == 404 && body == BodyKind::Other;
                let expected = if page {
                    "UNIMPLEMENTED UPSTREAM_API_NOT_FOUND never silent - -"
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
    fn the_breaker_counts_by_status_whatever_the_code_says() {
        assert!(of_answer(503, Some("APIGW.0613"), BodyKind::JsonObject).trips_breaker);
        assert!(!of_answer(500, Some("DBS.111205"), BodyKind::JsonObject).trips_breaker);
        assert!(!of_answer(410, Some("IAM.0020"), BodyKind::JsonObject).trips_breaker);
    }
}
