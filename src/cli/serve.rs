//! The options of `serve`, composed of the options of its modules.

use std::{ffi::OsStr, time::Duration};

use clap::ArgMatches;

use crate::{
    admin, coalescer,
    credentials::{self, Source, UpstreamContext},
    options::{Validation, boolean},
    quota_store, rpc,
    server::{self, tls},
    telemetry, upstream, watch,
};

/// The text below the flags in `serve --help`.
pub(super) const NOTES: &str = "\
Every flag has a variable: RDS_TASK_FACADE_ and the flag in capitals, for example RDS_TASK_FACADE_MAX_IN_FLIGHT. The flag
wins; an empty variable is unset. Durations are written 250ms, 10s, 5m, 1h; booleans true, false, 1, 0; lists a,b,c.

Other variables:
  RDS_TASK_FACADE_TOKEN            for --credentials token
  HUAWEICLOUD_SDK_AK, _SK, _SECURITY_TOKEN
                                   for --credentials env and chain
  HUAWEICLOUD_SDK_CREDENTIALS_FILE for --credentials profile and chain [default: ~/.huaweicloud/credentials]
  HUAWEICLOUD_SDK_IAM_ENDPOINT     for --credentials iam
  RUST_LOG                         log filter [default: info]
  OTEL_EXPORTER_OTLP_ENDPOINT      collector for traces, http/protobuf; enables the other OTEL_* variables";

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
    /// Print the effective configuration without secrets, and exit
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "false",
        value_parser = boolean,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set,
        help_heading = "Configuration"
    )]
    pub print_config: bool,
    /// The credential source that `--credentials` and its flags describe.
    #[arg(skip)]
    pub source: Source,
    /// Name and effective value of every option, without secrets.
    #[arg(skip)]
    shown: Vec<(String, String)>,
}

impl Serve {
    /// Checks rules for several options, and reads variables without a flag.
    pub(super) fn validate(
        &mut self,
        subcommand: &clap::Command,
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
        self.shown = self.effective_values(subcommand, matches);
    }

    /// The effective configuration. Flags of unused credential sources show as `not in use`, because their values are not checked.
    fn effective_values(
        &self,
        subcommand: &clap::Command,
        matches: &ArgMatches,
    ) -> Vec<(String, String)> {
        // Names and values that are not the text of a flag.
        let mut resolved = vec![("credentials", self.source.name().to_owned())];
        resolved.extend(self.source.shown());
        // It may contain a password.
        if self.upstream.upstream_proxy.is_some() {
            resolved.push(("upstream-proxy", "set".to_owned()));
        }
        if let Some(store) = &self.quota_store.quota_store {
            resolved.push(("quota-store", store.to_string()));
        }
        let mut shown = Vec::new();
        for arg in subcommand.get_arguments() {
            let flag = arg.get_long().unwrap_or_default();
            let value = if let Some(at) = resolved.iter().position(|(name, _)| *name == flag) {
                resolved.remove(at).1
            } else if arg.get_help_heading() == Some(credentials::HEADING) {
                "not in use".to_owned()
            } else {
                let values = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
                let values: Vec<_> = values.map(OsStr::to_string_lossy).collect();
                values.join(",")
            };
            shown.push((flag.to_owned(), value));
        }
        resolved.push(("RUST_LOG", self.telemetry.filter.clone()));
        if let Some(tracing) = &self.telemetry.tracing {
            resolved.push(("traces", tracing.endpoint.clone()));
            if !tracing.headers.is_empty() {
                resolved.push(("OTEL_EXPORTER_OTLP_HEADERS", "set".to_owned()));
            }
        }
        let resolved = resolved.into_iter();
        shown.extend(resolved.map(|(name, value)| (name.to_owned(), value)));
        shown
    }

    /// The effective configuration, one `name = value` per line; secrets show as `set`.
    pub(super) fn printed(&self) -> String {
        let line = |(name, value): &(String, String)| format!("{name} = {value}\n");
        self.shown.iter().map(line).collect()
    }

    /// The effective configuration as one log field; secrets show as `set`. Not one field per option, because log indices limit the
    /// number of fields.
    pub fn summary(&self) -> String {
        let set = self.shown.iter().filter(|(_, value)| !value.is_empty());
        let options: Vec<String> = set
            .map(|(name, value)| match value.contains(' ') {
                true => format!("{name}={value:?}"),
                false => format!("{name}={value}"),
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
