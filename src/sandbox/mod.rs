//! An embedded stand-in for RDS, IAM and the metadata service, so that the facade can be tried and tested without a cloud
//! account. Plain HTTP/1.1, on loopback only.
//!
//! It is written by hand from the vendor's pages and shares no wire types and no signing code with the rest of the crate, so
//! that a misspelt field or a wrong signature cannot agree with itself. `docs/sandbox.md` is its manual.
//!
//! - [`task`]: the RDS call, its two tasks and what the magic instance ids of [`scenarios`] make of it
//! - [`auth`], [`signature`]: what the gateway asks of a credential
//! - [`iam`], [`metadata`]: where credentials come from
//! - [`control`]: the sandbox's own paths under `/sandbox/`
//! - [`transport`]: connections, and the answers that are no HTTP
//! - [`state`]: everything that is remembered, bounded

mod answer;
mod auth;
mod control;
mod iam;
mod metadata;
mod options;
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
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};

use answer::{Answer, gateway_error, no_such_api};
pub use options::Options;
pub use scenarios::{SCENARIOS, Scenario};
use state::State;
use transport::Script;

/// The token that is always good.
pub const TOKEN: &str = "sandbox-token";
/// The key that is always good: AK.
pub const ACCESS_KEY_ID: &str = "SANDBOXACCESSKEY";
/// The key that is always good: SK.
pub const SECRET_ACCESS_KEY: &str = "sandbox-secret-key";
/// The security token that may go with the key that is always good.
pub const SECURITY_TOKEN: &str = "sandbox-security-token";
/// The user that gets tokens.
pub const USER: &str = "sandbox-user";
/// The password of [`USER`].
pub const PASSWORD: &str = "sandbox-password";
/// The account (domain) of [`USER`].
pub const DOMAIN: &str = "sandbox-domain";
/// Project of the example on the vendor's page. Any other project id does as well.
pub const EXAMPLE_PROJECT_ID: &str = "0483b6b16e954cb88930a360d2c4e663";
/// Instance of the example on the vendor's page.
pub const EXAMPLE_INSTANCE_ID: &str = "1ffc4167903840cb93a3da56d28c14fdin01";
/// Task of the example on the vendor's page.
pub const EXAMPLE_WORKFLOW_ID: &str = "102772a9-31fa-4129-b9f8-7638e2792f3b";
/// Name of the task of the example on the vendor's page.
pub const EXAMPLE_WORKFLOW_NAME: &str = "CreateMysqlSingleHAInstance";
/// A task of [`EXAMPLE_INSTANCE_ID`] that begins with the sandbox and is over after two minutes.
pub const RUNNING_TASK: &str = "running-task";

/// How long [`RUNNING_TASK`] runs.
const RUNNING_TASK_SECONDS: i64 = 120;

/// Connections at once; further ones wait in the kernel's queue. More than the facade's default of RPCs in flight.
const MAX_CONNECTIONS: usize = 4096;

/// Longest request body. The gateway takes 12 MB; no request of this API comes near either.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// For the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause after a failed accept, so that running out of file descriptors does not keep a core busy.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The stand-in, bound to its address.
#[derive(Debug)]
pub struct Sandbox {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared(Mutex<State>);

impl Shared {
    /// The state; never held over an await.
    fn state(&self) -> MutexGuard<'_, State> {
        // A request that panicked half-way leaves counters, nothing that could mislead the next one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sandbox {
    /// Binds the sandbox to a loopback address.
    ///
    /// # Errors
    /// `InvalidInput` for an address beyond loopback, since everybody knows the sandbox's passwords; else what the system
    /// says.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the sandbox listens on loopback addresses only, and {address} is none"),
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

    /// Serves until `shutdown` is done; then every connection is dropped.
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

/// Answers one request, or hands the connection over to a script.
async fn handle(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Script> {
    let request_id = format!("{:032x}", fastrand::u128(..));
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    let mut answer = match timeout(BODY_TIMEOUT, body).await {
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

    let request_id = HeaderValue::try_from(request_id).expect("hex digits make a header value");
    let now = shared.state().now();
    let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let date = HeaderValue::try_from(date).expect("a date makes a header value");
    answer.headers_mut().insert("x-request-id", request_id);
    answer.headers_mut().insert(header::DATE, date);
    Ok(answer.map(Full::new))
}

async fn route(
    shared: &Shared,
    request: &Request<Bytes>,
    request_id: &str,
) -> Result<Answer, Script> {
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
            let control = control::answer(request, &mut shared.state());
            return Ok(control.unwrap_or_else(|| no_such_api(request_id)));
        }
    };
    let delay = shared.state().credential_delay;
    sleep(delay).await;
    Ok(issue(request, &mut shared.state()))
}
