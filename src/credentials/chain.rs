//! The chain of the vendor's SDKs: the key in the environment, else the profile file, else the metadata service. The first
//! that is there is taken when the program starts, and stays.

use std::{path::PathBuf, sync::Arc};

use reqwest::Url;

use super::{
    Issuer,
    auth::AccessKey,
    cache::{Fetched, Refresh},
    fetch::FetchError,
    metadata, profile,
};

/// What the chain looks at.
#[derive(Debug, Clone)]
pub struct Config {
    /// The key in the environment.
    pub environment: Option<Arc<AccessKey>>,
    /// The profile file, which need not exist.
    pub profile: Option<PathBuf>,
    /// The metadata service, for example `http://169.254.169.254`.
    pub metadata_endpoint: Url,
}

/// The link of the chain that is taken.
pub(super) enum Choice {
    Environment(Arc<AccessKey>),
    Profile(PathBuf),
    /// The metadata service, with the reasons against the two before it.
    Metadata(String),
}

/// Chooses. Reads the profile file.
pub(super) fn choose(config: &Config) -> Choice {
    if let Some(key) = &config.environment {
        return Choice::Environment(key.clone());
    }
    let profile = match &config.profile {
        None => "profile: no home directory and no path given".to_owned(),
        Some(path) => match profile::load(path) {
            Ok(_) => return Choice::Profile(path.clone()),
            Err(fault) => format!("profile {}: {fault}", path.display()),
        },
    };
    tracing::warn!(reason = %profile, "the chain takes the metadata service");
    Choice::Metadata(format!(
        "environment: no key; {profile}; metadata service: "
    ))
}

/// The last link: when it fails, all three reasons are told.
pub(super) struct LastLink {
    pub(super) metadata: metadata::Source,
    pub(super) before: String,
}

impl Refresh for LastLink {
    type Value = Arc<AccessKey>;
    const ISSUER: Issuer = Issuer::Metadata;

    async fn refresh(&mut self) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
        self.metadata.refresh().await.map_err(|mut error| {
            let (FetchError::Rejected { fault, .. } | FetchError::Unavailable { fault, .. }) =
                &mut error;
            fault.insert_str(0, &self.before);
            error
        })
    }
}
