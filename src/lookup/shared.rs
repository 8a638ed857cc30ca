//! A lookup that shares its result with the other replicas: it uses theirs if that is young enough, waits while one of them asks RDS, or
//! asks RDS and publishes the result.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use serde_json::{Map, Value};
use tonic::Code;

use crate::{
    coalescer::Found,
    quota_store::{Claim, Session, SharedResult, TaskName},
    telemetry::Facts,
    upstream::{Error, LookupContext, TaskQuery, rejection, wire::TaskDetail},
};

/// The names of a task in the quota store.
pub fn task_name(session: &Session, query: &TaskQuery) -> TaskName {
    // An empty name differs from none.
    let name = query.workflow_name.as_ref().map(|name| format!("={name}"));
    session.task(&[
        query.project_id.as_bytes(),
        query.instance_id.as_bytes(),
        query.workflow_id.as_bytes(),
        name.unwrap_or_default().as_bytes(),
    ])
}

/// Finds a result that is younger than `max_age`, or asks RDS.
pub(super) async fn look_up(
    session: &Session,
    lookup: LookupContext<'_>,
    max_age: Duration,
    ask: impl Future<Output = Result<TaskDetail, Error>>,
) -> Found {
    let task = task_name(session, lookup.query);
    let claim = session.claim(&task, max_age, lookup.deadline.deadline());
    let lease = match claim.await {
        Claim::Ask(lease) => lease,
        Claim::Alone => return Found::from(ask.await),
        Claim::Result(result, age) => match from_shared(*result) {
            Some((result, facts)) => {
                lookup.progress.update(|known| *known = facts);
                return Found {
                    result,
                    is_cacheable: true,
                    age,
                };
            }
            None => return Found::from(ask.await),
        },
    };
    let found = Found::from(lease.hold(ask).await);
    if found.is_cacheable {
        lease.publish(to_shared(&found, lookup.progress.facts()));
    }
    found
}

fn to_shared(found: &Found, facts: Facts) -> SharedResult {
    let mut shared = SharedResult::default();
    shared.http_status = facts.http_status.unwrap_or_default().into();
    shared.request_id = facts.upstream_request_id;
    match &found.result {
        Ok(task) => shared.task = Some((**task).clone()),
        Err(Error::Rejected(rejection)) => {
            shared.error_code = facts.upstream_code;
            shared.error_message.clone_from(&rejection.message);
        }
        Err(_) => {}
    }
    shared
}

/// The result and what its attempt showed. An unknown task is read again from a reply with its code and text.
fn from_shared(
    shared: SharedResult,
) -> Option<(Result<Arc<crate::pb::GetTaskDetailResponse>, Error>, Facts)> {
    let http_status = u16::try_from(shared.http_status).ok()?;
    let facts = Facts {
        attempts: 0,
        http_status: Some(http_status),
        upstream_code: shared.error_code.clone(),
        upstream_request_id: shared.request_id,
    };
    if let Some(task) = shared.task {
        return Some((Ok(Arc::new(task)), facts));
    }
    let mut body = Map::new();
    if let Some(code) = shared.error_code {
        body.insert("error_code".to_owned(), Value::String(code));
    }
    body.insert("error_msg".to_owned(), Value::String(shared.error_message));
    let body = Value::Object(body).to_string();
    let no_headers = HeaderMap::new();
    let now = SystemTime::UNIX_EPOCH;
    let (rejection, _) = rejection::from_reply(http_status, &no_headers, body.as_bytes(), now);
    let is_unknown = rejection.verdict.code == Code::NotFound;
    is_unknown.then(|| (Err(Error::Rejected(Box::new(rejection))), facts))
}
