//! HTTP clients for the vendor's endpoints, and the limits of their requests.
//!
//! Calls of RDS reuse connections, and a response decides whether its connection is used again. The requests for credentials and traces are
//! seconds to hours apart, so each opens a connection and looks the name up again.

mod connect;
mod error;
mod pool;
mod resolver;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Request, Uri,
    header::{ACCEPT, HOST, PROXY_AUTHORIZATION, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, DEFAULT_VERSIONS, RootCertStore, crypto::aws_lc_rs::default_provider};
use serde::de::IgnoredAny;
use tokio::io::{AsyncRead, AsyncWrite};
use url::{Position, Url};

pub use self::error::{Error, Obstacle};
use self::{
    connect::Connector,
    error::{body_error, connect_error, request_error},
    pool::{Connection, MAX_AGE, Pool},
    resolver::Resolver,
};
use crate::{options::url::Proxy, pem, reason::Reason};

/// Size limit for a response of RDS. A task with its parts takes a few thousand bytes.
const MAX_BODY_BYTES: usize = 1 << 20;

const AGENT: &str = concat!("rds-task-facade/", env!("CARGO_PKG_VERSION"));

/// The settings of a client.
#[derive(Debug, Clone)]
pub struct Config {
    /// Made once by [`tls_config`] and cloned: clones share the roots and the sessions for resumption.
    pub tls: ClientConfig,
    /// The proxy, if any. Proxy variables of the environment are not read.
    pub proxy: Option<Proxy>,
    /// For name lookup, TCP and TLS together.
    pub connect_timeout: Duration,
}

/// Why a client could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The file of extra roots cannot be read.
    #[error("the CA file cannot be read: {0}")]
    RootsFile(#[from] io::Error),
    /// The extra roots are not PEM certificates.
    #[error("the CA file {0}")]
    Roots(#[from] pem::Error),
    /// The client library rejects the proxy's URL.
    #[error("the proxy's URL cannot be used")]
    Proxy,
    /// The endpoint's URL has no host that a request can name.
    #[error("the endpoint's URL cannot be used")]
    Url,
    /// TLS cannot be set up, most often because the system has no roots.
    #[error(
        "the TLS client cannot be set up; most often the system has no CA certificates (install ca-certificates or set --upstream-ca)"
    )]
    Tls,
    /// The system refuses the threads for name lookups.
    #[error("cannot start the threads for name lookups; raise the limit on processes")]
    Threads,
}

/// Whether a client trusts the system's certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemRoots {
    /// Trusted, together with those in a file. Loading them takes about 5 ms.
    Trusted,
    /// Not loaded, because the peer uses plain HTTP or only a file is trusted.
    Ignored,
}

/// TLS 1.2 and newer for HTTP/1.1, with the system's certificates and those in `extra_pem`.
///
/// # Errors
/// [`BuildError::Roots`] when `extra_pem` cannot be used, [`BuildError::Tls`] when the system has no certificates and
/// `extra_pem` is absent.
pub fn tls_config(
    system: SystemRoots,
    extra_pem: Option<&[u8]>,
) -> Result<ClientConfig, BuildError> {
    let mut trusted = match extra_pem {
        Some(pem) => pem::roots(pem)?,
        None => RootCertStore::empty(),
    };
    if system == SystemRoots::Trusted {
        let loaded = rustls_native_certs::load_native_certs();
        let (_, unfit) = trusted.add_parsable_certificates(loaded.certs);
        let ignored = unfit + loaded.errors.len();
        if trusted.is_empty() {
            return Err(BuildError::Tls);
        }
        if ignored > 0 {
            tracing::warn!(ignored, "some of the system's certificates cannot be read");
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(DEFAULT_VERSIONS)
        .map_err(|_| BuildError::Tls)?
        .with_root_certificates(trusted)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The addresses of a host name, looked up as connections do it.
///
/// # Errors
/// One sentence: the name cannot be looked up.
pub async fn look_up(name: &str) -> Result<Vec<IpAddr>, String> {
    let resolver = Resolver::system().map_err(|_| BuildError::Threads.to_string())?;
    let found = resolver.addresses(name.to_owned()).await;
    let found = found.map_err(|error| error.to_string())?;
    Ok(found.iter().map(SocketAddr::ip).collect())
}

/// Connects to the host of `url`, with TLS if its scheme is https, for another protocol than HTTP.
///
/// # Errors
/// Why there is no connection.
pub async fn connect(
    config: &Config,
    url: &Url,
) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, String> {
    let origin = url.origin().ascii_serialization().parse();
    let origin: Uri = origin.map_err(|_| BuildError::Url.to_string())?;
    let connector = Connector::new(config, origin).map_err(|error| error.to_string())?;
    let stream = connector.connect().await;
    Ok(TokioIo::new(
        stream.map_err(|error| connect_error(&*error).cause)?,
    ))
}

/// Reads a body of up to `max_bytes`.
///
/// A body that is cut off after a complete JSON object counts as read: some peers close a TLS connection without `close_notify`.
async fn read_body(body: &mut Incoming, max_bytes: usize) -> Result<Bytes, Error> {
    let length = body.size_hint().exact().unwrap_or(0);
    if length > max_bytes as u64 {
        return Err(too_large(max_bytes));
    }
    let Some(first) = next_chunk(body, &[]).await? else {
        return Ok(Bytes::new());
    };
    if first.len() > max_bytes {
        return Err(too_large(max_bytes));
    }
    let mut next = next_chunk(body, &first).await?;
    if next.is_none() {
        // Most bodies are one chunk, which is returned without a copy.
        return Ok(first);
    }
    let mut read = BytesMut::from(first);
    // Allocates the rest at once, because growing in steps copies the data and fragments the heap.
    read.reserve((length as usize).saturating_sub(read.len()));
    while let Some(chunk) = next {
        if read.len() + chunk.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        read.extend_from_slice(&chunk);
        next = next_chunk(body, &read).await?;
    }
    Ok(read.freeze())
}

async fn next_chunk(body: &mut Incoming, read: &[u8]) -> Result<Option<Bytes>, Error> {
    while let Some(frame) = body.frame().await {
        match frame {
            Err(_) if is_json_object(read) => return Ok(None),
            Err(error) => return Err(body_error(&error)),
            // Trailers are ignored.
            Ok(frame) => {
                if let Ok(chunk) = frame.into_data() {
                    return Ok(Some(chunk));
                }
            }
        }
    }
    Ok(None)
}

fn too_large(max_bytes: usize) -> Error {
    let cause = format!("the body is over {} KiB", max_bytes >> 10);
    Error::new(Reason::UpstreamResponseTooLarge, false, cause)
}

fn is_json_object(body: &[u8]) -> bool {
    let is_object = body.trim_ascii_start().starts_with(b"{");
    is_object && serde_json::from_slice::<IgnoredAny>(body).is_ok()
}

/// Whether a request may be sent on a connection that has delivered other responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// On an idle connection, if there is one.
    Allowed,
    /// Only on a new connection: an earlier attempt failed, perhaps because the name has moved and idle connections lead to the old address.
    Forbidden,
}

/// A client of one origin. Each worker has its own, because a connection is driven by the runtime that opened it.
#[derive(Debug, Clone)]
pub struct Client(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    /// Scheme, host, and port unless it is the scheme's default.
    origin: String,
    /// Host and port.
    host: HeaderValue,
    connector: Connector,
    pool: Arc<Pool>,
    max_age: Duration,
}

impl Client {
    /// A client of the origin of `url` with at most `max_idle` idle connections.
    ///
    /// # Errors
    /// [`BuildError`] for a setting that cannot be used.
    pub fn new(config: &Config, url: &Url, max_idle: usize) -> Result<Self, BuildError> {
        Self::with_max_age(config, url, max_idle, MAX_AGE)
    }

    fn with_max_age(
        config: &Config,
        url: &Url,
        max_idle: usize,
        max_age: Duration,
    ) -> Result<Self, BuildError> {
        let origin = url.origin().ascii_serialization();
        let uri: Uri = origin.parse().map_err(|_| BuildError::Url)?;
        let host = &url[Position::BeforeHost..Position::AfterPort];
        Ok(Self(Arc::new(Origin {
            host: HeaderValue::from_str(host).map_err(|_| BuildError::Url)?,
            origin,
            connector: Connector::new(config, uri)?,
            pool: Pool::new(max_idle),
            max_age,
        })))
    }

    /// Sends a request, whose URI is a path, and waits for the response head. Dropping the future closes the connection.
    ///
    /// # Errors
    /// [`Error`] when no head arrived.
    pub async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        reuse: Reuse,
    ) -> Result<Response, Error> {
        let headers = request.headers_mut();
        headers.insert(HOST, self.0.host.clone());
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        if let Some(proxy) = self.0.connector.forwarding_proxy() {
            if let Some(credential) = proxy.basic_auth() {
                headers.insert(PROXY_AUTHORIZATION, credential.clone());
            }
            let target = format!("{}{}", self.0.origin, request.uri());
            *request.uri_mut() = target.parse().expect("an origin and a path");
        }
        loop {
            let idle = match reuse {
                Reuse::Allowed => self.0.pool.take().await,
                Reuse::Forbidden => None,
            };
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.0.open(reuse).await?,
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    return Ok(Response {
                        response,
                        is_complete: false,
                        connection,
                        pool: Arc::clone(&self.0.pool),
                    });
                }
                Err(mut failed) => match failed.take_message() {
                    // The peer closed an idle connection before the request was written.
                    Some(unsent) if connection.is_used => request = unsent,
                    _ => {
                        if connection.is_used {
                            // Perhaps the peer behind the idle connections has been replaced.
                            self.0.pool.failed();
                        }
                        return Err(request_error(failed.error()));
                    }
                },
            }
        }
    }

    /// Records that no response head arrived in time: perhaps the peer behind the idle connections is gone.
    pub fn timed_out(&self) {
        self.0.pool.failed();
    }
}

impl Origin {
    /// Opens a connection, unless another one may be reused and becomes idle first.
    async fn open(&self, reuse: Reuse) -> Result<Connection, Error> {
        let permit = self.connector.permits.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        if reuse == Reuse::Allowed
            && let Some(connection) = self.pool.take().await
        {
            return Ok(connection);
        }
        let stream = self.connector.connect().await;
        let stream = stream.map_err(|error| {
            let error = connect_error(&*error);
            if error.reason == Reason::Overloaded {
                self.pool.clear();
            }
            error
        })?;
        // Invalid header lines are safe to accept here: a connection carries one request at a time, and only the length and the transfer
        // encoding decide where a reply ends.
        let opened = http1::Builder::new()
            .allow_obsolete_multiline_headers_in_responses(true)
            .allow_spaces_after_header_name_in_responses(true)
            .ignore_invalid_headers_in_responses(true)
            .handshake(stream)
            .await;
        let (sender, driver) = opened.map_err(|error| request_error(&error))?;
        tokio::spawn(async {
            // An error also reaches the request, if there is one.
            let _ = driver.await;
        });
        Ok(Connection::new(sender, self.max_age))
    }
}

/// A response whose head has arrived. Dropping it closes its connection; [`Self::release`] keeps it for the next request.
#[derive(Debug)]
pub struct Response {
    response: http::Response<Incoming>,
    is_complete: bool,
    connection: Connection,
    pool: Arc<Pool>,
}

impl Response {
    /// The status, from 100 to 999: the client library passes on numbers outside the HTTP status classes.
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Reads the body, up to [`MAX_BODY_BYTES`].
    ///
    /// # Errors
    /// [`Error`] when it breaks off or is longer.
    pub async fn body(&mut self) -> Result<Bytes, Error> {
        self.body_up_to(MAX_BODY_BYTES).await
    }

    /// Reads the body, up to `max_bytes`.
    ///
    /// # Errors
    /// As [`Self::body`].
    pub async fn body_up_to(&mut self, max_bytes: usize) -> Result<Bytes, Error> {
        let read = read_body(self.response.body_mut(), max_bytes).await;
        self.is_complete = read.is_ok();
        read
    }

    /// Keeps the connection for the next request, unless the status is 500 or above or the body was not read to its end.
    pub fn release(self) {
        if self.status() >= 500 {
            self.pool.failed();
        } else if self.is_complete {
            self.pool.keep(self.connection);
        }
    }
}

#[cfg(test)]
mod tests;
