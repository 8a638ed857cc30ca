//! HTTP clients for the vendor's endpoints, and the limits of their exchanges.
//!
//! [`Client`] serves the request path and maps the library's errors to [`Error`]. The clients for credentials and traces use the same settings
//! ([`client_builder`]) and the same limit on bodies ([`read_body`]).

use std::{error::Error as StdError, io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::TryFutureExt as _;
use http::HeaderMap;
use reqwest::{ClientBuilder, Proxy, Url, redirect};
use rustls::{
    ClientConfig, DEFAULT_VERSIONS, RootCertStore,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde::de::IgnoredAny;
use tower::{limit::ConcurrencyLimitLayer, timeout::TimeoutLayer};

use crate::{descriptors, error_chain::chain, reason::Reason};

/// Size limit for a response of RDS. A task with its parts takes a few thousand bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// Shorter than the keep-alive of common gateways (60 s and more), so that the client closes idle connections before they do.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Idle connections kept per worker, equal to the default of `--max-in-flight`: with fewer, many concurrent calls would close and reopen
/// connections. Idle ones are closed after [`POOL_IDLE_TIMEOUT`].
const POOL_MAX_IDLE: usize = 2048;

/// Limit on connects in progress per client. A thousand concurrent TLS handshakes would compete for the CPU until all of them time out.
const MAX_CONNECTS: usize = 256;

/// The settings of a client.
#[derive(Clone)]
pub struct Config {
    /// Made once by [`tls_config`] and cloned: clones share the roots and the sessions for resumption.
    pub tls: ClientConfig,
    /// Rejects URLs without TLS, for requests that carry credentials.
    pub https_only: bool,
    /// The proxy, if any. Proxy variables of the environment are not read.
    pub proxy: Option<Url>,
    /// For name lookup, TCP and TLS together.
    pub connect_timeout: Duration,
}

/// Why a client could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The extra roots are not PEM certificates.
    #[error("the CA file holds no readable PEM certificate")]
    Roots,
    /// The client library rejects the proxy's URL.
    #[error("the proxy's URL cannot be used")]
    Proxy,
    /// TLS cannot be set up, most often because the system has no roots.
    #[error(
        "the TLS client cannot be set up; most often the system has no CA certificates (install ca-certificates or set --upstream-ca)"
    )]
    Tls,
}

/// An exchange without a complete response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Error {
    /// One of the transport reasons, `UpstreamResponseTooLarge`, or `Overloaded` if this process is out of descriptors.
    pub reason: Reason,
    /// Whether the same request may succeed on another connection.
    pub retryable: bool,
    /// Whether the connect timeout expired.
    pub timed_out: bool,
}

impl Error {
    const fn transient(reason: Reason) -> Self {
        Self {
            reason,
            retryable: true,
            timed_out: false,
        }
    }

    const fn permanent(reason: Reason) -> Self {
        Self {
            reason,
            retryable: false,
            timed_out: false,
        }
    }
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
        Some(pem) => roots(pem)?,
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

/// The settings common to every HTTP client of the program: no redirects, no retries inside the library, no proxies from the
/// environment, TLS as configured.
///
/// # Errors
/// [`BuildError`] for a setting that cannot be used.
pub fn client_builder(config: &Config) -> Result<ClientBuilder, BuildError> {
    let mut builder = reqwest::Client::builder()
        .https_only(config.https_only)
        .redirect(redirect::Policy::none())
        // With a limit of 0 the library does not copy each request for a retry; `never` alone does not prevent that.
        .retry(reqwest::retry::never().max_retries_per_request(0))
        .referer(false)
        .no_proxy()
        .http1_only()
        .tls_backend_preconfigured(config.tls.clone())
        // Not `connect_timeout`, which would include the wait for a permit.
        .connector_layer(TimeoutLayer::new(config.connect_timeout))
        .connector_layer(ConcurrencyLimitLayer::new(MAX_CONNECTS))
        .user_agent(concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")));
    if let Some(proxy) = &config.proxy {
        builder = builder.proxy(Proxy::all(proxy.clone()).map_err(|_| BuildError::Proxy)?);
    }
    Ok(builder)
}

/// Builds the client of a [`client_builder`].
///
/// # Errors
/// [`BuildError::Tls`] when TLS cannot be set up.
pub fn build(builder: ClientBuilder) -> Result<reqwest::Client, BuildError> {
    builder.build().map_err(|_| BuildError::Tls)
}

/// A body that was not read to its end.
#[derive(Debug)]
pub enum BodyError {
    /// It is longer than allowed.
    TooLarge,
    /// It is cut off, or its framing is broken.
    Broken(reqwest::Error),
}

/// Reads a body of up to `max_bytes`.
///
/// A body that is cut off after a complete JSON object counts as read: some peers close a TLS connection without `close_notify`.
///
/// # Errors
/// [`BodyError`] when it is longer or broken.
pub async fn read_body(
    response: &mut reqwest::Response,
    max_bytes: usize,
) -> Result<Bytes, BodyError> {
    let length = response.content_length().unwrap_or(0);
    if length > max_bytes as u64 {
        return Err(BodyError::TooLarge);
    }
    let Some(first) = next_chunk(response, &[]).await? else {
        return Ok(Bytes::new());
    };
    if first.len() > max_bytes {
        return Err(BodyError::TooLarge);
    }
    let mut next = next_chunk(response, &first).await?;
    if next.is_none() {
        // Most bodies are one chunk, which is returned without a copy.
        return Ok(first);
    }
    let mut body = BytesMut::from(first);
    // Allocates the rest at once, because growing in steps copies the data and fragments the heap.
    body.reserve((length as usize).saturating_sub(body.len()));
    while let Some(chunk) = next {
        if body.len() + chunk.len() > max_bytes {
            return Err(BodyError::TooLarge);
        }
        body.extend_from_slice(&chunk);
        next = next_chunk(response, &body).await?;
    }
    Ok(body.freeze())
}

async fn next_chunk(
    response: &mut reqwest::Response,
    body: &[u8],
) -> Result<Option<Bytes>, BodyError> {
    match response.chunk().await {
        Err(_) if is_json_object(body) => Ok(None),
        next => next.map_err(BodyError::Broken),
    }
}

fn is_json_object(body: &[u8]) -> bool {
    let is_object = body.trim_ascii_start().starts_with(b"{");
    is_object && serde_json::from_slice::<IgnoredAny>(body).is_ok()
}

/// A pool of connections. Each worker has its own, because a connection is driven by the runtime that opened it.
#[derive(Debug, Clone)]
pub struct Client(reqwest::Client);

impl Client {
    /// # Errors
    /// [`BuildError`] for a setting that cannot be used.
    pub fn new(config: &Config) -> Result<Self, BuildError> {
        let builder = client_builder(config)?
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .pool_max_idle_per_host(POOL_MAX_IDLE)
            // Invalid header lines are safe to accept here: a connection carries one exchange at a time, and only the length and the
            // transfer encoding decide where a reply ends.
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true);
        build(builder).map(Self)
    }

    /// Sends a request and waits for the response head. Dropping the future closes the connection.
    ///
    /// # Errors
    /// [`Error`] when no head arrived.
    pub fn send(
        &self,
        request: reqwest::Request,
    ) -> impl Future<Output = Result<Response, Error>> + use<> {
        // Not an `async fn`, which would keep a second copy of the request until the response arrives.
        self.0
            .execute(request)
            .map_ok(Response)
            .map_err(|error| head_error(&error))
    }
}

/// A response whose head has arrived.
#[derive(Debug)]
pub struct Response(reqwest::Response);

impl Response {
    /// The status, from 100 to 999: the client library passes on numbers outside the HTTP status classes.
    pub fn status(&self) -> u16 {
        self.0.status().as_u16()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.0.headers()
    }

    /// Reads the body, up to [`MAX_BODY_BYTES`].
    ///
    /// # Errors
    /// [`Error`] when it breaks off or is longer.
    pub async fn body(&mut self) -> Result<Bytes, Error> {
        read_body(&mut self.0, MAX_BODY_BYTES)
            .await
            .map_err(|error| match error {
                BodyError::TooLarge => Error::permanent(Reason::UpstreamResponseTooLarge),
                BodyError::Broken(error) => body_error(&error),
            })
    }
}

/// Whether `pem` can be the extra roots of a client.
///
/// # Errors
/// [`BuildError::Roots`] when it holds no certificate or one that cannot be read.
pub fn check_roots(pem: &[u8]) -> Result<(), BuildError> {
    roots(pem).map(drop)
}

fn roots(pem: &[u8]) -> Result<RootCertStore, BuildError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|_| BuildError::Roots)?;
        roots.add(certificate).map_err(|_| BuildError::Roots)?;
    }
    if roots.is_empty() {
        return Err(BuildError::Roots);
    }
    Ok(roots)
}

/// The error of a request that got no response head.
fn head_error(error: &reqwest::Error) -> Error {
    let mut io_errors = chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    if io_errors.any(descriptors::is_shortage) || error.is_dns() && descriptors::are_exhausted() {
        return Error::permanent(Reason::Overloaded);
    }
    if error.is_dns() {
        return Error::transient(Reason::UpstreamDns);
    }
    if chain(error).any(is_tls) {
        return Error::permanent(Reason::UpstreamTls);
    }
    if error.is_connect() {
        return Error {
            timed_out: error.is_timeout(),
            ..Error::transient(Reason::UpstreamConnect)
        };
    }
    match chain(error).find_map(|cause| cause.downcast_ref::<hyper::Error>()) {
        Some(error) if error.is_parse_too_large() => Error::permanent(Reason::UpstreamProtocol),
        Some(error) if error.is_parse() => Error::transient(Reason::UpstreamProtocol),
        _ => Error::transient(Reason::UpstreamReset),
    }
}

/// The error of a body that broke off.
fn body_error(error: &reqwest::Error) -> Error {
    let io_kind = chain(error)
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    match io_kind {
        // hyper reports a chunk size or extension that it cannot parse with these kinds.
        Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
            Error::transient(Reason::UpstreamProtocol)
        }
        _ => Error::transient(Reason::UpstreamTruncated),
    }
}

/// Whether this is a TLS error, possibly inside `io::Error`s. The source of an `io::Error` is the source of the error that it wraps, so the
/// error chain alone skips the wrapped error.
fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    let wrapped = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    error.is::<rustls::Error>() || wrapped.is_some_and(|inner| is_tls(inner))
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The proxy's URL may hold a password.
        f.debug_struct("Config")
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pem() -> String {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["upstream.test".to_owned()]).unwrap();
        params.self_signed(&key).unwrap().pem()
    }

    #[tokio::test]
    async fn an_https_only_client_opens_no_plain_connection() {
        let plain = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", plain.local_addr().unwrap());
        let client = |https_only| {
            let config = Config {
                tls: tls_config(SystemRoots::Ignored, None).unwrap(),
                https_only,
                proxy: None,
                connect_timeout: Duration::from_secs(3),
            };
            build(client_builder(&config).unwrap()).unwrap()
        };

        tokio::select! {
            ended = client(true).get(&url).send() => assert!(ended.unwrap_err().is_builder()),
            _ = plain.accept() => panic!("a connection"),
        }
        // Without `https_only` the same request connects.
        tokio::select! {
            accepted = plain.accept() => assert!(accepted.is_ok()),
            ended = client(false).get(&url).send() => panic!("{ended:?}"),
        }
    }

    #[test]
    fn extra_roots_without_a_readable_certificate_are_rejected() {
        let pem = pem();
        let damaged = pem.replacen("MII", "MIX", 1);
        let cut = &pem[..pem.len() / 2];
        let cases = ["", "no certificate", cut, &damaged, &[&pem, cut].concat()];

        for case in cases {
            let found = tls_config(SystemRoots::Ignored, Some(case.as_bytes()));
            assert!(matches!(found, Err(BuildError::Roots)), "{case}");
        }
        assert!(tls_config(SystemRoots::Ignored, Some(pem.as_bytes())).is_ok());
    }
}
