//! TLS and proxies between the program and a scripted upstream, and callers of the program over TLS.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use rustls::{
    ClientConfig, ServerConfig,
    pki_types::ServerName,
    server::{Acceptor, ClientHello},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use tonic::Code;

use super::{Connection, example_request};

/// Something that stands before an upstream; it ends when dropped.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    /// One entry per connection: what it asked for, or the name and the protocols of its TLS hello.
    seen: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Front {
    /// Speaks TLS and hands on what is inside.
    pub(crate) async fn tls(config: Arc<ServerConfig>, upstream: SocketAddr) -> Self {
        Self::start(move |socket, seen| {
            let config = Arc::clone(&config);
            async move {
                let Ok(started) = LazyConfigAcceptor::new(Acceptor::default(), socket).await else {
                    return;
                };
                seen.lock()
                    .expect("no panic")
                    .push(hello(&started.client_hello()));
                let Ok(mut inside) = started.into_stream(config).await else {
                    return;
                };
                let Ok(mut upstream) = TcpStream::connect(upstream).await else {
                    return;
                };
                let _ = copy_bidirectional(&mut inside, &mut upstream).await;
            }
        })
        .await
    }

    /// An HTTP proxy that answers CONNECT with `answer`, and hands on to `upstream` when that is a 200.
    pub(crate) async fn proxy(answer: &'static str, upstream: SocketAddr) -> Self {
        Self::start(move |mut socket, seen| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match socket.read_buf(&mut head).await {
                    Ok(count) if count > 0 => {}
                    _ => return,
                }
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            seen.lock().expect("no panic").push(head);
            let _ = socket.write_all(answer.as_bytes()).await;
            if !answer.starts_with("HTTP/1.1 200") {
                return;
            }
            if let Ok(mut upstream) = TcpStream::connect(upstream).await {
                let _ = copy_bidirectional(&mut socket, &mut upstream).await;
            }
        })
        .await
    }

    async fn start<F: Future<Output = ()> + Send + 'static>(
        serve: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&seen);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut peers = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                peers.spawn(serve(socket, Arc::clone(&shared)));
            }
        });
        Self {
            address,
            seen,
            _tasks: tasks,
        }
    }

    /// What each connection has asked for.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("no panic").clone()
    }
}

fn hello(hello: &ClientHello<'_>) -> String {
    let mut words = vec![hello.server_name().unwrap_or("no name").to_owned()];
    let protocols = hello.alpn().into_iter().flatten();
    words.extend(protocols.map(|protocol| String::from_utf8_lossy(protocol).into_owned()));
    words.join(" ")
}

/// A connection to the program over TLS; `None` when the handshake fails on this side.
pub(crate) async fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> Option<Connection> {
    let socket = TcpStream::connect(address).await.ok()?;
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = TlsConnector::from(config)
        .connect(name, socket)
        .await
        .ok()?;
    Connection::over(stream).await.ok()
}

/// One call for the example task on a connection of its own; `None` when the client is not let in, which in TLS 1.3 it
/// learns only with its first exchange.
pub(crate) async fn call(address: SocketAddr, config: Arc<ClientConfig>) -> Option<Code> {
    let connection = connect(address, config).await?;
    let ended = connection.call_within("20S", &example_request()).await;
    Some(ended.ok()?.status()?.code())
}
