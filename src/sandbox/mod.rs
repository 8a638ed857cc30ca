//! A fake of RDS, IAM and the metadata service, to try and test the facade without a cloud account. Plain HTTP/1.1, on loopback
//! only. `docs/sandbox.md` is its manual.
//!
//! It follows the vendor's documentation and shares no wire types and no signing code with the rest of the crate, so that a misspelt
//! field or a wrong signature is not in both.
//!
//! - [`task`]: the RDS call with its two tasks; [`scenarios`]: the magic instance ids
//! - [`auth`], [`signature`]: the gateway's check of credentials
//! - [`iam`], [`metadata`]: the issuers of credentials
//! - [`control`]: the sandbox's own paths under `/sandbox/`
//! - [`transport`]: connections, and responses that are not valid HTTP
//! - [`response`]: the shapes of responses
//! - [`state`]: the bounded state

mod auth;
mod control;
mod iam;
mod metadata;
mod options;
mod response;
mod scenarios;
mod signature;
mod state;
mod task;
mod transport;

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};

pub use options::Options;
use response::{Response, gateway_error, no_such_api};
pub use scenarios::{SCENARIOS, Scenario};
use state::State;
use transport::Script;

/// A token that is always valid.
pub const TOKEN: &str = "sandbox-token";
/// The access key id (AK) of a key that is always valid.
pub const ACCESS_KEY_ID: &str = "SANDBOXACCESSKEY";
/// The secret access key (SK) of that key.
pub const SECRET_ACCESS_KEY: &str = "sandbox-secret-key";
/// The optional security token of that key.
pub const SECURITY_TOKEN: &str = "sandbox-security-token";
/// The user that can get tokens.
pub const USER: &str = "sandbox-user";
/// The password of [`USER`].
pub const PASSWORD: &str = "sandbox-password";
/// The account (domain) of [`USER`].
pub const DOMAIN: &str = "sandbox-domain";
/// Project of the example in the vendor's documentation. Any project id is accepted.
pub const EXAMPLE_PROJECT_ID: &str = "0483b6b16e954cb88930a360d2c4e663";
/// Instance of the example.
pub const EXAMPLE_INSTANCE_ID: &str = "1ffc4167903840cb93a3da56d28c14fdin01";
/// Task of the example.
pub const EXAMPLE_WORKFLOW_ID: &str = "102772a9-31fa-4129-b9f8-7638e2792f3b";
/// Name of the task of the example.
pub const EXAMPLE_WORKFLOW_NAME: &str = "CreateMysqlSingleHAInstance";
/// A task of [`EXAMPLE_INSTANCE_ID`] that starts with the sandbox and takes two minutes.
pub const RUNNING_TASK: &str = "running-task";

/// How long [`RUNNING_TASK`] takes.
const RUNNING_TASK_SECONDS: i64 = 120;

/// Concurrent connections; more wait in the kernel's queue. Above the facade's default limit of calls in flight.
const MAX_CONNECTIONS: usize = 4096;

/// Longest request body. The gateway accepts 12 MB, but requests of this API are far shorter than either.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Longest time for the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause after a failed accept, so that a lack of file descriptors does not keep a core busy.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The sandbox, bound to its address.
#[derive(Debug)]
pub struct Sandbox {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// The state that all connections share.
#[derive(Debug)]
struct Shared(Mutex<State>);

impl Shared {
    /// Locks the state; never held across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in the middle of a request leaves no state that the next request could not use.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sandbox {
    /// Binds the sandbox to a loopback address.
    ///
    /// # Errors
    /// `InvalidInput` for an address that is not loopback, because the sandbox's passwords are public; otherwise the error of
    /// the system.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the sandbox listens on loopback addresses only, not on {address}"),
            ));
        }
        let listener = TcpListener::bind(address).await?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            shared: Arc::new(Shared(Mutex::new(State::new()))),
        })
    }

    /// The address it listens on, with the port that the system chose for port 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes; then drops every connection.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                Some(_) = connections.join_next() => {}
                accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => {
                        self.shared.state().counts.connections += 1;
                        connections.spawn(transport::serve(stream, Arc::clone(&self.shared)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the sandbox cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
}

/// Responds to one request, or hands the connection over to a script.
async fn handle(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<http::Response<Full<Bytes>>, Script> {
    let request_id = format!("{:032x}", fastrand::u128(..));
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    let mut response = match timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => {
            let request = Request::from_parts(parts, body.to_bytes());
            route(&shared, &request, &request_id).await?
        }
        _ => gateway_error(
            StatusCode::PAYLOAD_TOO_LARGE,
            "APIGW.0201",
            "The request body is too large or did not arrive.",
            &request_id,
        ),
    };

    let request_id = HeaderValue::try_from(request_id).expect("hex digits are a header value");
    let now = shared.state().now();
    let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let date = HeaderValue::try_from(date).expect("a date is a header value");
    response.headers_mut().insert("x-request-id", request_id);
    response.headers_mut().insert(header::DATE, date);
    Ok(response.map(Full::new))
}

async fn route(
    shared: &Shared,
    request: &Request<Bytes>,
    request_id: &str,
) -> Result<Response, Script> {
    let path = request.uri().path();
    let issue = match (request.method(), path) {
        (&Method::POST, "/v3/auth/tokens") => iam::issue_token,
        (&Method::PUT, "/meta-data/latest/api/token") => metadata::issue_metadata_token,
        (&Method::GET, "/openstack/latest/securitykey") => metadata::issue_key,
        (method, _) => {
            let task = task::parse_path(path).filter(|_| method == Method::POST);
            if let Some(task) = task {
                return task::show_task(shared, request, task, request_id).await;
            }
            let control = control::respond(request, &mut shared.state());
            return Ok(control.unwrap_or_else(|| no_such_api(request_id)));
        }
    };
    let delay = shared.state().credential_delay;
    sleep(delay).await;
    Ok(issue(request, &mut shared.state()))
}
