//! Looks up one task. Prints the reply or, if the call fails, its code, message, reason, retry delay and request id.

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use tonic::{
    Code, Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_types::StatusExt as _;

use task::v1::{
    GetTaskDetailRequest, GetTaskDetailResponse, task_service_client::TaskServiceClient,
};

mod task {
    pub mod v1 {
        tonic::include_proto!("huaweicloud.rds.task.v1");
    }
}

/// Looks up one task.
#[derive(Parser)]
struct Options {
    /// Address of the facade, HOST:PORT.
    #[arg(long, default_value = "127.0.0.1:50051")]
    target: String,
    /// PEM file of trusted certificates; plaintext if not set.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// RDS token of the caller, needed if the facade runs with `--credentials caller`.
    #[arg(long)]
    token: Option<String>,
    /// Project that owns the instance.
    #[arg(long, default_value = "0483b6b16e954cb88930a360d2c4e663")]
    project_id: String,
    /// Database instance.
    #[arg(long, default_value = "1ffc4167903840cb93a3da56d28c14fdin01")]
    instance_id: String,
    /// Task.
    #[arg(long, default_value = "102772a9-31fa-4129-b9f8-7638e2792f3b")]
    workflow_id: String,
    /// Deadline of the call, in seconds.
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = Options::parse();
    let channel = open_channel(&options)?;
    let deadline = Duration::try_from_secs_f64(options.timeout)?;
    // This timer bounds both attempts together. `biased` polls it first, because tonic's own timer for `grpc-timeout` fires in
    // the same millisecond and returns CANCELLED.
    let result = tokio::select! {
        biased;
        () = tokio::time::sleep(deadline) => Err(Status::deadline_exceeded("no reply before the deadline")),
        result = get_task_detail(channel, &options, deadline) => result,
    };
    Ok(match result {
        Ok(reply) => {
            println!("{reply:#?}");
            ExitCode::SUCCESS
        }
        Err(status) => {
            print_error(&status);
            ExitCode::FAILURE
        }
    })
}

// [connection]
fn open_channel(options: &Options) -> Result<Channel, Box<dyn Error>> {
    let endpoint = match &options.ca {
        None => Endpoint::from_shared(format!("http://{}", options.target))?,
        Some(ca) => {
            let trusted =
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(ca)?));
            Endpoint::from_shared(format!("https://{}", options.target))?.tls_config(trusted)?
        }
    };
    Ok(endpoint.connect_lazy())
}
// [/connection]

// [retry]
/// Makes the call and retries it once on UNAVAILABLE, in code because tonic does not support service configs. The facade already
/// retries RDS; the retry here covers an instance of the facade that stops during the call.
async fn get_task_detail(
    channel: Channel,
    options: &Options,
    deadline: Duration,
) -> Result<GetTaskDetailResponse, Status> {
    match call(channel.clone(), options, deadline).await {
        Err(status) if status.code() == Code::Unavailable => {
            let delay = status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay);
            tokio::time::sleep(delay.unwrap_or(Duration::from_millis(200))).await;
            call(channel, options, deadline).await
        }
        result => result,
    }
}
// [/retry]

// [call]
async fn call(
    channel: Channel,
    options: &Options,
    deadline: Duration,
) -> Result<GetTaskDetailResponse, Status> {
    let mut request = Request::new(GetTaskDetailRequest {
        project_id: options.project_id.clone(),
        instance_id: options.instance_id.clone(),
        workflow_id: options.workflow_id.clone(),
        workflow_name: None,
    });
    request.set_timeout(deadline);
    if let Some(token) = &options.token {
        let token = token
            .parse()
            .map_err(|_| Status::invalid_argument("the token is not ASCII"))?;
        request.metadata_mut().insert("x-auth-token", token);
    }
    let reply = TaskServiceClient::new(channel)
        .get_task_detail(request)
        .await?;
    Ok(reply.into_inner())
}
// [/call]

// [error]
fn print_error(status: &Status) {
    eprintln!("{:?}: {}", status.code(), status.message());
    let details = status.get_error_details();
    if let Some(info) = details.error_info() {
        eprintln!("reason: {}", info.reason);
    }
    if let Some(delay) = details.retry_info().and_then(|info| info.retry_delay) {
        eprintln!("retry after: {} s", delay.as_secs_f64());
    }
    if let Some(info) = details.request_info() {
        eprintln!("request id: {}", info.request_id);
    }
}
// [/error]
