//! One bounded HTTP exchange with the vendor's endpoint. The only room of the request's path that knows the HTTP client
//! library: it sets every limit once, and turns the library's errors into a [`Failure`].
//!
//! The clients for credentials and traces begin with the same settings: [`client_builder`].

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

use crate::reason::Reason;

/// The largest answer that is read. A task is a few hundred bytes; its parts make it a few thousand.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// Shorter than the keep-alive of common gateways (60 s and more), so that we, not they, close an idle connection.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Idle connections kept per worker: as many as there are calls in flight at most, by default. With fewer, a thousand calls
/// at a time would close and open connections all the while; those that stay idle are closed anyway.
const POOL_MAX_IDLE: usize = 2048;

/// What a client needs to know besides the request.
#[derive(Clone)]
pub struct Config {
    /// Made once by [`tls_config`] and cloned: clones share the roots and the sessions that can be resumed.
    pub tls: ClientConfig,
    /// Whether a URL without TLS is refused, as the credentials that go there need.
    pub https_only: bool,
    /// The only proxy that is ever used; the environment's are not read.
    pub proxy: Option<Url>,
    /// For name, TCP and TLS together.
    pub connect_timeout: Duration,
}

/// Why a client could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The extra roots are not PEM certificates.
    #[error("the CA file holds no readable PEM certificate")]
    Roots,
    /// The proxy's URL is not one.
    #[error("the proxy's URL cannot be used")]
    Proxy,
    /// No system roots, most often.
    #[error(
        "the TLS client cannot be set up; most often the system has no CA certificates (install ca-certificates or set --upstream-ca)"
    )]
    Tls,
}

/// Why there is no whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// One of the transport reasons, or `UpstreamResponseTooLarge`.
    pub reason: Reason,
    /// Whether the same exchange may go better on another connection.
    pub repeatable: bool,
}

impl Failure {
    const fn passing(reason: Reason) -> Self {
        Self {
            reason,
            repeatable: true,
        }
    }

    const fn lasting(reason: Reason) -> Self {
        Self {
            reason,
            repeatable: false,
        }
    }
}

/// Which certificates a client trusts, apart from those in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemRoots {
    /// The system's too. Reading them takes some five milliseconds.
    Trusted,
    /// None: the peer is plain HTTP, or a file is all that counts.
    Ignored,
}

/// TLS 1.2 and newer for HTTP/1.1, with the system's certificates and those in `extra_pem`.
///
/// # Errors
/// [`BuildError::Roots`] when `extra_pem` cannot be used, [`BuildError::Tls`] when the system has no certificates and there
/// are no others.
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

/// What every HTTP client of the program starts from: no redirect is followed and nothing is repeated behind our back, the
/// environment's proxies do not count, and TLS is as configured.
///
/// # Errors
/// [`BuildError`] for a setting that cannot be used.
pub fn client_builder(config: &Config) -> Result<ClientBuilder, BuildError> {
    let mut builder = reqwest::Client::builder()
        .https_only(config.https_only)
        .redirect(redirect::Policy::none())
        // No copy of a request is kept for a second time, which `never` alone would do.
        .retry(reqwest::retry::never().max_retries_per_request(0))
        .referer(false)
        .no_proxy()
        .http1_only()
        .tls_backend_preconfigured(config.tls.clone())
        .connect_timeout(config.connect_timeout)
        .user_agent(concat!("rds-task-facade/", env!("CARGO_PKG_VERSION")));
    if let Some(proxy) = &config.proxy {
        builder = builder.proxy(Proxy::all(proxy.clone()).map_err(|_| BuildError::Proxy)?);
    }
    Ok(builder)
}

/// Builds what [`client_builder`] began.
///
/// # Errors
/// [`BuildError::Tls`] when TLS cannot be set up.
pub fn build(builder: ClientBuilder) -> Result<reqwest::Client, BuildError> {
    builder.build().map_err(|_| BuildError::Tls)
}

/// Reads a body that is expected to be small; `None` when it is longer than `max_bytes`.
///
/// # Errors
/// The library's, when the body breaks off.
pub async fn small_body(
    response: &mut reqwest::Response,
    max_bytes: usize,
) -> Result<Option<Bytes>, reqwest::Error> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > max_bytes {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body.freeze()))
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
            .pool_max_idle_per_host(POOL_MAX_IDLE);
        build(builder).map(Self)
    }

    /// Sends a request and awaits the head of the answer. Dropping the future closes the connection.
    ///
    /// # Errors
    /// [`Failure`] when no head came.
    pub fn send(
        &self,
        request: reqwest::Request,
    ) -> impl Future<Output = Result<Answer, Failure>> + use<> {
        // No `async`: it would hold the request as long as the answer is awaited, and the library keeps one already.
        self.0
            .execute(request)
            .map_ok(Answer)
            .map_err(|error| before_head(&error))
    }
}

/// An answer whose head is there.
#[derive(Debug)]
pub struct Answer(reqwest::Response);

impl Answer {
    /// The status, from 100 to 999: the client library passes on what is no HTTP status class.
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
    /// [`Failure`] when it breaks off or is longer.
    pub async fn body(&mut self) -> Result<Bytes, Failure> {
        let too_large = Failure::lasting(Reason::UpstreamResponseTooLarge);
        let length = self.0.content_length().unwrap_or(0);
        if length > MAX_BODY_BYTES as u64 {
            return Err(too_large);
        }
        let Some(first) = self.chunk().await? else {
            return Ok(Bytes::new());
        };
        let Some(second) = self.chunk().await? else {
            return if first.len() > MAX_BODY_BYTES {
                Err(too_large)
            } else {
                Ok(first)
            };
        };
        let mut body = BytesMut::from(first);
        // At once, where it is told: growing step by step copies, and leaves every smaller buffer behind.
        body.reserve((length as usize).saturating_sub(body.len()));
        let mut next = Some(second);
        while let Some(chunk) = next {
            if body.len() + chunk.len() > MAX_BODY_BYTES {
                return Err(too_large);
            }
            body.extend_from_slice(&chunk);
            next = self.chunk().await?;
        }
        Ok(body.freeze())
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        self.0.chunk().await.map_err(|error| in_body(&error))
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

fn before_head(error: &reqwest::Error) -> Failure {
    if error.is_dns() {
        return Failure::passing(Reason::UpstreamDns);
    }
    if causes(error).any(is_tls) {
        return Failure::lasting(Reason::UpstreamTls);
    }
    if error.is_connect() {
        return Failure::passing(Reason::UpstreamConnect);
    }
    match causes(error).find_map(|cause| cause.downcast_ref::<hyper::Error>()) {
        Some(error) if error.is_parse_too_large() => Failure::lasting(Reason::UpstreamProtocol),
        Some(error) if error.is_parse() => Failure::passing(Reason::UpstreamProtocol),
        _ => Failure::passing(Reason::UpstreamReset),
    }
}

fn in_body(error: &reqwest::Error) -> Failure {
    let io_kind = causes(error)
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    match io_kind {
        // hyper's words for a chunk size or an extension that cannot be read.
        Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
            Failure::passing(Reason::UpstreamProtocol)
        }
        _ => Failure::passing(Reason::UpstreamTruncated),
    }
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// An `io::Error` names the source of what it wraps, not the wrapped error itself, so this looks inside; they nest.
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
    async fn a_client_for_https_sends_nothing_without_tls() {
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
        // The same with the other client does connect.
        tokio::select! {
            accepted = plain.accept() => assert!(accepted.is_ok()),
            ended = client(false).get(&url).send() => panic!("{ended:?}"),
        }
    }

    #[test]
    fn extra_roots_that_are_no_certificates_are_a_mistake() {
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
