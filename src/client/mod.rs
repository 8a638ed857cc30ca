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

use secrecy::{ExposeSecret as _, SecretString};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{config::BaseUrl, deadline::Deadline, error_chain, pb};

/// The server to call, and how.
#[derive(Debug)]
pub struct Server {
    /// Scheme, host and port.
    pub target: BaseUrl,
    /// PEM file of the certificates to trust, in place of the system's.
    pub ca: Option<PathBuf>,
    /// PEM files of the client's certificate chain and key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Upper bound of connecting and of the call together.
    pub timeout: Duration,
}

/// `call`: asks for one task.
#[derive(Debug)]
pub struct Call {
    /// The server.
    pub server: Server,
    /// What to ask for.
    pub task: Task,
    /// What to send as `x-auth-token`.
    pub token: Option<Token>,
}

/// The task to ask for.
#[derive(Debug, PartialEq, Eq)]
pub struct Task {
    /// `project_id` of the request.
    pub project_id: String,
    /// `instance_id` of the request.
    pub instance_id: String,
    /// `workflow_id` of the request.
    pub workflow_id: String,
    /// `workflow_name` of the request.
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

/// The caller's token, or where it is.
#[derive(Debug)]
pub enum Token {
    /// In this file.
    File(PathBuf),
    /// The token itself.
    Fixed(SecretString),
}

/// `health`: asks for the health of a server or of one of its services.
#[derive(Debug)]
pub struct Health {
    /// The server.
    pub server: Server,
    /// Full name of the service; empty for the server as a whole.
    pub service: String,
}

/// Why there is no answer.
#[derive(Debug)]
enum Error {
    /// A file given on the command line is of no use. The text names the flag.
    File(&'static str, String),
    /// No connection.
    Connect(BaseUrl, tonic::transport::Error),
    /// No connection in time.
    ConnectTimeout(BaseUrl, Duration),
    /// A connection, and nothing more. The text is the innermost cause: a server that refuses a client's certificate says
    /// so only after the handshake, and the client may see no more of it than the end of the connection.
    NoAnswer(BaseUrl, String),
    /// The server says why.
    Status(Box<Status>),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let advice = "check --target, and that `rds-task-facade serve` runs there";
        match self {
            Self::File(flag, problem) => write!(f, "{flag}: {problem}"),
            Self::Connect(target, error) => {
                let cause = error_chain::root_cause(error);
                write!(f, "cannot connect to {target}: {cause}; {advice}")
            }
            Self::ConnectTimeout(target, timeout) => {
                write!(f, "cannot connect to {target} within {timeout:?}; {advice}")
            }
            Self::NoAnswer(target, cause) => {
                write!(f, "no answer from {target}: {cause}")?;
                match target.as_str().starts_with("https:") {
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
    let token = call.token.map(Token::metadata).transpose()?;
    let deadline = Deadline::after(call.server.timeout);
    let channel = connect(&call.server, deadline).await?;
    let mut request = Request::new(pb::GetTaskDetailRequest {
        project_id: call.task.project_id,
        instance_id: call.task.instance_id,
        workflow_id: call.task.workflow_id,
        workflow_name: call.task.workflow_name,
    });
    request.set_timeout(deadline.remaining());
    if let Some(token) = token {
        request.metadata_mut().insert("x-auth-token", token);
    }
    let mut client = pb::task_service_client::TaskServiceClient::new(channel);
    let answer = client.get_task_detail(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| failed(status, &call.server))
}

async fn ask_for_health(health: Health) -> Result<ServingStatus, Error> {
    let deadline = Deadline::after(health.server.timeout);
    let channel = connect(&health.server, deadline).await?;
    let mut request = Request::new(HealthCheckRequest {
        service: health.service,
    });
    request.set_timeout(deadline.remaining());
    match HealthClient::new(channel).check(request).await {
        Ok(answer) => Ok(answer.into_inner().status()),
        Err(status) => Err(failed(status, &health.server)),
    }
}

/// What a status means that the client library made itself, in place of the server: those have a source.
fn failed(status: Status, server: &Server) -> Error {
    let Some(cause) = std::error::Error::source(&status) else {
        return Error::Status(Box::new(status));
    };
    if error_chain::chain(cause).any(|error| error.is::<tonic::TimeoutExpired>()) {
        // The library ends a call at its deadline as CANCELLED.
        let message = format!("no answer within {:?}", server.timeout);
        return Error::Status(Box::new(Status::new(Code::DeadlineExceeded, message)));
    }
    Error::NoAnswer(
        server.target.clone(),
        error_chain::root_cause(cause).to_string(),
    )
}

async fn connect(server: &Server, deadline: Deadline) -> Result<Channel, Error> {
    let connect_error = |error| Error::Connect(server.target.clone(), error);
    let mut endpoint = Channel::from_shared(server.target.as_str().to_owned())
        .expect("a base URL is a URI")
        .user_agent(concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")))
        .expect("name and version are a header value");
    if server.target.as_str().starts_with("https:") {
        let mut tls = match &server.ca {
            Some(path) => {
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem("--ca", path)?))
            }
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((cert, key)) = &server.identity {
            tls = tls.identity(Identity::from_pem(pem("--cert", cert)?, pem("--key", key)?));
        }
        endpoint = endpoint.tls_config(tls).map_err(connect_error)?;
    }
    match deadline.bound(endpoint.connect()).await {
        Ok(channel) => channel.map_err(connect_error),
        Err(_) => Err(Error::ConnectTimeout(server.target.clone(), server.timeout)),
    }
}

fn pem(flag: &'static str, path: &PathBuf) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| Error::File(flag, error.kind().to_string()))
}

impl Token {
    fn metadata(self) -> Result<MetadataValue<Ascii>, Error> {
        let text = match self {
            Self::File(path) => fs::read_to_string(path)
                .map(SecretString::from)
                .map_err(|error| Error::File("--token-file", error.kind().to_string()))?,
            Self::Fixed(token) => token,
        };
        let mut value: MetadataValue<Ascii> =
            text.expose_secret().trim_end().parse().map_err(|_| {
                Error::File(
                    "--token-file",
                    "holds no token: a header cannot carry it".to_owned(),
                )
            })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// Prints one line; a reader that went away is no failure of ours.
fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn refuse(error: &Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "rds-task-facade: {error}");
    ExitCode::FAILURE
}
