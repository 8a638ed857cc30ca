//! Every flag of every subcommand, in tables. The tables make `--help`, the names of the variables and the defaults, so
//! the three cannot disagree.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// What every variable of `serve` begins with.
pub(super) const PREFIX: &str = "RDS_TASK_FACADE_";

/// One flag, and with `serve` one variable.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flag {
    /// Without the dashes.
    pub(super) name: &'static str,
    /// What stands for the value in `--help`.
    pub(super) value: &'static str,
    /// As one would type it; empty for none.
    pub(super) default: &'static str,
    /// One sentence for `--help`.
    pub(super) help: &'static str,
}

impl Flag {
    /// The variable that says the same.
    pub(super) fn variable(&self) -> String {
        PREFIX.to_owned() + &self.name.replace('-', "_").to_ascii_uppercase()
    }

    /// Whether the flag may stand alone, meaning `true`.
    pub(super) fn is_boolean(&self) -> bool {
        self.value == BOOLEAN
    }

    /// Whether the flag may be given more than once.
    pub(super) fn is_list(&self) -> bool {
        self.value == LIST
    }
}

const BOOLEAN: &str = "BOOL";
const LIST: &str = "ID,...";

const fn flag(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> Flag {
    Flag {
        name,
        value,
        default,
        help,
    }
}

/// The flags of `serve`.
#[rustfmt::skip]
pub(super) const SERVE: &[Flag] = &[
    flag("listen", "ADDRESS", "127.0.0.1:50051", "Address of the gRPC listener"),
    flag("metrics-listen", "ADDRESS", "127.0.0.1:9464", "Address for /metrics, /livez and /readyz over plain HTTP; off for none"),
    flag("region", "ID", "", "Region whose RDS is called, for example cn-north-4; exactly one of --region, --endpoint, --sandbox"),
    flag("endpoint", "URL", "", "Base URL of RDS in place of a region's"),
    flag("sandbox", BOOLEAN, "false", "Call an embedded stand-in for RDS, IAM and the metadata service; needs no cloud account"),
    flag("allow-insecure-upstream", BOOLEAN, "false", "Allow plain http beyond loopback for --endpoint and --iam-endpoint"),
    flag("upstream-ca", "FILE", "", "PEM file of certificates that are trusted on top of the system's"),
    flag("upstream-proxy", "URL", "", "http://[user:password@]host:port, for the vendor's endpoints; proxy variables of the environment are not read"),
    flag("upstream-rate", "CALLS/TIME", "off", "Most upstream calls of one credential in a time, for example 60/1m: a call whose turn comes before its deadline waits, any other is refused at once"),
    flag("credentials", "SOURCE", "caller", "caller (x-auth-token of each call), token, iam, env, profile, metadata or chain (env, profile, metadata); with --sandbox the default is token"),
    flag("token-file", "FILE", "", "For token: file with the token, read again when it changes; or the variable RDS_TASK_FACADE_TOKEN"),
    flag("iam-endpoint", "URL", "", "For iam: base URL of IAM; by default the region's, or HUAWEICLOUD_SDK_IAM_ENDPOINT"),
    flag("iam-user", "NAME", "", "For iam: name of the IAM user"),
    flag("iam-domain", "NAME", "", "For iam: name of the account that the user belongs to"),
    flag("iam-password-file", "FILE", "", "For iam: file with the user's password, read again when it changes"),
    flag("iam-project", "PROJECT", "", "For iam: id or name of the project that the token is for; by default the region's main project"),
    flag("metadata-endpoint", "URL", "http://169.254.169.254", "For metadata and chain: base URL of the metadata service"),
    flag("allow-project", LIST, "", "Serve these project ids only; may be repeated; by default any"),
    flag("timeout", "DURATION", "30s", "Upper bound of one RPC, also when the caller sets no deadline or a longer one"),
    flag("attempt-timeout", "DURATION", "10s", "Upper bound of one upstream attempt"),
    flag("connect-timeout", "DURATION", "3s", "Upper bound of connecting to upstream"),
    flag("max-attempts", "NUMBER", "3", "Upstream attempts of one RPC, 1 to 10; 1 means no retry"),
    flag("retry-budget", "PERCENT", "20", "Retries as per cent of the calls of the last 10 s, on top of 10 in 10 s"),
    flag("max-in-flight", "NUMBER", "2048", "RPCs at once; beyond it RESOURCE_EXHAUSTED at once"),
    flag("max-connections", "NUMBER", "1000", "gRPC connections at once"),
    flag("cache-ttl", "DURATION", "0s", "How long an answer is kept; 0s merges equal calls in flight and keeps nothing"),
    flag("cache-entries", "NUMBER", "10000", "Answers kept at most"),
    flag("drain-delay", "DURATION", "0s", "Time between NOT_SERVING and GOAWAY when stopping"),
    flag("shutdown-grace", "DURATION", "20s", "Time for calls in flight when stopping, from GOAWAY on"),
    flag("max-connection-age", "DURATION", "30m", "Age at which a connection is told to go away, plus or minus 10 per cent; 0s for none"),
    flag("tls-cert", "FILE", "", "PEM file of the listener's certificate chain; read again when it changes"),
    flag("tls-key", "FILE", "", "PEM file of the certificate's key; read again when it changes"),
    flag("tls-client-ca", "FILE", "", "PEM file of the certificates that sign client certificates, which it makes mandatory; read again when it changes"),
    flag("reflection", BOOLEAN, "true", "Serve gRPC reflection"),
    flag("propagate-trace-upstream", BOOLEAN, "false", "Send traceparent and tracestate of the attempt's span upstream; needs the export of traces"),
    flag("log-format", "FORMAT", "text", "text or json; the filter is the variable RUST_LOG"),
    flag("print-config", BOOLEAN, "false", "Print the effective configuration without secrets, and exit"),
];

const TARGET: Flag = flag(
    "target",
    "URL",
    "http://127.0.0.1:50051",
    "Server to call, http or https",
);
const CA: Flag = flag(
    "ca",
    "FILE",
    "",
    "PEM file of the certificates trusted for an https target, in place of the system's",
);
const CERT: Flag = flag(
    "cert",
    "FILE",
    "",
    "PEM file of the client's certificate chain",
);
const KEY: Flag = flag(
    "key",
    "FILE",
    "",
    "PEM file of the client certificate's key",
);

/// The flags of `call`.
#[rustfmt::skip]
pub(super) const CALL: &[Flag] = &[
    flag("project-id", "ID", "", "Project that owns the instance; without any id flag the example task of the vendor's page is asked for"),
    flag("instance-id", "ID", "", "Database instance"),
    flag("workflow-id", "ID", "", "Task"),
    flag("workflow-name", "NAME", "", "Name of the task"),
    TARGET,
    flag("token-file", "FILE", "", "File with the token to send as x-auth-token; or the variable RDS_TASK_FACADE_TOKEN"),
    flag("timeout", "DURATION", "10s", "Deadline of the call"),
    CA, CERT, KEY,
];

/// The flags of `health`.
#[rustfmt::skip]
pub(super) const HEALTH: &[Flag] = &[
    TARGET,
    flag("service", "NAME", "", "Service to ask about; by default the server as a whole"),
    flag("timeout", "DURATION", "3s", "Deadline of the check"),
    CA, CERT, KEY,
];

/// The flags of `sandbox`.
pub(super) const SANDBOX: &[Flag] = &[flag(
    "listen",
    "ADDRESS",
    "127.0.0.1:8080",
    "Address of the stand-in",
)];

/// Each subcommand: name, flags, what it is for, what else `--help` says.
#[rustfmt::skip]
pub(super) const SUBCOMMANDS: [(&str, &[Flag], &str, &str); 4] = [
    ("serve", SERVE, "Run the gRPC server", SERVE_NOTES),
    ("call", CALL, "Make one call as a client and print the reply as JSON", ""),
    ("health", HEALTH, "Ask a server for its health; exit code 0 when it is SERVING", ""),
    ("sandbox", SANDBOX, "Run only the stand-in for RDS, IAM and the metadata service", ""),
];

const SERVE_NOTES: &str = "\
Every flag has a variable: RDS_TASK_FACADE_ and the flag in capitals, for example RDS_TASK_FACADE_MAX_IN_FLIGHT. The flag
wins; an empty variable is unset. Durations are written 250ms, 10s, 5m, 1h; booleans true, false, 1, 0; lists with commas.

Other variables:
  RDS_TASK_FACADE_TOKEN            for --credentials token
  HUAWEICLOUD_SDK_AK, _SK, _SECURITY_TOKEN
                                   for --credentials env and chain
  HUAWEICLOUD_SDK_CREDENTIALS_FILE for --credentials profile and chain [default: ~/.huaweicloud/credentials]
  HUAWEICLOUD_SDK_IAM_ENDPOINT     for --credentials iam
  RUST_LOG                         filter of the log [default: info]
  OTEL_EXPORTER_OTLP_ENDPOINT      export of traces over http/protobuf; the other OTEL_* variables count then";

/// The whole command line. Values stay text: they are validated together, so that all mistakes show at once.
pub(super) fn command() -> Command {
    let subcommands = SUBCOMMANDS.map(|(name, flags, about, notes)| {
        Command::new(name)
            .about(about)
            .after_help(notes)
            .args(flags.iter().map(argument))
    });
    Command::new(env!("CARGO_PKG_NAME"))
        .version(env!("CARGO_PKG_VERSION"))
        .about("gRPC facade over the RDS call \"Obtaining Task Information\"")
        .subcommand_required(true)
        .subcommands(subcommands)
}

fn argument(flag: &Flag) -> Arg {
    let help = match flag.default {
        "" => flag.help.to_owned(),
        default => format!("{} [default: {default}]", flag.help),
    };
    let argument = Arg::new(flag.name)
        .long(flag.name)
        .value_name(flag.value)
        .help(help)
        .value_parser(clap::value_parser!(OsString))
        // A flag given twice is our own mistake to report, together with the others.
        .action(ArgAction::Append);
    if flag.is_boolean() {
        argument.num_args(0..=1).default_missing_value("true")
    } else {
        argument
    }
}
