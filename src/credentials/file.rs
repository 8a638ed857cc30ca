//! Tokens, keys and passwords in files: how the text of a file is read, and a file as a source of the [cache](super::cache).

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    auth::MalformedKey,
    cache::{Fetched, Refresh},
    fetch::FetchError,
    profile,
    secret::{self, Malformed},
};
use crate::files::{self, Watcher};

/// How often a file is read, so that a rotated secret is in use within seconds.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);

/// Larger than any token or profile.
const MAX_BYTES: usize = 64 * 1024;

/// A file without a usable credential. Quotes nothing of its content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It cannot be opened or read.
    #[error("the file cannot be read: {0}")]
    Unreadable(io::ErrorKind),
    /// More than 64 KiB.
    #[error("the file is longer than 64 KiB")]
    TooLong,
    /// Not UTF-8.
    #[error("the file is not UTF-8 text")]
    NotText,
    /// The token or password in it is malformed.
    #[error("the content {0}")]
    Malformed(#[from] Malformed),
    /// The key in it is malformed.
    #[error(transparent)]
    MalformedKey(#[from] MalformedKey),
    /// The profile in it cannot be used.
    #[error(transparent)]
    Profile(#[from] profile::Error),
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        match error.source.kind() {
            io::ErrorKind::FileTooLarge => Self::TooLong,
            kind => Self::Unreadable(kind),
        }
    }
}

/// Reads a file and parses its text. Blocks.
pub(super) fn load<T>(path: &Path, parse: impl Fn(&str) -> Result<T, Error>) -> Result<T, Error> {
    parse(text(&files::read(path, MAX_BYTES)?)?)
}

/// Reads a password. Blocks.
///
/// # Errors
/// [`Error`] when the file or the password cannot be used.
pub fn read_password(path: &Path) -> Result<Zeroizing<String>, Error> {
    load(path, |text| Ok(secret::parse_password(text)?))
}

/// The content of a file as text.
pub(super) fn text(content: &[u8]) -> Result<&str, Error> {
    str::from_utf8(content).map_err(|_| Error::NotText)
}

/// A watcher of one file.
pub(super) fn watch(path: PathBuf, interval: Duration) -> Watcher {
    Watcher::new(vec![path], MAX_BYTES, interval, None)
}

/// Reads the file of [`watch`] now.
pub(super) async fn read_watched(watcher: &mut Watcher) -> Result<Zeroizing<Vec<u8>>, Error> {
    Ok(watcher.read().await?.remove(0))
}

/// Turns the text of a file into a credential; the second argument is the credential that it replaces.
pub(super) type Parse<V> = fn(&str, Option<&V>) -> Result<V, Error>;

/// A file as a source of the cache: its credential has no end, and is read again when the file changes.
pub(super) struct FileSource<V> {
    watcher: Watcher,
    parse: Parse<V>,
    previous: Option<V>,
}

impl<V> FileSource<V> {
    pub(super) fn new(path: PathBuf, parse: Parse<V>) -> Self {
        Self {
            watcher: watch(path, INTERVAL),
            parse,
            previous: None,
        }
    }

    async fn read(&mut self) -> Result<V, Error> {
        let content = read_watched(&mut self.watcher).await?;
        (self.parse)(text(&content)?, self.previous.as_ref())
    }
}

impl<V: Clone + PartialEq + Send + Sync + 'static> Refresh for FileSource<V> {
    type Value = V;

    /// An unusable file is read as often as a usable file.
    const MAX_BACKOFF: Duration = INTERVAL;

    async fn refresh(&mut self) -> Result<Fetched<V>, FetchError> {
        let read = self.read().await;
        let value = read.map_err(|error| FetchError::unavailable(error.to_string()))?;
        self.previous = Some(value.clone());
        Ok(Fetched {
            value,
            lifetime: None,
        })
    }

    async fn changed(&mut self) {
        // The refresh that follows reads the file again and returns its error.
        let _ = self.watcher.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc, time::Instant};

    use tempfile::NamedTempFile;
    use tokio::{sync::watch, time::sleep};

    use super::*;
    use crate::{
        credentials::{
            self, TokenEvidence,
            cache::{Cache, OnRejection},
            profile_key,
            secret::parse_token,
        },
        deadline::Deadline,
        telemetry::metrics::Metrics,
    };

    const SHORT: Duration = Duration::from_millis(5);
    /// Longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// A cache of the token in a file.
    struct Running {
        cache: Cache<String>,
        latest: watch::Receiver<Option<String>>,
        metrics: Arc<Metrics>,
    }

    impl Running {
        fn start(path: &Path, interval: Duration) -> Self {
            let parse = |text: &str, _: Option<&String>| {
                Ok(parse_token(text)?.to_str().unwrap().to_owned())
            };
            let source = FileSource {
                watcher: watch(path.to_owned(), interval),
                parse,
                previous: None,
            };
            let (sender, latest) = watch::channel(None);
            let metrics = Metrics::new();
            let on_rejection = OnRejection::Recheck;
            Self {
                cache: Cache::start("test", source, on_rejection, sender, metrics.clone()),
                latest,
                metrics,
            }
        }

        async fn token(&self) -> Result<(String, u64), credentials::Error> {
            self.cache.current(Deadline::after(PATIENCE)).await
        }

        async fn refresh(&self, used: u64) -> Option<(String, u64)> {
            let deadline = Deadline::after(PATIENCE);
            let refresh = self.cache.refresh(used, TokenEvidence::Unclear, deadline);
            refresh.await.unwrap()
        }

        async fn until_token_is(&self, expected: &str, generation: u64) {
            let expected = Ok((expected.to_owned(), generation));
            let end = Instant::now() + PATIENCE;
            loop {
                let token = self.token().await;
                if token == expected {
                    return;
                }
                assert!(Instant::now() < end, "{token:?} instead of {expected:?}");
                sleep(SHORT).await;
            }
        }

        fn failures(&self) -> u64 {
            let text = self.metrics.encode();
            let name = "rds_credential_refresh_total{outcome=\"failure\"} ";
            let value = text.lines().find_map(|line| line.strip_prefix(name));
            value.expect("a counter").parse().unwrap()
        }

        async fn until_refresh_fails(&self, write: impl FnOnce()) {
            let before = self.failures();
            write();
            let end = Instant::now() + PATIENCE;
            while self.failures() == before {
                assert!(Instant::now() < end, "the bad file goes unnoticed");
                sleep(SHORT).await;
            }
        }
    }

    #[tokio::test]
    async fn a_changed_file_is_used_and_one_that_goes_bad_keeps_the_token() {
        let file = NamedTempFile::new().unwrap();
        fs::write(&file, "one\n").unwrap();
        let running = Running::start(file.path(), SHORT);
        assert_eq!(running.token().await, Ok(("one".to_owned(), 1)));
        assert!(running.latest.borrow().is_some());

        let write = |text| fs::write(&file, text).unwrap();
        running
            .until_refresh_fails(|| write("one\r\nX-Evil: 1"))
            .await;
        assert_eq!(running.token().await, Ok(("one".to_owned(), 1)));

        let remove = || fs::remove_file(&file).unwrap();
        running.until_refresh_fails(remove).await;
        assert_eq!(running.token().await, Ok(("one".to_owned(), 1)));

        write("two\n");
        running.until_token_is("two", 2).await;
    }

    #[tokio::test]
    async fn without_a_usable_file_a_call_fails_at_once_and_the_file_is_used_once_it_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let running = Running::start(&path, SHORT);

        let Err(credentials::Error::Unavailable { retry_after }) = running.token().await else {
            panic!("a token without a file");
        };
        assert!(retry_after <= INTERVAL, "{retry_after:?}");
        assert_eq!(*running.latest.borrow(), None);

        fs::write(&path, "late").unwrap();
        running.until_token_is("late", 1).await;
        assert!(running.latest.borrow().is_some());
    }

    #[tokio::test]
    async fn a_rejected_token_is_read_again_at_once_and_replaced_only_if_it_has_changed() {
        let file = NamedTempFile::new().unwrap();
        fs::write(&file, "one").unwrap();
        let hour = Duration::from_secs(3600);
        let running = Running::start(file.path(), hour);
        running.token().await.unwrap();

        assert_eq!(running.refresh(1).await, None);

        fs::write(&file, "one\n").unwrap();
        assert_eq!(running.refresh(1).await, None, "the same token");

        fs::write(&file, "").unwrap();
        assert_eq!(running.refresh(1).await, None, "a bad file");

        fs::write(&file, "two").unwrap();
        let two = Some(("two".to_owned(), 2));
        assert_eq!(running.refresh(1).await, two, "soon after the failure");
        assert_eq!(running.refresh(1).await, two, "a straggler");
    }

    #[tokio::test]
    async fn a_key_that_a_profile_file_repeats_keeps_its_guard() {
        let file = NamedTempFile::new().unwrap();
        let mut source = FileSource::new(file.path().to_owned(), profile_key);
        let mut read = async |text| {
            fs::write(&file, text).unwrap();
            source.refresh().await.unwrap().value
        };

        let first = read("[basic]\nak = AK\nsk = one\n").await;
        let repeated = read("; comment\n[basic]\nak = AK\nsk = one\n").await;
        let another = read("[basic]\nak = AK\nsk = two\n").await;

        assert_eq!(first, repeated);
        assert!(Arc::ptr_eq(&first.guard, &repeated.guard));
        assert_ne!(first, another);
        assert!(!Arc::ptr_eq(&first.guard, &another.guard));
    }

    #[test]
    fn files_that_are_not_text_or_too_long_are_rejected() {
        let file = NamedTempFile::new().unwrap();

        let load = |path: &Path| load(path, |text| Ok(text.to_owned()));

        fs::write(&file, vec![b'a'; MAX_BYTES + 1]).unwrap();
        assert_eq!(load(file.path()), Err(Error::TooLong));

        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert_eq!(load(file.path()), Err(Error::NotText));

        assert_eq!(
            load(Path::new("/nonexistent/file")),
            Err(Error::Unreadable(io::ErrorKind::NotFound))
        );
    }
}
