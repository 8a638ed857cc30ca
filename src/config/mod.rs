//! Command line and environment, read once and turned into typed values; every mistake is reported at once.
//!
//! [`Command::read`] is the way in; [`of_process`] is the only place that touches the process's own arguments and
//! environment.

mod command;
mod credentials;
mod flags;
mod read;
mod regions;
mod serve;
#[cfg(test)]
mod tests;
mod tracing;
mod urls;
mod values;

use std::{
    collections::BTreeMap, ffi::OsString, fmt, net::SocketAddr, num::NonZeroU32, path::PathBuf,
    sync::Arc, time::Duration,
};

use http::HeaderValue;
use secrecy::SecretString;

pub use self::{
    command::Command,
    tracing::{Propagators, Sampler, Tracing},
};
use crate::credentials::AccessKey;

/// The environment, as it is passed in.
pub type Environment = BTreeMap<OsString, OsString>;

/// What this process is asked to do, by its command line and environment.
///
/// # Errors
/// [`Refused`] with every mistake there is.
pub fn of_process() -> Result<Command, Refused> {
    Command::read(std::env::args_os(), &std::env::vars_os().collect())
}

/// Everything `serve` can be told, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address of the gRPC listener.
    pub listen: SocketAddr,
    /// Address of `/metrics`, `/livez` and `/readyz`; `None` for none.
    pub metrics_listen: Option<SocketAddr>,
    /// What is called, and how.
    pub upstream: Upstream,
    /// Where credentials come from.
    pub credentials: Credentials,
    /// The only project ids that are served; empty for any.
    pub allowed_projects: Vec<String>,
    /// Upper bound of one RPC.
    pub timeout: Duration,
    /// RPCs at once.
    pub max_in_flight: usize,
    /// gRPC connections at once.
    pub max_connections: usize,
    /// How long an answer is kept; zero keeps nothing.
    pub cache_ttl: Duration,
    /// Answers kept at most.
    pub cache_entries: u64,
    /// Time between `NOT_SERVING` and GOAWAY.
    pub drain_delay: Duration,
    /// Time for calls in flight, from GOAWAY on.
    pub shutdown_grace: Duration,
    /// Age at which a connection is told to go away, before jitter; `None` for never.
    pub max_connection_age: Option<Duration>,
    /// TLS of the gRPC listener; `None` for plaintext.
    pub tls: Option<Tls>,
    /// Whether reflection is served.
    pub reflection: bool,
    /// How the log looks.
    pub log: Log,
    /// How traces are made and exported; `None` for not at all.
    pub tracing: Option<Tracing>,
    /// Whether upstream requests carry the trace context.
    pub propagate_trace_upstream: bool,
    /// Name and effective value of every setting, secrets left out.
    shown: Vec<(String, String)>,
}

/// The upstream side of [`Config`].
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Where RDS is.
    pub endpoint: Endpoint,
    /// PEM file of certificates that are trusted on top of the system's.
    pub ca: Option<PathBuf>,
    /// Proxy for the vendor's endpoints, never for the metadata service.
    pub proxy: Option<Proxy>,
    /// Upper bound of one attempt.
    pub attempt_timeout: Duration,
    /// Upper bound of connecting.
    pub connect_timeout: Duration,
    /// Attempts of one RPC, 1 to 10.
    pub max_attempts: u32,
    /// Retries as per cent of recent calls, 0 to 100.
    pub retry_budget_percent: u32,
    /// Most calls in a time; `None` for no limit of our own.
    pub rate: Option<Rate>,
}

/// A server by its URL, or the embedded sandbox, whose address is known only once it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A configured URL.
    Url(BaseUrl),
    /// The embedded sandbox.
    Sandbox,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            Self::Sandbox => f.write_str("sandbox"),
        }
    }
}

/// Scheme, host and port: `https://rds.example.com` or `http://127.0.0.1:8080`, never with a slash at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl(String);

impl BaseUrl {
    /// The URL as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The URL of a server that listens on `address` over plain http, such as the sandbox.
    pub fn of_plain(address: SocketAddr) -> Self {
        Self(format!("http://{address}"))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A forward proxy. [`fmt::Display`] shows it without user and password.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// `http://[user:password@]host:port`, user and password percent-encoded as typed.
    pub url: SecretString,
    shown: String,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// So many calls in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Calls.
    pub calls: NonZeroU32,
    /// The time; not zero.
    pub per: Duration,
}

/// Where credentials come from, with what each source needs.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// Each caller brings an `x-auth-token`.
    Caller,
    /// A fixed token.
    Token(HeaderValue),
    /// A token in a file, read again when it changes.
    TokenFile(PathBuf),
    /// A token from IAM.
    Iam(Iam),
    /// The key in the environment.
    Key(Arc<AccessKey>),
    /// Keys out of a profile file.
    Profile(PathBuf),
    /// Temporary keys of the machine.
    Metadata(Endpoint),
    /// The first of environment, profile file and metadata service that has keys.
    Chain {
        /// The key in the environment, when AK and SK are set.
        key: Option<Arc<AccessKey>>,
        /// The profile file, which need not exist; `None` when there is no home folder to look in.
        profile: Option<PathBuf>,
        /// The metadata service.
        metadata: Endpoint,
    },
}

/// What a token from IAM needs.
#[derive(Debug, Clone)]
pub struct Iam {
    /// Where IAM is.
    pub endpoint: Endpoint,
    /// Name of the IAM user.
    pub user: String,
    /// Name of the account that the user belongs to.
    pub domain: String,
    /// File with the user's password.
    pub password_file: PathBuf,
    /// Id or name of the project that the token is for.
    pub project: String,
}

/// TLS of the gRPC listener. The files are readable when the program starts.
#[derive(Debug, Clone)]
pub struct Tls {
    /// PEM file of the certificate chain.
    pub cert: PathBuf,
    /// PEM file of the key.
    pub key: PathBuf,
    /// PEM file of the certificates that sign client certificates; with it a client certificate is mandatory.
    pub client_ca: Option<PathBuf>,
}

/// How the log looks.
#[derive(Debug, Clone)]
pub struct Log {
    /// Text or JSON.
    pub format: LogFormat,
    /// The text of `RUST_LOG`, which parses; `info` when it is unset.
    pub filter: String,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// Reads the arguments that follow `serve`.
    ///
    /// # Errors
    /// [`Refused`] with every mistake there is.
    pub fn read(
        args: impl IntoIterator<Item = OsString>,
        env: &Environment,
    ) -> Result<Self, Refused> {
        serve::read(args, env).map(|(config, _)| config)
    }

    /// The effective configuration, one `name = value` per line; a secret shows as `set`.
    pub fn print(&self) -> String {
        self.shown
            .iter()
            .map(|(name, value)| format!("{name} = {value}\n"))
            .collect()
    }

    /// The effective configuration in one line, for the log; a secret shows as `set`. One text and not a field for each
    /// setting: a log's index keeps few fields, and nobody searches for the value of a flag there.
    pub fn summary(&self) -> String {
        let settings: Vec<String> = self
            .shown
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| match value.contains(' ') {
                true => format!("{name}={value:?}"),
                false => format!("{name}={value}"),
            })
            .collect();
        settings.join(" ")
    }

    /// The warning that is due when whoever reaches the port uses the facade's own cloud account.
    pub fn exposure_warning(&self) -> Option<&'static str> {
        let exposed = !matches!(self.credentials, Credentials::Caller)
            && !self.listen.ip().is_loopback()
            && self.allowed_projects.is_empty()
            && self.tls.as_ref().is_none_or(|tls| tls.client_ca.is_none());
        exposed.then_some(
            "whoever reaches the gRPC port uses the configured cloud account: ask for client certificates with \
             --tls-client-ca, or limit the projects with --allow-project",
        )
    }
}

/// The command line or the environment holds mistakes. [`fmt::Display`] prints one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// One sentence per mistake, each beginning with the flag or variable it is about. No secrets.
    pub mistakes: Vec<String>,
    /// The form in which to print them.
    pub log_format: LogFormat,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.mistakes {
            writeln!(f, "{}: {mistake}", env!("CARGO_PKG_NAME"))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}
