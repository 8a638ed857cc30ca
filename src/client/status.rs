//! Formats the status of a failed call: code, message and `google.rpc` details, one fact per line.

use std::fmt;

use tonic::Status;
use tonic_types::{ErrorDetail, StatusExt as _};

use crate::{code, telemetry::Escaped};

/// Writes code and message on the first line, then one indented line per detail.
pub(super) fn describe(status: &Status, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let code = code::name(status.code());
    write!(f, "{code}: {}", Escaped(status.message()))?;
    let Ok(details) = status.check_error_details_vec() else {
        return f.write_str("; the details of the status cannot be decoded");
    };
    for detail in &details {
        describe_detail(f, detail)?;
    }
    Ok(())
}

fn describe_detail(f: &mut fmt::Formatter<'_>, detail: &ErrorDetail) -> fmt::Result {
    let mut line = |name: &str, value: &str| write!(f, "\n  {name}: {}", Escaped(value));
    match detail {
        ErrorDetail::ErrorInfo(info) => {
            line("reason", &info.reason)?;
            line("domain", &info.domain)?;
            let mut metadata: Vec<_> = info.metadata.iter().collect();
            metadata.sort();
            metadata
                .into_iter()
                .try_for_each(|(key, value)| line(&Escaped(key).to_string(), value))
        }
        ErrorDetail::RequestInfo(info) => line("request id", &info.request_id),
        ErrorDetail::RetryInfo(info) => match info.retry_delay {
            Some(delay) => line("retry after", &format!("{delay:?}")),
            None => line("retry after", "any time"),
        },
        ErrorDetail::BadRequest(bad) => bad
            .field_violations
            .iter()
            .try_for_each(|v| line("field", &format!("{}: {}", v.field, v.description))),
        ErrorDetail::QuotaFailure(quota) => quota
            .violations
            .iter()
            .try_for_each(|v| line("quota", &format!("{}: {}", v.subject, v.description))),
        ErrorDetail::ResourceInfo(info) => {
            let resource = format!("{} {}", info.resource_type, info.resource_name);
            line("resource", &resource)?;
            match info.description.as_str() {
                "" => Ok(()),
                description => line("description", description),
            }
        }
        // The facade sends no other details, but a proxy may.
        other => line("detail", &format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use tonic::Code;
    use tonic_types::ErrorDetails;

    use super::*;

    struct Described(Status);

    impl fmt::Display for Described {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            describe(&self.0, f)
        }
    }

    #[test]
    fn every_detail_is_printed_on_a_line() {
        let mut details = ErrorDetails::new();
        details
            .set_error_info(
                "THROTTLED",
                "rds-task-facade",
                HashMap::from([
                    ("upstreamService".to_owned(), "RDS".to_owned()),
                    ("httpStatus".to_owned(), "429".to_owned()),
                ]),
            )
            .set_request_info("request-1", "")
            .set_retry_info(Some(Duration::from_millis(1500)))
            .add_quota_failure_violation("user", "60 calls per minute")
            .add_bad_request_violation("project_id", "must not be empty")
            .set_resource_info("task", "w", "", "");
        let status = Status::with_error_details(Code::ResourceExhausted, "slow down", details);

        let text = Described(status).to_string();

        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.remove(0), "RESOURCE_EXHAUSTED: slow down");
        lines.sort_unstable();
        let expected = [
            "  domain: rds-task-facade",
            "  field: project_id: must not be empty",
            "  httpStatus: 429",
            "  quota: user: 60 calls per minute",
            "  reason: THROTTLED",
            "  request id: request-1",
            "  resource: task w",
            "  retry after: 1.5s",
            "  upstreamService: RDS",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn control_characters_are_escaped() {
        let status = Status::internal("a\u{1b}[2Jb\nc\u{9b}d\u{7f}e\u{202e}f\u{200b}");

        let text = Described(status).to_string();

        let expected = "INTERNAL: a\\u001b[2Jb\\nc\\u009bd\\u007fe\\u202ef\\u200b";
        assert_eq!(text, expected);
    }

    #[test]
    fn undecodable_details_are_reported() {
        let status = Status::with_details(Code::NotFound, "gone", vec![0xff, 0xff].into());

        let text = Described(status).to_string();

        let expected = "NOT_FOUND: gone; the details of the status cannot be decoded";
        assert_eq!(text, expected);
    }
}
