//! Two tasks have the same etag if and only if RDS returned the same text, and the request of a watch accepts every etag. Any bytes are a
//! valid request of a watch, or an `INVALID_ARGUMENT` that names exactly the invalid fields.
//!
//! The input's lines: replies of RDS with two tasks; the rest is a request.

use std::time::Duration;

use prost::Message as _;
use rds_task_facade::{
    pb::{GetTaskDetailRequest, GetTaskDetailResponse, SubTask, WatchTaskDetailRequest},
    rpc::{request::validate, watch_task_detail::etag_violation},
    status::Failure,
    task::Task,
    upstream::wire::parse_task_detail,
    watch::snapshot::etag,
};

use super::{lines, request_validation::invalid_fields, status_contract::assert_complete};

pub(crate) fn check(input: &[u8]) {
    let [first, second, request] = lines(input);
    let [first, second] = [first, second].map(|body| parse_task_detail(body).ok());
    for task in first.iter().chain(&second) {
        let etag = etag(task);
        assert!(etag.len() == 32 && is_hex(&etag), "{etag}");
        assert!(etag_violation(&etag).is_none());
        let shared = Task::from_bytes(&task.to_bytes()).expect("an encoded task");
        assert_eq!(self::etag(&shared), etag);
    }
    if let (Some(first), Some(second)) = (first, second) {
        assert_eq!(
            etag(&first) == etag(&second),
            texts(&first) == texts(&second)
        );
    }
    if let Ok(request) = WatchTaskDetailRequest::decode(request) {
        check_request(request);
    }
}

/// The task without the fields that the facade derives.
fn texts(task: &Task) -> (GetTaskDetailResponse, Vec<SubTask>) {
    let message = GetTaskDetailResponse {
        state: 0,
        progress_percent: None,
        create_time: None,
        update_time: None,
        ..task.message().clone()
    };
    let parts = task.parts().map(|part| SubTask {
        state: 0,
        progress_percent: None,
        ..part
    });
    (message, parts.collect())
}

fn check_request(request: WatchTaskDetailRequest) {
    let task = GetTaskDetailRequest {
        project_id: request.project_id,
        instance_id: request.instance_id,
        workflow_id: request.workflow_id,
        workflow_name: request.workflow_name,
    };
    let mut invalid = invalid_fields(&task);
    if request.etag.chars().count() > 64 || !is_hex(&request.etag) {
        invalid.push("etag");
    }

    match validate(task.clone(), etag_violation(&request.etag)) {
        Ok(query) => {
            assert_eq!(invalid, [""; 0]);
            assert_eq!(query.workflow_id, task.workflow_id);
        }
        Err(error) => {
            let status = Failure::from_error(&error).to_status("r-1", Duration::MAX);
            let details = assert_complete(&status);
            let bad = details.bad_request().expect("a BadRequest");
            let named: Vec<_> = bad.field_violations.iter().map(|v| &*v.field).collect();
            assert_eq!(named, invalid);
        }
    }
}

fn is_hex(text: &str) -> bool {
    text.chars().all(|c| "0123456789abcdef".contains(c))
}
