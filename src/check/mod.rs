//! The subcommand `check`: whether `serve` can work with a configuration, before anyone depends on it.
//!
//! Each check prints one line as soon as it has ended. All of them together take less than a minute, even if every peer hangs, and send RDS at
//! most three requests: one without a credential, and a call for a task that does not exist, with its one repetition. The checks use the
//! clients, credentials and messages of `serve`.

mod rds;

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use serde_json::json;
use url::Url;

use crate::{
    accept, app,
    cli::{Check, Serve},
    descriptors,
    options::{OutputFormat, url::without_slash},
    quota_store::QuotaStore,
    server::tls,
    telemetry::{Escaped, metrics::Metrics},
};

/// A certificate that expires sooner is a warning.
const NEAR_EXPIRY: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// The result of one check.
enum Outcome {
    Fine,
    /// `serve` can work, but the operator should look at it.
    Warn,
    /// `serve` cannot work.
    Fail,
}

use Outcome::{Fail, Fine, Warn};

/// Prints the results.
struct Report {
    format: OutputFormat,
    has_failed: bool,
}

impl Report {
    /// Prints one result. `message` is one sentence without secrets, which ends with the cure.
    fn add(&mut self, check: &str, outcome: Outcome, message: &str) {
        self.has_failed |= matches!(outcome, Fail);
        let outcome = match outcome {
            Fine => "ok",
            Warn => "warn",
            Fail => "fail",
        };
        // Parts of it can come from a peer.
        let safe = Escaped(message).to_string();
        let line = match self.format {
            OutputFormat::Text => format!("{outcome:<4} {check}: {safe}\n"),
            OutputFormat::Json => {
                let object = json!({ "check": check, "outcome": outcome, "message": safe });
                format!("{object}\n")
            }
        };
        // A closed standard output does not change the result.
        let _ = io::stdout().write_all(line.as_bytes());
    }
}

/// Makes all checks. The exit code is 1 if one of them has failed.
pub async fn check(options: Check) -> ExitCode {
    let mut report = Report {
        format: options.output,
        has_failed: false,
    };
    let descriptors = descriptors::raise_limit();
    let serve = &options.serve;
    let (base_url, source, _) = match app::resolve_upstream(serve).await {
        Ok(found) => found,
        Err(error) => {
            report.add("sandbox", Fail, &error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let (target, from) = (without_slash(&base_url), source.name());
    let settings = format!("RDS at {target} with --credentials {from}");
    report.add("settings", Fine, &settings);
    certificate(serve, &mut report);
    rds::check(&options, &base_url, source, &mut report).await;
    listeners(serve, &mut report);
    descriptor_limit(descriptors, serve, &mut report);
    quota_store(serve, &base_url, &mut report).await;
    match report.has_failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Certificate, key and client CA of the listener, which the validation of the settings has read once.
fn certificate(serve: &Serve, report: &mut Report) {
    let Some(files) = &serve.server.tls else {
        return;
    };
    let (outcome, message) = match tls::check(files) {
        Err(error) => (Fail, error.to_string()),
        Ok(None) => (Warn, "its expiry date cannot be read".to_owned()),
        Ok(Some(expires)) => {
            let date = Timestamp::try_from(expires).map_or_else(
                |_| "in a distant year".to_owned(),
                |at| at.strftime("%Y-%m-%d %H:%M UTC").to_string(),
            );
            match expires.duration_since(system_time()) {
                Err(_) => (Fail, format!("has expired on {date}: replace it")),
                Ok(left) if left < NEAR_EXPIRY => {
                    (Warn, format!("expires on {date}: replace it soon"))
                }
                Ok(_) => (Fine, format!("matches its key and expires on {date}")),
            }
        }
    };
    report.add("certificate", outcome, &message);
}

/// Whether the addresses of the listeners can be used.
fn listeners(serve: &Serve, report: &mut Report) {
    let addresses = [
        ("listen", Some(serve.server.listen)),
        ("metrics-listen", serve.admin.metrics_listen),
    ];
    // Held until the end, so that two listeners with one address are noticed.
    let mut open = Vec::new();
    for (flag, address) in addresses {
        let Some(address) = address else {
            continue;
        };
        let (outcome, message) = match accept::listen(address) {
            Ok(listener) => {
                open.push(listener);
                (Fine, format!("{address} is free"))
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => in_use(address, &mut open),
            Err(error) => (Fail, format!("{address}: {error}; check --{flag}")),
        };
        report.add(flag, outcome, &message);
    }
}

/// The result for an address in use: by another process, or by the other listener of this configuration.
fn in_use(address: SocketAddr, open: &mut Vec<std::net::TcpListener>) -> (Outcome, String) {
    let is_own = !open.is_empty() && {
        open.clear();
        accept::listen(address).is_ok()
    };
    match is_own {
        true => (
            Fail,
            format!("{address} is the address of --listen: use another port"),
        ),
        false => (
            Warn,
            format!(
                "{address} is in use: by this service, if it runs already; otherwise stop the other process or use another port"
            ),
        ),
    }
}

/// Whether the limit of open descriptors is high enough for the configured limits.
fn descriptor_limit(limit: usize, serve: &Serve, report: &mut Report) {
    let server = &serve.server;
    let (outcome, message) = match descriptors::fit(
        limit,
        server.max_connections,
        server.max_in_flight,
    ) {
        None => (
            Fine,
            "enough for --max-connections and --max-in-flight".to_owned(),
        ),
        Some(fitted) => (
            Warn,
            format!(
                "the limit is {limit}, but --max-connections and --max-in-flight need {}: raise it (ulimit -n), otherwise they are reduced to {} and {}",
                fitted.needed, fitted.connections, fitted.calls
            ),
        ),
    };
    report.add("descriptors", outcome, &message);
}

/// Whether the quota store, if any is configured, can be used. `serve` works without it, so only a store that ends the start is a failure.
async fn quota_store(serve: &Serve, base_url: &Url, report: &mut Report) {
    let metrics = Metrics::new();
    let opened = QuotaStore::open(
        &serve.quota_store,
        base_url,
        serve.upstream.attempt_timeout,
        serve.result_lifetime(),
        &metrics,
    );
    let (outcome, message) = match opened.await {
        Ok(None) => return,
        Ok(Some((store, opened))) => {
            let result = match opened.problem() {
                None => (Fine, "this replica can use it".to_owned()),
                Some(problem) => (
                    Warn,
                    format!(
                        "{problem}; without it, each replica paces itself and shares no results: see docs/fleet.md"
                    ),
                ),
            };
            opened.close(&store).await;
            result
        }
        Err(error) => (Fail, error.to_string()),
    };
    report.add("quota-store", outcome, &message);
}

#[expect(
    clippy::disallowed_methods,
    reason = "an expiry date is compared with the system's clock"
)]
fn system_time() -> SystemTime {
    SystemTime::now()
}
