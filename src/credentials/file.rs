//! Small files that somebody else may replace while the program runs: read whole, checked, and read again.

use std::{fs::File, io, io::Read as _, path::Path, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use zeroize::Zeroizing;

use super::{Error, auth::MalformedKey, profile, secret::Malformed};
use crate::{deadline::Deadline, telemetry::metrics::Metrics};

/// How often a file is read again. A rotated secret has to be in use within a minute; reading costs next to nothing.
pub(super) const REREAD_INTERVAL: Duration = Duration::from_secs(5);

/// Larger than any token or profile; whatever is longer is some other file.
const MAX_BYTES: u64 = 64 * 1024;

/// Why a file gives no credential. Says nothing of its content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
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
    /// It is no usable profile file.
    #[error(transparent)]
    Profile(#[from] profile::Fault),
}

/// Reads a file whole. Blocks.
pub(super) fn read(path: &Path) -> Result<Zeroizing<String>, Fault> {
    let unreadable = |error: io::Error| Fault::Unreadable(error.kind());
    let file = File::open(path).map_err(unreadable)?;
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(unreadable)?;
    if content.len() as u64 > MAX_BYTES {
        return Err(Fault::TooLong);
    }
    let text = str::from_utf8(&content).map_err(|_| Fault::NotText)?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// [`read`] off the runtime's own threads.
pub(super) async fn read_off_thread(path: Arc<Path>) -> Result<Zeroizing<String>, Fault> {
    tokio::task::spawn_blocking(move || read(&path))
        .await
        .unwrap_or(Err(Fault::Unreadable(io::ErrorKind::Interrupted)))
}

/// How the text of a file becomes a credential; the second argument is the one it replaces.
pub(super) type Parse<V> = fn(&str, Option<&V>) -> Result<V, Fault>;

/// The credential in a file, read again every five seconds, and a token also when upstream refuses it. A file that went bad changes
/// nothing but the log.
pub(super) struct Watched<V> {
    reader: Arc<Reader<V>>,
    _polling: AbortOnDropHandle<()>,
}

struct Reader<V> {
    path: Arc<Path>,
    parse: Parse<V>,
    /// Held while the file is read, so that it is read by one at a time.
    reading: Mutex<()>,
    view: watch::Sender<View<V>>,
    ready: Arc<watch::Sender<bool>>,
    metrics: Arc<Metrics>,
}

/// What is known of the file.
struct View<V> {
    value: Option<V>,
    /// Grows with each value.
    generation: u64,
    /// Of the content that gave the value.
    digest: Option<digest::Digest>,
    /// What was wrong with the file at the last look.
    fault: Option<Fault>,
    /// When the last look began.
    looked_at: Option<Instant>,
}

impl<V: Clone + Send + Sync + 'static> Watched<V> {
    /// Reads the file now and from then on.
    pub(super) fn start(
        path: &Path,
        parse: Parse<V>,
        ready: Arc<watch::Sender<bool>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let reader = Arc::new(Reader {
            path: path.into(),
            parse,
            reading: Mutex::new(()),
            view: watch::Sender::new(View {
                value: None,
                generation: 0,
                digest: None,
                fault: None,
                looked_at: None,
            }),
            ready,
            metrics,
        });
        let polling = tokio::spawn({
            let reader = reader.clone();
            async move {
                loop {
                    reader.look().await;
                    tokio::time::sleep(REREAD_INTERVAL).await;
                }
            }
        });
        Self {
            reader,
            _polling: AbortOnDropHandle::new(polling),
        }
    }

    /// The value and its generation. Waits for the first look only.
    pub(super) async fn current(&self, deadline: Deadline) -> Result<(V, u64), Error> {
        let mut changes = self.reader.view.subscribe();
        let view = deadline
            .bound(changes.wait_for(|view| view.looked_at.is_some()))
            .await
            .map_err(|_| Error::DeadlineExceeded)?
            .expect("the reader holds the sender");
        match &view.value {
            Some(value) => Ok((value.clone(), view.generation)),
            None => Err(Error::Unavailable {
                retry_after: REREAD_INTERVAL,
            }),
        }
    }

    /// Looks at the file at once, and returns its value if that is newer than generation `used`.
    pub(super) async fn renew(
        &self,
        used: u64,
        deadline: Deadline,
    ) -> Result<Option<(V, u64)>, Error> {
        if self.reader.view.borrow().generation == used {
            deadline
                .bound(self.reader.look())
                .await
                .map_err(|_| Error::DeadlineExceeded)?;
        }
        let (value, generation) = self.current(deadline).await?;
        Ok((generation > used).then_some((value, generation)))
    }
}

impl<V: Clone + Send + Sync + 'static> Reader<V> {
    /// Reads the file, unless a look that began after this call was made has been taken by somebody else.
    async fn look(&self) {
        let asked_at = Instant::now();
        let _one_at_a_time = self.reading.lock().await;
        if self
            .view
            .borrow()
            .looked_at
            .is_some_and(|looked_at| looked_at > asked_at)
        {
            return;
        }
        let looked_at = Instant::now();
        let content = read_off_thread(self.path.clone()).await;
        self.view
            .send_modify(|view| self.note(view, content, looked_at));
        if self.view.borrow().value.is_some() {
            self.ready.send_replace(true);
        }
    }

    fn note(
        &self,
        view: &mut View<V>,
        content: Result<Zeroizing<String>, Fault>,
        looked_at: Instant,
    ) {
        view.looked_at = Some(looked_at);
        let path = self.path.display();
        let parsed = content.and_then(|text| {
            let digest = digest::digest(&digest::SHA256, text.as_bytes());
            if view
                .digest
                .is_some_and(|known| known.as_ref() == digest.as_ref())
            {
                return Ok(None);
            }
            (self.parse)(&text, view.value.as_ref()).map(|value| Some((value, digest)))
        });
        match parsed {
            Ok(found) => {
                view.fault = None;
                if let Some((value, digest)) = found {
                    view.value = Some(value);
                    view.digest = Some(digest);
                    view.generation += 1;
                    self.metrics.credential_refreshed(true);
                    tracing::info!(%path, generation = view.generation, "credential read from file");
                }
            }
            Err(fault) if view.fault.as_ref() != Some(&fault) => {
                self.metrics.credential_refreshed(false);
                let kept = view.value.is_some();
                tracing::warn!(%path, %fault, kept, "credential file is not usable");
                view.fault = Some(fault);
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::credentials::secret::parse_token;

    fn token(text: &str, _: Option<&String>) -> Result<String, Fault> {
        Ok(parse_token(text)?.to_str().unwrap().to_owned())
    }

    fn watched(path: &Path) -> (Watched<String>, watch::Receiver<bool>) {
        let (ready, is_ready) = watch::channel(false);
        let watched = Watched::start(path, token, Arc::new(ready), Metrics::new());
        (watched, is_ready)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    async fn next_look() {
        tokio::time::sleep(REREAD_INTERVAL + Duration::from_millis(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_in_use_after_the_next_look_and_a_bad_one_changes_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "one\n").unwrap();
        let (watched, is_ready) = watched(file.path());

        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("one".to_owned(), 1)
        );
        assert!(*is_ready.borrow());

        fs::write(&file, "one\r\nX-Evil: 1").unwrap();
        next_look().await;
        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("one".to_owned(), 1)
        );

        fs::remove_file(&file).unwrap();
        next_look().await;
        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("one".to_owned(), 1)
        );

        fs::write(&file, "two\n").unwrap();
        next_look().await;
        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("two".to_owned(), 2)
        );

        fs::write(&file, "two\n").unwrap();
        next_look().await;
        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("two".to_owned(), 2)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_usable_file_a_call_fails_at_once_and_the_file_is_awaited() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let (watched, is_ready) = watched(&path);

        assert_eq!(
            watched.current(soon()).await,
            Err(Error::Unavailable {
                retry_after: REREAD_INTERVAL
            })
        );
        assert!(!*is_ready.borrow());

        fs::write(&path, "late").unwrap();
        next_look().await;
        assert_eq!(
            watched.current(soon()).await.unwrap(),
            ("late".to_owned(), 1)
        );
        assert!(*is_ready.borrow());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_value_is_renewed_at_once_when_the_file_has_changed_and_never_otherwise() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "one").unwrap();
        let (watched, _) = watched(file.path());
        watched.current(soon()).await.unwrap();

        assert_eq!(watched.renew(1, soon()).await.unwrap(), None);

        fs::write(&file, "two").unwrap();
        assert_eq!(
            watched.renew(1, soon()).await.unwrap(),
            Some(("two".to_owned(), 2))
        );
        assert_eq!(
            watched.renew(1, soon()).await.unwrap(),
            Some(("two".to_owned(), 2)),
            "a straggler gets what is there"
        );
    }

    #[test]
    fn files_that_are_no_text_or_far_too_long_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();

        fs::write(&file, vec![b'a'; 64 * 1024 + 1]).unwrap();
        assert_eq!(read(file.path()), Err(Fault::TooLong));

        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert_eq!(read(file.path()), Err(Fault::NotText));

        assert_eq!(
            read(Path::new("/nonexistent/file")),
            Err(Fault::Unreadable(io::ErrorKind::NotFound))
        );
    }
}
