//! A fake of RDS, IAM and the metadata service, to try and test the facade without a cloud account. Plain HTTP/1.1, on loopback
//! only. `docs/sandbox.md` documents it.
//!
//! It follows the vendor's documentation and shares no wire types and no signing code with the rest of the crate, so that a misspelt
//! field or a wrong signature cannot agree with itself.
//!
//! - [`task`]: the RDS call; [`scenarios`]: the magic instance ids; [`course`]: tasks that change with time
//! - [`auth`], [`signature`]: authentication at the gateway
//! - [`iam`], [`metadata`]: issuers of tokens and keys
//! - [`control`]: paths under `/sandbox/` for tests
//! - [`transport`]: connections, and responses that are not valid HTTP
//! - [`response`]: response formats
//! - [`state`]: the bounded state

mod auth;
mod control;
mod course;
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

use std::{future::Future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};

pub use options::Options;
use response::{Response, gateway_error, no_such_api};
use state::State;
use transport::Script;

use crate::accept::Accept;

/// A token that is always valid.
pub const TOKEN: &str = "sandbox-token";
/// The access key id (AK) of a key that is always valid.
pub const ACCESS_KEY_ID: &str = "SANDBOXACCESSKEY";
/// The secret access key (SK) of that key.
pub const SECRET_ACCESS_KEY: &str = "sandbox-secret-key";
/// The optional security token of that key.
pub const SECURITY_TOKEN: &str = "sandbox-security-token";
/// The IAM user.
pub const USER: &str = "sandbox-user";
/// The password of [`USER`].
pub const PASSWORD: &str = "sandbox-password";
/// The account (domain) of [`USER`].
pub const DOMAIN: &str = "sandbox-domain";
/// Project of the example task in the vendor's documentation. Any project id is accepted.
pub const EXAMPLE_PROJECT_ID: &str = "0483b6b16e954cb88930a360d2c4e663";
/// Instance of the example task.
pub const EXAMPLE_INSTANCE_ID: &str = "1ffc4167903840cb93a3da56d28c14fdin01";
/// Id of the example task.
pub const EXAMPLE_WORKFLOW_ID: &str = "102772a9-31fa-4129-b9f8-7638e2792f3b";

/// Concurrent connections; further ones wait in the accept queue. Above the default of `--max-in-flight`.
const MAX_CONNECTIONS: usize = 4096;

/// Longest request body. The gateway accepts 12 MB, but requests of this API are far shorter.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Longest time to receive a request body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The sandbox, bound to its address.
#[derive(Debug)]
pub struct Sandbox {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<SharedState>,
}

/// The state shared by all connections.
#[derive(Debug)]
struct SharedState(Mutex<State>);

impl SharedState {
    /// Locks the state. Never held across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

impl Sandbox {
    /// Binds the sandbox to a loopback address.
    ///
    /// # Errors
    /// `InvalidInput` for an address that is not loopback, because the sandbox's credentials are public; or the system's error.
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
            shared: Arc::new(SharedState(Mutex::new(State::new()))),
        })
    }

    /// The bound address, with the actual port if port 0 was requested.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes, then drops every connection.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let mut connections = JoinSet::new();
        let mut accept = Accept::new("sandbox");
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                Some(_) = connections.join_next() => {}
                (stream, _) = accept.next(&self.listener), if connections.len() < MAX_CONNECTIONS => {
                    self.shared.state().counts.connections += 1;
                    connections.spawn(transport::serve(stream, Arc::clone(&self.shared)));
                }
            }
        }
    }
}

/// Responds to a request, or returns the script that takes over the connection.
async fn handle(
    shared: Arc<SharedState>,
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

    let request_id =
        HeaderValue::try_from(request_id).expect("hex digits are a valid header value");
    let now = shared.state().now();
    let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let date = HeaderValue::try_from(date).expect("a date is a valid header value");
    response.headers_mut().insert("x-request-id", request_id);
    response.headers_mut().insert(header::DATE, date);
    Ok(response.map(Full::new))
}

async fn route(
    shared: &SharedState,
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
