/// The cache: what it stores, for which identity, and for how long.
mod cache;
/// Random calls that join and leave in any order.
mod random;
/// Identical lookups in flight.
mod single_flight;

use std::time::SystemTime;

use http::HeaderMap;

use super::*;
use crate::{pb::GetTaskDetailResponse, upstream::rejection};

const ANN: Identity = Identity::Caller([1; 16]);
const BOB: Identity = Identity::Caller([2; 16]);

fn coalescer(cache_ttl: Duration, cache_entries: usize) -> Arc<Coalescer> {
    let options = Options {
        cache_ttl,
        cache_entries,
    };
    Coalescer::new(&options, Metrics::new())
}

fn without_cache() -> Arc<Coalescer> {
    coalescer(Duration::ZERO, 100)
}

fn with_cache() -> Arc<Coalescer> {
    coalescer(Duration::from_secs(3600), 100)
}

fn query(task: impl Into<String>) -> TaskQuery {
    TaskQuery {
        project_id: "p".into(),
        instance_id: "i".into(),
        workflow_id: task.into(),
        workflow_name: None,
    }
}

fn task(job_id: impl Into<String>) -> Arc<Task> {
    Arc::new(Task::new(GetTaskDetailResponse {
        job_id: job_id.into(),
        ..GetTaskDetailResponse::default()
    }))
}

fn rejected(http_status: u16, body: &str) -> Error {
    let now = SystemTime::UNIX_EPOCH;
    let (rejection, _) =
        rejection::from_reply(http_status, &HeaderMap::new(), body.as_bytes(), now);
    Error::Rejected(Box::new(rejection))
}

fn in_seconds(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}

/// One call whose work completes at once with `outcome`.
async fn look_up(
    coalescer: &Arc<Coalescer>,
    identity: Identity,
    task: &str,
    outcome: impl Fn() -> Result<Arc<Task>, Error>,
) -> Arc<Lookup> {
    let key = coalescer.key(identity, query(task));
    let work = |_, _| {
        let result = outcome();
        async move { result }
    };
    coalescer
        .look_up(&key, in_seconds(9), None, |_| {}, work)
        .await
}

fn job_id(lookup: &Lookup) -> &str {
    &lookup.result.as_ref().expect("a task").message().job_id
}
