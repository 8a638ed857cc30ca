//! TLS on the listener: which files, which protocol versions, and how a change of the files reaches new handshakes.

use std::{
    convert::Infallible,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use tokio::{net::TcpStream, sync::Semaphore, time::sleep};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::certificate;
use crate::{options, telemetry::metrics::Metrics};

/// The one protocol spoken inside TLS.
const HTTP2: &[u8] = b"h2";
/// Handshakes at once, over all workers: what they may cost in memory and CPU while ordinary calls go on.
const MAX_HANDSHAKES: usize = 256;

/// The files of certificates. The first two are set together.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "tls")]
pub struct Files {
    /// PEM file of the listener's certificate chain; read again when it changes
    #[arg(long = "tls-cert", value_name = "FILE", value_parser = options::file)]
    pub certificate: PathBuf,
    /// PEM file of the certificate's key; read again when it changes
    #[arg(long = "tls-key", value_name = "FILE", value_parser = options::file)]
    pub key: PathBuf,
    /// PEM file of the CAs of client certificates, which become mandatory; read again when it changes
    #[arg(long = "tls-client-ca", value_name = "FILE", value_parser = options::file)]
    pub client_ca: Option<PathBuf>,
    /// How often the files are read to find a change. Their content counts, because Kubernetes swaps a directory.
    #[arg(skip = Duration::from_secs(10))]
    pub reload_interval: Duration,
}

/// Why certificates cannot be used. No text holds anything out of a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds no certificate in PEM.
    #[error("{}: must hold at least one certificate in PEM form", .0.display())]
    NoCertificate(PathBuf),
    /// A file holds no private key in PEM.
    #[error("{}: must hold a private key in PEM form (PKCS#8, PKCS#1 or SEC1), not encrypted", .0.display())]
    NoKey(PathBuf),
    /// Certificate and key do not go together, or one is of an unknown kind.
    #[error("{} and {} cannot be used together: {reason}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why, in the TLS library's words.
        reason: String,
    },
    /// A client CA cannot be used.
    #[error("{}: cannot be used as client CA: {reason}", path.display())]
    ClientCa {
        /// Which file.
        path: PathBuf,
        /// Why, in the TLS library's words.
        reason: String,
    },
}

/// Checks that the listener can use these files.
///
/// # Errors
/// The first file that cannot be used.
pub fn check(files: &Files) -> Result<(), Error> {
    Contents::read(files)?.build(files).map(drop)
}

/// The certificates in use, and the handshakes under way.
#[derive(Debug)]
pub(super) struct Tls {
    files: Files,
    current: ArcSwap<ServerConfig>,
    handshakes: Semaphore,
    metrics: Arc<Metrics>,
    /// Of the content that `current` was made from.
    loaded: Fingerprint,
}

/// Tells contents apart without keeping a copy of a key.
type Fingerprint = [u8; 32];

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub(super) fn load(files: Files, metrics: &Arc<Metrics>) -> Result<Self, Error> {
        let contents = Contents::read(&files)?;
        let (current, expires) = contents.build(&files)?;
        note_expiry(metrics, expires);
        Ok(Self {
            current: ArcSwap::from_pointee(current),
            handshakes: Semaphore::new(MAX_HANDSHAKES),
            metrics: Arc::clone(metrics),
            loaded: contents.fingerprint(),
            files,
        })
    }

    /// The handshake with one client; `None` when it fails. The caller bounds its time.
    pub(super) async fn handshake(&self, socket: TcpStream) -> Option<TlsStream<TcpStream>> {
        // A peer that sends nothing takes no place.
        socket.readable().await.ok()?;
        let _place = self.handshakes.acquire().await.ok()?;
        let acceptor = TlsAcceptor::from(self.current.load_full());
        let peer = socket.peer_addr().ok()?;
        let stream = acceptor
            .accept(socket)
            .await
            .inspect_err(|error| tracing::warn!(%peer, %error, "TLS handshake failed"))
            .ok()?;
        // The library lets a client pass that offers no protocol at all.
        (stream.get_ref().1.alpn_protocol() == Some(HTTP2)).then_some(stream)
    }
}

/// Reads the files again and again until it is dropped; new handshakes use what changed. A change that cannot be used is
/// reported once, and what was in use stays.
pub(super) async fn follow(tls: Option<&Tls>) -> Infallible {
    let Some(tls) = tls else {
        return std::future::pending().await;
    };
    let mut seen = Some(tls.loaded);
    loop {
        sleep(tls.files.reload_interval).await;
        let files = tls.files.clone();
        let read = tokio::task::spawn_blocking(move || Contents::read(&files)).await;
        let Ok(contents) = read else { continue };
        let now = contents.as_ref().ok().map(Contents::fingerprint);
        if now == seen {
            continue;
        }
        seen = now;
        match contents.and_then(|contents| contents.build(&tls.files)) {
            Ok((config, expires)) => {
                note_expiry(&tls.metrics, expires);
                tls.current.store(Arc::new(config));
                tracing::info!("certificates read again");
            }
            Err(error) => {
                tracing::error!(%error, "changed certificates cannot be used; the old ones stay")
            }
        }
    }
}

/// An end that cannot be read leaves what was noted before.
fn note_expiry(metrics: &Metrics, expires: Option<SystemTime>) {
    if let Some(at) = expires {
        metrics.tls_certificate_expires(at);
    }
}

/// The files as they are.
struct Contents {
    certificate: Vec<u8>,
    key: zeroize::Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
}

impl Contents {
    fn read(files: &Files) -> Result<Self, Error> {
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: zeroize::Zeroizing::new(read(&files.key)?),
            client_ca: files.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn fingerprint(&self) -> Fingerprint {
        let mut context = digest::Context::new(&digest::SHA256);
        let client_ca = self.client_ca.as_deref().unwrap_or_default();
        for content in [&self.certificate, &*self.key, client_ca] {
            // The length keeps a shift of bytes from one file to the next from looking the same.
            context.update(&content.len().to_be_bytes());
            context.update(content);
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(context.finish().as_ref());
        fingerprint
    }

    /// Parses the contents, and notes when the certificate expires.
    /// The configuration of the TLS library, and when the certificate expires.
    fn build(&self, files: &Files) -> Result<(ServerConfig, Option<SystemTime>), Error> {
        let chain = certificates(&self.certificate, &files.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| Error::NoKey(files.key.clone()))?;
        let expires = certificate::expires_at(&chain[0]);
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .expect("the provider knows TLS 1.2 and 1.3");
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let unusable = |reason: String| Error::ClientCa {
                    path: path.clone(),
                    reason,
                };
                let mut roots = RootCertStore::empty();
                for root in certificates(self.client_ca.as_deref().unwrap_or_default(), path)? {
                    roots
                        .add(root)
                        .map_err(|error| unusable(error.to_string()))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| unusable(error.to_string()))?;
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
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(Error::NoCertificate(path.to_owned())),
    }
}
