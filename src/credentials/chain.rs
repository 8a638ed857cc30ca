//! The chain of the vendor's SDKs: the key in the environment, else the profile file, else the metadata service. The choice is
//! made when the program starts, and stays.

use std::{path::PathBuf, sync::Arc};

use reqwest::Url;

use super::{
    auth::AccessKey,
    cache::{Fetched, Refresh},
    fetch::FetchError,
    metadata, profile,
};

/// The links of the chain.
#[derive(Debug, Clone)]
pub struct ChainConfig {
    /// The key in the environment.
    pub environment: Option<Arc<AccessKey>>,
    /// The profile file, which need not exist.
    pub profile: Option<PathBuf>,
    /// The metadata service, for example `http://169.254.169.254`.
    pub metadata_endpoint: Url,
}

/// The chosen link.
pub(super) enum Choice {
    Environment(Arc<AccessKey>),
    Profile(PathBuf),
    /// The metadata service, with the reasons why the two before it were not chosen.
    Metadata(String),
}

/// Chooses a link. Reads the profile file; blocks.
pub(super) fn choose(config: &ChainConfig) -> Choice {
    if let Some(key) = &config.environment {
        return Choice::Environment(key.clone());
    }
    let profile = match &config.profile {
        None => "profile: no home directory and no path given".to_owned(),
        Some(path) => match profile::load(path) {
            Ok(_) => return Choice::Profile(path.clone()),
            Err(error) => format!("profile {}: {error}", path.display()),
        },
    };
    tracing::warn!(reason = %profile, "the chain takes the metadata service");
    Choice::Metadata(format!(
        "environment: no key; {profile}; metadata service: "
    ))
}

/// The metadata service as the last link: its errors name the reasons of all three links.
pub(super) struct LastLink {
    pub(super) metadata: metadata::MetadataKeys,
    pub(super) before: String,
}

impl Refresh for LastLink {
    type Value = Arc<AccessKey>;

    async fn refresh(&mut self) -> Result<Fetched<Arc<AccessKey>>, FetchError> {
        let refreshed = self.metadata.refresh().await;
        refreshed.map_err(|error| FetchError {
            cause: format!("{}{error}", self.before),
            ..error
        })
    }
}
