//! The local server: the one that `serve` starts with the variables of this process. In a container, `health` asks it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs::default_provider},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic_health::pb::health_check_response::ServingStatus;
use url::Url;

use super::{HealthOptions, Pair};
use crate::{
    admin,
    options::{self, Validation, defaults, variable_name},
    pb::task_service_server::SERVICE_NAME,
    server,
};

/// Longer than the head of a response of `/readyz`.
const MAX_HEAD_BYTES: u64 = 1024;

/// How to ask the local server.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalServer {
    /// The listener of `/readyz`, if the gRPC listener requires a client certificate, which `health` may not have.
    readyz: Option<SocketAddr>,
}

impl HealthOptions {
    /// Replaces the default target with the local server.
    pub fn use_local_server(&mut self, validation: &mut Validation<'_>) {
        let file = |flag, validation: &mut Validation<'_>| -> Option<PathBuf> {
            validation.parsed_variable(&variable_name(flag), options::file)
        };
        let (listen, metrics_listen) = (variable_name("listen"), variable_name("metrics-listen"));
        let listen = validation
            .parsed_variable(&listen, options::address)
            .unwrap_or_else(|| defaults::<server::Options>().listen);
        let metrics_listen = validation
            .parsed_variable(&metrics_listen, admin::address_or_off)
            .unwrap_or_else(|| defaults::<admin::Options>().metrics_listen);
        let cert = file("tls-cert", validation);
        let key = file("tls-key", validation);
        let client_ca = file("tls-client-ca", validation);

        let scheme = if cert.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", reachable(listen));
        self.server.target = Url::parse(&url).expect("an address makes a URL");
        let mut local = LocalServer::default();
        if client_ca.is_some() {
            local.readyz = metrics_listen.map(reachable);
            // The server's certificate is often valid for clients too.
            let pair = cert.zip(key).map(|(cert, key)| Pair { cert, key });
            self.server.pair = self.server.pair.take().or(pair);
        }
        self.server.local = Some(local);
    }

    /// The status at `/readyz`, if the gRPC listener requires a client certificate and `/readyz` replies.
    pub(super) async fn ready(&self) -> Option<ServingStatus> {
        let address = self.server.local?.readyz?;
        if !["", SERVICE_NAME].contains(&self.service.as_str()) {
            return None;
        }
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.ok()?;
        let mut response = String::new();
        let mut head = stream.take(MAX_HEAD_BYTES);
        head.read_to_string(&mut response).await.ok()?;
        match response.split(' ').nth(1)? {
            "200" => Some(ServingStatus::Serving),
            "503" => Some(ServingStatus::NotServing),
            _ => None,
        }
    }
}

/// An address at which this machine reaches the listener. A listener on `[::]` accepts IPv4, see [`crate::accept::listen`].
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip().is_unspecified() {
        true => Ipv4Addr::LOCALHOST.into(),
        false => listen.ip(),
    };
    SocketAddr::new(ip, listen.port())
}

/// Accepts any certificate: that of the local server is valid for the name by which clients reach it and not for loopback, and `health`
/// sends no secret.
#[derive(Debug)]
pub(super) struct AnyCertificate(CryptoProvider);

impl AnyCertificate {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(default_provider()))
    }
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
