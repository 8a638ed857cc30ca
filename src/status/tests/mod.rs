//! Statuses of failed calls. [`check`] asserts in every test what all of them have in common.

/// Errors without a reply of RDS.
mod own_errors;
/// Error replies of RDS.
mod rejections;
/// The sentences of this module.
mod sentences;
/// The contract of every failed call.
#[path = "../../../fuzz/checks/status_contract.rs"]
mod status_contract;
/// Which text of a reply is passed on, and its maximum length.
mod text;

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use self::status_contract::assert_complete as check;
use super::*;
use crate::{
    credentials::{self, Issuer, Owner},
    error::{Error, FailedLookup, Violation},
    reason::Reason,
    telemetry::Facts,
    upstream::{self, TaskQuery, rejection},
};

const WAIT: Duration = Duration::from_secs(7);

fn query() -> TaskQuery {
    TaskQuery {
        project_id: "project-1".to_owned(),
        instance_id: "instance-1".to_owned(),
        workflow_id: "workflow-1".to_owned(),
        workflow_name: None,
    }
}

fn status_of(error: &Error) -> Status {
    Failure::from_error(error).to_status("r-1", Duration::MAX)
}

fn upstream(error: upstream::Error, facts: Facts, owner: Owner) -> Error {
    Error::Upstream(Box::new(FailedLookup {
        error,
        facts,
        owner,
        query: query(),
    }))
}

/// The error for a reply of RDS to a call with a credential of `owner`.
fn rejection_for(owner: Owner, http_status: u16, headers: &HeaderMap, body: &[u8]) -> Error {
    let (rejection, facts) =
        rejection::from_reply(http_status, headers, body, SystemTime::UNIX_EPOCH);
    upstream(upstream::Error::Rejected(Box::new(rejection)), facts, owner)
}

fn status_of_reply(http_status: u16, body: &str) -> Status {
    let error = rejection_for(
        Owner::Caller,
        http_status,
        &HeaderMap::new(),
        body.as_bytes(),
    );
    status_of(&error)
}

fn info(status: &Status) -> (String, HashMap<String, String>) {
    let info = status
        .get_details_error_info()
        .expect("every failure has ErrorInfo");
    (info.reason, info.metadata)
}

fn metadata(status: &Status, key: &str) -> Option<String> {
    info(status).1.get(key).cloned()
}
