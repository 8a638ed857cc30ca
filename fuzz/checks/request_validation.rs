//! Any bytes are a valid request, or an `INVALID_ARGUMENT` that names exactly the invalid fields.

use std::time::Duration;

use prost::Message as _;
use rds_task_facade::{pb::GetTaskDetailRequest, rpc::request::validate, status::Failure};
use tonic::Code;

use super::status_contract::assert_complete;

pub(crate) fn check(input: &[u8]) {
    let request = match GetTaskDetailRequest::decode(input) {
        Ok(request) => request,
        Err(error) => {
            let status = Failure::from_library(Code::Internal, &error.to_string())
                .to_status("r-1", Duration::MAX);
            assert_complete(&status);
            return;
        }
    };
    let invalid = invalid_fields(&request);

    match validate(request.clone(), None) {
        Ok(query) => {
            assert_eq!(invalid, [""; 0]);
            assert_eq!(query.project_id, request.project_id);
            assert_eq!(query.instance_id, request.instance_id);
            assert_eq!(query.workflow_id, request.workflow_id);
            assert_eq!(query.workflow_name, request.workflow_name);
        }
        Err(error) => {
            let status = Failure::from_error(&error).to_status("r-1", Duration::MAX);
            assert_eq!(status.code(), Code::InvalidArgument);
            let details = assert_complete(&status);
            let bad = details.bad_request().expect("a BadRequest");
            let named: Vec<_> = bad.field_violations.iter().map(|v| &*v.field).collect();
            assert_eq!(named, invalid);
        }
    }
}

/// The invalid fields, by the rules of the contract.
pub(crate) fn invalid_fields(request: &GetTaskDetailRequest) -> Vec<&'static str> {
    const ID: &str = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_-";
    let is_id = |text: &str, max| {
        let length = text.chars().count();
        length >= 1 && length <= max && text.chars().all(|c| ID.contains(c))
    };
    let is_name = |text: &str| {
        let control = |c: char| matches!(u32::from(c), 0..=0x1f | 0x7f..=0x9f);
        text.chars().count() <= 256 && !text.chars().any(control)
    };
    let mut invalid = Vec::new();
    if !is_id(&request.project_id, 64) {
        invalid.push("project_id");
    }
    if !is_id(&request.instance_id, 64) {
        invalid.push("instance_id");
    }
    if !is_id(&request.workflow_id, 128) {
        invalid.push("workflow_id");
    }
    if request
        .workflow_name
        .as_deref()
        .is_some_and(|name| !is_name(name))
    {
        invalid.push("workflow_name");
    }
    invalid
}
