//! The options of the quota store.

use std::{
    fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::hmac;
use clap::ArgAction;
use percent_encoding::percent_decode_str;
use rustls::pki_types::ServerName;
use url::Url;
use zeroize::Zeroizing;

use super::seal::Keys;
use crate::{
    credentials::file,
    options::{self, BOOL, Parsed, Validation, boolean},
    pem,
    telemetry::is_invisible,
};

/// The shortest key file, in bytes.
const MIN_KEY: usize = 32;

/// The longest key file, in bytes.
const MAX_KEY: u64 = 64 << 10;

/// The options of the quota store.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Quota store")]
pub struct Options {
    /// Valkey or Redis 6.2 or newer, in which replicas share pacing, throttle windows, results and evidence about keys; not a cluster;
    /// rediss:// for TLS
    #[arg(long, value_name = "redis[s]://[USER[:PASSWORD]@]HOST:PORT[/DB]", value_parser = StoreUrl::parse)]
    pub quota_store: Option<StoreUrl>,
    /// File with the password for the quota store, which keeps it off the command line; read at start
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub quota_store_password_file: Option<PathBuf>,
    /// File of at least 32 random bytes, the same for all replicas: names and results in the quota store depend on it; read at start
    #[arg(long, value_name = "FILE", value_parser = options::file)]
    pub quota_store_key_file: Option<PathBuf>,
    /// PEM file of certificates that are trusted for the quota store on top of the system's
    #[arg(long, value_name = "FILE", value_parser = pem::roots_file)]
    pub quota_store_ca: Option<PathBuf>,
    /// Allow redis:// beyond loopback, without TLS
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    pub allow_insecure_quota_store: bool,
    /// The keys that the key file holds.
    #[arg(skip)]
    pub(super) keys: Option<Arc<Keys>>,
}

impl Options {
    /// Checks the rules that span several options, and reads the password and the key.
    pub fn validate(&mut self, validation: &mut Validation<'_>) {
        if let Some(path) = &self.quota_store_key_file {
            let name = validation.name_of("quota-store-key-file");
            self.keys = validation.accept(&name, read_key(path)).map(Arc::new);
        }
        if validation.is_rejected(&["quota-store"]) {
            return;
        }
        let Some(store) = &mut self.quota_store else {
            return;
        };
        if let Some(path) = &self.quota_store_password_file {
            let password = file::read_password(path).map_err(|error| error.to_string());
            let set = password.and_then(|password| store.set_password(password));
            validation.accept(&validation.name_of("quota-store-password-file"), set);
        }
        if !store.tls && !self.allow_insecure_quota_store && !store.is_loopback() {
            let name = validation.name_of("quota-store");
            validation.problem(
                &name,
                "redis:// is allowed for loopback only; use rediss://, or set --allow-insecure-quota-store",
            );
        }
        if self.quota_store_key_file.is_none() && !validation.is_rejected(&["quota-store-key-file"])
        {
            let name = validation.name_of("quota-store");
            validation.problem(
                &name,
                "requires --quota-store-key-file, a file of 32 random bytes that all replicas share",
            );
        }
    }

    /// The key of the hashes that distinguish callers, if replicas share it: then the log of each shows the same hash for a caller.
    pub fn caller_key(&self) -> Option<hmac::Key> {
        Some(self.keys.as_ref()?.callers.clone())
    }
}

fn read_key(path: &Path) -> Parsed<Keys> {
    let unreadable = |error: std::io::Error| format!("the file cannot be read: {}", error.kind());
    if fs::metadata(path).map_err(unreadable)?.len() > MAX_KEY {
        return Err(
            "the file is longer than 64 KiB; it must hold random bytes, at least 32".into(),
        );
    }
    let content = Zeroizing::new(fs::read(path).map_err(unreadable)?);
    if content.len() < MIN_KEY {
        return Err(format!(
            "the file holds {} bytes; it must hold at least {MIN_KEY} random bytes",
            content.len()
        ));
    }
    Ok(Keys::derive(&content))
}

/// Where the quota store is. [`fmt::Debug`] and [`fmt::Display`] omit user and password.
#[derive(Clone)]
pub struct StoreUrl {
    tls: bool,
    /// The origin for the HTTP client's connector, which resolves names and adds TLS.
    pub(super) origin: Url,
    pub(super) user: Option<String>,
    pub(super) password: Option<Zeroizing<String>>,
    pub(super) database: u16,
}

impl StoreUrl {
    /// Parses `redis[s]://[user[:password]@]host:port[/db]`, user and password percent-encoded.
    ///
    /// # Errors
    /// The rest of an error sentence, without the text.
    pub fn parse(text: &str) -> Parsed<Self> {
        Self::split(text).ok_or_else(|| {
            "must be redis://[user[:password]@]host:port[/db] or the same with rediss://".to_owned()
        })
    }

    fn split(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let tls = match scheme {
            "redis" => false,
            "rediss" => true,
            _ => return None,
        };
        let (rest, database) = match rest.split_once('/') {
            Some((rest, "")) => (rest, 0),
            Some((rest, database)) if database.bytes().all(|b| b.is_ascii_digit()) => {
                (rest, database.parse().ok()?)
            }
            Some(_) => return None,
            None => (rest, 0),
        };
        let (credential, address) = match rest.rsplit_once('@') {
            Some((credential, address)) => (Some(credential), address),
            None => (None, rest),
        };
        let (host, port) = address.rsplit_once(':')?;
        let is_plain = address
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b));
        let name = host.trim_start_matches('[').trim_end_matches(']');
        if !is_plain || ServerName::try_from(name).is_err() || port.parse::<u16>().ok()? == 0 {
            return None;
        }
        let scheme = if tls { "https" } else { "http" };
        let decoded = |text: &str| {
            let decoded = percent_decode_str(text).decode_utf8().ok()?;
            (!text.contains('@') && !decoded.chars().any(is_invisible))
                .then(|| decoded.into_owned())
        };
        let (user, password) =
            match credential.map(|both| both.split_once(':').unwrap_or((both, ""))) {
                Some((user, password)) => (decoded(user)?, decoded(password)?),
                None => Default::default(),
            };
        Some(Self {
            tls,
            origin: Url::parse(&format!("{scheme}://{address}")).ok()?,
            user: (!user.is_empty()).then_some(user),
            password: (!password.is_empty()).then(|| Zeroizing::new(password)),
            database,
        })
    }

    fn set_password(&mut self, password: Zeroizing<String>) -> Parsed<()> {
        if self.password.is_some() {
            return Err("requires --quota-store without a password".to_owned());
        }
        self.password = Some(password);
        Ok(())
    }

    /// Whether the URL holds a user or a password.
    pub fn has_credential(&self) -> bool {
        self.user.is_some() || self.password.is_some()
    }

    fn is_loopback(&self) -> bool {
        let host = self.origin.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || address
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let host = self.origin.host_str().unwrap_or_default();
        let port = self.origin.port_or_known_default().unwrap_or_default();
        write!(f, "{scheme}://{host}:{port}/{}", self.database)
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_url_has_a_port_and_perhaps_a_credential_and_a_database() {
        let cases = [
            (
                "redis://127.0.0.1:6379",
                "redis://127.0.0.1:6379/0",
                None,
                None,
            ),
            (
                "rediss://store.example.com:6380/7",
                "rediss://store.example.com:6380/7",
                None,
                None,
            ),
            ("redis://[::1]:6379/", "redis://[::1]:6379/0", None, None),
            (
                "redis://ann:s%40%2f@store:6379",
                "redis://store:6379/0",
                Some("ann"),
                Some("s@/"),
            ),
            (
                "redis://:secret@store:6379",
                "redis://store:6379/0",
                None,
                Some("secret"),
            ),
            (
                "redis://ann@store:80",
                "redis://store:80/0",
                Some("ann"),
                None,
            ),
        ];

        for (text, shown, user, password) in cases {
            let url = StoreUrl::parse(text).unwrap();
            assert_eq!(format!("{url} {url:?}"), format!("{shown} {shown}"));
            assert_eq!(url.user.as_deref(), user, "{text}");
            assert_eq!(
                url.password.as_ref().map(|it| it.as_str()),
                password,
                "{text}"
            );
        }
    }

    #[test]
    fn malformed_store_urls_are_rejected_without_echo() {
        let cases = [
            "hunter2",
            "http://:hunter2@store:6379",
            "redis://:hunter2@store",
            "redis://:hunter2@store:0",
            "redis://:hunter2@store:6379/x",
            "redis://:hunter2@store:6379/0/1",
            "redis://:hunter2@store:6379?x=1",
            "redis://:hunter2@@store:6379",
            "redis://:hunter2%00@store:6379",
            "redis://:hunter2@:6379",
            "redis://:hunter2@a b:6379",
            "redis://:hunter2@store:6379/99999",
        ];

        for text in cases {
            let problem = StoreUrl::parse(text).unwrap_err();
            assert!(!problem.contains("hunter2"), "{text}: {problem}");
        }
    }
}
