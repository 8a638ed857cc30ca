//! What an operator sees from outside: log, access line, metrics, traces.

mod access;
pub mod context;
mod conventions;
mod export;
mod line;
pub(crate) mod log;
pub mod method;
pub mod metrics;
mod otlp;
mod process;
mod repeats;
mod trace;
mod writer;

use std::{
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    os::fd::AsFd as _,
    sync::Arc,
};

use jiff::Timestamp;
use tracing::Level;

pub use self::{
    access::{Access, AccessLine, Peer},
    context::Context,
    export::Error as TracingError,
    trace::{AttemptEnd, AttemptSpan, ServerSpan, Tracer},
};
use self::{
    line::{Line, Style},
    metrics::Metrics,
    repeats::Repeats,
    writer::{Flush, Writer},
};
use crate::config::{self, LogFormat, Refused};

/// The log of the process. Dropping it writes what still waits, so it lives until the end of `main`.
#[derive(Debug)]
pub struct Telemetry {
    /// Where the edge writes its access lines.
    pub access: Access,
    _flush: Flush,
}

/// Starts the log on standard output and replaces the panic hook. Once per process.
///
/// # Panics
/// When the process has a log already, or is out of threads.
pub fn start(log: &config::Log, metrics: &Metrics) -> Telemetry {
    let style = Style {
        format: log.format,
        colour: log.format == LogFormat::Text && io::stdout().is_terminal(),
    };
    let (writer, flush) = Writer::new(standard_output(), metrics.log_lines_dropped.clone());
    let filter = log::filter(&log.filter).expect("the configuration holds only filters that parse");
    let repeats = Repeats::new(metrics.log_lines_suppressed.clone());
    let subscriber = log::subscriber(style, filter, writer.clone(), repeats);
    tracing::subscriber::set_global_default(subscriber).expect("the log is started once");
    log::set_panic_hook();
    Telemetry {
        access: Access::new(style, writer),
        _flush: flush,
    }
}

/// Starts the export of traces.
///
/// # Errors
/// [`TracingError`] for a setting that cannot be used.
///
/// # Panics
/// When the process is out of threads.
pub fn start_tracing(
    tracing: &config::Tracing,
    propagate_upstream: bool,
    metrics: Arc<Metrics>,
) -> Result<Arc<Tracer>, TracingError> {
    let queue = export::Queue::start(tracing, metrics)?;
    Ok(Tracer::new(tracing, propagate_upstream, queue))
}

/// Prints the mistakes of the configuration on standard error, one line each: with `--log-format json` as objects, like
/// every other line of the process.
pub fn print_refused(refused: &Refused) {
    let text = match refused.log_format {
        LogFormat::Text => refused.to_string(),
        LogFormat::Json => {
            let style = Style {
                format: LogFormat::Json,
                colour: false,
            };
            let object = |mistake| {
                Line::new(
                    style,
                    Timestamp::now(),
                    Level::ERROR,
                    "rds_task_facade::config",
                    mistake,
                )
                .finish()
            };
            refused
                .mistakes
                .iter()
                .map(|mistake| object(mistake))
                .collect()
        }
    };
    // Without standard error there is nobody to tell.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Standard output without the line buffer of the standard library, which would make one system call per line.
fn standard_output() -> Box<dyn io::Write + Send> {
    match io::stdout().as_fd().try_clone_to_owned() {
        Ok(descriptor) => Box::new(File::from(descriptor)),
        Err(_) => Box::new(io::stdout()),
    }
}
