/// Replies cached for a while.
mod cached;
/// Identical calls in flight; nothing is shared between credentials.
mod coalesced;
/// Identities that the vendor throttles, and the local rate limiter.
mod throttled;

use rds_task_facade::pb::{GetTaskDetailRequest, task_service_client::TaskServiceClient};
use tokio::task::JoinSet;
use tonic::{Request, Status, transport::Channel};

fn with_token(token: &str, request: GetTaskDetailRequest) -> Request<GetTaskDetailRequest> {
    let mut request = Request::new(request);
    request
        .metadata_mut()
        .insert("x-auth-token", token.parse().expect("ASCII"));
    request
}

/// Starts one call in a task of this set.
async fn begin(
    calls: &mut JoinSet<Result<String, Status>>,
    mut client: TaskServiceClient<Channel>,
    request: impl tonic::IntoRequest<GetTaskDetailRequest> + Send + 'static,
) {
    calls.spawn(async move {
        client
            .get_task_detail(request)
            .await
            .map(|reply| reply.into_inner().job_id)
    });
}
