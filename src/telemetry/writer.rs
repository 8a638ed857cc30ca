//! Writes log lines on a dedicated thread. If standard output is blocked, lines are dropped and counted: calls never wait, and
//! the end of the process waits at most a second.
//!
//! Written by hand because the guard of tracing-appender prints to standard output if its worker does not stop in time, so a
//! blocked pipe blocks the end of the process. It also allocates, writes and wakes its thread for each line. Here lines are
//! copied into one buffer, which the thread swaps for an empty one and writes as a whole.

use std::{
    io::Write,
    mem,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;

/// Maximum number of queued bytes: a very busy server logs as much in a few tenths of a second.
const MAX_QUEUED_BYTES: usize = 4 << 20;

/// Capacity to which a buffer shrinks after a blocked pipe made it grow.
const IDLE_CAPACITY: usize = 256 << 10;

/// How long the thread collects lines before it writes. Waking it for each line costs more than the line itself.
const BATCH_DELAY: Duration = Duration::from_millis(10);

/// How long [`Flush`] waits for the thread.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Buffer {
    queued: Mutex<Queued>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queued {
    text: Vec<u8>,
    lines: u64,
    /// Whether further lines are dropped.
    closed: bool,
}

/// Queues lines. Clones write to the same sink.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    buffer: Arc<Buffer>,
    dropped: Counter,
}

/// Dropping it closes the writer and waits up to [`FLUSH_TIMEOUT`] for the queued lines to be written.
#[derive(Debug)]
#[must_use = "dropping it early loses the last lines"]
pub(super) struct Flush {
    buffer: Arc<Buffer>,
    ended: Receiver<()>,
}

impl Writer {
    /// Starts a thread that writes to `sink`. `dropped` counts lines dropped because the queue is full or writing fails.
    pub(super) fn new(sink: impl Write + Send + 'static, dropped: Counter) -> (Self, Flush) {
        let buffer = Arc::<Buffer>::default();
        let (end, ended) = channel();
        let (lines, counter) = (Arc::clone(&buffer), dropped.clone());
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&lines, sink, &counter, end))
            .expect("the thread starts");
        let flush = Flush {
            buffer: Arc::clone(&buffer),
            ended,
        };
        (Self { buffer, dropped }, flush)
    }

    /// Queues one line. Never waits for the sink.
    pub(super) fn write(&self, line: &str) {
        let mut queued = self.buffer.queued.lock();
        if queued.closed || queued.text.len() + line.len() > MAX_QUEUED_BYTES {
            self.dropped.inc();
            return;
        }
        let first = queued.text.is_empty();
        queued.text.extend_from_slice(line.as_bytes());
        queued.lines += 1;
        drop(queued);
        if first {
            self.buffer.changed.notify_one();
        }
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        self.buffer.queued.lock().closed = true;
        self.buffer.changed.notify_one();
        // The thread sends nothing; the channel closes when it ends.
        let _ = self.ended.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Writes batches of lines until the writer is closed.
fn write_lines(buffer: &Buffer, mut sink: impl Write, dropped: &Counter, _end: Sender<()>) {
    let mut batch = Vec::new();
    let mut closed = false;
    while !closed {
        let idle = |queued: &mut Queued| queued.text.is_empty() && !queued.closed;
        let mut queued = buffer.queued.lock();
        buffer.changed.wait_while(&mut queued, idle);
        if !queued.closed {
            drop(queued);
            thread::sleep(BATCH_DELAY);
            queued = buffer.queued.lock();
        }
        batch.clear();
        batch.shrink_to(IDLE_CAPACITY);
        mem::swap(&mut queued.text, &mut batch);
        let lines = mem::take(&mut queued.lines);
        closed = queued.closed;
        drop(queued);
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

    /// A sink that records the written text.
    #[derive(Debug, Clone, Default)]
    pub(in crate::telemetry) struct Recorder(Arc<Mutex<Vec<u8>>>);

    impl Recorder {
        pub(in crate::telemetry) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Recorder {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A pipe that blocks until the test closes the channel.
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
    fn every_line_is_written_in_order_before_flush_returns() {
        let recorder = Recorder::default();
        let (writer, flush) = Writer::new(recorder.clone(), Counter::default());

        for number in 0..1000 {
            writer.write(&format!("{number}\n"));
        }
        drop(flush);

        let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(recorder.text(), expected);
    }

    #[test]
    fn blocked_pipe_drops_counted_lines_and_never_blocks() {
        let (open, blocked) = channel();
        let dropped = Counter::default();
        let (writer, flush) = Writer::new(Blocked(blocked), dropped.clone());
        let line = "x".repeat(MAX_QUEUED_BYTES / 64);
        let handed_over = Instant::now();
        writer.write(&line);
        while !writer.buffer.queued.lock().text.is_empty() {
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
