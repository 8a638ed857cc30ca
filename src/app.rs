//! The composition root of `serve` and `sandbox`: connects and starts the modules, runs them until a signal, returns the exit code.

use std::{
    future, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
};
use url::Url;

use crate::{
    accept, admin,
    cli::Serve,
    coalescer::Coalescer,
    credentials::{Credentials, Source},
    descriptors,
    http_client::{self, SystemRoots},
    lookup::Lookups,
    method::Method,
    options::{defaults, url::without_slash},
    quota_store::{self, QuotaStore},
    rpc::Facade,
    sandbox::Sandbox,
    server::{self, Server},
    supervise::Task,
    telemetry::{self, Access, Sinks, metrics::Metrics},
    upstream,
    watch::Hub,
};

/// Longest time for exporting the last spans.
const MAX_LAST_EXPORT: Duration = Duration::from_secs(5);

/// The exit code for flags, variables and files that cannot be used.
pub const INVALID_CONFIGURATION: u8 = 2;

/// Time for the log thread to write its queued lines when a second signal ends the process.
const LAST_LINES_DELAY: Duration = Duration::from_millis(30);

/// Why the program cannot start or go on. One sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot listen on {address}: {error}{}", in_use_hint(flag, error))]
    Listen {
        /// The flag that sets the address.
        flag: &'static str,
        address: SocketAddr,
        #[source]
        error: io::Error,
    },
    #[error("cannot start the sandbox: {0}")]
    Sandbox(#[source] io::Error),
    #[error(transparent)]
    Http(#[from] http_client::BuildError),
    #[error(transparent)]
    Server(#[from] server::Error),
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    QuotaStore(#[from] quota_store::Error),
}

fn in_use_hint(flag: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "; another process has this port, perhaps an earlier {}: stop it, or set {flag}",
            env!("CARGO_PKG_NAME")
        ),
        _ => String::new(),
    }
}

/// Runs the gRPC server until a signal, then drains.
pub async fn serve(options: Serve) -> ExitCode {
    let metrics = Metrics::new();
    let telemetry = telemetry::start(&options.telemetry, &metrics);
    finish(run(options, metrics, telemetry.access.clone()).await)
}

/// Runs only the sandbox until a signal.
pub async fn sandbox(listen: SocketAddr) -> ExitCode {
    descriptors::raise_limit();
    let _telemetry = telemetry::start(&defaults(), &Metrics::new());
    finish(run_sandbox(listen).await)
}

fn finish(ended: Result<(), Error>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ Error::QuotaStore(_)) => {
            tracing::error!("{error}");
            ExitCode::from(INVALID_CONFIGURATION)
        }
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Serve, metrics: Arc<Metrics>, access: Access) -> Result<(), Error> {
    let descriptors = descriptors::raise_limit();
    let shutdown = shutdown_signal()?;
    let address = options.server.listen;
    let listener = accept::listen(address).map_err(cannot_listen("--listen", address))?;
    let listen = listener.local_addr();
    let listen = listen.map_err(cannot_listen("--listen", address))?;
    let admin = match options.admin.metrics_listen {
        Some(address) => Some(
            accept::listen(address)
                .and_then(TcpListener::from_std)
                .map_err(cannot_listen("--metrics-listen", address))?,
        ),
        None => None,
    };
    let metrics_listen = admin
        .as_ref()
        .and_then(|listener| listener.local_addr().ok());
    let ipv6 = |addresses: [Option<SocketAddr>; 2]| {
        let addresses = addresses.iter().flatten();
        addresses.filter(|address| address.is_ipv6()).count()
    };
    let configured = [Some(address), options.admin.metrics_listen];
    if ipv6(configured) != ipv6([Some(listen), metrics_listen]) {
        tracing::info!("the kernel has no IPv6: listening on 0.0.0.0 instead of [::]");
    }
    let (base_url, source, sandbox) = resolve_upstream(&options).await?;
    let system_roots = system_roots(&base_url, &source);
    let http = options.upstream.http_config(system_roots)?;
    let store = QuotaStore::open(
        &options.quota_store,
        &base_url,
        options.upstream.attempt_timeout,
        options.result_lifetime(),
        &metrics,
    );
    let (store, opened) = store.await?.unzip();
    let credentials = Credentials::start(
        source,
        options.quota_store.caller_key(),
        &http,
        Arc::clone(&metrics),
    )?;
    let mut server_options = options.server.clone();
    let (connections, calls) = (server_options.max_connections, server_options.max_in_flight);
    let fitted = descriptors::fit(descriptors, connections, calls);
    if let Some(fitted) = &fitted {
        server_options.max_connections = fitted.connections;
        server_options.max_in_flight = fitted.calls;
    }
    let max_calls = server_options.max_in_flight;
    let facades = facades(
        &options,
        &base_url,
        &http,
        &credentials,
        store.as_ref(),
        max_calls,
        &metrics,
    )?;

    let serving = watch::Sender::new(false);
    if let Some(listener) = admin {
        let ready = serving.subscribe();
        let metrics = Arc::clone(&metrics);
        tokio::spawn(async move {
            let serve = || admin::serve(&listener, Arc::clone(&metrics), ready.clone());
            metrics.background.supervise(Task::Admin, serve).await
        });
    }
    let shutdown_time = options.server.drain_delay + options.server.shutdown_grace;
    let tracer = telemetry::start_tracing(&options.telemetry, Arc::clone(&metrics));
    let stopping = Arc::new(OnceLock::new());
    let shutdown = {
        let stopping = Arc::clone(&stopping);
        async move {
            shutdown.await;
            let _ = stopping.set(Instant::now());
        }
    };
    let sinks = Arc::new(Sinks {
        metrics,
        access,
        tracer: tracer.clone(),
    });
    let server = Server::start(listener, server_options, facades, serving, sinks).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %listen,
        metrics_listen = %metrics_listen.map_or_else(|| "off".to_owned(), |address| address.to_string()),
        upstream = without_slash(&base_url),
        config = options.summary(),
        "serving"
    );
    // After the line above, which is the first one of the log.
    if let (Some(store), Some(opened)) = (&store, opened) {
        store.start(opened);
    }
    if sandbox {
        tracing::warn!(
            "the upstream is the embedded sandbox: replies are not real; \
             breaker, retry budget, throttle windows and key guard are scoped to the instance id"
        );
        for command in first_calls(&options, listen) {
            tracing::info!("try in another terminal: {command}");
        }
    }
    if let Some(warning) = options.exposure_warning() {
        tracing::warn!("{warning}");
    }
    if let Some(fitted) = fitted {
        tracing::warn!(
            limit = descriptors,
            needed = fitted.needed,
            max_connections = fitted.connections,
            max_in_flight = fitted.calls,
            "the limit of open descriptors is too low for --max-connections and --max-in-flight, which are reduced; raise the limit (ulimit -n)"
        );
    }
    server.run(credentials.ready(), shutdown).await;
    if let Some(tracer) = tracer {
        let spent = stopping.get().map(Instant::elapsed).unwrap_or_default();
        let left = shutdown_time.saturating_sub(spent);
        // Within the rest of the shutdown time, which the calls in flight may have used up.
        if !tracer.finish(left.min(MAX_LAST_EXPORT)).await {
            tracing::warn!("the last spans did not reach the collector in time");
        }
    }
    // Last, because another heartbeat would count this replica again.
    if let Some(store) = store {
        store.leave().await;
    }
    tracing::info!("stopped");
    Ok(())
}

fn cannot_listen(flag: &'static str, address: SocketAddr) -> impl Fn(io::Error) -> Error {
    move |error| Error::Listen {
        flag,
        address,
        error,
    }
}

/// Commands for a first call to this server with the sandbox.
fn first_calls(options: &Serve, listen: SocketAddr) -> Vec<String> {
    let host = match listen.ip() {
        ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    let address = format!("{host}:{}", listen.port());
    if options.server.tls.is_some() {
        return vec![format!(
            "rds-task-facade call --target https://{address} --ca FILE"
        )];
    }
    let (variable, header) = match options.source {
        Source::Caller => (
            "RDS_TASK_FACADE_TOKEN=sandbox-token ",
            " -H 'x-auth-token: sandbox-token'",
        ),
        _ => ("", ""),
    };
    let project = options.rpc.allow_project.first();
    let ids = project.map_or_else(String::new, |id| {
        format!(" --project-id {id} --instance-id every-field --workflow-id w")
    });
    let project = project.map_or("p", String::as_str);
    let task = format!(
        r#"{{"project_id": "{project}", "instance_id": "every-field", "workflow_id": "w"}}"#
    );
    let method = Method::GetTaskDetail.full_name();
    let mut commands = vec![format!(
        "{variable}rds-task-facade call --target http://{address}{ids}"
    )];
    if options.server.reflection {
        commands.push(format!(
            "grpcurl -plaintext{header} -d '{task}' {address} {method}"
        ));
    }
    commands
}

async fn run_sandbox(listen: SocketAddr) -> Result<(), Error> {
    let shutdown = shutdown_signal()?;
    let sandbox = Sandbox::bind(listen).await;
    let sandbox = sandbox.map_err(cannot_listen("--listen", listen))?;
    tracing::info!(listen = %sandbox.local_addr(), "sandbox");
    sandbox.serve(shutdown).await;
    tracing::info!("stopped");
    Ok(())
}

/// Resolves at the first SIGTERM or SIGINT. The second signal ends the process at once. Other signals that programs use among themselves
/// no longer end the process: SIGHUP makes the watchers of files read them again, SIGUSR1 and SIGUSR2 do nothing.
fn shutdown_signal() -> Result<impl Future<Output = ()>, Error> {
    let listen = |kind| signal(kind).map_err(Error::Signals);
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    // The runtime never restores the default, which would end the process.
    let _ = listen(SignalKind::user_defined1())?;
    let _ = listen(SignalKind::user_defined2())?;
    let (first, begun) = oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            loop {
                tokio::select! {
                    _ = terminate.recv() => return,
                    _ = interrupt.recv() => return,
                    Some(()) = hangup.recv() => {
                        tracing::info!("SIGHUP: reading certificates and secrets again");
                    }
                }
            }
        };
        next().await;
        tracing::info!("signal: draining");
        let _ = first.send(());
        next().await;
        // Blocks the drain too, so that it cannot end the process with exit code 0 meanwhile.
        thread::sleep(LAST_LINES_DELAY);
        std::process::exit(1);
    });
    Ok(async move {
        let _ = begun.await;
    })
}

/// The base URL of RDS, the credential source, and whether the embedded sandbox is used, which this starts.
pub(crate) async fn resolve_upstream(options: &Serve) -> Result<(Url, Source, bool), Error> {
    let mut source = options.source.clone();
    if let Some(url) = options.upstream.base_url() {
        return Ok((url, source, false));
    }
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let sandbox = Sandbox::bind(any_port).await.map_err(Error::Sandbox)?;
    let address = sandbox.local_addr();
    tokio::spawn(sandbox.serve(future::pending()));
    source.set_sandbox(address);
    let url = Url::parse(&format!("http://{address}")).expect("an address is a valid URL");
    Ok((url, source, true))
}

/// The system's certificates are needed for TLS only.
pub(crate) fn system_roots(base_url: &Url, source: &Source) -> SystemRoots {
    let iam_endpoint = match source {
        Source::Iam(iam) => Some(&iam.endpoint),
        _ => None,
    };
    let needs_roots = |url: &Url| url.scheme() == "https";
    match needs_roots(base_url) || iam_endpoint.is_some_and(needs_roots) {
        true => SystemRoots::Trusted,
        false => SystemRoots::Ignored,
    }
}

/// One facade for each worker, and one worker for each core that the process may use.
fn facades(
    options: &Serve,
    base_url: &Url,
    http: &http_client::Config,
    credentials: &Credentials,
    store: Option<&Arc<QuotaStore>>,
    max_calls: usize,
    metrics: &Arc<Metrics>,
) -> Result<Vec<Facade>, Error> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    // All workers together keep no more idle connections than calls in flight need.
    let max_idle = max_calls.div_ceil(workers);
    let shared = upstream::Endpoint::new(
        base_url.clone(),
        options.upstream.clone(),
        Arc::clone(metrics),
    );
    let coalescer = Coalescer::new(&options.coalescer, Arc::clone(metrics));
    let hub = Hub::new(&options.watch, options.server.timeout, Arc::clone(metrics));
    let facade = |_| {
        let upstream = upstream::Client::new(
            http_client::Client::new(http, base_url, max_idle)?,
            Arc::clone(&shared),
            credentials.clone(),
        );
        let lookups = Lookups {
            credentials: credentials.clone(),
            coalescer: Arc::clone(&coalescer),
            upstream,
            store: store.cloned(),
        };
        Ok(Facade::new(lookups, Arc::clone(&hub), &options.rpc))
    };
    (0..workers).map(facade).collect()
}
