//! Looks up one task, or watches it until it is over. Prints the reply or each state; for an error, its code, message, reason, retry
//! delay and request id.

use std::{
    error::Error,
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use tonic::{
    Code, Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt as _;

use task::v1::{
    GetTaskDetailRequest, GetTaskDetailResponse, TaskState, WatchTaskDetailRequest,
    task_service_client::TaskServiceClient,
};

mod task {
    pub mod v1 {
        tonic::include_proto!("huaweicloud.rds.task.v1");
    }
}

/// Looks up one task, or watches it until it is over.
#[derive(Parser)]
struct Options {
    /// `watch` to watch the task; one call if not set.
    #[arg(value_parser = ["watch"])]
    command: Option<String>,
    /// Address of the facade, HOST:PORT.
    #[arg(long, default_value = "127.0.0.1:50051")]
    target: String,
    /// PEM file of trusted certificates; plaintext if not set.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// PEM file of the client's certificate, for a facade with `--tls-client-ca`.
    #[arg(long, requires_all = ["ca", "key"])]
    cert: Option<PathBuf>,
    /// PEM file of the certificate's key.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,
    /// RDS token of the caller, needed if the facade runs with `--credentials caller`.
    #[arg(long)]
    token: Option<String>,
    /// Project that owns the instance.
    #[arg(long, default_value = "0483b6b16e954cb88930a360d2c4e663")]
    project_id: String,
    /// Database instance.
    #[arg(
        long,
        default_value = "1ffc4167903840cb93a3da56d28c14fdin01",
        default_value_if("command", "watch", "lifecycle-20")
    )]
    instance_id: String,
    /// Task.
    #[arg(long, default_value = "102772a9-31fa-4129-b9f8-7638e2792f3b")]
    workflow_id: String,
    /// Deadline of the call or of the whole watch, in seconds.
    #[arg(
        long,
        default_value_t = 10.0,
        default_value_if("command", "watch", "3600")
    )]
    timeout: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = Options::parse();
    let channel = open_channel(&options)?;
    let deadline = Duration::try_from_secs_f64(options.timeout)?;
    if options.command.is_some() {
        return Ok(watch(channel, &options, deadline).await);
    }
    // This timer bounds both attempts together. `biased` polls it first, because tonic's own timer for `grpc-timeout` fires in
    // the same millisecond and returns CANCELLED.
    let result = tokio::select! {
        biased;
        () = tokio::time::sleep(deadline) => Err(Status::deadline_exceeded("no reply before the deadline")),
        result = get_task_detail(channel, &options, deadline) => result,
    };
    Ok(match result {
        Ok(reply) => {
            println!("{}", to_json(&reply)?);
            ExitCode::SUCCESS
        }
        Err(status) => {
            print_error(&status);
            ExitCode::FAILURE
        }
    })
}

/// The reply as JSON, with the names of the proto. prost generates no JSON; prost-reflect derives it from the descriptors.
fn to_json(reply: &GetTaskDetailResponse) -> Result<String, Box<dyn Error>> {
    let pool =
        DescriptorPool::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"))[..])?;
    let name = "huaweicloud.rds.task.v1.GetTaskDetailResponse";
    let mut message = DynamicMessage::new(pool.get_message_by_name(name).ok_or(name)?);
    message.transcode_from(reply)?;
    let mut json = serde_json::Serializer::pretty(Vec::new());
    message.serialize_with_options(
        &mut json,
        &SerializeOptions::new().use_proto_field_name(true),
    )?;
    Ok(String::from_utf8(json.into_inner())?)
}

fn open_channel(options: &Options) -> Result<Channel, Box<dyn Error>> {
    let endpoint = match &options.ca {
        None => Endpoint::from_shared(format!("http://{}", options.target))?,
        Some(ca) => {
            let mut tls =
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(ca)?));
            if let (Some(cert), Some(key)) = (&options.cert, &options.key) {
                tls = tls.identity(Identity::from_pem(fs::read(cert)?, fs::read(key)?));
            }
            Endpoint::from_shared(format!("https://{}", options.target))?.tls_config(tls)?
        }
    };
    // PINGs detect a lost connection, on which a watch would wait for its deadline.
    let endpoint = endpoint
        .http2_keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20));
    Ok(endpoint.connect_lazy())
}

/// Makes the call and retries it once on UNAVAILABLE, in code because tonic does not support service configs. The facade already
/// retries RDS; the retry here covers an instance of the facade that stops during the call.
async fn get_task_detail(
    channel: Channel,
    options: &Options,
    deadline: Duration,
) -> Result<GetTaskDetailResponse, Status> {
    match call(channel.clone(), options, deadline).await {
        Err(status) if status.code() == Code::Unavailable => {
            tokio::time::sleep(retry_delay(&status).max(Duration::from_millis(200))).await;
            call(channel, options, deadline).await
        }
        result => result,
    }
}

async fn call(
    channel: Channel,
    options: &Options,
    deadline: Duration,
) -> Result<GetTaskDetailResponse, Status> {
    let message = GetTaskDetailRequest {
        project_id: options.project_id.clone(),
        instance_id: options.instance_id.clone(),
        workflow_id: options.workflow_id.clone(),
        workflow_name: None,
    };
    let reply = TaskServiceClient::new(channel)
        .get_task_detail(request(message, options, deadline)?)
        .await?;
    Ok(reply.into_inner())
}

fn request<T>(message: T, options: &Options, deadline: Duration) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    if let Some(token) = &options.token {
        let token = token
            .parse()
            .map_err(|_| Status::invalid_argument("the token is not ASCII"))?;
        request.metadata_mut().insert("x-auth-token", token);
    }
    Ok(request)
}

/// Returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed.
async fn watch(channel: Channel, options: &Options, timeout: Duration) -> ExitCode {
    let mut client = TaskServiceClient::new(channel);
    let mut message = WatchTaskDetailRequest {
        project_id: options.project_id.clone(),
        instance_id: options.instance_id.clone(),
        workflow_id: options.workflow_id.clone(),
        ..Default::default()
    };
    let begun = Instant::now();
    let mut state = TaskState::Unspecified;
    let mut pause = Duration::from_secs(1);
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        let stream = async {
            let request = request(message.clone(), options, left)?;
            let mut stream = client.watch_task_detail(request).await?.into_inner();
            while let Some(received) = stream.message().await? {
                pause = Duration::from_secs(1);
                if let Some(task) = received.task {
                    // The final state comes again if the connection was lost after it.
                    if received.etag != message.etag {
                        print_state(&task);
                    }
                    state = task.state();
                }
                message.etag = received.etag;
            }
            Ok(())
        };
        // tonic's timer for `grpc-timeout` ends with the headers of the response.
        let end = tokio::time::timeout(left, stream).await;
        match end.unwrap_or_else(|_| Err(Status::deadline_exceeded("the time is over"))) {
            Ok(()) if state == TaskState::Succeeded => return ExitCode::SUCCESS,
            Ok(()) => return ExitCode::from(3),
            Err(status) => {
                print_error(&status);
                if !is_transient(&status) {
                    return ExitCode::FAILURE;
                }
                let jitter = 0.8 + 0.4 * fastrand::f64();
                let delay = pause.mul_f64(jitter).max(retry_delay(&status));
                pause = pause.mul_f64(1.6).min(Duration::from_secs(30));
                if delay >= timeout.saturating_sub(begun.elapsed()) {
                    return ExitCode::from(4);
                }
                tokio::time::sleep(delay).await;
            }
        }
    }
}

fn is_transient(status: &Status) -> bool {
    let reason = status.get_details_error_info().map(|info| info.reason);
    match status.code() {
        Code::Unavailable
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::DeadlineExceeded
        | Code::Cancelled => reason.as_deref() != Some("QUOTA_EXHAUSTED"),
        // Without a reason, these codes come from a proxy or a lost connection.
        Code::Internal | Code::Unknown => reason.is_none(),
        _ => false,
    }
}

fn print_state(task: &GetTaskDetailResponse) {
    let percent = task.progress_percent.map(|percent| format!(" {percent}%"));
    println!(
        "{}{}",
        task.state().as_str_name(),
        percent.unwrap_or_default()
    );
}

fn print_error(status: &Status) {
    eprintln!("{:?}: {}", status.code(), status.message());
    if let Some(info) = status.get_details_error_info() {
        eprintln!("reason: {}", info.reason);
    }
    let delay = retry_delay(status);
    if !delay.is_zero() {
        eprintln!("retry after: {} s", delay.as_secs_f64());
    }
    if let Some(info) = status.get_details_request_info() {
        eprintln!("request id: {}", info.request_id);
    }
}

fn retry_delay(status: &Status) -> Duration {
    let info = status.get_details_retry_info();
    info.and_then(|info| info.retry_delay).unwrap_or_default()
}
