//! The credential of one upstream request.

use std::{fmt, sync::Arc};

use aws_lc_rs::hmac;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::{
    Owner,
    fragments::{Fragments, repeats},
    key_guard::KeyGuard,
    secret::{Malformed, parse_token, visible},
};

/// The credential of one upstream request: a token or a signature, never both.
#[derive(Debug, Clone)]
pub enum Auth {
    /// Goes out as `X-Auth-Token`.
    Token(Token),
    /// Signs the request, separately for each attempt.
    Key(Arc<AccessKey>),
}

impl Auth {
    /// The owner of the credential.
    pub fn owner(&self) -> Owner {
        match self.identity() {
            Identity::Caller(_) => Owner::Caller,
            Identity::Server => Owner::Server,
        }
    }

    /// The identity of the request. The facade distinguishes callers by their tokens.
    pub fn identity(&self) -> Identity {
        match self {
            Self::Token(token) => token.identity,
            Self::Key(_) => Identity::Server,
        }
    }

    /// Whether one of these texts of a reply repeats the facade's own credential, so that the caller must not see it.
    pub fn is_own_in<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> bool {
        match self {
            Self::Token(token) => {
                let fragments = token.fragments.as_ref();
                fragments.is_some_and(|fragments| fragments.are_in(texts))
            }
            Self::Key(key) => key.fragments.are_in(texts),
        }
    }

    /// Whether a text of a reply repeats the credential, the facade's or the caller's, so that no log may contain it.
    pub fn is_in(&self, text: &str) -> bool {
        match self {
            Self::Token(Token {
                fragments: None,
                value,
                ..
            }) => repeats(text, value.as_bytes()),
            _ => self.is_own_in([text]),
        }
    }
}

/// The identity of a request. Equal identities may share responses and throttle windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity {
    /// The facade itself.
    Server,
    /// The caller with the token of this hash. The hash key is secret, so the hash is useless without it.
    Caller([u8; 16]),
}

/// The identity of a credential, equal on all replicas of a fleet, and the same after a refresh. Holds the token of a caller, so it is
/// not stored anywhere; the quota store gets a keyed hash.
#[derive(Clone)]
pub struct SharedIdentity(Zeroizing<Vec<u8>>);

impl fmt::Debug for SharedIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedIdentity").finish_non_exhaustive()
    }
}

impl SharedIdentity {
    /// An identity of this kind, with these parts.
    pub(super) fn new(kind: &str, parts: &[&str]) -> Self {
        let mut bytes = Zeroizing::new(kind.as_bytes().to_vec());
        for part in parts {
            // No part holds a zero byte.
            bytes.push(0);
            bytes.extend_from_slice(part.as_bytes());
        }
        Self(bytes)
    }

    /// The input of the keyed hash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A token.
#[derive(Debug, Clone)]
pub struct Token {
    /// Marked sensitive, so that no `Debug` prints it.
    pub value: HeaderValue,
    /// Grows with each refresh; 0 for tokens that are not refreshed.
    pub generation: u64,
    /// The identity of the request.
    pub identity: Identity,
    /// To find the token in replies; `None` for a caller's token, which the caller may see.
    pub fragments: Option<Arc<Fragments>>,
}

impl Token {
    /// A token of the facade. `password` is what the facade got it for, if it was a password.
    pub(super) fn for_server(value: HeaderValue, password: Option<&str>) -> Self {
        let parts = [Some(value.as_bytes()), password.map(str::as_bytes)];
        let fragments = Fragments::from_credential(parts.into_iter().flatten());
        Self {
            value,
            generation: 0,
            identity: Identity::Server,
            fragments: Some(Arc::new(fragments)),
        }
    }
}

/// The same token may have been fetched twice.
impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value && self.identity == other.identity
    }
}

/// A key pair, with the security token that belongs to it when it is temporary.
pub struct AccessKey {
    /// AK.
    pub access_key_id: String,
    /// SK, ready for signing. The library wipes it on drop.
    pub(super) signing_key: hmac::Key,
    /// Goes out as `X-Security-Token`; marked sensitive.
    pub security_token: Option<HeaderValue>,
    /// To find the parts of the key in replies.
    fragments: Fragments,
    /// Keeps bad signatures from locking the key at the gateway.
    pub guard: Arc<KeyGuard>,
}

impl AccessKey {
    /// Parses the parts of a key. An empty security token counts as absent.
    ///
    /// # Errors
    /// [`MalformedKey`] names the part that does not hold 1 to 31 KiB of visible ASCII.
    pub fn parse(
        access_key_id: &str,
        secret_access_key: &str,
        security_token: Option<&str>,
    ) -> Result<Self, MalformedKey> {
        let part = |part| move |problem| MalformedKey { part, problem };
        let access_key_id = visible(access_key_id).map_err(part("access key id (AK)"))?;
        let secret = visible(secret_access_key).map_err(part("secret access key (SK)"))?;
        let security_token = security_token
            .filter(|text| !text.trim_ascii().is_empty())
            .map(parse_token)
            .transpose()
            .map_err(part("security token"))?;
        let parts = [access_key_id.as_bytes(), secret.as_bytes()];
        let token = security_token.as_ref().map(HeaderValue::as_bytes);
        Ok(Self {
            fragments: Fragments::from_credential(parts.into_iter().chain(token)),
            access_key_id: access_key_id.to_owned(),
            signing_key: hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()),
            security_token,
            guard: Arc::new(KeyGuard::default()),
        })
    }

    /// Takes over the guard of the previous key if it is the same key. With another secret, the key has not been accepted yet, so its
    /// first rejection starts a rest.
    pub(super) fn following(mut self, previous: Option<&Self>) -> Self {
        if let Some(previous) = previous
            && previous.access_key_id == self.access_key_id
            && self.same_secret(previous)
        {
            self.guard = previous.guard.clone();
        }
        self
    }

    /// Equal for equal secrets, and useless without the secret.
    pub fn secret_tag(&self) -> [u8; 32] {
        let tag = hmac::sign(&self.signing_key, b"same secret?");
        *tag.as_ref().first_chunk().expect("SHA-256 has 32 bytes")
    }

    fn same_secret(&self, other: &Self) -> bool {
        self.secret_tag() == other.secret_tag()
    }
}

/// Equal keys make the same signatures. Their guards are not compared.
impl PartialEq for AccessKey {
    fn eq(&self, other: &Self) -> bool {
        self.access_key_id == other.access_key_id
            && self.security_token == other.security_token
            && self.same_secret(other)
    }
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKey").finish_non_exhaustive()
    }
}

/// A part of a key is malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {part} {problem}")]
pub struct MalformedKey {
    part: &'static str,
    problem: Malformed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_part_of_a_key_or_token() {
        let key = AccessKey::parse("canary-ak", "canary-sk", Some("canary-st")).unwrap();
        let token = Token {
            generation: 1,
            ..Token::for_server(parse_token("canary-token").unwrap(), None)
        };

        let printed = format!("{:?} {:?}", Auth::Key(Arc::new(key)), Auth::Token(token));

        assert!(!printed.contains("canary"), "{printed}");
    }

    #[test]
    fn a_malformed_key_names_the_part_and_not_the_value() {
        let cases = [
            (
                AccessKey::parse("can ary", "sk", None),
                "the access key id (AK) holds a blank",
            ),
            (
                AccessKey::parse("ak", "canary\nx", None),
                "the secret access key (SK) holds a line break; write it on one line",
            ),
            (
                AccessKey::parse("ak", "sk", Some("canaryß")),
                "the security token holds a character that is not visible ASCII",
            ),
        ];

        for (parsed, expected) in cases {
            assert_eq!(parsed.unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn keys_are_equal_when_each_part_is() {
        let key = |ak, sk, st| AccessKey::parse(ak, sk, st).unwrap();

        assert_eq!(key("ak", "sk", Some("st")), key("ak", "sk", Some("st")));
        for other in [
            key("other", "sk", Some("st")),
            key("ak", "other", Some("st")),
            key("ak", "sk", Some("other")),
            key("ak", "sk", None),
        ] {
            assert_ne!(key("ak", "sk", Some("st")), other);
        }
    }

    #[test]
    fn an_empty_security_token_is_none() {
        for empty in ["", "\n", " "] {
            let key = AccessKey::parse("ak", "sk", Some(empty)).unwrap();

            assert_eq!(key.security_token, None, "{empty:?}");
        }
    }
}
