//! The options of `serve`, composed of the options of its modules.

use std::{ffi::OsStr, time::Duration};

use clap::{ArgMatches, parser::ValueSource};
use http::HeaderValue;

use crate::{
    admin, coalescer,
    credentials::{self, Source, UpstreamContext, secret::parse_token},
    options::{BOOL, OutputFormat, PREFIX, Shown, Validation, boolean, variable_name, word},
    quota_store,
    rpc::{
        self,
        request::{MAX_ID, id_problem},
    },
    server::{self, tls},
    telemetry, upstream, watch,
};

/// The text below the flags in `serve --help`.
pub(super) const NOTES: &str = "\
Every flag has a variable: RDS_TASK_FACADE_ and the flag in capitals, for example RDS_TASK_FACADE_MAX_IN_FLIGHT. The flag
wins; an empty variable is unset. Durations are written 250ms, 10s, 5m, 1h; booleans true, false, 1, 0; lists a,b,c.

Other variables:
  RDS_TASK_FACADE_TOKEN            for --credentials token; in check also for caller
  HUAWEICLOUD_SDK_AK, _SK, _SECURITY_TOKEN
                                   for --credentials env and chain
  HUAWEICLOUD_SDK_CREDENTIALS_FILE for --credentials profile and chain [default: ~/.huaweicloud/credentials]
  HUAWEICLOUD_SDK_IAM_ENDPOINT     for --credentials iam
  HUAWEICLOUD_SDK_PROJECT_ID       project for the call of check, without --allow-project
  RUST_LOG                         log filter [default: info]
  OTEL_EXPORTER_OTLP_ENDPOINT      collector for traces, http/protobuf; enables the other OTEL_* variables";

/// The options of `check`.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_line_help = true)]
pub struct Check {
    /// The configuration to check.
    #[command(flatten)]
    pub serve: Serve,
    /// Format of the results, text or json: one object per line
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "text",
        value_parser = word::<OutputFormat>,
        help_heading = "Results"
    )]
    pub output: OutputFormat,
    /// The token of a caller, if callers bring their own.
    #[arg(skip)]
    pub caller_token: Option<HeaderValue>,
    /// The project for a call; `None` if the configuration names none.
    #[arg(skip)]
    pub project: Option<String>,
}

impl Check {
    /// Reads the variables that only `check` uses.
    pub(super) fn read_variables(&mut self, validation: &mut Validation<'_>) {
        if matches!(self.serve.source, Source::Caller) {
            let variable = format!("{PREFIX}TOKEN");
            self.caller_token = validation.parsed_variable(&variable, parse_token);
        }
        let allowed = self.serve.rpc.allow_project.first().map(String::as_str);
        let from_iam = match &self.serve.source {
            Source::Iam(iam) => iam.project_id(),
            _ => None,
        };
        let from_sdk = || {
            // Not of this program, so an unusable value is no problem.
            let id = validation.raw_variable("HUAWEICLOUD_SDK_PROJECT_ID")?;
            id.to_str().filter(|id| id_problem(id, MAX_ID).is_none())
        };
        self.project = allowed.or(from_iam).or_else(from_sdk).map(str::to_owned);
    }
}

/// The options of `serve`.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_line_help = true)]
pub struct Serve {
    /// The gRPC listener.
    #[command(flatten)]
    pub server: server::Options,
    /// The listener for metrics and probes.
    #[command(flatten)]
    pub admin: admin::Options,
    /// The endpoint of RDS, attempts and retries.
    #[command(flatten)]
    pub upstream: upstream::Options,
    #[command(flatten)]
    credentials: credentials::Options,
    /// Access rules.
    #[command(flatten)]
    pub rpc: rpc::Options,
    /// Polls of watched tasks.
    #[command(flatten)]
    pub watch: watch::Options,
    /// The cache.
    #[command(flatten)]
    pub coalescer: coalescer::Options,
    /// What replicas share.
    #[command(flatten)]
    pub quota_store: quota_store::Options,
    /// Log and traces.
    #[command(flatten)]
    pub telemetry: telemetry::Options,
    /// Print the effective configuration as variables without secrets, and exit
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = clap::ArgAction::Set, help_heading = "Configuration")]
    pub print_config: bool,
    /// The credential source that `--credentials` and its flags describe.
    #[arg(skip)]
    pub source: Source,
    /// Every setting with its effective value, without secrets.
    #[arg(skip)]
    shown: Vec<Setting>,
}

/// A flag or variable with its effective value.
#[derive(Debug)]
struct Setting {
    /// The flag without dashes, or the variable if there is no flag.
    name: String,
    value: Shown,
    /// Whether the log shows it: it was set, or follows from other settings.
    is_notable: bool,
}

impl Setting {
    /// A line of a file of variables, which a shell, systemd and container engines can read. Only values that a shell would change are
    /// in quotes, because container engines do not remove quotes.
    fn as_variable(&self) -> String {
        let is_flag = self.name.starts_with(|c: char| c.is_ascii_lowercase());
        let variable = match is_flag {
            true => variable_name(&self.name),
            false => self.name.clone(),
        };
        let is_plain = |c: char| c.is_alphanumeric() || "_-./:@%+,=[]".contains(c);
        match &self.value {
            Shown::Note(note) => format!("# {variable}: {note}\n"),
            Shown::Value(value) if value.chars().all(is_plain) => format!("{variable}={value}\n"),
            Shown::Value(value) => format!("{variable}='{}'\n", value.replace('\'', "'\\''")),
        }
    }
}

impl Serve {
    /// Checks rules for several options, and reads variables without a flag. `serve` is the subcommand, `matches` its flags.
    pub(super) fn validate(
        &mut self,
        serve: &clap::Command,
        matches: &ArgMatches,
        validation: &mut Validation<'_>,
    ) {
        self.upstream.validate(validation);
        self.quota_store.validate(validation);
        let upstream = UpstreamContext {
            region: self.upstream.region,
            sandbox: self.upstream.sandbox,
            allow_plain_http: self.upstream.allow_insecure_upstream,
        };
        if let Some(source) = self.credentials.source(upstream, validation) {
            self.source = source;
        }
        if let Some(files) = &self.server.tls {
            let flags = "--tls-cert, --tls-key, --tls-client-ca";
            validation.accept(flags, tls::check(files));
        }
        self.telemetry.read_variables(validation);
        self.shown = self.effective_values(serve, matches);
    }

    /// The effective configuration. The values of unused credential sources are not shown, because they are not checked.
    fn effective_values(&self, serve: &clap::Command, matches: &ArgMatches) -> Vec<Setting> {
        // Names and values that are not the text of a flag.
        let name = Shown::Value(self.source.name().to_owned());
        let mut resolved = vec![("credentials", name)];
        resolved.extend(self.source.shown());
        // It may contain a password.
        if self.upstream.upstream_proxy.is_some() {
            resolved.push(("upstream-proxy", Shown::SECRET));
        }
        if let Some(store) = &self.quota_store.quota_store {
            // Without user and password, it would not be the same setting.
            let shown = store.to_string();
            let shown = match store.has_credential() {
                true => Shown::Note(shown.into()),
                false => Shown::Value(shown),
            };
            resolved.push(("quota-store", shown));
        }
        let mut shown = Vec::new();
        for arg in serve.get_arguments() {
            let flag = arg.get_long().unwrap_or_default();
            let id = arg.get_id().as_str();
            let (value, is_notable) =
                if let Some(at) = resolved.iter().position(|(name, _)| *name == flag) {
                    (resolved.remove(at).1, true)
                } else if arg.get_help_heading() == Some(credentials::HEADING) {
                    (Shown::Note("not in use".into()), false)
                } else {
                    let values = matches.get_raw(id).into_iter().flatten();
                    let values: Vec<_> = values.map(OsStr::to_string_lossy).collect();
                    let is_set = matches.value_source(id) == Some(ValueSource::CommandLine);
                    (Shown::Value(values.join(",")), is_set)
                };
            shown.push(Setting {
                name: flag.to_owned(),
                value,
                is_notable,
            });
        }
        // Not a setting of a server.
        shown.retain(|setting| setting.name != "print-config");
        let filter = &self.telemetry.filter;
        shown.push(Setting {
            name: "RUST_LOG".to_owned(),
            value: Shown::Value(filter.clone()),
            is_notable: *filter != "info",
        });
        if let Some(tracing) = &self.telemetry.tracing {
            let endpoint = Shown::Value(tracing.endpoint.clone());
            resolved.push(("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint));
            if !tracing.headers.is_empty() {
                resolved.push(("OTEL_EXPORTER_OTLP_HEADERS", Shown::SECRET));
            }
        }
        let resolved = resolved.into_iter();
        shown.extend(resolved.map(|(name, value)| Setting {
            name: name.to_owned(),
            value,
            is_notable: true,
        }));
        shown
    }

    /// The effective configuration as variables, one per line; secrets, and values that are not in use, are comments.
    pub(super) fn printed(&self) -> String {
        self.shown.iter().map(Setting::as_variable).collect()
    }

    /// The settings that are not defaults as one log field; secrets show as `set`. Not one field per option, because log indices limit the
    /// number of fields.
    pub fn summary(&self) -> String {
        let notable = self.shown.iter().filter(|setting| setting.is_notable);
        let options: Vec<String> = notable
            .filter_map(|Setting { name, value, .. }| match value {
                Shown::Value(value) if value.is_empty() => None,
                Shown::Value(value) if value.contains(' ') => Some(format!("{name}={value:?}")),
                Shown::Value(value) => Some(format!("{name}={value}")),
                Shown::Note(note) => Some(format!("{name}={note}")),
            })
            .collect();
        options.join(" ")
    }

    /// How long the quota store keeps a result: as long as the cache does, and until the next poll of a watched task.
    pub fn result_lifetime(&self) -> Duration {
        let poll = self.watch.watch_interval * 4;
        self.coalescer.cache_ttl.max(poll)
    }

    /// A warning if callers can use the configured cloud account for any project.
    pub fn exposure_warning(&self) -> Option<&'static str> {
        if matches!(self.source, Source::Caller) || !self.rpc.allow_project.is_empty() {
            return None;
        }
        let tls = self.server.tls.as_ref();
        let open =
            !self.server.listen.ip().is_loopback() && tls.is_none_or(|tls| tls.client_ca.is_none());
        Some(match open {
            true => {
                "every client that reaches the gRPC port can use the configured cloud account for any project; require client \
                 certificates with --tls-client-ca, or limit the projects with --allow-project"
            }
            false => {
                "callers can use the configured cloud account for any project; limit the projects with --allow-project"
            }
        })
    }
}
