//! The options of the upstream side: where RDS is, how it is reached, and how often it is called.

use std::{fs, num::NonZeroU32, path::PathBuf, time::Duration};

use ::url::Url;
use clap::ArgAction;

use super::{RateConfig, Scope};
use crate::{
    credentials::file,
    http_client::{self, BuildError, SystemRoots},
    options::{
        self, BOOL, Parsed, Validation, boolean, duration, not, number,
        url::{self, Proxy},
    },
    pem,
    regions::{self, Region},
};

/// The options of the upstream side.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Upstream")]
pub struct Options {
    /// Region whose RDS is called, for example cn-north-4; exactly one of --region, --endpoint, --sandbox
    #[arg(long, value_name = "ID", value_parser = regions::parse)]
    pub region: Option<Region>,
    /// Base URL of RDS instead of a region's; https, or http to loopback
    #[arg(long, value_name = "URL", value_parser = url::base)]
    pub endpoint: Option<Url>,
    /// Call an embedded sandbox of RDS, IAM and the metadata service; needs no cloud account
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    pub sandbox: bool,
    /// Allow plain http beyond loopback for --endpoint and --iam-endpoint
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    pub allow_insecure_upstream: bool,
    /// PEM file of certificates that are trusted on top of the system's
    #[arg(long, value_name = "FILE", value_parser = pem::roots_file)]
    pub upstream_ca: Option<PathBuf>,
    /// Proxy for the vendor's endpoints, with optional user and password; proxy variables of the environment are not read
    #[arg(long, value_name = "http://[USER[:PASSWORD]@]HOST:PORT", value_parser = Proxy::parse)]
    pub upstream_proxy: Option<Proxy>,
    /// File with the password of the proxy's user, which keeps it off the command line; read at start
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub upstream_proxy_password_file: Option<PathBuf>,
    // The full path keeps clap from reading the type as an optional flag.
    /// Maximum rate of upstream attempts per credential, for example 60/1m; a call waits if it can start before its
    /// deadline, else it is rejected at once
    #[arg(long, value_name = "CALLS/TIME", default_value = "off", value_parser = rate)]
    pub upstream_rate: std::option::Option<RateConfig>,
    /// Upper bound of one upstream attempt
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub attempt_timeout: Duration,
    /// Upper bound of connecting to upstream
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = duration)]
    pub connect_timeout: Duration,
    /// Upstream attempts of one call, 1 to 10; 1 means no retry
    #[arg(long, value_name = "NUMBER", default_value = "3", value_parser = number::<1, 10>)]
    pub max_attempts: u32,
    /// Retries as a percentage of the calls in the last 10 s, in addition to 10 retries per 10 s
    #[arg(long, value_name = "PERCENT", default_value = "20", value_parser = number::<0, 100>)]
    pub retry_budget: u32,
}

impl Options {
    /// Checks the rules that span several options, and reads the password of the proxy.
    pub fn validate(&mut self, validation: &mut Validation<'_>) {
        if let Some(path) = &self.upstream_proxy_password_file
            && !validation.is_rejected(&["upstream-proxy"])
        {
            let password = file::read_password(path).map_err(|error| error.to_string());
            let set = password.and_then(|password| match &mut self.upstream_proxy {
                Some(proxy) => proxy.set_password(&password),
                None => Err("requires --upstream-proxy".to_owned()),
            });
            validation.accept(&validation.name_of("upstream-proxy-password-file"), set);
        }
        const TARGETS: [&str; 3] = ["region", "endpoint", "sandbox"];
        if validation.is_rejected(&TARGETS) {
            return;
        }
        let set = [self.region.is_some(), self.endpoint.is_some(), self.sandbox];
        let found: Vec<String> = TARGETS
            .into_iter()
            .zip(set)
            .filter(|(_, set)| *set)
            .map(|(target, _)| validation.name_of(target))
            .collect();
        let targets = "--region, --endpoint, --sandbox";
        match found.len() {
            0 => validation.problem(targets, "exactly one must be set; try serve --sandbox"),
            1 => {}
            _ => {
                let found = found.join(" and ");
                validation.problem(targets, format!("only one may be set, found {found}"));
            }
        }
        if let Some(url) = &self.endpoint {
            let checked = url::check_plain_http(url, self.allow_insecure_upstream);
            validation.accept(&validation.name_of("endpoint"), checked);
        }
    }

    /// Where RDS is; `None` for the embedded sandbox, whose address is known once it listens.
    pub fn base_url(&self) -> Option<Url> {
        self.endpoint
            .clone()
            .or_else(|| self.region.map(Region::rds_url))
    }

    /// In the sandbox, the instance id selects the outcome of a call, which must not depend on the calls for other ids.
    pub fn scope(&self) -> Scope {
        if self.sandbox {
            Scope::Instance
        } else {
            Scope::Endpoint
        }
    }

    /// The settings of the HTTP clients.
    ///
    /// # Errors
    /// [`BuildError`] if there are no certificates to trust.
    pub fn http_config(
        &self,
        system_roots: SystemRoots,
    ) -> Result<http_client::Config, BuildError> {
        let extra_roots = self.upstream_ca.as_ref().map(fs::read).transpose();
        Ok(http_client::Config {
            tls: http_client::tls_config(system_roots, extra_roots?.as_deref())?,
            proxy: self.upstream_proxy.clone(),
            connect_timeout: self.connect_timeout,
        })
    }
}

/// Parses a rate like `60/1m` (attempts per period), or `off`.
///
/// # Errors
/// The rest of an error sentence.
pub fn rate(text: &str) -> Parsed<Option<RateConfig>> {
    if text == "off" {
        return Ok(None);
    }
    let parsed = text.split_once('/').and_then(|(calls, period)| {
        Some(RateConfig {
            calls: NonZeroU32::new(number::<1, 1_000_000>(calls).ok()?)?,
            period: duration(period).ok()?,
        })
    });
    parsed
        .map(Some)
        .ok_or_else(|| not(text, "a rate; write it like 60/1m, or off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_calls_per_duration() {
        let cases = [
            ("60/1m", Some(Some((60, 60)))),
            ("off", Some(None)),
            ("0/1m", None),
            ("60/0s", None),
            ("60", None),
            ("60/minute", None),
        ];

        for (text, expected) in cases {
            let parsed = rate(text)
                .ok()
                .map(|rate| rate.map(|rate| (rate.calls.get(), rate.period.as_secs())));
            assert_eq!(parsed, expected, "{text:?}");
        }
    }
}
