//! The subcommands `call`, `watch` and `health`: clients of a running server.

mod local;
mod progress;
mod status;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use ::url::Url;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    metadata::{Ascii, MetadataMap, MetadataValue},
    transport::{Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::util::MapResponse;

use self::local::{AnyCertificate, LocalServer};
pub use self::watch::{WatchOptions, watch};
use crate::{
    credentials::secret,
    deadline::{Deadline, Passed},
    error_chain,
    options::{
        self, Validation,
        url::{self, without_slash},
    },
    pb,
    pem::{roots, roots_file, without_mark},
    sandbox,
    telemetry::Escaped,
};

/// The metadata of the details of a status.
const DETAILS: &str = "grpc-status-details-bin";

type HttpResponse = http::Response<Body>;

/// A connection whose responses the gRPC library can read.
type Connection = MapResponse<Channel, fn(HttpResponse) -> HttpResponse>;

/// Address and TLS settings of the server to call.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Server {
    /// URL of the server, http or https
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051", value_parser = url::base)]
    pub target: Url,
    /// PEM file of certificates to trust for an https target instead of the system's
    #[arg(long, value_name = "FILE", value_parser = roots_file)]
    pub ca: Option<PathBuf>,
    /// The client certificate, if any.
    #[command(flatten)]
    pub pair: Option<Pair>,
    /// Set if the target is the local server.
    #[arg(skip)]
    pub local: Option<LocalServer>,
}

/// A client certificate. Both files must be set.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "pair")]
pub struct Pair {
    /// PEM file of the client certificate chain
    #[arg(long, value_name = "FILE", value_parser = options::public_file)]
    pub cert: PathBuf,
    /// PEM file of the client certificate's private key
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub key: PathBuf,
}

impl Server {
    /// Checks rules for several options.
    pub fn validate(&self, validation: &mut Validation<'_>) {
        let tls = self.ca.is_some() || self.pair.is_some();
        if tls && self.target.scheme() != "https" && !validation.is_rejected(&["target"]) {
            validation.problem("--ca, --cert, --key", "require an https --target");
        }
    }
}

/// The options of `call`.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct CallOptions {
    /// The task; `None` for the example task of the vendor's documentation.
    #[command(flatten)]
    pub task: Option<Task>,
    /// The server.
    #[command(flatten)]
    pub server: Server,
    /// Time limit for connecting and the call together
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = options::duration)]
    pub timeout: Duration,
    /// The token.
    #[command(flatten)]
    pub token: Token,
}

/// The token to send.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(skip)]
pub struct Token {
    /// File with the token to send as x-auth-token; default: the variable RDS_TASK_FACADE_TOKEN
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub token_file: Option<PathBuf>,
    /// The token from the variable, if `token_file` is not set.
    #[arg(skip)]
    pub from_variable: Option<SecretString>,
}

/// The task to look up. All ids must be set.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[group(id = "task")]
pub struct Task {
    /// Project of the instance; without id flags, an example task of the sandbox is used
    #[arg(long, value_name = "ID")]
    pub project_id: String,
    /// Database instance of the task
    #[arg(long, value_name = "ID")]
    pub instance_id: String,
    /// Task to look up
    #[arg(long, value_name = "ID")]
    pub workflow_id: String,
    /// Name of the task
    #[arg(long, value_name = "NAME")]
    pub workflow_name: Option<String>,
}

impl Task {
    /// The example task of the RDS API reference, "Obtaining Task Information", which the sandbox also has.
    pub fn example() -> Self {
        Self {
            project_id: sandbox::EXAMPLE_PROJECT_ID.to_owned(),
            instance_id: sandbox::EXAMPLE_INSTANCE_ID.to_owned(),
            workflow_id: sandbox::EXAMPLE_WORKFLOW_ID.to_owned(),
            workflow_name: Some("CreateMysqlSingleHAInstance".to_owned()),
        }
    }
}

/// The options of `health`.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct HealthOptions {
    /// The server.
    #[command(flatten)]
    pub server: Server,
    /// Time limit for connecting and the check together
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = options::duration)]
    pub timeout: Duration,
    /// Full name of a service; default: the whole server
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub service: String,
}

/// Why a call or check failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A file of this flag is unusable.
    #[error("{0}: {1}")]
    File(&'static str, String),
    /// The connection failed, with this root cause.
    #[error(
        "cannot connect to {}: {}; check --target, and that `rds-task-facade serve` runs there",
        without_slash(.0),
        Escaped(.1)
    )]
    Connect(Url, String),
    /// The connection ended without a reply, with this root cause. A server that rejects a client certificate reports it after the
    /// handshake, so the client may only see the connection close.
    #[error("no reply from {}: {}{}", without_slash(.0), Escaped(.1), certificate_hint(.0))]
    NoReply(Url, String),
    /// The server replied with this status.
    #[error(fmt = status::describe)]
    Status(Box<Status>),
}

fn certificate_hint(target: &Url) -> &'static str {
    match target.scheme() {
        "https" => "; if the server requires a client certificate, check --cert and --key",
        _ => "",
    }
}

impl Error {
    /// Converts a status. A status with a source was created by the client library, not received from the server.
    fn from_status(status: Status, server: &Server, timeout: Duration) -> Self {
        let Some(cause) = std::error::Error::source(&status) else {
            return Self::Status(Box::new(status));
        };
        if error_chain::chain(cause).any(|error| error.is::<tonic::TimeoutExpired>()) {
            // The library reports an exceeded deadline as CANCELLED.
            return Self::timeout(timeout);
        }
        let cause = error_chain::root_cause(cause).to_string();
        Self::NoReply(server.target.clone(), cause)
    }

    fn timeout(timeout: Duration) -> Self {
        let message = format!("no reply within {timeout:?}");
        Self::Status(Box::new(Status::new(Code::DeadlineExceeded, message)))
    }
}

/// Makes the call and prints the reply as JSON on standard output, or the error on standard error.
pub async fn call(options: CallOptions) -> ExitCode {
    match get_task_detail(options).await {
        Ok(reply) => {
            let json = serde_json::to_string_pretty(&reply).expect("the reply serializes");
            let _ = print(&escape_json(&json));
            ExitCode::SUCCESS
        }
        Err(error) => report(&error),
    }
}

/// Checks the health and prints it on standard output. The exit code is zero only for `SERVING`.
pub async fn health(options: HealthOptions) -> ExitCode {
    match check_health(options).await {
        Ok(status) => {
            let _ = print(status.as_str_name());
            match status {
                ServingStatus::Serving => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => report(&error),
    }
}

async fn get_task_detail(options: CallOptions) -> Result<pb::GetTaskDetailResponse, Error> {
    let deadline = Deadline::after(options.timeout);
    let token = token(&options.token, &options.server, deadline).await?;
    let channel = connect(&options.server, options.timeout, deadline).await?;
    let task = options.task.unwrap_or_else(Task::example);
    let mut request = Request::new(pb::GetTaskDetailRequest {
        project_id: task.project_id,
        instance_id: task.instance_id,
        workflow_id: task.workflow_id,
        workflow_name: task.workflow_name,
    });
    request.set_timeout(deadline.remaining());
    if let Some(token) = token {
        request.metadata_mut().insert("x-auth-token", token);
    }
    let mut client = pb::task_service_client::TaskServiceClient::new(channel);
    let response = deadline.bound(client.get_task_detail(request)).await;
    into_reply(response, &options.server, options.timeout)
}

async fn check_health(options: HealthOptions) -> Result<ServingStatus, Error> {
    let deadline = Deadline::after(options.timeout);
    if let Ok(Some(status)) = deadline.bound(options.ready()).await {
        return Ok(status);
    }
    let channel = connect(&options.server, options.timeout, deadline).await?;
    let mut request = Request::new(HealthCheckRequest {
        service: options.service,
    });
    request.set_timeout(deadline.remaining());
    let mut client = HealthClient::new(channel);
    let response = deadline.bound(client.check(request)).await;
    into_reply(response, &options.server, options.timeout).map(|reply| reply.status())
}

/// The outcome of a call that was bounded by its deadline: the library's own limit ends with the head of the response.
fn into_reply<T>(
    response: Result<Result<Response<T>, Status>, Passed>,
    server: &Server,
    timeout: Duration,
) -> Result<T, Error> {
    match response {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Error::from_status(status, server, timeout)),
        Err(Passed) => Err(Error::timeout(timeout)),
    }
}

async fn connect(
    server: &Server,
    timeout: Duration,
    deadline: Deadline,
) -> Result<Connection, Error> {
    let failed = |cause: String| Error::Connect(server.target.clone(), cause);
    let connect_error = |error| failed(error_chain::root_cause(&error).to_string());
    let mut endpoint = Channel::from_shared(server.target.as_str().to_owned())
        .expect("url::base accepts only URLs that are URIs")
        .user_agent(concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")))
        .expect("name and version are a valid header value");
    if server.target.scheme() == "https" {
        let mut tls = match &server.ca {
            Some(path) => {
                let roots = roots(&pem("--ca", path, deadline).await?);
                let roots = roots.map_err(|error| Error::File("--ca", error.to_string()))?;
                ClientTlsConfig::new().trust_anchors(roots.roots)
            }
            None if server.local.is_some() => ClientTlsConfig::new(),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some(Pair { cert, key }) = &server.pair {
            let cert = pem("--cert", cert, deadline).await?;
            let key = pem("--key", key, deadline).await?;
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        let secured = match (&server.local, &server.ca) {
            (Some(_), None) => endpoint.tls_config_with_verifier(tls, AnyCertificate::new()),
            _ => endpoint.tls_config(tls),
        };
        endpoint = secured.map_err(connect_error)?;
    }
    let channel = deadline.bound(endpoint.connect()).await;
    let channel = channel
        .map_err(|Passed| failed(format!("no connection within {timeout:?}")))?
        .map_err(connect_error)?;
    Ok(MapResponse::new(channel, check_details))
}

/// Replaces details of a status that are not base64, at which the gRPC library panics.
fn check_details(response: HttpResponse) -> HttpResponse {
    let (mut head, body) = response.into_parts();
    replace_broken_details(&mut head.headers);
    let body = body.map_frame(|mut frame| {
        if let Some(trailers) = frame.trailers_mut() {
            replace_broken_details(trailers);
        }
        frame
    });
    HttpResponse::from_parts(head, Body::new(body))
}

fn replace_broken_details(headers: &mut HeaderMap) {
    let metadata = MetadataMap::from_headers(std::mem::take(headers));
    let is_broken = metadata
        .get_bin(DETAILS)
        .is_some_and(|details| details.to_bytes().is_err());
    *headers = metadata.into_headers();
    if is_broken {
        // Base64 of a byte that is not a message.
        headers.insert(DETAILS, http::HeaderValue::from_static("/w"));
    }
}

async fn pem(flag: &'static str, path: &Path, deadline: Deadline) -> Result<Vec<u8>, Error> {
    let content = read(flag, path, deadline).await?;
    Ok(without_mark(&content).to_owned())
}

/// Reads a file within the deadline: it may be a pipe that no program writes to.
async fn read(flag: &'static str, path: &Path, deadline: Deadline) -> Result<Vec<u8>, Error> {
    let path = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || fs::read(path));
    let problem = match deadline.bound(reading).await {
        Ok(Ok(Ok(content))) => return Ok(content),
        Ok(Ok(Err(error))) => error.kind().to_string(),
        Ok(Err(_)) | Err(Passed) => "cannot be read within the time limit".to_owned(),
    };
    Err(Error::File(flag, problem))
}

/// The token to send, if any, as a header value. Warns if others can read it on the way.
async fn token(
    token: &Token,
    server: &Server,
    deadline: Deadline,
) -> Result<Option<MetadataValue<Ascii>>, Error> {
    let text = match (&token.token_file, &token.from_variable) {
        (Some(path), _) => {
            let content = read("--token-file", path, deadline).await?;
            let text = String::from_utf8(content);
            let not_text = |_| Error::File("--token-file", "the token is not text".to_owned());
            SecretString::from(text.map_err(not_text)?)
        }
        (None, Some(token)) => token.clone(),
        (None, None) => return Ok(None),
    };
    let text = secret::visible(text.expose_secret().trim_end());
    let text =
        text.map_err(|problem| Error::File("--token-file", format!("the token {problem}")))?;
    let mut value = MetadataValue::try_from(text).expect("visible ASCII is metadata");
    value.set_sensitive(true);
    if url::check_plain_http(&server.target, false).is_err() {
        let target = without_slash(&server.target);
        warn(&format!(
            "the token is sent unencrypted to {target}: use an https --target"
        ));
    }
    Ok(Some(value))
}

/// JSON that is safe on a terminal. The serializer escapes only the characters below U+0020.
fn escape_json(json: &str) -> String {
    let lines: Vec<_> = json
        .split('\n')
        .map(|line| Escaped(line).to_string())
        .collect();
    lines.join("\n")
}

/// Prints one line.
fn print(text: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{text}")
}

fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "rds-task-facade: WARN: {text}");
}

fn report(error: &Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "rds-task-facade: {error}");
    ExitCode::FAILURE
}
