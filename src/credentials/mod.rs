//! The credential of an upstream request: its source, its refresh, and the signature of a request.
//!
//! - [`Credentials`]: the configured source; [`Credentials::resolve`] for each call, [`Credentials::refresh`] after a 401
//! - [`readiness`]: whether the facade has a usable credential
//! - [`auth`]: the credential of one request; [`secret`]: the form of tokens and keys; [`fragments`]: finds them in replies
//! - [`signer`], [`key_guard`]: signing with a key, and keeping it from being locked
//! - [`iam`], [`metadata`], [`chain`], [`profile`], [`file`](mod@file): the sources; [`cache`]: their current credential

pub mod auth;
mod cache;
pub mod chain;
#[cfg(test)]
mod fake_issuer;
pub mod fetch;
pub mod file;
pub mod fragments;
pub mod iam;
pub mod key_guard;
pub mod metadata;
mod options;
pub mod profile;
mod readiness;
pub mod secret;
mod server_time;
pub mod signer;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use aws_lc_rs::{hmac, rand::SystemRandom};
use http::{HeaderMap, HeaderValue};
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;
use url::Url;

pub use self::{
    auth::{AccessKey, Auth, Identity, SharedIdentity, Token},
    options::{HEADING, Options, UpstreamContext},
};
use self::{
    cache::{Cache, OnRejection},
    readiness::Readiness,
};
use crate::{
    caller::Caller,
    deadline::Deadline,
    http_client::{self, BuildError},
    telemetry::metrics::Metrics,
};

/// For tokens of the identity service.
const ON_TOKEN_REJECTED: OnRejection = OnRejection::Fetch {
    spacing: Duration::from_secs(2),
};

/// For temporary keys: the gateway may have rejected the clock and not the key.
const ON_KEY_REJECTED: OnRejection = OnRejection::Fetch {
    spacing: Duration::from_secs(5 * 60),
};

/// The source of credentials, chosen at start.
#[derive(Debug, Clone, Default)]
pub enum Source {
    /// Each caller brings a token, as `x-auth-token`.
    #[default]
    Caller,
    /// A token that never changes.
    Token(HeaderValue),
    /// A token in a file that another program replaces.
    TokenFile(PathBuf),
    /// Tokens from the identity service, for user and password.
    Iam(iam::IamConfig),
    /// A key that never changes.
    Key(Arc<AccessKey>),
    /// The key in a profile file of the vendor's SDKs.
    Profile(PathBuf),
    /// Temporary keys from the metadata service at this address, for example `http://169.254.169.254`.
    Metadata(Url),
    /// Environment, profile file, metadata service: the first that holds a key.
    Chain(chain::ChainConfig),
}

/// The credentials of the facade. Clones share everything.
#[derive(Clone)]
pub struct Credentials {
    source: Arc<Running>,
    /// The shared identity, if it does not depend on the current token or key.
    fixed_identity: Option<SharedIdentity>,
    ready: Arc<watch::Sender<bool>>,
    _readiness: Option<Arc<AbortOnDropHandle<()>>>,
}

/// A source at work.
enum Running {
    /// The key of the hashes that distinguish callers, also in the access line.
    Caller(Box<hmac::Key>),
    Token(Token),
    Key(Arc<AccessKey>),
    CachedToken(Cache<Token>),
    CachedKey(Cache<Arc<AccessKey>>),
}

impl Credentials {
    /// Starts the source, with a task on the current runtime if it fetches or reads files. `http` is for the identity service; the
    /// metadata service is always reached directly. `caller_key` is the key of the hashes that distinguish callers, by default a random one.
    ///
    /// # Errors
    /// [`BuildError`] when the identity service's proxy or certificates cannot be used.
    pub fn start(
        source: Source,
        caller_key: Option<hmac::Key>,
        http: &http_client::Config,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BuildError> {
        let (tokens, latest_token) = watch::channel(None);
        let (keys, latest_key) = watch::channel(None);
        let mut fixed_identity = None;
        let source = match source {
            Source::Caller => Running::Caller(Box::new(caller_key.unwrap_or_else(|| {
                hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
                    .expect("the system has random bytes")
            }))),
            Source::Token(value) => Running::Token(Token::for_server(value, None)),
            Source::Key(key) => Running::Key(key),
            Source::TokenFile(path) => {
                let name = format!("token file {}", path.display());
                let source = file::FileSource::new(path, |text, _| {
                    Ok(Token::for_server(secret::parse_token(text)?, None))
                });
                let cache = Cache::start(name, source, OnRejection::Recheck, tokens, metrics);
                Running::CachedToken(cache)
            }
            Source::Profile(path) => Running::profile(path, keys, metrics),
            Source::Iam(iam) => {
                let parts = [iam.endpoint.as_str(), &iam.domain, &iam.user];
                fixed_identity = Some(SharedIdentity::new("iam", &parts));
                let source = iam::IamTokens::new(http, iam)?;
                let cache = Cache::start("iam", source, ON_TOKEN_REJECTED, tokens, metrics);
                Running::CachedToken(cache)
            }
            Source::Metadata(endpoint) => {
                fixed_identity = Some(SharedIdentity::new("metadata", &[]));
                let source = metadata::MetadataKeys::new(&endpoint, String::new())?;
                let cache = Cache::start("metadata", source, ON_KEY_REJECTED, keys, metrics);
                Running::CachedKey(cache)
            }
            Source::Chain(chain) => match chain::choose(&chain) {
                chain::Choice::Environment(key) => Running::Key(key),
                chain::Choice::Profile(path) => Running::profile(path, keys, metrics),
                chain::Choice::Metadata(error_prefix) => {
                    fixed_identity = Some(SharedIdentity::new("metadata", &[]));
                    let endpoint = &chain.metadata_endpoint;
                    let source = metadata::MetadataKeys::new(endpoint, error_prefix)?;
                    let cache = Cache::start("chain", source, ON_KEY_REJECTED, keys, metrics);
                    Running::CachedKey(cache)
                }
            },
        };
        let is_fetched = matches!(source, Running::CachedToken(_) | Running::CachedKey(_));
        let ready = Arc::new(watch::Sender::new(!is_fetched));
        let readiness = || Readiness(ready.clone());
        let task = match &source {
            Running::Caller(_) | Running::Token(_) => None,
            Running::Key(key) => Some(tokio::spawn(readiness().follow_key(key.clone()))),
            Running::CachedToken(_) => Some(tokio::spawn(readiness().follow_tokens(latest_token))),
            Running::CachedKey(_) => Some(tokio::spawn(readiness().follow_keys(latest_key))),
        };
        Ok(Self {
            source: Arc::new(source),
            fixed_identity,
            ready,
            _readiness: task.map(|task| Arc::new(AbortOnDropHandle::new(task))),
        })
    }

    /// The owner of the credentials.
    pub fn owner(&self) -> Owner {
        match &*self.source {
            Running::Caller(_) => Owner::Caller,
            _ => Owner::Server,
        }
    }

    /// Whether calls can be made: true from the start if callers bring their credentials, else from the first credential on.
    /// False again while a key that RDS has never accepted rests, and when a task that provides the credential has ended.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Why the last fetch of the credential failed, if it did. Holds no secret.
    pub fn failure(&self) -> Option<String> {
        match &*self.source {
            Running::CachedToken(cache) => cache.failure(),
            Running::CachedKey(cache) => cache.failure(),
            Running::Caller(_) | Running::Token(_) | Running::Key(_) => None,
        }
    }

    /// The keyed hash of the caller's token, if callers bring tokens and this token is well-formed. Equal tokens have equal hashes
    /// as long as the process runs, and on all replicas with the same `--quota-store-key-file`.
    pub fn token_hash(&self, metadata: &HeaderMap) -> Option<[u8; 16]> {
        let Running::Caller(key) = &*self.source else {
            return None;
        };
        let token = caller_token(metadata).ok()?;
        hmac::sign(key, token.as_bytes())
            .as_ref()
            .first_chunk()
            .copied()
    }

    /// The identity of a credential of this source for the other replicas.
    pub fn shared_identity(&self, auth: &Auth) -> SharedIdentity {
        match (&self.fixed_identity, auth) {
            (Some(fixed), _) => fixed.clone(),
            (_, Auth::Key(key)) => SharedIdentity::new("key", &[&key.access_key_id]),
            (_, Auth::Token(token)) => {
                let token = token.value.to_str().unwrap_or_default();
                SharedIdentity::new("token", &[token])
            }
        }
    }

    /// The credential for a call with this metadata. `caller` holds the [`Credentials::token_hash`], if there is a hash.
    ///
    /// # Errors
    /// - [`Error::Missing`], [`Error::Malformed`]: the caller's token, where callers bring theirs.
    /// - [`Error::Rejected`], [`Error::Unavailable`]: the facade has no credential.
    /// - [`Error::DeadlineExceeded`]: the first refresh took too long for this call.
    pub async fn resolve(
        &self,
        metadata: &HeaderMap,
        caller: Caller,
        deadline: Deadline,
    ) -> Result<Auth, Error> {
        match &*self.source {
            Running::Caller(_) => {
                let value = caller_token(metadata)?;
                let Caller::Token(hash) = caller else {
                    return Err(Error::Malformed);
                };
                Ok(Auth::Token(Token {
                    value,
                    generation: 0,
                    identity: Identity::Caller(hash),
                    fragments: None,
                }))
            }
            Running::Token(token) => Ok(Auth::Token(token.clone())),
            Running::Key(key) => Ok(Auth::Key(key.clone())),
            Running::CachedToken(cache) => {
                Ok(Auth::Token(server_token(cache.current(deadline).await?)))
            }
            Running::CachedKey(cache) => Ok(Auth::Key(cache.current(deadline).await?.0)),
        }
    }

    /// Upstream accepted `used` in an attempt that was sent then.
    pub fn accepted(&self, used: &Token, sent_at: Instant) {
        if let Running::CachedToken(cache) = &*self.source {
            cache.accepted(used.generation, sent_at);
        }
    }

    /// Upstream rejected `used`: returns a newer credential for one retry of the call, or `None` if the source has no newer
    /// one, or never has one: a caller's or a fixed token, and keys. A rejected key only makes its source refresh,
    /// because trying keys in turn would lock them.
    ///
    /// # Errors
    /// As [`Credentials::resolve`].
    pub async fn refresh(
        &self,
        used: &Auth,
        evidence: TokenEvidence,
        deadline: Deadline,
    ) -> Result<Option<Auth>, Error> {
        let newer = match (&*self.source, used) {
            (Running::CachedToken(cache), Auth::Token(used)) => {
                cache.refresh(used.generation, evidence, deadline).await?
            }
            (Running::CachedKey(cache), Auth::Key(used)) => {
                cache.rejected(|current| Arc::ptr_eq(current, used));
                None
            }
            _ => None,
        };
        Ok(newer.map(|newer| Auth::Token(server_token(newer))))
    }
}

impl Running {
    fn profile(
        path: PathBuf,
        keys: watch::Sender<Option<Arc<AccessKey>>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let name = format!("profile {}", path.display());
        let source = file::FileSource::new(path, profile_key);
        let cache = Cache::start(name, source, OnRejection::Recheck, keys, metrics);
        Self::CachedKey(cache)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

fn server_token((token, generation): (Token, u64)) -> Token {
    Token {
        generation,
        ..token
    }
}

fn profile_key(
    text: &str,
    previous: Option<&Arc<AccessKey>>,
) -> Result<Arc<AccessKey>, file::Error> {
    profile::parse(text, previous.map(|key| &**key)).map(Arc::new)
}

/// The token that the caller brought. It is used for this one call and not stored.
fn caller_token(metadata: &HeaderMap) -> Result<HeaderValue, Error> {
    let mut given = metadata.get_all("x-auth-token").iter();
    let value = given.next().ok_or(Error::Missing)?;
    let text = value.to_str().map_err(|_| Error::Malformed)?;
    if given.next().is_some() || secret::visible(text) != Ok(text) {
        return Err(Error::Malformed);
    }
    let mut value = value.clone();
    value.set_sensitive(true);
    Ok(value)
}

/// A call has no credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The caller brought no `x-auth-token`.
    #[error("no x-auth-token in the call's metadata")]
    Missing,
    /// The caller's `x-auth-token` is repeated or malformed.
    #[error("x-auth-token is repeated or malformed")]
    Malformed,
    /// The issuer rejected the facade's own credential. Waiting does not help, so it carries no retry time.
    #[error("the issuer rejects the configured credential")]
    Rejected {
        /// The issuer.
        issuer: Issuer,
        /// HTTP status of the rejection: 401 or 403.
        http_status: u16,
    },
    /// The facade's own credential cannot be fetched now.
    #[error("the configured credential cannot be fetched")]
    Unavailable {
        /// Time until the next fetch.
        retry_after: Duration,
    },
    /// The key is locked, by the gateway or by the key guard.
    #[error("the key is locked after failed signatures")]
    Locked {
        /// Time until the lock ends.
        retry_after: Duration,
    },
    /// The deadline passed while waiting.
    #[error("the deadline passed while waiting for a credential")]
    DeadlineExceeded,
}

/// The part of a 401 that is about the token of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenEvidence {
    /// The token itself is rejected: it has expired, was revoked or cannot be read.
    Rejected,
    /// The call is rejected, perhaps because the token is for another project.
    Unclear,
}

/// An issuer of credentials that the facade fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Issuer {
    /// The identity service, IAM.
    Identity,
    /// The metadata service of the machine.
    Metadata,
}

/// The owner of the credential of an upstream request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The caller's, passed through.
    Caller,
    /// The facade's own.
    Server,
}
