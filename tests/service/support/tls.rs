//! Callers of the program over TLS.

use std::{net::SocketAddr, sync::Arc};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;

use super::{Connection, example_request, within};

/// A connection to the program over TLS; `None` when the handshake fails on this side.
pub(crate) async fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> Option<Connection> {
    let socket = TcpStream::connect(address).await.ok()?;
    let name = ServerName::try_from("localhost").expect("a name");
    let connecting = TlsConnector::from(config).connect(name, socket);
    let stream = within("the TLS handshake", connecting).await.ok()?;
    Connection::over(stream).await.ok()
}

/// One call for the example task on a separate connection; `None` if the server rejects the client, which in TLS 1.3 it
/// learns only with its first exchange.
pub(crate) async fn call(address: SocketAddr, config: Arc<ClientConfig>) -> Option<Code> {
    let connection = connect(address, config).await?;
    let ended = connection.call_within("20S", &example_request()).await;
    Some(ended.ok()?.status()?.code())
}
