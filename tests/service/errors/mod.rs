/// Incomplete replies: truncated, malformed, too slow, no connection.
mod incomplete;
/// Complete replies: statuses, error objects, bodies without a task.
mod replies;

use crate::support::{Failure, Program, Step, Upstream, example_request};

/// The failure of one call, without retries, against an upstream with this script.
async fn failure_for(steps: Vec<Step>) -> Failure {
    let upstream = Upstream::always(steps).await;
    let program = Program::over(
        &upstream.url(),
        &["--max-attempts", "1", "--attempt-timeout", "2s"],
    );
    program.failure(example_request()).await
}

fn raw(text: &str) -> Vec<Step> {
    vec![Step::Send(text.as_bytes().to_vec())]
}
