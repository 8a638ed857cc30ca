//! Certificates made for a test, and TLS on both sides with them.

use std::{path::Path, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    version::{TLS12, TLS13},
};

/// Whom a test trusts, or not.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key in PEM.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// Writes the certificate below `folder` as `<name>.pem`; returns the path.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> String {
        let path = folder.join(format!("{name}.pem"));
        std::fs::write(&path, self.0.pem()).expect("a file");
        path.display().to_string()
    }

    fn issue(&self, name: &str, usages: &[ExtendedKeyUsagePurpose], last_year: i32) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.extended_key_usages = usages.to_vec();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(last_year, 3, 2);
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.0).expect("a certificate");
        Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        }
    }
}

impl Pair {
    pub(crate) fn for_server(authority: &Authority, name: &str) -> Self {
        authority.issue(name, &[ExtendedKeyUsagePurpose::ServerAuth], 2061)
    }

    /// For servers and for clients, as a certificate without usages is.
    pub(crate) fn for_both(authority: &Authority, name: &str) -> Self {
        authority.issue(name, &[], 2061)
    }

    pub(crate) fn for_client(authority: &Authority) -> Self {
        authority.issue("client", &[ExtendedKeyUsagePurpose::ClientAuth], 2061)
    }

    pub(crate) fn expired_of_server(authority: &Authority, name: &str) -> Self {
        authority.issue(name, &[ExtendedKeyUsagePurpose::ServerAuth], 2001)
    }

    pub(crate) fn expired_of_client(authority: &Authority) -> Self {
        authority.issue("client", &[ExtendedKeyUsagePurpose::ClientAuth], 2001)
    }

    /// Writes both below `folder` as `<name>.pem` and `<name>-key.pem`; returns the paths.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> (String, String) {
        let cert = folder.join(format!("{name}.pem"));
        let key = folder.join(format!("{name}-key.pem"));
        std::fs::write(&cert, &self.cert).expect("a file");
        std::fs::write(&key, &self.key).expect("a file");
        (cert.display().to_string(), key.display().to_string())
    }

    fn der(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (
            vec![CertificateDer::from_pem_slice(self.cert.as_bytes()).expect("PEM")],
            PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("PEM"),
        )
    }

    /// A server that shows this pair.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let (chain, key) = self.der();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .expect("known versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a pair");
        Arc::new(config)
    }
}

/// A gRPC client that trusts this authority and shows this pair.
pub(crate) fn client(authority: &Authority, pair: Option<&Pair>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.0.der().clone()).expect("a certificate");
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("known versions")
        .with_root_certificates(roots);
    let mut config = match pair {
        Some(pair) => {
            let (chain, key) = pair.der();
            builder.with_client_auth_cert(chain, key).expect("a pair")
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}
