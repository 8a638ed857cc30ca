//! `serve` and `sandbox`: puts the rooms together, runs them until a signal, and says with which code the process ends.

use std::{
    collections::HashSet,
    future, io,
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use secrecy::ExposeSecret as _;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
};

use crate::{
    admin,
    coalescer::{self, Coalescer},
    config::{self, Config, Endpoint},
    credentials::{self, Credentials, chain, iam},
    http_client,
    rpc::Facade,
    sandbox::Sandbox,
    server::{self, Timings, tls},
    telemetry::{self, Access, Sinks, metrics::Metrics},
    upstream,
};

/// For the last spans, when calls in flight have used up the shutdown, and at most.
const MAX_EXPORT: Duration = Duration::from_secs(5);

/// For the thread of the log, when a second signal ends the process.
const LAST_LINES: Duration = Duration::from_millis(30);

/// Why the program ends before it serves, or cannot go on. One sentence for the operator.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, #[source] io::Error),
    #[error("cannot start the sandbox: {0}")]
    Sandbox(#[source] io::Error),
    #[error("--upstream-ca: {0}")]
    UpstreamCa(#[source] io::Error),
    #[error(transparent)]
    Http(#[from] http_client::BuildError),
    #[error(transparent)]
    Server(#[from] server::Error),
    #[error(transparent)]
    Tracing(#[from] telemetry::TracingError),
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
}

/// Serves until a signal, and drains.
pub async fn serve(config: Config) -> ExitCode {
    let metrics = Metrics::new();
    let telemetry = telemetry::start(&config.log, &metrics);
    finish(run(config, metrics, telemetry.access.clone()).await)
}

/// Runs only the stand-in for the vendor's services, until a signal.
pub async fn sandbox(listen: SocketAddr) -> ExitCode {
    let log = config::Log {
        format: config::LogFormat::Text,
        filter: "info".to_owned(),
    };
    let _telemetry = telemetry::start(&log, &Metrics::new());
    finish(run_sandbox(listen).await)
}

fn finish(ended: Result<(), Error>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config, metrics: Arc<Metrics>, access: Access) -> Result<(), Error> {
    let shutdown = shutdown_signal()?;
    let listener =
        std::net::TcpListener::bind(config.listen).map_err(|e| Error::Listen(config.listen, e))?;
    let listen = listener
        .local_addr()
        .map_err(|e| Error::Listen(config.listen, e))?;
    let admin = match config.metrics_listen {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .map_err(|e| Error::Listen(address, e))?,
        ),
        None => None,
    };
    let metrics_listen = admin
        .as_ref()
        .and_then(|listener| listener.local_addr().ok());
    let sandbox = start_sandbox(&config).await?;
    let base_url = |endpoint: &Endpoint| base_url(endpoint, sandbox);

    let endpoint = base_url(&config.upstream.endpoint);
    let source = source(&config.credentials, base_url);
    let http = http_config(&config.upstream, &endpoint, &source)?;
    let credentials = Credentials::start(
        credentials::Config {
            source,
            http: http.clone(),
        },
        Arc::clone(&metrics),
    )?;
    let workers = workers();
    let facades = facades(
        &config,
        workers,
        url(endpoint.as_str()),
        &http,
        &credentials,
        &metrics,
    )?;

    let serving = watch::Sender::new(false);
    if let Some(listener) = admin {
        let ready = serving.subscribe();
        tokio::spawn(admin::serve(
            listener,
            Arc::clone(&metrics),
            ready,
            future::pending(),
        ));
    }
    let server_config = server_config(&config, workers);
    let shutdown_takes = config.drain_delay + config.shutdown_grace;
    let tracer = match &config.tracing {
        Some(tracing) => Some(telemetry::start_tracing(
            tracing,
            config.propagate_trace_upstream,
            Arc::clone(&metrics),
        )?),
        None => None,
    };
    let stopping = Arc::new(OnceLock::new());
    let shutdown = {
        let stopping = Arc::clone(&stopping);
        async move {
            shutdown.await;
            let _ = stopping.set(Instant::now());
        }
    };
    let started = move || {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            listen = %listen,
            metrics_listen = %metrics_listen.map_or_else(|| "off".to_owned(), |address| address.to_string()),
            upstream = endpoint.as_str(),
            config = config.summary(),
            "serving"
        );
        if sandbox.is_some() {
            tracing::warn!("the upstream is the embedded sandbox: no answer is real");
        }
        if let Some(warning) = config.exposure_warning() {
            tracing::warn!("{warning}");
        }
    };
    let parts = server::Parts {
        facade: move || {
            let mut facades = facades.lock().unwrap_or_else(PoisonError::into_inner);
            facades.pop().expect("there is one for each worker")
        },
        ready: credentials.ready(),
        serving,
        sinks: Arc::new(Sinks {
            metrics,
            access,
            tracer: tracer.clone(),
        }),
        started: Box::new(started),
    };
    server::serve(listener, server_config, parts, shutdown).await?;
    if let Some(tracer) = tracer {
        let spent = stopping.get().map(Instant::elapsed).unwrap_or_default();
        let left = shutdown_takes.saturating_sub(spent);
        // Within what calls in flight have left of the shutdown.
        if !tracer.finish(left.min(MAX_EXPORT)).await {
            tracing::warn!("the last spans did not reach the collector in time");
        }
    }
    Ok(())
}

async fn run_sandbox(listen: SocketAddr) -> Result<(), Error> {
    let shutdown = shutdown_signal()?;
    let sandbox = Sandbox::bind(listen).await.map_err(Error::Sandbox)?;
    tracing::info!(listen = %sandbox.local_addr(), "sandbox");
    sandbox.serve(shutdown).await;
    Ok(())
}

/// Resolves at the first SIGTERM or SIGINT. The second ends the process at once, whatever it is doing.
fn shutdown_signal() -> Result<impl Future<Output = ()>, Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let (first, begun) = oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        next().await;
        tracing::info!("signal: draining");
        let _ = first.send(());
        next().await;
        // Blocks the drain too, which must not end well in the meantime.
        std::thread::sleep(LAST_LINES);
        std::process::exit(1);
    });
    Ok(async move {
        let _ = begun.await;
    })
}

async fn start_sandbox(config: &Config) -> Result<Option<SocketAddr>, Error> {
    if config.upstream.endpoint != Endpoint::Sandbox {
        return Ok(None);
    }
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let sandbox = Sandbox::bind(any_port).await.map_err(Error::Sandbox)?;
    let address = sandbox.local_addr();
    tokio::spawn(sandbox.serve(future::pending()));
    Ok(Some(address))
}

fn base_url(endpoint: &Endpoint, sandbox: Option<SocketAddr>) -> config::BaseUrl {
    match endpoint {
        Endpoint::Url(url) => url.clone(),
        Endpoint::Sandbox => config::BaseUrl::of_plain(
            sandbox.expect("credentials use the sandbox only when upstream does"),
        ),
    }
}

fn source(
    configured: &config::Credentials,
    base_url: impl Fn(&Endpoint) -> config::BaseUrl,
) -> credentials::Source {
    let url = |endpoint| base_url(endpoint).as_str().to_owned();
    match configured {
        config::Credentials::Caller => credentials::Source::Caller,
        config::Credentials::Token(token) => credentials::Source::Token(token.clone()),
        config::Credentials::TokenFile(path) => credentials::Source::TokenFile(path.clone()),
        config::Credentials::Iam(iam) => credentials::Source::Iam(iam::Config {
            endpoint: url(&iam.endpoint),
            user: iam.user.clone(),
            domain: iam.domain.clone(),
            password_file: iam.password_file.clone(),
            project: iam.project.clone(),
        }),
        config::Credentials::Key(key) => credentials::Source::Key(Arc::clone(key)),
        config::Credentials::Profile(path) => credentials::Source::Profile(path.clone()),
        config::Credentials::Metadata(endpoint) => credentials::Source::Metadata(url(endpoint)),
        config::Credentials::Chain {
            key,
            profile,
            metadata,
        } => credentials::Source::Chain(chain::Config {
            environment: key.clone(),
            profile: profile.clone(),
            metadata_endpoint: url(metadata),
        }),
    }
}

/// How the vendor's endpoints are reached.
fn http_config(
    upstream: &config::Upstream,
    endpoint: &config::BaseUrl,
    credentials: &credentials::Source,
) -> Result<http_client::Config, Error> {
    let extra_roots = match &upstream.ca {
        Some(path) => Some(std::fs::read(path).map_err(Error::UpstreamCa)?),
        None => None,
    };
    let is_https = |base: &str| base.starts_with("https:");
    let identity_service = match credentials {
        credentials::Source::Iam(iam) => Some(iam.endpoint.as_str()),
        _ => None,
    };
    let system = if is_https(endpoint.as_str()) || identity_service.is_some_and(is_https) {
        http_client::SystemRoots::Trusted
    } else {
        http_client::SystemRoots::Ignored
    };
    let proxy = upstream.proxy.as_ref();
    Ok(http_client::Config {
        tls: http_client::tls_config(system, extra_roots.as_deref())?,
        https_only: is_https(endpoint.as_str()),
        proxy: proxy.map(|proxy| url(proxy.url.expose_secret())),
        connect_timeout: upstream.connect_timeout,
    })
}

fn url(text: &str) -> reqwest::Url {
    reqwest::Url::parse(text).expect("the configuration holds only URLs that parse")
}

/// One facade for each worker, made before any thread starts, so that a setting that cannot be used ends the start.
fn facades(
    config: &Config,
    workers: usize,
    endpoint: reqwest::Url,
    http: &http_client::Config,
    credentials: &Credentials,
    metrics: &Arc<Metrics>,
) -> Result<Mutex<Vec<Facade>>, Error> {
    let upstream = &config.upstream;
    let shared = upstream::Endpoint::new(
        upstream::Config {
            endpoint,
            attempt_timeout: upstream.attempt_timeout,
            max_attempts: upstream.max_attempts,
            retry_budget_percent: upstream.retry_budget_percent,
            rate: upstream.rate.map(|rate| upstream::RateConfig {
                calls: rate.calls,
                period: rate.per,
            }),
        },
        Arc::clone(metrics),
    );
    let coalescer = Coalescer::new(
        coalescer::Config {
            cache_ttl: config.cache_ttl,
            cache_entries: config.cache_entries,
        },
        Arc::clone(metrics),
    );
    let allowed: HashSet<_> = config.allowed_projects.iter().cloned().collect();
    let allowed = (!allowed.is_empty()).then(|| Arc::new(allowed));
    let facade = |_| {
        let client = upstream::Client::new(
            http_client::Client::new(http)?,
            Arc::clone(&shared),
            credentials.clone(),
        );
        Ok(Facade::new(
            credentials.clone(),
            Arc::clone(&coalescer),
            client,
            allowed.clone(),
        ))
    };
    let facades: Result<Vec<_>, Error> = (0..workers).map(facade).collect();
    Ok(Mutex::new(facades?))
}

/// One worker for each core that the process may use.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn server_config(config: &Config, workers: usize) -> server::Config {
    server::Config {
        timeout: config.timeout,
        max_in_flight: config.max_in_flight,
        max_connections: config.max_connections,
        drain_delay: config.drain_delay,
        shutdown_grace: config.shutdown_grace,
        tls: config.tls.as_ref().map(|files| tls::Files {
            certificate: files.cert.clone(),
            key: files.key.clone(),
            client_ca: files.client_ca.clone(),
            reload_interval: Duration::from_secs(10),
        }),
        reflection: config.reflection,
        workers,
        timings: Timings {
            max_connection_age: config.max_connection_age.unwrap_or_default(),
            ..Timings::default()
        },
    }
}
