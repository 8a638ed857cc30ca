//! The settings of `serve`: rules that span several flags, and the list of effective values.

use std::{ffi::OsString, path::PathBuf};

use super::{
    BaseUrl, Config, Credentials, Endpoint, Environment, Log, LogFormat, Refused, Tls, Upstream,
    credentials::{self, Surroundings},
    flags,
    read::{self, Reader, Typed},
    regions::{self, Region},
    tracing,
    urls::{self, PlainHttp},
    values::{self, Parsed},
};
use crate::{http_client, server, telemetry::log};

const LOG_FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];

/// Reads the arguments that follow `serve`; with the configuration comes whether it is only to be printed.
pub(super) fn read(
    args: impl IntoIterator<Item = OsString>,
    env: &Environment,
) -> Result<(Config, bool), Refused> {
    let prefix = [env!("CARGO_PKG_NAME"), "serve"].map(OsString::from);
    match read::split(prefix.into_iter().chain(args).collect())? {
        Typed::Flags(matches, mistakes) => {
            let (_, matches) = matches
                .subcommand()
                .expect("the arguments begin with serve");
            of_matches(matches, env, mistakes)
        }
        Typed::Print(_) => Err(Refused {
            mistakes: vec!["--help: prints a text and makes no configuration".to_owned()],
            log_format: LogFormat::Text,
        }),
    }
}

/// Reads the flags of `serve` as clap split them.
pub(super) fn of_matches(
    matches: &clap::ArgMatches,
    env: &Environment,
    mistakes: Vec<String>,
) -> Result<(Config, bool), Refused> {
    let mut reader = Reader::new(flags::SERVE, matches, env, true, mistakes);
    let r = &mut reader;
    read::unknown_variables(r);
    let log_format = r.value("log-format", |text| values::word(text, &LOG_FORMATS));
    let print = r.value("print-config", values::boolean);
    let plain_http = match r.value("allow-insecure-upstream", values::boolean) {
        true => PlainHttp::Anywhere,
        false => PlainHttp::Loopback,
    };
    let (endpoint, region) = endpoint(r, plain_http);
    let around = Surroundings {
        region,
        sandbox: endpoint == Endpoint::Sandbox,
        plain_http,
    };
    let (source, credentials) = credentials::read(r, &around);
    let age = r.value("max-connection-age", zero_or_longer);
    let mut config = Config {
        listen: r.value("listen", values::address),
        metrics_listen: r.value("metrics-listen", values::address_or_off),
        upstream: Upstream {
            endpoint,
            ca: r.optional("upstream-ca", roots),
            proxy: r.optional("upstream-proxy", urls::proxy),
            attempt_timeout: r.value("attempt-timeout", positive),
            connect_timeout: r.value("connect-timeout", positive),
            max_attempts: r.value("max-attempts", |text| values::number(text, 1..=10)),
            retry_budget_percent: r.value("retry-budget", |text| values::number(text, 0..=100)),
            rate: r.value("upstream-rate", values::rate),
        },
        // Without a value there are mistakes, and the configuration is not handed out.
        credentials: credentials.unwrap_or(Credentials::Caller),
        allowed_projects: r.list("allow-project", values::project_ids),
        timeout: r.value("timeout", positive),
        max_in_flight: r.value("max-in-flight", limit) as usize,
        max_connections: r.value("max-connections", limit) as usize,
        cache_ttl: r.value("cache-ttl", zero_or_longer),
        cache_entries: r.value("cache-entries", limit).into(),
        drain_delay: r.value("drain-delay", zero_or_longer),
        shutdown_grace: r.value("shutdown-grace", zero_or_longer),
        max_connection_age: Some(age).filter(|age| !age.is_zero()),
        tls: tls(r),
        reflection: r.value("reflection", values::boolean),
        log: Log {
            format: log_format,
            filter: filter(r),
        },
        tracing: tracing::read(r),
        propagate_trace_upstream: r.value("propagate-trace-upstream", values::boolean),
        shown: Vec::new(),
    };
    if r.mistakes.is_empty() {
        config.shown = shown(r, &config, source);
    }
    reader.finish(log_format, (config, print))
}

fn positive(text: &str) -> Parsed<std::time::Duration> {
    values::duration(text, false)
}

fn zero_or_longer(text: &str) -> Parsed<std::time::Duration> {
    values::duration(text, true)
}

/// A count of things that take memory: a million is far beyond any use and still fits every counter.
fn limit(text: &str) -> Parsed<u32> {
    values::number(text, 1..=1_000_000)
}

/// Exactly one of `--region`, `--endpoint` and `--sandbox`.
fn endpoint(r: &mut Reader<'_>, plain_http: PlainHttp) -> (Endpoint, Option<Region>) {
    let region = r.given("region");
    let url = r.given("endpoint");
    let nowhere = (Endpoint::Sandbox, None);
    let before = r.mistakes.len();
    let sandbox = r.value("sandbox", values::boolean);
    if r.mistakes.len() > before {
        return nowhere;
    }
    match (region, url, sandbox) {
        (Some(given), None, false) => {
            let region = r.parsed(&given.source, known_region(&given.texts[0]));
            region.map_or(nowhere, |region| {
                let url = BaseUrl(format!("https://{}", region.rds_host));
                (Endpoint::Url(url), Some(region))
            })
        }
        (None, Some(given), false) => {
            let url = urls::base_url(&given.texts[0], plain_http);
            let url = r.parsed(&given.source, url);
            url.map_or(nowhere, |url| (Endpoint::Url(url), None))
        }
        (None, None, true) => (Endpoint::Sandbox, None),
        (region, url, sandbox) => {
            let mut sources: Vec<String> = [region, url]
                .into_iter()
                .flatten()
                .map(|given| given.source)
                .collect();
            sources.extend(sandbox.then(|| "--sandbox".to_owned()));
            let problem = match sources.is_empty() {
                true => "one of the three must say where RDS is; try serve --sandbox".to_owned(),
                false => format!("only one may be set, found {}", sources.join(" and ")),
            };
            r.mistake("--region, --endpoint, --sandbox", &problem)
                .unwrap_or(nowhere)
        }
    }
}

fn known_region(id: &str) -> Parsed<Region> {
    regions::find(id).ok_or_else(|| {
        let ids: Vec<&str> = regions::all().map(|region| region.id).collect();
        match values::closest(id, ids.iter().copied()) {
            Some(close) => format!("no known region; did you mean {close}?"),
            None => format!(
                "no known region; known are {}; for any other use --endpoint",
                ids.join(", ")
            ),
        }
    })
}

/// The path of a file with at least one certificate.
fn roots(text: &str) -> Parsed<PathBuf> {
    let path = values::file(text)?;
    let pem = std::fs::read(&path).map_err(|error| format!("cannot be read: {error}"))?;
    match http_client::check_roots(&pem) {
        Ok(()) => Ok(path),
        Err(error) => Err(error.to_string()),
    }
}

fn tls(r: &mut Reader<'_>) -> Option<Tls> {
    let set = ["tls-cert", "tls-key", "tls-client-ca"].map(|name| r.given(name).is_some());
    match set {
        [true, false, _] => r.mistake("--tls-cert", "needs --tls-key too"),
        [false, true, _] => r.mistake("--tls-key", "needs --tls-cert too"),
        [false, false, true] => r.mistake("--tls-client-ca", "needs --tls-cert and --tls-key"),
        _ => {
            let cert = r.file("tls-cert");
            let key = r.file("tls-key");
            let client_ca = r.file("tls-client-ca");
            let files = Tls {
                cert: cert?,
                key: key?,
                client_ca,
            };
            match server::tls::check(&files.cert, &files.key, files.client_ca.as_deref()) {
                Ok(()) => Some(files),
                Err(error) => {
                    r.mistake("--tls-cert, --tls-key, --tls-client-ca", &error.to_string())
                }
            }
        }
    }
}

fn filter(r: &mut Reader<'_>) -> String {
    let text = r.variable("RUST_LOG").unwrap_or_default();
    if text.trim().is_empty() {
        return "info".to_owned();
    }
    if log::filter(&text).is_none() {
        return r
            .mistake(
                "RUST_LOG",
                "must be a level (error, warn, info, debug, trace, off) or target=level, with commas between",
            )
            .unwrap_or(text);
    }
    text
}

/// Name and effective value of every setting. A flag of a credential source not in use shows as such: nobody checked it,
/// so it could hold anything.
fn shown(r: &mut Reader<'_>, config: &Config, source: &str) -> Vec<(String, String)> {
    let mut shown = Vec::new();
    for flag in flags::SERVE {
        let value = match flag.name {
            _ if !r.was_read(flag.name) => "not in use".to_owned(),
            "credentials" => source.to_owned(),
            "upstream-proxy" => config
                .upstream
                .proxy
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            "iam-endpoint" | "metadata-endpoint" => {
                credential_endpoint(&config.credentials).unwrap_or_default()
            }
            "iam-project" => match &config.credentials {
                Credentials::Iam(iam) => iam.project.clone(),
                _ => String::new(),
            },
            name => r
                .given(name)
                .map_or(flag.default.to_owned(), |given| given.texts.join(",")),
        };
        shown.push((flag.name.to_owned(), value));
    }
    let secrets: &[&str] = match &config.credentials {
        Credentials::Token(_) => &["RDS_TASK_FACADE_TOKEN"],
        Credentials::Key(key) | Credentials::Chain { key: Some(key), .. } => {
            match key.security_token {
                Some(_) => &[
                    "HUAWEICLOUD_SDK_AK",
                    "HUAWEICLOUD_SDK_SK",
                    "HUAWEICLOUD_SDK_SECURITY_TOKEN",
                ],
                None => &["HUAWEICLOUD_SDK_AK", "HUAWEICLOUD_SDK_SK"],
            }
        }
        _ => &[],
    };
    shown.extend(
        secrets
            .iter()
            .map(|name| ((*name).to_owned(), "set".to_owned())),
    );
    shown.push(("RUST_LOG".to_owned(), config.log.filter.clone()));
    if let Some(tracing) = &config.tracing {
        shown.push(("traces".to_owned(), tracing.endpoint.clone()));
        if !tracing.headers.is_empty() {
            shown.push(("OTEL_EXPORTER_OTLP_HEADERS".to_owned(), "set".to_owned()));
        }
    }
    shown
}

fn credential_endpoint(credentials: &Credentials) -> Option<String> {
    match credentials {
        Credentials::Iam(iam) => Some(iam.endpoint.to_string()),
        Credentials::Metadata(endpoint)
        | Credentials::Chain {
            metadata: endpoint, ..
        } => Some(endpoint.to_string()),
        _ => None,
    }
}
