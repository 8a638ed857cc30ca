//! The chain of the vendor's SDKs: the key in the environment, else the profile file, else the metadata service. The link is
//! chosen once, when the program starts.

use std::{path::PathBuf, sync::Arc};

use reqwest::Url;

use super::{auth::AccessKey, file, profile_key};

/// The links of the chain.
#[derive(Debug, Clone)]
pub struct ChainConfig {
    /// The key in the environment.
    pub environment: Option<Arc<AccessKey>>,
    /// The profile file, if its path is known. It need not exist.
    pub profile: Option<PathBuf>,
    /// The metadata service, for example `http://169.254.169.254`.
    pub metadata_endpoint: Url,
}

/// The chosen link.
pub(super) enum Choice {
    Environment(Arc<AccessKey>),
    Profile(PathBuf),
    /// The metadata service. Its errors begin with this text: the reasons for not choosing the two other links.
    Metadata(String),
}

/// Chooses a link. Reads the profile file; blocks.
pub(super) fn choose(config: &ChainConfig) -> Choice {
    if let Some(key) = &config.environment {
        return Choice::Environment(key.clone());
    }
    let profile = match &config.profile {
        None => "profile: no home directory and no path given".to_owned(),
        Some(path) => match file::load(path, |text| profile_key(text, None)) {
            Ok(_) => return Choice::Profile(path.clone()),
            Err(error) => format!("profile {}: {error}", path.display()),
        },
    };
    tracing::warn!(reason = %profile, "the credential chain uses the metadata service");
    Choice::Metadata(format!(
        "environment: no key; {profile}; metadata service: "
    ))
}
