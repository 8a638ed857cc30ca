//! Log, access log, metrics and traces.

mod access;
mod attempt;
pub mod context;
pub mod export;
mod line;
pub(crate) mod log;
pub mod metrics;
mod options;
mod otel;
mod otlp;
mod process;
mod record;
mod repeats;
mod trace;
mod writer;

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
    sync::Arc,
};

use jiff::Timestamp;
use tracing::Level;

pub(crate) use self::line::{Escaped, is_invisible};
pub use self::{
    access::Access,
    attempt::AttemptRecord,
    options::Options,
    otel::{Propagators, Sampler, Tracing},
    record::{Facts, Peer, Progress, Record, Sinks},
    trace::{ServerSpan, Tracer},
};
use self::{
    line::Line,
    metrics::Metrics,
    repeats::Repeats,
    writer::{Flush, Writer},
};
use crate::options::OutputFormat;

/// The log of the process. Dropping it writes the queued lines, so it must live until the process ends.
#[derive(Debug)]
pub struct Telemetry {
    /// The access log.
    pub access: Access,
    _flush: Flush,
}

/// Starts the log on standard output and replaces the panic hook. Once per process.
///
/// # Panics
/// When the log was started before, or no thread can be started.
pub fn start(options: &Options, metrics: &Metrics) -> Telemetry {
    let format = options.log_format;
    let (writer, flush) = Writer::new(standard_output(), metrics.log_lines_dropped.clone());
    let filter =
        log::filter(&options.filter).expect("validated options hold only filters that parse");
    let repeats = Repeats::new(metrics.log_lines_suppressed.clone());
    let subscriber = log::subscriber(format, filter, writer.clone(), repeats);
    tracing::subscriber::set_global_default(subscriber).expect("the log is started once");
    log::set_panic_hook();
    Telemetry {
        access: Access::new(format, writer),
        _flush: flush,
    }
}

/// Starts the export of traces, if it is configured and possible. Logs which settings of it are not used.
///
/// # Panics
/// When no thread can be started.
pub fn start_tracing(options: &Options, metrics: Arc<Metrics>) -> Option<Arc<Tracer>> {
    if !options.unusable.is_empty() {
        let variables = options.unusable.join("; ");
        tracing::warn!(variables, "some variables of OpenTelemetry are not used");
    }
    let tracing = options.tracing.as_ref()?;
    let queue = export::SpanQueue::start(tracing, metrics);
    let queue = queue
        .inspect_err(
            |error| tracing::warn!(endpoint = tracing.endpoint, %error, "traces are not exported"),
        )
        .ok()?;
    Some(Tracer::new(
        tracing,
        options.propagate_trace_upstream,
        queue,
    ))
}

/// Prints configuration problems on standard error, one line each; JSON objects if the log is JSON.
pub fn print_problems(problems: &[String], format: OutputFormat) {
    let line = |problem: &String| match format {
        OutputFormat::Text => format!("{}: {problem}\n", env!("CARGO_PKG_NAME")),
        OutputFormat::Json => Line::new(
            OutputFormat::Json,
            Timestamp::now(),
            Level::ERROR,
            "rds_task_facade::cli",
            problem,
        )
        .finish(),
    };
    let text: String = problems.iter().map(line).collect();
    // A closed standard error must not change the exit code.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Standard output without the standard library's line buffer, which makes one system call per line.
fn standard_output() -> Box<dyn io::Write + Send> {
    match io::stdout().as_fd().try_clone_to_owned() {
        Ok(descriptor) => Box::new(File::from(descriptor)),
        Err(_) => Box::new(io::stdout()),
    }
}
