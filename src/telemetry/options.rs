//! The options of the log and of traces.

use clap::ArgAction;

use super::{Tracing, log, otel};
use crate::options::{self, BOOL, OutputFormat, Parsed, Validation, boolean};

/// The options of the log and of traces.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Log and traces")]
pub struct Options {
    /// Log format, text or json; RUST_LOG sets the filter
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = options::word::<OutputFormat>)]
    pub log_format: OutputFormat,
    /// Send traceparent and tracestate of each attempt's span to RDS; needs trace export
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    pub propagate_trace_upstream: bool,
    /// The value of `RUST_LOG`.
    #[arg(skip = "info")]
    pub filter: String,
    /// The trace export; `None` without it.
    #[arg(skip)]
    pub tracing: Option<Tracing>,
    /// The `OTEL_*` variables that cannot be used, each with its value and the reason.
    #[arg(skip)]
    pub unusable: Vec<String>,
}

impl Options {
    /// Reads `RUST_LOG` and the `OTEL_*` variables.
    pub fn read_variables(&mut self, validation: &mut Validation<'_>) {
        if let Some(filter) = validation.parsed_variable("RUST_LOG", filter) {
            self.filter = filter;
        }
        (self.tracing, self.unusable) = otel::read(validation.environment());
    }
}

fn filter(text: &str) -> Parsed<String> {
    if text.trim().is_empty() {
        return Ok("info".to_owned());
    }
    match log::filter(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(options::not(
            text,
            "a level (error, warn, info, debug, trace, off) or target=level, separated by commas",
        )),
    }
}
