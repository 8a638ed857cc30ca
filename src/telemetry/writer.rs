//! Writes log lines on a thread of its own. If nobody reads the pipe, lines are dropped and counted; a call never waits, and
//! the end of the process waits a bounded time.
//!
//! Written by hand because the guard of tracing-appender prints to standard output when its worker does not stop in time, so a
//! blocked pipe blocks the end of the process. It also allocates and writes each line separately and wakes its thread for
//! each; here lines are copied into one buffer, which the thread swaps for an empty one and writes as a whole.

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

/// Most bytes that wait: what a very busy server logs in some tenths of a second.
const MAX_WAITING: usize = 4 << 20;

/// Largest capacity that an empty buffer keeps, in bytes, after a blocked pipe has made it grow.
const KEPT_BYTES: usize = 256 << 10;

/// How long the thread waits for more lines before it writes: waking it for each line costs a call more than the line does.
const GATHER: Duration = Duration::from_millis(10);

/// How long [`Flush`] waits for the reader of the pipe.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Buffer {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: u64,
    /// Set once: no line is accepted any more.
    closed: bool,
}

impl Buffer {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts lines. Clones write to the same sink.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    buffer: Arc<Buffer>,
    dropped: Counter,
}

/// Dropping it writes the waiting lines, for at most a second, and closes the writer: later lines are dropped.
#[derive(Debug)]
#[must_use = "dropping it early loses the last lines"]
pub(super) struct Flush {
    buffer: Arc<Buffer>,
    ended: Receiver<()>,
}

impl Writer {
    /// A writer to `sink`, which only the new thread touches. `dropped` counts lines that find the buffer full or that `sink`
    /// does not accept.
    pub(super) fn new(sink: impl Write + Send + 'static, dropped: Counter) -> (Self, Flush) {
        let buffer = Arc::<Buffer>::default();
        let (end, ended) = channel();
        let (lines, counter) = (Arc::clone(&buffer), dropped.clone());
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&lines, sink, &counter, end))
            .expect("a thread can be started while the program starts");
        let flush = Flush {
            buffer: Arc::clone(&buffer),
            ended,
        };
        (Self { buffer, dropped }, flush)
    }

    /// A writer that drops every line.
    pub(super) fn closed() -> Self {
        let buffer = Arc::<Buffer>::default();
        buffer.lock().closed = true;
        Self {
            buffer,
            dropped: Counter::default(),
        }
    }

    /// Takes one line. Never waits for the sink.
    pub(super) fn write(&self, line: &str) {
        let mut waiting = self.buffer.lock();
        if waiting.closed || waiting.text.len() + line.len() > MAX_WAITING {
            self.dropped.inc();
            return;
        }
        let first = waiting.text.is_empty();
        waiting.text.extend_from_slice(line.as_bytes());
        waiting.lines += 1;
        drop(waiting);
        if first {
            self.buffer.changed.notify_one();
        }
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        self.buffer.lock().closed = true;
        self.buffer.changed.notify_one();
        // The thread sends nothing; its end closes the channel.
        let _ = self.ended.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Writes lines, one batch at a time, until the writer is closed.
fn write_lines(buffer: &Buffer, mut sink: impl Write, dropped: &Counter, _end: Sender<()>) {
    let mut batch = Vec::new();
    let mut closed = false;
    while !closed {
        let idle = |waiting: &mut Waiting| waiting.text.is_empty() && !waiting.closed;
        let waiting = buffer.changed.wait_while(buffer.lock(), idle);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        if !waiting.closed {
            drop(waiting);
            thread::sleep(GATHER);
            waiting = buffer.lock();
        }
        batch.clear();
        batch.shrink_to(KEPT_BYTES);
        mem::swap(&mut waiting.text, &mut batch);
        let lines = mem::take(&mut waiting.lines);
        closed = waiting.closed;
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

    /// A sink that keeps the text.
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
        let handed_over = Instant::now();
        writer.write(&line);
        while !writer.buffer.lock().text.is_empty() {
            assert!(handed_over.elapsed() < Duration::from_secs(5));
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
