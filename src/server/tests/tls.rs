//! TLS of the listener: which clients it accepts, and certificate reload.

use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;
use crate::server::tls;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate and its key in PEM.
fn issue(authority: &Authority, last_year: i32) -> (String, String) {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(last_year, 3, 2);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    (certificate.pem(), key.serialize_pem())
}

/// Writes a certificate and its key to the files of the listener.
fn write(folder: &Path, (certificate, key): &(String, String)) {
    fs::write(folder.join("cert.pem"), certificate).unwrap();
    fs::write(folder.join("key.pem"), key).unwrap();
}

fn files(folder: &Path, client_ca: Option<&Authority>) -> tls::Files {
    tls::Files {
        certificate: folder.join("cert.pem"),
        key: folder.join("key.pem"),
        client_ca: client_ca.map(|authority| {
            fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
            folder.join("ca.pem")
        }),
        reload_interval: Duration::from_millis(20),
    }
}

fn with_tls(files: tls::Files) -> Options {
    Options {
        tls: Some(files),
        ..with_timings(|timings| timings.handshake_timeout = LONGER_THAN_PATIENCE)
    }
}

/// A client that trusts this authority and presents this certificate.
fn trusting(authority: &Authority, pair: Option<&(String, String)>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match pair {
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

async fn handshake(
    address: SocketAddr,
    config: ClientConfig,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    within(TlsConnector::from(Arc::new(config)).connect(name, socket)).await
}

/// One call over TLS: with TLS 1.3 a client sees only then that its certificate was rejected.
async fn call_over_tls(address: SocketAddr, config: ClientConfig) -> Option<Code> {
    let stream = handshake(address, config).await.ok()?;
    let (client, connection) = within(h2::client::handshake(stream)).await.ok()?;
    tokio::spawn(connection);
    Some(call(&client, "i").await.ok()?.code())
}

#[tokio::test]
async fn calls_work_over_tls_and_the_certificate_expiry_is_a_metric() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    write(folder.path(), &issue(&authority, 2061));
    let running = start(with_tls(files(folder.path(), None)));

    let code = call_over_tls(running.address, trusting(&authority, None)).await;

    assert_eq!(code, Some(Code::Ok));
    assert_eq!(
        running.metric("tls_certificate_expiry_timestamp_seconds "),
        2_876_947_200
    );
    running.stop().await;
}

#[tokio::test]
async fn only_clients_with_a_valid_certificate_are_accepted_if_a_client_ca_is_set() {
    let folder = tempfile::tempdir().unwrap();
    let trusted = authority();
    let other = authority();
    write(folder.path(), &issue(&trusted, 2061));
    let running = start(with_tls(files(folder.path(), Some(&trusted))));
    let mut no_protocol = trusting(&trusted, Some(&issue(&trusted, 2061)));
    no_protocol.alpn_protocols.clear();
    let mut http1 = trusting(&trusted, Some(&issue(&trusted, 2061)));
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let rejected = [
        ("no certificate", "tls", trusting(&trusted, None)),
        (
            "another authority's",
            "tls",
            trusting(&trusted, Some(&issue(&other, 2061))),
        ),
        (
            "expired",
            "tls",
            trusting(&trusted, Some(&issue(&trusted, 2020))),
        ),
        ("no protocol offered", "alpn", no_protocol),
        ("HTTP/1.1 offered", "alpn", http1),
    ];

    for (name, reason, config) in rejected {
        let before = running.refused(reason);
        assert_eq!(call_over_tls(running.address, config).await, None, "{name}");
        eventually(|| running.refused(reason) == before + 1).await;
        let good = trusting(&trusted, Some(&issue(&trusted, 2061)));
        assert_eq!(
            call_over_tls(running.address, good).await,
            Some(Code::Ok),
            "after: {name}"
        );
    }
    assert_eq!(running.ended(5).await, [Code::Ok; 5]);
}

#[tokio::test]
async fn an_incomplete_handshake_times_out_and_does_not_delay_other_clients() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    write(folder.path(), &issue(&authority, 2061));
    let mut config = with_tls(files(folder.path(), None));
    // Shorter than the default, and long enough for a valid client on a busy machine.
    config.timings.handshake_timeout = Duration::from_secs(4);
    let running = start(config);
    let mut late = Vec::new();
    for hello in [&b""[..], &[0x16, 3, 1, 1, 0, 1]] {
        for _ in 0..20 {
            let mut socket = TcpStream::connect(running.address).await.unwrap();
            socket.write_all(hello).await.unwrap();
            late.push(socket);
        }
    }

    let code = call_over_tls(running.address, trusting(&authority, None)).await;

    assert_eq!(code, Some(Code::Ok));
    for mut socket in late {
        assert!(until_closed(&mut socket).await.is_empty());
    }
    eventually(|| running.refused("timeout") == 40).await;
}

#[tokio::test]
async fn many_handshakes_that_do_not_continue_do_not_delay_other_clients() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    write(folder.path(), &issue(&authority, 2061));
    let running = start(with_tls(files(folder.path(), None)));
    let name = ServerName::try_from("localhost").unwrap();
    let client = Arc::new(trusting(&authority, None));
    let mut hello = Vec::new();
    let mut connection = rustls::ClientConnection::new(client, name).unwrap();
    connection.write_tls(&mut hello).unwrap();
    let mut stopped = Vec::new();
    for hello in [&hello[..6], &hello] {
        for _ in 0..150 {
            let mut socket = TcpStream::connect(running.address).await.unwrap();
            socket.write_all(hello).await.unwrap();
            stopped.push(socket);
        }
    }
    // The server has signed the handshakes that can continue.
    for socket in &mut stopped[150..] {
        within(socket.read_u8()).await.unwrap();
    }

    let code = call_over_tls(running.address, trusting(&authority, None)).await;

    assert_eq!(code, Some(Code::Ok));
}

#[tokio::test]
async fn changed_certificates_are_used_and_invalid_ones_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (authority(), authority());
    write(folder.path(), &issue(&first, 2061));
    let running = start(with_tls(files(folder.path(), Some(&first))));
    let client = |authority| trusting(authority, Some(&issue(&first, 2061)));
    let stream = handshake(running.address, client(&first)).await.unwrap();
    let (early, connection) = within(h2::client::handshake(stream)).await.unwrap();
    tokio::spawn(connection);

    // A key without its certificate: the current pair stays in use.
    fs::write(folder.path().join("key.pem"), issue(&second, 2061).1).unwrap();
    // Nothing happens, so there is no event to wait for. Ten times the reload interval; a shorter time only weakens the test.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        call_over_tls(running.address, client(&first)).await,
        Some(Code::Ok)
    );
    // A byte order mark does not hide what follows it.
    let (certificate, key) = issue(&second, 2051);
    let marked = |text: String| format!("\u{feff}{text}");
    write(folder.path(), &(marked(certificate), marked(key)));
    eventually(|| running.metric("tls_certificate_expiry_timestamp_seconds ") == 2_561_328_000)
        .await;

    assert_eq!(
        call_over_tls(running.address, client(&second)).await,
        Some(Code::Ok)
    );
    assert_eq!(call_over_tls(running.address, client(&first)).await, None);
    assert_eq!(
        call(&early, "i").await.unwrap().code(),
        Code::Ok,
        "open connections survive"
    );
    fs::write(folder.path().join("ca.pem"), marked(second.pem())).unwrap();
    let by_second = || trusting(&second, Some(&issue(&second, 2061)));
    within(async {
        while Box::pin(call_over_tls(running.address, by_second()))
            .await
            .is_none()
        {}
    })
    .await;
    assert_eq!(call_over_tls(running.address, client(&second)).await, None);
}

#[tokio::test]
async fn an_expired_certificate_does_not_replace_a_valid_one() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (authority(), authority());
    write(folder.path(), &issue(&first, 2061));
    let running = start(with_tls(files(folder.path(), None)));
    let expiry = "tls_certificate_expiry_timestamp_seconds ";
    eventually(|| running.metric(expiry) == 2_876_947_200).await;

    write(folder.path(), &issue(&second, 2020));
    // Nothing happens, so there is no event to wait for. Ten times the reload interval; a shorter time only weakens the test.
    tokio::time::sleep(Duration::from_millis(200)).await;

    let with_valid = call_over_tls(running.address, trusting(&first, None)).await;
    assert_eq!(with_valid, Some(Code::Ok));
    assert_eq!(running.metric(expiry), 2_876_947_200);

    write(folder.path(), &issue(&second, 2051));
    eventually(|| running.metric(expiry) == 2_561_328_000).await;
}

#[tokio::test]
async fn an_expired_certificate_is_loaded_if_there_is_no_valid_one() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    write(folder.path(), &issue(&authority, 2020));
    let running = start(with_tls(files(folder.path(), None)));
    let expiry = "tls_certificate_expiry_timestamp_seconds ";
    eventually(|| running.metric(expiry) == 1_583_107_200).await;

    write(folder.path(), &issue(&authority, 2021));
    eventually(|| running.metric(expiry) == 1_614_643_200).await;
    write(folder.path(), &issue(&authority, 2061));
    eventually(|| running.metric(expiry) == 2_876_947_200).await;
}

#[tokio::test]
async fn unusable_files_are_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    let pair = issue(&authority, 2061);
    let other = issue(&authority, 2061);
    let empty = String::new();
    let cases = [
        (
            "certificate without PEM",
            (&empty, &pair.1),
            "cert.pem: must contain at least one certificate in PEM form",
        ),
        (
            "damaged certificate of the chain",
            (
                &format!("{}{}", pair.0, pair.0.replacen("MII", "M!I", 1)),
                &pair.1,
            ),
            "cert.pem: certificate 2 cannot be read",
        ),
        (
            "key without PEM",
            (&pair.0, &pair.0),
            "key.pem: must contain an unencrypted private key",
        ),
        (
            "key of another certificate",
            (&pair.0, &other.1),
            "key.pem cannot be used together",
        ),
    ];

    for (name, (certificate, key), text) in cases {
        write(folder.path(), &(certificate.clone(), key.clone()));
        let running = start(with_tls(files(folder.path(), None)));
        let error = within(running.done).await.unwrap().unwrap_err().to_string();

        assert!(error.contains(text), "{name}: {error}");
        assert!(!error.contains("BEGIN"), "{name}: {error}");
    }
    let running = start(with_tls(files(Path::new("/nowhere"), None)));
    let error = within(running.done).await.unwrap().unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read /nowhere/cert.pem: "),
        "{error}"
    );
}
