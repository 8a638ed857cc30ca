//! The chain of the vendor's SDKs: the key in the environment, else the profile file, else the metadata service. The link is
//! chosen once, when the program starts.

use std::{io::ErrorKind, path::PathBuf, sync::Arc};

use url::Url;

use super::{auth::AccessKey, file, profile_key};
use crate::options::url::without_slash;

/// The links of the chain.
#[derive(Debug, Clone)]
pub struct ChainConfig {
    /// The key in the environment.
    pub environment: Option<Arc<AccessKey>>,
    /// The variables that are missing if the environment has only a part of a key.
    pub missing: Vec<&'static str>,
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

impl Choice {
    fn name(&self, config: &ChainConfig) -> String {
        match self {
            Self::Environment(_) => "environment".to_owned(),
            Self::Profile(path) => format!("profile {}", path.display()),
            Self::Metadata(_) => {
                let endpoint = without_slash(&config.metadata_endpoint);
                format!("metadata service {endpoint}")
            }
        }
    }
}

/// The name of the link that [`choose`] chooses now. Reads the profile file; blocks.
pub fn chosen(config: &ChainConfig) -> String {
    find(config).name(config)
}

/// Chooses a link. Reads the profile file; blocks.
pub(super) fn choose(config: &ChainConfig) -> Choice {
    if !config.missing.is_empty() {
        let missing = config.missing.join(", ");
        tracing::warn!(
            missing,
            "the environment has only a part of a key, which is not used"
        );
    }
    let choice = find(config);
    let source = choice.name(config);
    tracing::info!(source, "the credential chain has chosen a source");
    choice
}

fn find(config: &ChainConfig) -> Choice {
    if let Some(key) = &config.environment {
        return Choice::Environment(key.clone());
    }
    let profile = match &config.profile {
        None => "profile: no home directory and no path given".to_owned(),
        Some(path) => match file::load(path, |text| profile_key(text, None)) {
            Ok(_) => return Choice::Profile(path.clone()),
            Err(error) => {
                let reason = format!("profile {}: {error}", path.display());
                if error != file::Error::Unreadable(ErrorKind::NotFound) {
                    tracing::warn!(reason, "the credential chain skips the profile");
                }
                reason
            }
        },
    };
    Choice::Metadata(format!(
        "environment: no key; {profile}; metadata service: "
    ))
}
