//! A failed call as a client sees it, details included.

use std::{collections::BTreeMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// What a client sees of a failed call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) reason: String,
    pub(crate) domain: String,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) request_id: Option<String>,
    pub(crate) retry_delay: Option<Duration>,
    pub(crate) pushback_ms: Option<u64>,
    pub(crate) violations: Vec<(String, String)>,
    pub(crate) quota_subjects: Vec<String>,
    /// (type, name)
    pub(crate) resource: Option<(String, String)>,
    pub(crate) details_bytes: usize,
}

impl Failure {
    pub(crate) fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            reason: info.map(|info| info.reason.clone()).unwrap_or_default(),
            domain: info.map(|info| info.domain.clone()).unwrap_or_default(),
            metadata: info
                .map(|info| info.metadata.clone().into_iter().collect())
                .unwrap_or_default(),
            request_id: details.request_info().map(|info| info.request_id.clone()),
            retry_delay: details.retry_info().and_then(|info| info.retry_delay),
            pushback_ms: status
                .metadata()
                .get("grpc-retry-pushback-ms")
                .and_then(|value| value.to_str().ok()?.parse().ok()),
            violations: details
                .bad_request()
                .map(|bad| {
                    bad.field_violations
                        .iter()
                        .map(|v| (v.field.clone(), v.description.clone()))
                        .collect()
                })
                .unwrap_or_default(),
            quota_subjects: details
                .quota_failure()
                .map(|quota| quota.violations.iter().map(|v| v.subject.clone()).collect())
                .unwrap_or_default(),
            resource: details.resource_info().map(|resource| {
                (
                    resource.resource_type.clone(),
                    resource.resource_name.clone(),
                )
            }),
            details_bytes: status.details().len(),
        }
    }

    pub(crate) fn code_and_reason(&self) -> (Code, &str) {
        (self.code, self.reason.as_str())
    }
}
