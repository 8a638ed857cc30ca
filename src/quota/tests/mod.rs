/// What is kept, for whom, and for how long.
mod cache;
/// Equal questions in flight.
mod flights;
/// Random calls that come and leave in any order.
mod random;

use std::time::SystemTime;

use http::HeaderMap;

use super::*;
use crate::upstream::{Facts, rejection, wire::TaskDetail};

const ANN: Identity = Identity::Caller([1; 16]);
const BOB: Identity = Identity::Caller([2; 16]);

fn quota(cache_ttl: Duration, cache_entries: usize) -> Arc<Quota> {
    let options = Options {
        cache_ttl,
        cache_entries,
    };
    Quota::new(&options, Metrics::new())
}

fn without_cache() -> Arc<Quota> {
    quota(Duration::ZERO, 100)
}

fn with_cache() -> Arc<Quota> {
    quota(Duration::from_secs(3600), 100)
}

fn query(task: impl Into<String>) -> TaskQuery {
    TaskQuery {
        project_id: "p".into(),
        instance_id: "i".into(),
        workflow_id: task.into(),
        workflow_name: None,
    }
}

fn task(job_id: impl Into<String>) -> TaskDetail {
    TaskDetail {
        job_id: job_id.into(),
        ..TaskDetail::default()
    }
}

fn rejected(http_status: u16, body: &str) -> Error {
    let now = SystemTime::UNIX_EPOCH;
    let (rejection, facts) =
        rejection::of_answer(http_status, &HeaderMap::new(), body.as_bytes(), now);
    Error {
        kind: ErrorKind::Rejected(Box::new(rejection)),
        facts,
    }
}

fn in_seconds(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}
/// One call whose work ends at once with `outcome`.
async fn ask(
    quota: &Arc<Quota>,
    identity: Identity,
    task: &str,
    outcome: impl Fn() -> Result<TaskDetail, Error>,
) -> Answer {
    let question = quota.question(identity, query(task));
    let work = |_, _| {
        let facts = Facts::default();
        let answer = outcome().map(|task| Found { task, facts });
        async move { answer }
    };
    quota.ask(&question, in_seconds(9), |_| {}, work).await
}

fn job_id(answer: &Answer) -> &str {
    &answer.as_ref().expect("a task").task.job_id
}
