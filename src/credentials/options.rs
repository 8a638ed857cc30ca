//! The options of the credential source. Only those of the source in use are parsed, so all of them are declared as text.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use ::url::Url;
use secrecy::{ExposeSecret, SecretString};

use super::{
    AccessKey, Source, chain, file, iam, profile,
    secret::{self, visible},
};
use crate::{
    options::{self, PREFIX, Parsed, Shown, Validation, url},
    regions::Region,
    sandbox,
    telemetry::is_invisible,
};

/// The heading of these options in `--help`.
pub const HEADING: &str = "Credentials";

/// The variable of the vendor's SDKs for the path of the profile file.
const PROFILE_VARIABLE: &str = "HUAWEICLOUD_SDK_CREDENTIALS_FILE";

const AK_VARIABLE: &str = "HUAWEICLOUD_SDK_AK";
const SK_VARIABLE: &str = "HUAWEICLOUD_SDK_SK";
const SECURITY_TOKEN_VARIABLE: &str = "HUAWEICLOUD_SDK_SECURITY_TOKEN";

/// The metadata service of every machine of the vendor.
const METADATA_ENDPOINT: &str = "http://169.254.169.254";

/// The options of the credential source.
#[derive(Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = HEADING)]
pub struct Options {
    /// caller (x-auth-token of each call), token, iam, env, profile, metadata or chain (env, profile, metadata); with
    /// --sandbox the default is token [default: caller]
    #[arg(long, value_name = "SOURCE", value_parser = options::word::<SourceKind>)]
    credentials: Option<SourceKind>,
    /// For token: file with the token, read again when it changes; or the variable RDS_TASK_FACADE_TOKEN
    #[arg(long, value_name = "FILE")]
    token_file: Option<String>,
    /// For iam: base URL of IAM; by default the region's, or HUAWEICLOUD_SDK_IAM_ENDPOINT
    #[arg(long, value_name = "URL")]
    iam_endpoint: Option<String>,
    /// For iam: name of the IAM user
    #[arg(long, value_name = "NAME")]
    iam_user: Option<String>,
    /// For iam: name of the account that the user belongs to
    #[arg(long, value_name = "NAME")]
    iam_domain: Option<String>,
    /// For iam: file with the user's password, read again when it changes
    #[arg(long, value_name = "FILE")]
    iam_password_file: Option<String>,
    /// For iam: id or name of the project that the token is for; by default the region's main project
    #[arg(long, value_name = "PROJECT")]
    iam_project: Option<String>,
    /// For metadata and chain: base URL of the metadata service
    #[arg(long, value_name = "URL", default_value = METADATA_ENDPOINT)]
    metadata_endpoint: String,
}

impl fmt::Debug for Options {
    /// Without the values: those of a source that is not in use are not validated and may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").finish_non_exhaustive()
    }
}

/// The credential source by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SourceKind {
    Caller,
    Token,
    Iam,
    Env,
    Profile,
    Metadata,
    Chain,
}

/// The settings of the upstream that the credential source depends on.
#[derive(Debug, Clone, Copy)]
pub struct UpstreamContext {
    /// The region, if one is configured.
    pub region: Option<Region>,
    /// Whether the embedded sandbox is called.
    pub sandbox: bool,
    /// Whether IAM may be reached over plain http beyond loopback.
    pub allow_plain_http: bool,
}

impl Options {
    /// The source in use; `None` if it has problems.
    pub fn source(
        &self,
        upstream: UpstreamContext,
        validation: &mut Validation<'_>,
    ) -> Option<Source> {
        if validation.is_rejected(&["credentials"]) {
            return None;
        }
        let default = match upstream.sandbox {
            true => SourceKind::Token,
            false => SourceKind::Caller,
        };
        match self.credentials.unwrap_or(default) {
            SourceKind::Caller => Some(Source::Caller),
            SourceKind::Token => self.token(upstream, validation),
            SourceKind::Iam => self.iam(upstream, validation).map(Source::Iam),
            SourceKind::Env => key(validation, true).map(Source::Key),
            SourceKind::Profile => profile(validation).map(Source::Profile),
            SourceKind::Metadata => self.metadata(upstream, validation).map(Source::Metadata),
            SourceKind::Chain => {
                let environment = key(validation, false);
                let missing = missing_parts(validation);
                let profile = profile_path(validation).map(|(_, path)| path);
                self.metadata(upstream, validation)
                    .map(|metadata_endpoint| {
                        Source::Chain(chain::ChainConfig {
                            environment,
                            missing,
                            profile,
                            metadata_endpoint,
                        })
                    })
            }
        }
    }

    fn token(&self, upstream: UpstreamContext, validation: &mut Validation<'_>) -> Option<Source> {
        if let Some(path) = &self.token_file {
            let path = secret_file(path, |text| Ok(secret::parse_token(text)?));
            return validation
                .accept(&validation.name_of("token-file"), path)
                .map(Source::TokenFile);
        }
        let variable = format!("{PREFIX}TOKEN");
        if validation.raw_variable(&variable).is_some() {
            return validation
                .parsed_variable(&variable, secret::parse_token)
                .map(Source::Token);
        }
        if upstream.sandbox {
            return secret::parse_token(sandbox::TOKEN).ok().map(Source::Token);
        }
        let sentence = format!("must be set for --credentials token, or the variable {variable}");
        validation.problem("--token-file", sentence);
        None
    }

    fn iam(
        &self,
        upstream: UpstreamContext,
        validation: &mut Validation<'_>,
    ) -> Option<iam::IamConfig> {
        let endpoint = self.iam_endpoint(upstream, validation);
        let user = required("iam-user", &self.iam_user, name, validation);
        let domain = required("iam-domain", &self.iam_domain, name, validation);
        let password = |path: &str| secret_file(path, |text| Ok(secret::parse_password(text)?));
        let password_file = required(
            "iam-password-file",
            &self.iam_password_file,
            password,
            validation,
        );
        let project = match (&self.iam_project, upstream.region) {
            (Some(project), _) => {
                validation.accept(&validation.name_of("iam-project"), name(project))
            }
            // The name of a region's main project is the region's id.
            (None, Some(region)) => Some(region.id.to_owned()),
            (None, None) if upstream.sandbox => Some(sandbox::EXAMPLE_PROJECT_ID.to_owned()),
            (None, None) => {
                validation.problem(
                    "--iam-project",
                    "must be set for --credentials iam without --region",
                );
                None
            }
        };
        Some(iam::IamConfig {
            endpoint: endpoint?,
            user: user?,
            domain: domain?,
            password_file: password_file?,
            project: project?,
        })
    }

    fn iam_endpoint(
        &self,
        upstream: UpstreamContext,
        validation: &mut Validation<'_>,
    ) -> Option<Url> {
        const SDK_VARIABLE: &str = "HUAWEICLOUD_SDK_IAM_ENDPOINT";
        let (name, text) = match &self.iam_endpoint {
            Some(text) => (validation.name_of("iam-endpoint"), Some(text.clone())),
            None => (SDK_VARIABLE.to_owned(), validation.variable(SDK_VARIABLE)),
        };
        if let Some(text) = text {
            let url = validation.accept(&name, url::base(&text))?;
            let checked = url::check_plain_http(&url, upstream.allow_plain_http);
            return validation.accept(&name, checked).map(|()| url);
        }
        if upstream.sandbox {
            return Some(sandbox_url());
        }
        let url = upstream.region.and_then(Region::iam_url);
        if url.is_none() {
            validation.problem(
                "--iam-endpoint",
                "must be set for --credentials iam without a --region whose IAM endpoint is known",
            );
        }
        url
    }

    fn metadata(&self, upstream: UpstreamContext, validation: &mut Validation<'_>) -> Option<Url> {
        if upstream.sandbox && self.metadata_endpoint == METADATA_ENDPOINT {
            return Some(sandbox_url());
        }
        // The metadata service speaks plain http, on a link-local address.
        let url = url::base(&self.metadata_endpoint);
        validation.accept(&validation.name_of("metadata-endpoint"), url)
    }
}

/// The embedded sandbox before it listens. Port 0 is replaced once the sandbox has a port.
fn sandbox_url() -> Url {
    Url::parse("http://127.0.0.1:0").expect("a URL")
}

impl Source {
    /// Replaces port 0 by the port of the sandbox, if the source uses the sandbox.
    pub fn set_sandbox(&mut self, address: SocketAddr) {
        let url = match self {
            Self::Iam(iam) => &mut iam.endpoint,
            Self::Metadata(endpoint) => endpoint,
            Self::Chain(chain) => &mut chain.metadata_endpoint,
            _ => return,
        };
        if url.port() == Some(0) {
            url.set_port(Some(address.port()))
                .expect("an http URL has a port");
        }
    }

    /// The value of `--credentials` that selects this source.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Token(_) | Self::TokenFile(_) => "token",
            Self::Iam(_) => "iam",
            Self::Key(_) => "env",
            Self::Profile(_) => "profile",
            Self::Metadata(_) => "metadata",
            Self::Chain(_) => "chain",
        }
    }

    /// The effective values of the options and variables in use.
    pub fn shown(&self) -> Vec<(&'static str, Shown)> {
        let value = |text: &str| Shown::Value(text.to_owned());
        let file = |path: &Path| Shown::Value(path.display().to_string());
        let key = |key: &AccessKey| {
            let mut shown = vec![(AK_VARIABLE, Shown::SECRET), (SK_VARIABLE, Shown::SECRET)];
            if key.security_token.is_some() {
                shown.push((SECURITY_TOKEN_VARIABLE, Shown::SECRET));
            }
            shown
        };
        match self {
            Self::Caller => Vec::new(),
            Self::Token(_) => vec![
                ("token-file", value("")),
                ("RDS_TASK_FACADE_TOKEN", Shown::SECRET),
            ],
            Self::TokenFile(path) => vec![("token-file", file(path))],
            Self::Iam(iam) => vec![
                ("iam-endpoint", shown_url(&iam.endpoint)),
                ("iam-user", value(&iam.user)),
                ("iam-domain", value(&iam.domain)),
                ("iam-password-file", file(&iam.password_file)),
                ("iam-project", value(&iam.project)),
            ],
            Self::Key(environment) => key(environment),
            Self::Profile(path) => vec![(PROFILE_VARIABLE, file(path))],
            Self::Metadata(endpoint) => vec![("metadata-endpoint", shown_url(endpoint))],
            Self::Chain(chain) => {
                let mut shown = chain.environment.as_deref().map(key).unwrap_or_default();
                let profile = chain.profile.iter();
                shown.extend(profile.map(|path| (PROFILE_VARIABLE, file(path))));
                shown.push(("metadata-endpoint", shown_url(&chain.metadata_endpoint)));
                shown
            }
        }
    }
}

fn shown_url(url: &Url) -> Shown {
    match url.port() {
        Some(0) => Shown::Note("of the sandbox".into()),
        _ => Shown::Value(url::without_slash(url).to_owned()),
    }
}

/// The key in the environment, if AK and SK are set.
fn key(validation: &mut Validation<'_>, required: bool) -> Option<Arc<AccessKey>> {
    let secret = |text: &str| visible(text).map(SecretString::from);
    let mut part = |name: &str| {
        if required && validation.raw_variable(name).is_none() {
            validation.problem(name, "must be set for --credentials env");
        }
        validation.parsed_variable(name, secret)
    };
    let access_key_id = part(AK_VARIABLE);
    let secret_access_key = part(SK_VARIABLE);
    let security_token = validation.parsed_variable(SECURITY_TOKEN_VARIABLE, secret);
    let key = AccessKey::parse(
        access_key_id?.expose_secret(),
        secret_access_key?.expose_secret(),
        security_token.as_ref().map(ExposeSecret::expose_secret),
    );
    Some(Arc::new(key.expect("each part is visible ASCII")))
}

/// The variables that a part of a key in the environment lacks; none without a key.
fn missing_parts(validation: &Validation<'_>) -> Vec<&'static str> {
    let missing = |name: &&str| validation.raw_variable(name).is_none();
    let all = [AK_VARIABLE, SK_VARIABLE, SECURITY_TOKEN_VARIABLE];
    match all.iter().all(missing) {
        true => Vec::new(),
        false => all[..2]
            .iter()
            .filter(|name| missing(name))
            .copied()
            .collect(),
    }
}

/// The profile file, which must hold a key.
fn profile(validation: &mut Validation<'_>) -> Option<PathBuf> {
    let Some((subject, path)) = profile_path(validation) else {
        validation.problem(
            PROFILE_VARIABLE,
            "must be the path of the profile file, because HOME is not set",
        );
        return None;
    };
    let path = match path.to_str() {
        Some(path) => secret_file(path, |text| profile::parse(text, None)),
        None => Err("is not UTF-8".to_owned()),
    };
    validation.accept(subject, path)
}

/// The path of the profile file, after the variable or path that an error names.
fn profile_path(validation: &mut Validation<'_>) -> Option<(&'static str, PathBuf)> {
    match validation.variable(PROFILE_VARIABLE) {
        Some(path) => Some((PROFILE_VARIABLE, PathBuf::from(path))),
        None => validation.variable("HOME").map(|home| {
            (
                "~/.huaweicloud/credentials",
                PathBuf::from(home).join(".huaweicloud/credentials"),
            )
        }),
    }
}

/// The value of a flag that `--credentials iam` needs.
fn required<T>(
    flag: &str,
    text: &Option<String>,
    parse: impl Fn(&str) -> Parsed<T>,
    validation: &mut Validation<'_>,
) -> Option<T> {
    let Some(text) = text else {
        validation.problem(&format!("--{flag}"), "must be set for --credentials iam");
        return None;
    };
    validation.accept(&validation.name_of(flag), parse(text))
}

/// The name of a user, account or project.
fn name(text: &str) -> Parsed<String> {
    if text.is_empty() || text.chars().count() > 256 || text.contains(is_invisible) {
        return Err("must hold 1 to 256 characters, none of them invisible".to_owned());
    }
    Ok(text.to_owned())
}

/// The path of a file whose text `parse` accepts.
fn secret_file<T>(text: &str, parse: impl Fn(&str) -> Result<T, file::Error>) -> Parsed<PathBuf> {
    let path = options::file(text)?;
    // A pipe (process substitution of a shell) can be read once, so it is left to the source.
    if path.is_file() {
        file::load(&path, parse).map_err(|error| error.to_string())?;
    }
    Ok(path)
}
