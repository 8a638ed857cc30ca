//! The subcommands `call` and `health`: the facade seen from a caller's side.

mod failure;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    deadline::Deadline,
    error_chain,
    options::{
        self, Validation,
        url::{self, without_slash},
    },
    pb,
};

/// The server to call, and how.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Server {
    /// Server to call, http or https
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051", value_parser = url::base)]
    pub target: Url,
    /// PEM file of the certificates trusted for an https target, in place of the system's
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub ca: Option<PathBuf>,
    /// The client's certificate; `None` for none.
    #[command(flatten)]
    pub pair: Option<Pair>,
}

/// A client certificate. The two files are set together.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "pair")]
pub struct Pair {
    /// PEM file of the client's certificate chain
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub cert: PathBuf,
    /// PEM file of the client certificate's key
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub key: PathBuf,
}

impl Server {
    /// Checks the rules that span several options.
    pub fn validate(&self, validation: &mut Validation<'_>) {
        let tls = self.ca.is_some() || self.pair.is_some();
        if tls && self.target.scheme() != "https" && !validation.is_rejected(&["target"]) {
            validation.problem("--ca, --cert, --key", "need an https --target");
        }
    }
}

/// `call`: looks up one task.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Call {
    /// The task; `None` for the example task of the vendor's page.
    #[command(flatten)]
    pub task: Option<Task>,
    /// The server.
    #[command(flatten)]
    pub server: Server,
    /// Deadline of connecting and of the call together
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = options::duration)]
    pub timeout: Duration,
    /// File with the token to send as x-auth-token; or the variable RDS_TASK_FACADE_TOKEN
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub token_file: Option<PathBuf>,
    /// The token itself, if there is no file.
    #[arg(skip)]
    pub token: Option<SecretString>,
}

/// The task to look up. The ids are set together.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[group(id = "task")]
pub struct Task {
    /// Project that owns the instance; without any id flag the example task of the vendor's page is looked up
    #[arg(long, value_name = "ID")]
    pub project_id: String,
    /// Database instance
    #[arg(long, value_name = "ID")]
    pub instance_id: String,
    /// Task
    #[arg(long, value_name = "ID")]
    pub workflow_id: String,
    /// Name of the task
    #[arg(long, value_name = "NAME")]
    pub workflow_name: Option<String>,
}

impl Task {
    /// The task of the example in the RDS API reference, "Obtaining Task Information"; the sandbox knows it.
    pub fn example() -> Self {
        Self {
            project_id: "0483b6b16e954cb88930a360d2c4e663".to_owned(),
            instance_id: "1ffc4167903840cb93a3da56d28c14fdin01".to_owned(),
            workflow_id: "102772a9-31fa-4129-b9f8-7638e2792f3b".to_owned(),
            workflow_name: Some("CreateMysqlSingleHAInstance".to_owned()),
        }
    }
}

/// `health`: checks the health of a server or of one of its services.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Health {
    /// The server.
    #[command(flatten)]
    pub server: Server,
    /// Deadline of connecting and of the check together
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = options::duration)]
    pub timeout: Duration,
    /// Full name of the service; by default the server as a whole
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub service: String,
}

/// Why there is no answer.
#[derive(Debug)]
enum Error {
    /// A file given on the command line is of no use. The text names the flag.
    File(&'static str, String),
    /// No connection.
    Connect(Url, tonic::transport::Error),
    /// No connection in time.
    ConnectTimeout(Url, Duration),
    /// A connection, and nothing more. The text is the innermost cause: a server that refuses a client's certificate says
    /// so only after the handshake, and the client may see no more of it than the end of the connection.
    NoAnswer(Url, String),
    /// The server says why.
    Status(Box<Status>),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let advice = "check --target, and that `rds-task-facade serve` runs there";
        match self {
            Self::File(flag, problem) => write!(f, "{flag}: {problem}"),
            Self::Connect(target, error) => {
                let target = without_slash(target);
                let cause = error_chain::root_cause(error);
                write!(f, "cannot connect to {target}: {cause}; {advice}")
            }
            Self::ConnectTimeout(target, timeout) => {
                let target = without_slash(target);
                write!(f, "cannot connect to {target} within {timeout:?}; {advice}")
            }
            Self::NoAnswer(target, cause) => {
                write!(f, "no answer from {}: {cause}", without_slash(target))?;
                match target.scheme() == "https" {
                    true => f.write_str(
                        "; where the server demands a client certificate, check --cert and --key",
                    ),
                    false => Ok(()),
                }
            }
            Self::Status(status) => failure::describe(f, status),
        }
    }
}

/// Makes the call and prints the reply as JSON on standard output, or the failure on standard error.
pub async fn call(call: Call) -> ExitCode {
    match ask_for_task(call).await {
        Ok(reply) => {
            let json = serde_json::to_string_pretty(&reply);
            print(&json.expect("text and flags always make JSON"));
            ExitCode::SUCCESS
        }
        Err(error) => refuse(&error),
    }
}

/// Asks for the health and prints it on standard output. The exit code is zero only for `SERVING`.
pub async fn health(health: Health) -> ExitCode {
    match ask_for_health(health).await {
        Ok(ServingStatus::Serving) => {
            print("SERVING");
            ExitCode::SUCCESS
        }
        Ok(status) => {
            print(status.as_str_name());
            ExitCode::FAILURE
        }
        Err(error) => refuse(&error),
    }
}

async fn ask_for_task(call: Call) -> Result<pb::GetTaskDetailResponse, Error> {
    let token = token(&call)?;
    let deadline = Deadline::after(call.timeout);
    let channel = connect(&call.server, call.timeout, deadline).await?;
    let task = call.task.unwrap_or_else(Task::example);
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
    let answer = client.get_task_detail(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| failed(status, &call.server.target, call.timeout))
}

async fn ask_for_health(health: Health) -> Result<ServingStatus, Error> {
    let deadline = Deadline::after(health.timeout);
    let channel = connect(&health.server, health.timeout, deadline).await?;
    let mut request = Request::new(HealthCheckRequest {
        service: health.service,
    });
    request.set_timeout(deadline.remaining());
    match HealthClient::new(channel).check(request).await {
        Ok(answer) => Ok(answer.into_inner().status()),
        Err(status) => Err(failed(status, &health.server.target, health.timeout)),
    }
}

/// What a status means that the client library made itself, in place of the server: those have a source.
fn failed(status: Status, target: &Url, timeout: Duration) -> Error {
    let Some(cause) = std::error::Error::source(&status) else {
        return Error::Status(Box::new(status));
    };
    if error_chain::chain(cause).any(|error| error.is::<tonic::TimeoutExpired>()) {
        // The library ends a call at its deadline as CANCELLED.
        let message = format!("no answer within {timeout:?}");
        return Error::Status(Box::new(Status::new(Code::DeadlineExceeded, message)));
    }
    Error::NoAnswer(target.clone(), error_chain::root_cause(cause).to_string())
}

async fn connect(server: &Server, timeout: Duration, deadline: Deadline) -> Result<Channel, Error> {
    let connect_error = |error| Error::Connect(server.target.clone(), error);
    let mut endpoint = Channel::from_shared(server.target.as_str().to_owned())
        .expect("url::base checks that its URL is a URI")
        .user_agent(concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")))
        .expect("name and version are a header value");
    if server.target.scheme() == "https" {
        let mut tls = match &server.ca {
            Some(path) => {
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem("--ca", path)?))
            }
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some(Pair { cert, key }) = &server.pair {
            tls = tls.identity(Identity::from_pem(pem("--cert", cert)?, pem("--key", key)?));
        }
        endpoint = endpoint.tls_config(tls).map_err(connect_error)?;
    }
    match deadline.bound(endpoint.connect()).await {
        Ok(channel) => channel.map_err(connect_error),
        Err(_) => Err(Error::ConnectTimeout(server.target.clone(), timeout)),
    }
}

fn pem(flag: &'static str, path: &PathBuf) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| Error::File(flag, error.kind().to_string()))
}

/// The caller's token, if any, as the value of a header.
fn token(call: &Call) -> Result<Option<MetadataValue<Ascii>>, Error> {
    let text = match (&call.token_file, &call.token) {
        (Some(path), _) => fs::read_to_string(path)
            .map(SecretString::from)
            .map_err(|error| Error::File("--token-file", error.kind().to_string()))?,
        (None, Some(token)) => token.clone(),
        (None, None) => return Ok(None),
    };
    let value: Result<MetadataValue<Ascii>, _> = text.expose_secret().trim_end().parse();
    let mut value = value.map_err(|_| {
        let problem = "holds no token: a header cannot carry it";
        Error::File("--token-file", problem.to_owned())
    })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Prints one line, and ignores a closed standard output.
fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn refuse(error: &Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "rds-task-facade: {error}");
    ExitCode::FAILURE
}
