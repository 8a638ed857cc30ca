//! Names and sealed entries. Without the key file, a name reveals nothing about its credential or task, and an entry can be neither read
//! nor made. The name of an entry is authenticated with it, so entries cannot be swapped.

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hkdf::{HKDF_SHA256, Salt},
    hmac,
};

/// Before every name; the digit is the version of names, scripts and entries.
pub(super) const PREFIX: &str = "rtf1:";

/// The first byte of a sealed entry.
const VERSION: u8 = 1;

/// The keys that all replicas derive from the key file.
pub struct Keys {
    names: hmac::Key,
    pub(super) callers: hmac::Key,
    sealing: RandomizedNonceKey,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

impl Keys {
    /// Derives the keys with HKDF.
    pub fn derive(file: &[u8]) -> Self {
        let secret = Salt::new(HKDF_SHA256, b"rds-task-facade quota store").extract(file);
        let derive = |purpose: &[u8]| {
            let mut key = zeroize::Zeroizing::new([0; 32]);
            let purpose = [purpose];
            let derived = secret.expand(&purpose, hmac::HMAC_SHA256);
            derived
                .and_then(|derived| derived.fill(&mut *key))
                .expect("the key is as long as a hash");
            key
        };
        Self {
            names: hmac::Key::new(hmac::HMAC_SHA256, &*derive(b"names")),
            callers: hmac::Key::new(hmac::HMAC_SHA256, &*derive(b"callers")),
            sealing: RandomizedNonceKey::new(&AES_256_GCM, &*derive(b"sealing"))
                .expect("the key has 32 bytes"),
        }
    }

    /// The name of an entry of this kind. Different parts make different names, however they are divided.
    pub fn name(&self, kind: &str, parts: &[&[u8]]) -> String {
        let mut context = hmac::Context::with_key(&self.names);
        for part in [&[kind.as_bytes()], parts].concat() {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let hash = context.sign();
        let hex = |byte: &u8| format!("{byte:02x}");
        let hex: String = hash.as_ref().iter().map(hex).collect();
        format!("{PREFIX}{kind}:{hex}")
    }

    /// Seals the content of the entry with this name.
    pub fn seal(&self, name: &str, content: &[u8]) -> Vec<u8> {
        let mut sealed = content.to_vec();
        let aad = Aad::from(name.as_bytes());
        let nonce = self.sealing.seal_in_place_append_tag(aad, &mut sealed);
        let nonce = nonce.expect("the content is short");
        [&[VERSION], nonce.as_ref().as_slice(), &sealed].concat()
    }

    /// The content of a sealed entry; `None` if it was not sealed by a replica under this name.
    pub fn open(&self, name: &str, entry: &[u8]) -> Option<Vec<u8>> {
        let (version, rest) = entry.split_first()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        if *version != VERSION {
            return None;
        }
        let mut sealed = sealed.to_vec();
        let aad = Aad::from(name.as_bytes());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let content = self.sealing.open_in_place(nonce, aad, &mut sealed).ok()?;
        let length = content.len();
        sealed.truncate(length);
        Some(sealed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::derive(&[7; 32])
    }

    #[test]
    fn only_a_whole_entry_with_its_own_name_and_key_opens() {
        let (name, content) = ("rtf1:result:a", b"content".as_slice());
        let sealed = keys().seal(name, content);

        assert_eq!(keys().open(name, &sealed).as_deref(), Some(content));
        assert_ne!(sealed, keys().seal(name, content), "the nonce is random");
        assert_eq!(keys().open("rtf1:result:b", &sealed), None);
        assert_eq!(Keys::derive(&[8; 32]).open(name, &sealed), None);
        for length in 0..sealed.len() {
            assert_eq!(keys().open(name, &sealed[..length]), None, "{length}");
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(keys().open(name, &changed), None, "{at}");
        }
        assert_eq!(keys().open(name, &[sealed, vec![0]].concat()), None);
    }

    #[test]
    fn names_are_printable_and_depend_on_key_kind_and_each_part() {
        let parts: [&[&[u8]]; 5] = [&[b"a", b"b"], &[b"ab"], &[b"ab", b""], &[b"", b"ab"], &[]];
        let mut names: Vec<String> = parts.iter().map(|parts| keys().name("k", parts)).collect();
        names.push(keys().name("l", parts[0]));
        names.push(Keys::derive(&[8; 32]).name("k", parts[0]));
        let count = names.len();

        for name in &names {
            let hex = name.strip_prefix(PREFIX).expect("the prefix");
            assert_eq!(hex.len(), "k:".len() + 64);
            assert!(name.bytes().all(|byte| byte.is_ascii_graphic()), "{name}");
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(
            keys().name("k", parts[0]),
            Keys::derive(&[7; 32]).name("k", parts[0])
        );
    }
}
