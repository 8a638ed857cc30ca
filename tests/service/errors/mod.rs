/// Whole answers: statuses, error objects, bodies that are no task.
mod answers;
/// What is no whole answer: cut off, malformed, too slow, no connection.
mod broken;

use crate::support::{Failure, Program, Step, Upstream, example_request};

/// One call against an upstream that always does the same, without retries; and what the caller is told.
async fn told(steps: Vec<Step>) -> Failure {
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
