//! TLS of the listener: its files, its protocol versions, and the reload of changed files.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use futures_util::poll;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::default_provider,
    server::{Acceptor, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::certificate;
use crate::{
    files::{self, Contents, Digest, Watcher},
    options, pem,
    telemetry::metrics::{Metrics, Refusal},
};

/// The only application protocol.
const HTTP2: &[u8] = b"h2";
/// Handshakes that are ready to be signed, of all workers: a call waits behind no more of these, about a millisecond of CPU time each, when
/// many clients connect at once.
const MAX_SIGNATURES: usize = 8;
/// Far more than a bundle of all public CA certificates.
const MAX_FILE_BYTES: usize = 4 << 20;

/// The certificate files. Certificate and key are set together.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "tls")]
pub struct Files {
    /// PEM file of the listener's certificate chain; read again when it changes
    #[arg(long = "tls-cert", value_name = "FILE", value_parser = options::public_file)]
    pub certificate: PathBuf,
    /// PEM file of the certificate's key; read again when it changes
    #[arg(long = "tls-key", value_name = "FILE", value_parser = options::file)]
    pub key: PathBuf,
    /// PEM file of the CAs of client certificates, which become mandatory; read again when it changes
    #[arg(long = "tls-client-ca", value_name = "FILE", value_parser = options::public_file)]
    pub client_ca: Option<PathBuf>,
    /// How often the files are read to detect a change of their content: Kubernetes replaces them by swapping a directory.
    #[arg(skip = Duration::from_secs(10))]
    pub reload_interval: Duration,
}

impl Files {
    /// In the order in which [`build`] expects the contents.
    fn paths(&self) -> Vec<PathBuf> {
        let files = [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ];
        files.into_iter().flatten().cloned().collect()
    }
}

/// Why certificates cannot be used. Holds no content of a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] files::Error),
    /// A file contains no certificate in PEM, or a damaged one.
    #[error("{}: {}", .0.display(), .1)]
    Certificates(PathBuf, pem::Error),
    /// A file contains no private key in PEM.
    #[error("{}: must contain an unencrypted private key in PEM form (PKCS#8, PKCS#1 or SEC1)", .0.display())]
    NoKey(PathBuf),
    /// Certificate and key do not match, or the TLS library does not support one of them.
    #[error("{} and {} cannot be used together: {reason}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The message of the TLS library.
        reason: String,
    },
    /// The certificate has expired. Not an error at the start: then there is no better one.
    #[error("{}: the certificate has expired; replace it", .0.display())]
    Expired(PathBuf),
}

/// Checks that the listener can use these files. Returns when the certificate expires, if its date can be read. Blocks.
///
/// # Errors
/// [`Error`] of the first file that cannot be used.
pub fn check(files: &Files) -> Result<Option<SystemTime>, Error> {
    let contents = files::read_all(&files.paths(), MAX_FILE_BYTES)?;
    build(&contents, files).map(|(_, expires)| expires)
}

/// The certificates in use, and the permits for signatures.
#[derive(Debug)]
pub(super) struct Tls {
    files: Files,
    current: ArcSwap<ServerConfig>,
    signatures: Semaphore,
    metrics: Arc<Metrics>,
    /// When the certificate that was loaded at the start expires.
    expires: Option<SystemTime>,
    /// The digest of the files that were loaded at the start.
    loaded: Digest,
}

impl Tls {
    /// Reads the files. Blocks.
    ///
    /// # Errors
    /// [`Error`] of the first file that cannot be used.
    pub(super) fn load(files: Files, metrics: &Arc<Metrics>) -> Result<Self, Error> {
        let contents = files::read_all(&files.paths(), MAX_FILE_BYTES)?;
        let (current, expires) = build(&contents, &files)?;
        record_expiry(metrics, expires);
        if is_expired(expires) {
            let error = Error::Expired(files.certificate.clone());
            tracing::warn!(%error, "clients will reject this server");
        }
        Ok(Self {
            expires,
            current: ArcSwap::from_pointee(current),
            signatures: Semaphore::new(MAX_SIGNATURES),
            metrics: Arc::clone(metrics),
            loaded: files::digest(&contents),
            files,
        })
    }

    /// Performs the handshake with one client. The caller bounds its time.
    ///
    /// # Errors
    /// [`Refusal`] when it fails.
    pub(super) async fn handshake(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
    ) -> Result<TlsStream<TcpStream>, Refusal> {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), socket);
        let hello = hello.await.map_err(|error| {
            if is_end(&error) {
                tracing::debug!(%peer, %error, "the client closed the connection before its first TLS record");
                return Refusal::Closed;
            }
            tracing::warn!(%peer, %error, "TLS handshake failed: the client does not speak TLS");
            Refusal::Tls
        })?;
        let mut handshake = hello.into_stream(self.current.load_full());
        let permit = self.signatures.acquire().await.expect("never closed");
        // Other tasks run first, and more handshakes become ready.
        tokio::task::yield_now().await;
        // The first poll signs. A client that does not continue afterwards holds no permit.
        let signed = poll!(&mut handshake);
        drop(permit);
        let stream = match signed {
            Poll::Ready(stream) => stream,
            Poll::Pending => handshake.await,
        };
        let stream = stream.map_err(|error| log_failure(peer, &error))?;
        // rustls accepts a client that offers no protocol.
        if stream.get_ref().1.alpn_protocol() != Some(HTTP2) {
            return Err(log_failure(
                peer,
                &io::Error::other(rustls::Error::NoApplicationProtocol),
            ));
        }
        Ok(stream)
    }
}

/// Logs a failed handshake. Each line suppresses only its own repetitions, so a frequent cause does not hide the others.
fn log_failure(peer: SocketAddr, error: &io::Error) -> Refusal {
    let cause = error.get_ref().and_then(|inner| inner.downcast_ref());
    match cause {
        Some(rustls::Error::NoApplicationProtocol) => {
            tracing::warn!(%peer, "TLS handshake failed: the client does not offer h2 by ALPN, which gRPC requires");
            return Refusal::Alpn;
        }
        Some(rustls::Error::NoCertificatesPresented) => {
            tracing::warn!(%peer, "TLS handshake failed: the client has no certificate");
        }
        Some(rustls::Error::InvalidCertificate(reason)) => {
            tracing::warn!(%peer, error = %reason, "TLS handshake failed: the client's certificate is not valid");
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            tracing::warn!(%peer, ?alert, "TLS handshake failed: the client rejected it");
        }
        Some(error) => tracing::warn!(%peer, %error, "TLS handshake failed"),
        None => tracing::warn!(%peer, %error, "TLS handshake failed: the connection broke"),
    }
    Refusal::Tls
}

/// Whether the client closed or reset the connection.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

/// Reloads changed files for new handshakes until the future is dropped. Changed files that cannot be used are logged, and the current
/// certificates stay in use. So they do if the changed certificate has expired and the current one has not.
pub(super) async fn follow(tls: Option<&Tls>) -> Infallible {
    let Some(tls) = tls else {
        return std::future::pending().await;
    };
    let (paths, interval) = (tls.files.paths(), tls.files.reload_interval);
    let mut watcher = Watcher::new(paths, MAX_FILE_BYTES, interval, Some(tls.loaded));
    let mut current = tls.expires;
    loop {
        let changed = watcher.changed().await.map_err(Error::from);
        let usable = changed.and_then(|contents| {
            let (config, expires) = build(&contents, &tls.files)?;
            if is_expired(expires) && !is_expired(current) {
                return Err(Error::Expired(tls.files.certificate.clone()));
            }
            Ok((config, expires))
        });
        match usable {
            Ok((config, expires)) => {
                current = expires;
                record_expiry(&tls.metrics, expires);
                tls.current.store(Arc::new(config));
                tracing::info!("certificates reloaded");
            }
            Err(error) => {
                tracing::error!(%error, "changed certificates cannot be used; the current ones stay in use")
            }
        }
    }
}

/// An expiry that cannot be read counts as in the future.
#[expect(
    clippy::disallowed_methods,
    reason = "reload compares certificates with the system's clock, as clients do"
)]
fn is_expired(expires: Option<SystemTime>) -> bool {
    expires.is_some_and(|at| at <= SystemTime::now())
}

/// An expiry that cannot be read leaves the metric as it was.
fn record_expiry(metrics: &Metrics, expires: Option<SystemTime>) {
    if let Some(at) = expires {
        metrics.tls_certificate_expires(at);
    }
}

/// Builds the TLS configuration from the contents of [`Files::paths`], and returns when the certificate expires.
fn build(contents: &Contents, files: &Files) -> Result<(ServerConfig, Option<SystemTime>), Error> {
    let invalid = |path: &PathBuf| {
        let path = path.clone();
        move |error| Error::Certificates(path, error)
    };
    let chain = pem::certificates(&contents[0]).map_err(invalid(&files.certificate))?;
    let key = pem::private_key(&contents[1]).ok_or_else(|| Error::NoKey(files.key.clone()))?;
    let expires = certificate::expires_at(&chain[0]);
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("the provider supports TLS 1.2 and 1.3");
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(pem::roots(&contents[2]).map_err(invalid(path))?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .expect("there are roots, and no revocation lists");
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| Error::Pair {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            reason: error.to_string(),
        })?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok((config, expires))
}
