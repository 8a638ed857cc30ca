//! Small files that may be replaced while the program runs: certificates, tokens, passwords.
//!
//! [`read`] reads one file, up to a size limit. A [`Watcher`] reads a set of files at an interval and after SIGHUP, and returns
//! their contents when they have changed. Contents count, not modification times: Kubernetes replaces a mounted secret by
//! switching a symbolic link. Contents may be secrets, so their buffers are wiped on drop.
//!
//! Reading has a time limit, because a pipe without a writer or a file system that does not respond blocks it.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use aws_lc_rs::digest;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use zeroize::Zeroizing;

/// Time limit for the content of a pipe, and for reading the files of a watcher.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a pipe without content is read.
const PIPE_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Files that stay unusable are reported this often.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A file could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}: {source}", path.display())]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// The cause; [`io::ErrorKind::FileTooLarge`] above the size limit, [`io::ErrorKind::TimedOut`] after the time limit.
    pub source: io::Error,
}

impl Error {
    fn new(path: &Path, source: io::Error) -> Self {
        Self {
            path: path.to_owned(),
            source,
        }
    }
}

fn timed_out() -> io::Error {
    let limit = READ_TIMEOUT.as_secs();
    let cause = format!(
        "no content within {limit} s; check for a pipe without a writer or a file system that does not respond"
    );
    io::Error::new(io::ErrorKind::TimedOut, cause)
}

/// Reads a file of up to `max_bytes`. Blocks, but a pipe without content for at most five seconds.
///
/// # Errors
/// [`Error`] when it cannot be read or is longer.
pub fn read(path: &Path, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, Error> {
    read_bounded(path, max_bytes).map_err(|source| Error::new(path, source))
}

fn read_bounded(path: &Path, max_bytes: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let begun = Instant::now();
    // Otherwise a pipe blocks: opening it until there is a writer, reading it until the writer has written or closed it.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    // A reallocation would leave a copy of the secret behind, so the buffer has its final size from the start.
    let length = metadata.len().min(max_bytes as u64);
    let mut content = Zeroizing::new(Vec::with_capacity(length as usize + 1));
    loop {
        let rest = max_bytes + 1 - content.len();
        match (&file).take(rest as u64).read_to_end(&mut content) {
            Ok(_) if content.len() > max_bytes => return Err(io::ErrorKind::FileTooLarge.into()),
            Ok(_) if metadata.is_file() || !content.is_empty() => return Ok(content),
            // A pipe has no writer yet, or its writer has not written yet.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if begun.elapsed() >= READ_TIMEOUT {
            return Err(timed_out());
        }
        thread::sleep(PIPE_POLL_INTERVAL);
    }
}

/// Reads several files, each as [`read`] does.
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
/// can start a thread at that moment, and a read that hangs blocks the other watchers as little as calls.
#[derive(Debug)]
pub struct Watcher {
    paths: Arc<[PathBuf]>,
    max_bytes: usize,
    interval: Duration,
    /// The digest of the contents that were read last; `None` before the first read, and if the last read failed.
    last_read: Option<Digest>,
    /// When [`Watcher::changed`] last returned an error.
    reported: Option<Instant>,
    /// The reading thread; `None` while it could not be started.
    reader: Option<mpsc::Sender<Reply>>,
    /// SIGHUP; `None` if the system does not deliver it.
    hangup: Option<Signal>,
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
            reported: None,
            hangup: signal(SignalKind::hangup()).ok(),
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

    /// Reads the files at each interval and after SIGHUP, until their contents differ from those read last. Files that have
    /// become readable or unreadable differ too. Cancel safe.
    ///
    /// # Errors
    /// [`Error`] when the files have become unreadable, and once per [`REPORT_INTERVAL`] while they stay unreadable.
    pub async fn changed(&mut self) -> Result<Contents, Error> {
        loop {
            tokio::select! {
                () = sleep(self.interval) => {}
                Some(()) = received(&mut self.hangup) => {}
            }
            let before = self.last_read;
            let read = self.read().await;
            let is_reported = |at: Instant| at.elapsed() < REPORT_INTERVAL;
            let is_due = read.is_err() && !self.reported.is_some_and(is_reported);
            if self.last_read != before || is_due {
                self.reported = read.is_err().then(Instant::now);
                return read;
            }
        }
    }

    async fn read_on_thread(&mut self) -> Result<Contents, Error> {
        match timeout(READ_TIMEOUT, self.request_read()).await {
            Ok(read) => read,
            Err(_) => Err(Error::new(&self.paths[0], timed_out())),
        }
    }

    async fn request_read(&mut self) -> Result<Contents, Error> {
        let error = |source| Error::new(&self.paths[0], source);
        let reader = match &self.reader {
            Some(reader) => reader,
            None => {
                let started = start_reader(self.paths.clone(), self.max_bytes).map_err(error)?;
                self.reader.insert(started)
            }
        };
        let (reply, read) = oneshot::channel();
        let read = match reader.send(reply).await {
            Ok(()) => read.await.ok(),
            Err(_) => None,
        };
        read.unwrap_or_else(|| {
            // The next read starts another thread.
            self.reader = None;
            let ended = io::Error::other("the reading thread has ended");
            Err(Error::new(&self.paths[0], ended))
        })
    }
}

/// Waits for the next signal, or forever if signals cannot be received.
async fn received(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => std::future::pending().await,
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
                if !reply.is_closed() {
                    let _ = reply.send(read_all(&paths, max_bytes));
                }
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
    const SECOND: Duration = Duration::from_secs(1);
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

    #[test]
    fn a_pipe_is_read_to_its_end_even_if_its_writer_is_slow() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());

        let writer = thread::spawn({
            let path = path.clone();
            move || {
                let mut pipe = File::options().write(true).open(path).unwrap();
                for part in ["one", ",", "two"] {
                    io::Write::write_all(&mut pipe, part.as_bytes()).unwrap();
                    thread::sleep(3 * PIPE_POLL_INTERVAL);
                }
            }
        });
        let content = read(&path, MAX_BYTES).unwrap();

        writer.join().unwrap();
        assert_eq!(**content, *b"one,two");
    }

    #[tokio::test]
    async fn a_pipe_in_place_of_a_file_is_an_error_and_the_next_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "one").unwrap();
        let mut watcher = watcher(&[&path]);
        watcher.read().await.unwrap();

        fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        assert_eq!(changed(&mut watcher).await, Err(io::ErrorKind::TimedOut));

        fs::remove_file(&path).unwrap();
        fs::write(&path, "two").unwrap();
        assert_eq!(changed(&mut watcher).await, Ok("two".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_hangs_ends_in_time_and_is_reported_once_per_interval_until_it_works() {
        let (reader, mut requests) = mpsc::channel(1);
        let mut watcher = Watcher {
            reader: Some(reader),
            ..Watcher::new(vec!["file".into()], MAX_BYTES, 5 * SECOND, None)
        };

        let begun = Instant::now();
        let first = watcher.read().await.unwrap_err();
        assert_eq!(first.source.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), READ_TIMEOUT);
        for _ in 0..3 {
            let begun = Instant::now();
            let hangs = watcher.changed().await.unwrap_err();
            assert_eq!(hangs.source.kind(), io::ErrorKind::TimedOut);
            assert!(begun.elapsed() <= REPORT_INTERVAL + 2 * READ_TIMEOUT);
        }

        // The file system responds again. The requests of reads that timed out are still queued.
        let responding = async {
            while let Some(reply) = requests.recv().await {
                let _: Result<(), _> = reply.send(Ok(vec![Zeroizing::new(b"new".to_vec())]));
            }
        };
        tokio::select! {
            changed = watcher.changed() => assert_eq!(**changed.unwrap()[0], *b"new"),
            () = responding => unreachable!("the watcher holds the sender"),
        }
    }

    #[tokio::test]
    async fn a_reading_thread_that_has_ended_is_replaced() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "one").unwrap();
        let mut watcher = watcher(&[file.path()]);
        watcher.reader = Some(mpsc::channel(1).0);

        assert!(watcher.read().await.is_err());
        assert_eq!(**watcher.read().await.unwrap()[0], *b"one");
    }
}
