//! Small files that may be replaced while the program runs: certificates, tokens, passwords.
//!
//! [`read`] reads one file, up to a size limit. A [`Watcher`] reads a set of files at an interval and returns their contents
//! when they have changed. Contents count, not modification times: Kubernetes replaces a mounted secret by switching a symbolic
//! link. Contents may be secrets, so their buffers are wiped on drop.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use aws_lc_rs::digest;
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};
use zeroize::Zeroizing;

/// A file could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}: {source}", path.display())]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// The cause; [`io::ErrorKind::FileTooLarge`] above the size limit.
    pub source: io::Error,
}

/// Reads a file of up to `max_bytes`. Blocks.
///
/// # Errors
/// [`Error`] when it cannot be read or is longer.
pub fn read(path: &Path, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, Error> {
    read_bounded(path, max_bytes).map_err(|source| Error {
        path: path.to_owned(),
        source,
    })
}

fn read_bounded(path: &Path, max_bytes: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    // A reallocation would leave a copy of the secret behind, so the buffer has its final size from the start.
    let length = file.metadata()?.len().min(max_bytes as u64);
    let mut content = Zeroizing::new(Vec::with_capacity(length as usize + 1));
    file.take(max_bytes as u64 + 1).read_to_end(&mut content)?;
    if content.len() > max_bytes {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(content)
}

/// Reads several files, each of up to `max_bytes`. Blocks.
///
/// # Errors
/// [`Error`] of the first file that cannot be read or is longer.
pub fn read_all(paths: &[PathBuf], max_bytes: usize) -> Result<Contents, Error> {
    paths.iter().map(|path| read(path, max_bytes)).collect()
}

/// The contents of several files, in the order of their paths.
pub type Contents = Vec<Zeroizing<Vec<u8>>>;

/// Identifies contents without keeping a copy of a secret.
pub type Digest = [u8; 32];

/// The digest of contents, such as those of a set of files.
pub fn digest<T: AsRef<[u8]>>(contents: &[T]) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    for content in contents.iter().map(AsRef::as_ref) {
        // With the lengths, moving bytes from one file to the next changes the digest.
        context.update(&content.len().to_be_bytes());
        context.update(content);
    }
    let mut digest = Digest::default();
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// Watches a set of files.
///
/// The files are read on a thread that lives as long as the watcher, so that a change does not depend on whether the system
/// can start a thread at that moment, and a read that hangs (a pipe without a writer, a dead network file system) blocks
/// nothing else.
#[derive(Debug)]
pub struct Watcher {
    paths: Arc<[PathBuf]>,
    max_bytes: usize,
    interval: Duration,
    /// The digest of the contents that were read last; `None` before the first read, and if the last read failed.
    last_read: Option<Digest>,
    /// The reading thread; `None` while it could not be started.
    reader: Option<mpsc::Sender<Reply>>,
}

type Reply = oneshot::Sender<Result<Contents, Error>>;

impl Watcher {
    /// Starts the reading thread. `last_read` is the digest of contents already in use, if any.
    pub fn new(
        paths: Vec<PathBuf>,
        max_bytes: usize,
        interval: Duration,
        last_read: Option<Digest>,
    ) -> Self {
        let paths: Arc<[PathBuf]> = paths.into();
        Self {
            // The first read tries again, and returns the error if it fails.
            reader: start_reader(paths.clone(), max_bytes).ok(),
            paths,
            max_bytes,
            interval,
            last_read,
        }
    }

    /// Reads the files now.
    ///
    /// # Errors
    /// [`Error`] of the first file that cannot be read.
    pub async fn read(&mut self) -> Result<Contents, Error> {
        let read = self.read_on_thread().await;
        self.last_read = read.as_deref().ok().map(digest);
        read
    }

    /// Reads the files at each interval, until their contents differ from those read last. Files that have become readable or
    /// unreadable differ too. Cancel safe.
    ///
    /// # Errors
    /// [`Error`] when the files have become unreadable.
    pub async fn changed(&mut self) -> Result<Contents, Error> {
        loop {
            sleep(self.interval).await;
            let before = self.last_read;
            let read = self.read().await;
            if self.last_read != before {
                return read;
            }
        }
    }

    async fn read_on_thread(&mut self) -> Result<Contents, Error> {
        let error = |source| Error {
            path: self.paths[0].clone(),
            source,
        };
        let reader = match &self.reader {
            Some(reader) => reader,
            None => {
                let started = start_reader(self.paths.clone(), self.max_bytes).map_err(error)?;
                self.reader.insert(started)
            }
        };
        let (reply, read) = oneshot::channel();
        let ended = || error(io::Error::other("the reading thread has ended"));
        reader.send(reply).await.map_err(|_| ended())?;
        read.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Starts the thread that reads the files for each [`Reply`] that it receives.
fn start_reader(paths: Arc<[PathBuf]>, max_bytes: usize) -> io::Result<mpsc::Sender<Reply>> {
    let (reader, mut requests) = mpsc::channel::<Reply>(1);
    thread::Builder::new()
        .name("files".to_owned())
        .spawn(move || {
            while let Some(reply) = requests.blocking_recv() {
                // The receiver is gone if the caller has stopped waiting.
                let _ = reply.send(read_all(&paths, max_bytes));
            }
        })?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;

    const MAX_BYTES: usize = 16;
    const INTERVAL: Duration = Duration::from_millis(5);
    /// Longer than any test takes.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn watcher(paths: &[&Path]) -> Watcher {
        let paths = paths.iter().map(|path| path.to_path_buf()).collect();
        Watcher::new(paths, MAX_BYTES, INTERVAL, None)
    }

    async fn changed(watcher: &mut Watcher) -> Result<String, io::ErrorKind> {
        let contents = timeout(PATIENCE, watcher.changed())
            .await
            .expect("a change is noticed");
        match contents {
            Ok(contents) => Ok(contents
                .iter()
                .map(|content| str::from_utf8(content).unwrap())
                .collect()),
            Err(error) => Err(error.source.kind()),
        }
    }

    #[test]
    fn a_file_is_read_up_to_its_size_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();

        fs::write(&file, [b'a'; MAX_BYTES]).unwrap();
        assert_eq!(**read(file.path(), MAX_BYTES).unwrap(), [b'a'; MAX_BYTES]);

        fs::write(&file, [b'a'; MAX_BYTES + 1]).unwrap();
        let too_long = read(file.path(), MAX_BYTES).unwrap_err();
        assert_eq!(too_long.source.kind(), io::ErrorKind::FileTooLarge);

        let missing = read(Path::new("/nonexistent/file"), MAX_BYTES).unwrap_err();
        assert_eq!(missing.source.kind(), io::ErrorKind::NotFound);
        assert!(
            missing
                .to_string()
                .starts_with("cannot read /nonexistent/file: ")
        );
    }

    #[test]
    fn the_digest_depends_on_where_one_content_ends() {
        assert_eq!(digest(&["ab", "c"]), digest(&["ab", "c"]));
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_ne!(digest(&["ab"]), digest(&["ab", ""]));
    }

    #[tokio::test]
    async fn new_content_is_a_change_and_so_is_a_file_that_goes_or_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        fs::write(&first, "one,").unwrap();
        fs::write(&second, "two").unwrap();
        let mut watcher = watcher(&[&first, &second]);
        watcher.read().await.unwrap();

        fs::write(&second, "three").unwrap();
        assert_eq!(changed(&mut watcher).await, Ok("one,three".to_owned()));

        fs::remove_file(&first).unwrap();
        assert_eq!(changed(&mut watcher).await, Err(io::ErrorKind::NotFound));

        fs::write(&first, "one,").unwrap();
        assert_eq!(changed(&mut watcher).await, Ok("one,three".to_owned()));
    }

    #[tokio::test]
    async fn writing_equal_content_is_not_a_change() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "same").unwrap();
        let mut watcher = watcher(&[file.path()]);
        watcher.read().await.unwrap();

        let rewriting = async {
            for _ in 0..20 {
                fs::write(file.path().with_extension("new"), "same").unwrap();
                fs::rename(file.path().with_extension("new"), &file).unwrap();
                sleep(INTERVAL).await;
            }
        };
        tokio::select! {
            changed = watcher.changed() => panic!("{changed:?}"),
            () = rewriting => {}
        }

        fs::write(&file, "new").unwrap();
        assert_eq!(changed(&mut watcher).await, Ok("new".to_owned()));
    }

    #[tokio::test]
    async fn contents_that_differ_from_those_in_use_are_a_change() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "new").unwrap();
        let in_use = Some(digest(&["old"]));
        let paths = vec![file.path().to_path_buf()];
        let mut watcher = Watcher::new(paths, MAX_BYTES, INTERVAL, in_use);

        assert_eq!(changed(&mut watcher).await, Ok("new".to_owned()));
    }
}
