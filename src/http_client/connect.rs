//! Opens connections to upstream: name lookup, TCP, the proxy's tunnel, TLS.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Uri, header::USER_AGENT};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::{
        legacy::connect::{HttpConnector, proxy::Tunnel},
        proxy::matcher::{Intercept, Matcher},
    },
    rt::TokioIo,
};
use rustls::ClientConfig;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};
use tower_service::Service as _;

use super::{AGENT, BuildError, Config, resolver::Resolver};

/// Limit on connects in progress per worker. A thousand concurrent TLS handshakes would compete for the CPU until all of them time out.
const MAX_CONNECTS: usize = 256;

/// TCP keepalive: probes begin after 15 s of silence, and the connection fails after 30 s without an acknowledgement.
const KEEPALIVE: Duration = Duration::from_secs(15);
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(30);

pub(super) type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;
pub(super) type Error = Box<dyn StdError + Send + Sync>;

/// Opens connections to one origin.
pub(super) struct Connector {
    origin: Uri,
    proxy: Option<Intercept>,
    http: HttpConnector<Resolver>,
    tls: Arc<ClientConfig>,
    connect_timeout: Duration,
    pub(super) permits: Semaphore,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The proxy's URL may hold a password.
        f.debug_struct("Connector")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl Connector {
    pub(super) fn new(config: &Config, origin: Uri) -> Result<Self, BuildError> {
        let resolver = Resolver::system().map_err(|_| BuildError::Threads)?;
        let mut http = HttpConnector::new_with_resolver(resolver);
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(KEEPALIVE));
        http.set_keepalive_interval(Some(KEEPALIVE));
        http.set_keepalive_retries(Some(3));
        http.set_tcp_user_timeout(Some(ACKNOWLEDGED_WITHIN));
        // Divided among the addresses of a name, so that one that does not reply leaves time for the others.
        http.set_connect_timeout(Some(config.connect_timeout));
        let proxy = match &config.proxy {
            Some(proxy) => {
                let matcher = Matcher::builder().all(proxy.url().as_str()).build();
                Some(matcher.intercept(&origin).ok_or(BuildError::Proxy)?)
            }
            None => None,
        };
        Ok(Self {
            origin,
            proxy,
            http,
            tls: Arc::new(config.tls.clone()),
            connect_timeout: config.connect_timeout,
            permits: Semaphore::new(MAX_CONNECTS),
        })
    }

    /// The proxy, if it forwards plain requests. TLS goes through a tunnel instead.
    pub(super) fn forwarding_proxy(&self) -> Option<&Intercept> {
        self.proxy.as_ref().filter(|_| !self.is_https())
    }

    fn is_https(&self) -> bool {
        self.origin.scheme_str() == Some("https")
    }

    pub(super) async fn connect(&self) -> Result<Stream, Error> {
        let (http, tls) = (self.http.clone(), Arc::clone(&self.tls));
        let connecting = match &self.proxy {
            None => HttpsConnector::from((http, tls)).call(self.origin.clone()),
            Some(proxy) if self.is_https() => {
                let agent = HeaderMap::from_iter([(USER_AGENT, HeaderValue::from_static(AGENT))]);
                let mut tunnel = Tunnel::new(proxy.uri().clone(), http).with_headers(agent);
                if let Some(credential) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(credential.clone());
                }
                HttpsConnector::from((tunnel, tls)).call(self.origin.clone())
            }
            Some(proxy) => HttpsConnector::from((http, tls)).call(proxy.uri().clone()),
        };
        timeout(self.connect_timeout, connecting).await?
    }
}
