//! Takes finished lines off the threads that serve calls. A pipe that nobody reads costs lines, which are counted, and
//! never a waiting call; stopping waits a bounded time for the rest.

use std::{
    io::{BufWriter, Write},
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;

/// Lines that wait at most: some seconds of a busy server, some megabytes of memory.
const QUEUE_LINES: usize = 8192;

/// How long [`Flush`] waits for a reader of the pipe.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

enum Order {
    Line(String),
    /// Write everything before this, then answer.
    Flush(SyncSender<()>),
}

/// Where lines go. Clones write to the same place.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: SyncSender<Order>,
    dropped: Counter,
}

/// Writes the waiting lines when it is dropped, for at most two seconds.
#[derive(Debug)]
#[must_use = "dropping it early loses the lines of the end"]
pub(super) struct Flush(SyncSender<Order>);

impl Writer {
    /// A writer to `sink`, which only its own thread touches. Lines that find the queue full, or that `sink` refuses, are
    /// counted in `dropped`.
    pub(super) fn new(sink: impl Write + Send + 'static, dropped: Counter) -> (Self, Flush) {
        let (queue, orders) = sync_channel(QUEUE_LINES);
        let counter = dropped.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&orders, BufWriter::new(sink), &counter))
            .expect("a thread can be started while the program starts");
        let flush = Flush(queue.clone());
        (Self { queue, dropped }, flush)
    }

    /// Hands one line over. Never waits.
    pub(super) fn write(&self, line: String) {
        if self.queue.try_send(Order::Line(line)).is_err() {
            self.dropped.inc();
        }
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        let (done, answer) = sync_channel(1);
        let until = Instant::now() + FLUSH_TIMEOUT;
        let mut order = Order::Flush(done);
        while let Err(TrySendError::Full(returned)) = self.0.try_send(order) {
            if Instant::now() > until {
                return;
            }
            order = returned;
            thread::sleep(Duration::from_millis(5));
        }
        // Without an answer there is nobody left to tell.
        let _ = answer.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Writes until every [`Writer`] is gone. One flush per batch: a busy server makes few system calls.
fn write_lines(orders: &Receiver<Order>, mut sink: BufWriter<impl Write>, dropped: &Counter) {
    while let Ok(first) = orders.recv() {
        let mut next = Some(first);
        while let Some(order) = next {
            match order {
                Order::Line(line) => {
                    if sink.write_all(line.as_bytes()).is_err() {
                        dropped.inc();
                    }
                }
                Order::Flush(done) => {
                    let _ = sink.flush();
                    let _ = done.try_send(());
                }
            }
            next = orders.try_recv().ok();
        }
        let _ = sink.flush();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
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
            writer.write(format!("{number}\n"));
        }
        drop(flush);

        let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(kept.text(), expected);
    }

    #[test]
    fn a_blocked_pipe_costs_counted_lines_and_no_waiting() {
        let (open, blocked) = sync_channel(1);
        let dropped = Counter::default();
        let (writer, flush) = Writer::new(Blocked(blocked), dropped.clone());
        let line = "x".repeat(9000);
        let lines = QUEUE_LINES as u64 + 100;

        let began = Instant::now();
        for _ in 0..lines {
            writer.write(line.clone());
        }
        let took = began.elapsed();

        // The thread holds at most the line it is stuck with.
        assert!((99..=100).contains(&dropped.get()), "{}", dropped.get());
        assert!(took < Duration::from_secs(5), "{took:?}");
        let began = Instant::now();
        drop(flush);
        assert!(began.elapsed() < Duration::from_secs(4));
        drop(open);
    }
}
