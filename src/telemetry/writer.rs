//! Takes finished lines off the threads that serve calls. A pipe that nobody reads costs lines, which are counted, and
//! never a waiting call; stopping waits a bounded time for the rest.
//!
//! Lines are copied into one buffer, which the writing thread swaps for the one it has written: a line that one thread
//! allocates and another frees makes the two meet in the allocator.

use std::{
    io::Write,
    mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

/// Text that waits at most, in bytes: some tenths of a second of a very busy server.
const MAX_WAITING: usize = 4 << 20;

/// What is kept of a buffer that a blocked pipe made large, in bytes.
const KEPT_BYTES: usize = 256 << 10;

/// How long the first of some lines waits for more of them, because waking the thread for each line costs a call more than
/// the line does.
const GATHER: Duration = Duration::from_millis(10);

/// How long [`Flush`] waits for a reader of the pipe.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: u64,
    /// Nothing will be written after what is here.
    over: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where lines go. Clones write to the same place.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: Arc<Queue>,
    dropped: Counter,
}

/// Writes the waiting lines when it is dropped, for at most a second; those that come later are dropped.
#[derive(Debug)]
#[must_use = "dropping it early loses the lines of the end"]
pub(super) struct Flush {
    queue: Arc<Queue>,
    ended: Receiver<()>,
}

impl Writer {
    /// A writer to `sink`, which only its own thread touches. Lines that find the queue full, or that `sink` refuses, are
    /// counted in `dropped`.
    pub(super) fn new(sink: impl Write + Send + 'static, dropped: Counter) -> (Self, Flush) {
        let queue = Arc::<Queue>::default();
        let (end, ended) = channel();
        let (of_thread, counter) = (Arc::clone(&queue), dropped.clone());
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&of_thread, sink, &counter, end))
            .expect("a thread can be started while the program starts");
        let flush = Flush {
            queue: Arc::clone(&queue),
            ended,
        };
        (Self { queue, dropped }, flush)
    }

    /// A writer that drops every line.
    pub(super) fn closed() -> Self {
        let queue = Arc::<Queue>::default();
        queue.lock().over = true;
        Self {
            queue,
            dropped: Counter::default(),
        }
    }

    /// Hands one line over. Never waits.
    pub(super) fn write(&self, line: &str) {
        let mut waiting = self.queue.lock();
        if waiting.over || waiting.text.len() + line.len() > MAX_WAITING {
            self.dropped.inc();
            return;
        }
        let first = waiting.text.is_empty();
        waiting.text.extend_from_slice(line.as_bytes());
        waiting.lines += 1;
        drop(waiting);
        if first {
            self.queue.changed.notify_one();
        }
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        self.queue.lock().over = true;
        self.queue.changed.notify_one();
        // The thread never sends: its end closes the channel.
        let _ = self.ended.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Writes until the end. One write per batch: few system calls, however many lines.
fn write_lines(queue: &Queue, mut sink: impl Write, dropped: &Counter, _end: Sender<()>) {
    let mut batch = Vec::new();
    let mut over = false;
    while !over {
        let idle = |waiting: &mut Waiting| waiting.text.is_empty() && !waiting.over;
        let waiting = queue.changed.wait_while(queue.lock(), idle);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        if !waiting.over {
            drop(waiting);
            thread::sleep(GATHER);
            waiting = queue.lock();
        }
        batch.clear();
        batch.shrink_to(KEPT_BYTES);
        mem::swap(&mut waiting.text, &mut batch);
        let lines = mem::take(&mut waiting.lines);
        over = waiting.over;
        drop(waiting);
        if sink.write_all(&batch).and_then(|()| sink.flush()).is_err() {
            dropped.inc_by(lines);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
        time::Instant,
    };

    use super::*;

    /// A sink that keeps what is written.
    #[derive(Debug, Clone, Default)]
    pub(in crate::telemetry) struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Kept {
        pub(in crate::telemetry) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A pipe that is full until the test opens it.
    struct Blocked(Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_is_written_in_order_before_the_end() {
        let kept = Kept::default();
        let (writer, flush) = Writer::new(kept.clone(), Counter::default());

        for number in 0..1000 {
            writer.write(&format!("{number}\n"));
        }
        drop(flush);

        let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(kept.text(), expected);
    }

    #[test]
    fn a_blocked_pipe_costs_counted_lines_and_no_waiting() {
        let (open, blocked) = channel();
        let dropped = Counter::default();
        let (writer, flush) = Writer::new(Blocked(blocked), dropped.clone());
        let line = "x".repeat(MAX_WAITING / 64);
        let took_by_the_thread = Instant::now();
        writer.write(&line);
        while !writer.queue.lock().text.is_empty() {
            assert!(took_by_the_thread.elapsed() < Duration::from_secs(5));
            thread::yield_now();
        }

        let began = Instant::now();
        for _ in 0..64 + 3 {
            writer.write(&line);
        }
        let took = began.elapsed();

        assert_eq!(dropped.get(), 3);
        assert!(took < Duration::from_secs(5), "{took:?}");
        let began = Instant::now();
        drop(flush);
        assert!(began.elapsed() < Duration::from_secs(4));
        drop(open);
    }
}
