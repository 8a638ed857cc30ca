//! The settings of the credential source in use. Those of every other source are neither read nor checked.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::ExposeSecret;

use super::{
    Credentials, Endpoint, Iam,
    flags::PREFIX,
    read::Reader,
    regions::Region,
    urls::{self, PlainHttp},
    values::{self, Parsed},
};
use crate::credentials::{AccessKey, file::Error as FileError, profile, secret};

/// What the sandbox accepts where nothing else is configured.
const SANDBOX_TOKEN: &str = "sandbox-token";

/// Any project will do for the sandbox; this is the one of the vendor's example.
const SANDBOX_PROJECT: &str = "0483b6b16e954cb88930a360d2c4e663";

/// Where the vendor's SDKs are told of the profile file.
const PROFILE_VARIABLE: &str = "HUAWEICLOUD_SDK_CREDENTIALS_FILE";

/// The credential source by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Caller,
    Token,
    Iam,
    Env,
    Profile,
    Metadata,
    Chain,
}

const SOURCES: [(&str, Source); 7] = [
    ("caller", Source::Caller),
    ("token", Source::Token),
    ("iam", Source::Iam),
    ("env", Source::Env),
    ("profile", Source::Profile),
    ("metadata", Source::Metadata),
    ("chain", Source::Chain),
];

/// Where the calls go, as far as credentials depend on it.
pub(super) struct Surroundings {
    /// The region, when one is configured.
    pub(super) region: Option<Region>,
    /// Whether the sandbox is called.
    pub(super) sandbox: bool,
    /// Where plain http may go.
    pub(super) plain_http: PlainHttp,
}

/// Reads the source and its settings, and its name for people. Without a value only when mistakes were noted.
pub(super) fn read(
    reader: &mut Reader<'_>,
    around: &Surroundings,
) -> (&'static str, Option<Credentials>) {
    let chosen = reader
        .given("credentials")
        .and_then(|given| reader.parsed(&given.source, values::word(&given.texts[0], &SOURCES)));
    let source = match chosen {
        Some(source) => source,
        None if around.sandbox => Source::Token,
        None => Source::Caller,
    };
    let name = SOURCES
        .iter()
        .find(|(_, known)| *known == source)
        .map_or("", |(name, _)| name);
    let credentials = match source {
        Source::Caller => Some(Credentials::Caller),
        Source::Token => token(reader, around),
        Source::Iam => iam(reader, around).map(Credentials::Iam),
        Source::Env => key(reader, true).map(Credentials::Key),
        Source::Profile => profile(reader).map(Credentials::Profile),
        Source::Metadata => Some(Credentials::Metadata(metadata(reader, around))),
        Source::Chain => Some(Credentials::Chain {
            key: key(reader, false),
            profile: profile_path(reader).map(|(_, path)| path),
            metadata: metadata(reader, around),
        }),
    };
    (name, credentials)
}

fn token(reader: &mut Reader<'_>, around: &Surroundings) -> Option<Credentials> {
    if let Some(given) = reader.given("token-file") {
        let path = secret_file(&given.texts[0], secret::load_token);
        return reader
            .parsed(&given.source, path)
            .map(Credentials::TokenFile);
    }
    let variable = format!("{PREFIX}TOKEN");
    let text = match reader.variable(&variable) {
        Some(text) => text,
        None if around.sandbox => SANDBOX_TOKEN.to_owned(),
        None => {
            return reader.mistake(
                "--token-file",
                &format!("must be set for --credentials token, or the variable {variable}"),
            );
        }
    };
    let token = secret::parse_token(&text).map_err(|fault| fault.to_string());
    reader.parsed(&variable, token).map(Credentials::Token)
}

fn iam(reader: &mut Reader<'_>, around: &Surroundings) -> Option<Iam> {
    let endpoint = iam_endpoint(reader, around);
    let mut named = |name| {
        let given = reader.given(name);
        match given {
            Some(given) => reader.parsed(&given.source, values::name(&given.texts[0])),
            None => reader.mistake(&format!("--{name}"), "must be set for --credentials iam"),
        }
    };
    let user = named("iam-user");
    let domain = named("iam-domain");
    let password_file = match reader.given("iam-password-file") {
        Some(given) => {
            let path = secret_file(&given.texts[0], secret::load_password);
            reader.parsed(&given.source, path)
        }
        None => reader.mistake("--iam-password-file", "must be set for --credentials iam"),
    };
    let project = match (reader.given("iam-project"), around.region) {
        (Some(given), _) => reader.parsed(&given.source, values::name(&given.texts[0])),
        // The name of a region's main project is the region's id.
        (None, Some(region)) => Some(region.id.to_owned()),
        (None, None) if around.sandbox => Some(SANDBOX_PROJECT.to_owned()),
        (None, None) => reader.mistake(
            "--iam-project",
            "must be set for --credentials iam when there is no --region",
        ),
    };
    Some(Iam {
        endpoint: endpoint?,
        user: user?,
        domain: domain?,
        password_file: password_file?,
        project: project?,
    })
}

fn iam_endpoint(reader: &mut Reader<'_>, around: &Surroundings) -> Option<Endpoint> {
    const VARIABLE_OF_SDK: &str = "HUAWEICLOUD_SDK_IAM_ENDPOINT";
    let given = match reader.given("iam-endpoint") {
        Some(given) => Some((given.source, given.texts[0].clone())),
        None => reader
            .variable(VARIABLE_OF_SDK)
            .map(|text| (VARIABLE_OF_SDK.to_owned(), text)),
    };
    if let Some((source, text)) = given {
        let url = reader.parsed(&source, urls::base_url(&text, around.plain_http));
        return url.map(Endpoint::Url);
    }
    if around.sandbox {
        return Some(Endpoint::Sandbox);
    }
    match around.region.and_then(|region| region.iam_host) {
        Some(host) => Some(Endpoint::Url(super::BaseUrl(format!("https://{host}")))),
        None => reader.mistake(
            "--iam-endpoint",
            "must be set for --credentials iam: no region tells where IAM is",
        ),
    }
}

fn metadata(reader: &mut Reader<'_>, around: &Surroundings) -> Endpoint {
    // The metadata service speaks plain http by nature, on an address of the machine's own link.
    let parse = |text: &str| urls::base_url(text, PlainHttp::Anywhere);
    match reader.given("metadata-endpoint") {
        None if around.sandbox => Endpoint::Sandbox,
        _ => Endpoint::Url(reader.value("metadata-endpoint", parse)),
    }
}

/// The key of the environment, AK and SK or nothing.
fn key(reader: &mut Reader<'_>, required: bool) -> Option<Arc<AccessKey>> {
    let mut part = |name: &'static str, required: bool| match reader.variable(name) {
        Some(text) => reader.parsed(name, values::secret(&text)),
        None if required => reader.mistake(name, "must be set for --credentials env"),
        None => None,
    };
    let access_key_id = part("HUAWEICLOUD_SDK_AK", required);
    let secret_access_key = part("HUAWEICLOUD_SDK_SK", required);
    let security_token = part("HUAWEICLOUD_SDK_SECURITY_TOKEN", false);
    let key = AccessKey::parse(
        access_key_id?.expose_secret(),
        secret_access_key?.expose_secret(),
        security_token.as_ref().map(ExposeSecret::expose_secret),
    );
    Some(Arc::new(
        key.expect("each part was found to be visible ASCII"),
    ))
}

/// The profile file, which must hold a key.
fn profile(reader: &mut Reader<'_>) -> Option<PathBuf> {
    let Some((source, path)) = profile_path(reader) else {
        return reader.mistake(
            PROFILE_VARIABLE,
            "must name the profile file, as there is no HOME to look in",
        );
    };
    let path = match path.to_str() {
        Some(path) => secret_file(path, profile::load),
        None => Err("is not UTF-8".to_owned()),
    };
    reader.parsed(source, path)
}

/// The path of the profile file, and who says so: as configured, else in the home folder.
fn profile_path(reader: &mut Reader<'_>) -> Option<(&'static str, PathBuf)> {
    match reader.variable(PROFILE_VARIABLE) {
        Some(path) => Some((PROFILE_VARIABLE, PathBuf::from(path))),
        None => reader.variable("HOME").map(|home| {
            (
                "~/.huaweicloud/credentials",
                PathBuf::from(home).join(".huaweicloud/credentials"),
            )
        }),
    }
}

/// A file that `load` finds a secret in.
fn secret_file<T>(text: &str, load: impl Fn(&Path) -> Result<T, FileError>) -> Parsed<PathBuf> {
    let path = values::file(text)?;
    // A pipe (process substitution of a shell) gives its content once, to the source at work.
    if path.is_file() {
        load(&path).map_err(|fault| fault.to_string())?;
    }
    Ok(path)
}
