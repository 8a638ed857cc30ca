//! Writes the events of `tracing` as lines of the log. [`Repeats`] suppresses repeated warnings.
//!
//! The filter is `RUST_LOG`, by default `info`. Other crates log only WARN and ERROR with any filter, because at lower levels they
//! log URLs and header values, which can contain a token.

use std::{
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Instant,
};

use jiff::Timestamp;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::filter_fn,
    layer::{Context, SubscriberExt as _},
};

use super::{access, line::Line, repeats::Repeats, writer::Writer};
use crate::options::OutputFormat;

/// The prefix of this crate's targets.
const OWN_TARGET: &str = "rds_task_facade";

/// Parses the value of `RUST_LOG`; `None` if it is invalid.
pub(crate) fn filter(text: &str) -> Option<EnvFilter> {
    EnvFilter::try_new(text).ok()
}

/// The subscriber of the process: applies the filter and the limit for other crates, and writes lines to `writer`.
pub(super) fn subscriber(
    format: OutputFormat,
    filter: EnvFilter,
    writer: Writer,
    repeats: Repeats,
) -> impl Subscriber + Send + Sync {
    tracing_subscriber::registry()
        .with(Lines {
            format,
            writer,
            repeats,
        })
        .with(filter)
        .with(filter_fn(may_log))
}

fn may_log(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    *metadata.level() <= Level::WARN
        || matches!(target, access::TARGET | access::HEALTH_TARGET)
        || target
            .strip_prefix(OWN_TARGET)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Logs a panic as one ERROR line with its location, without its message, which can contain a secret.
pub(super) fn set_panic_hook() {
    std::panic::set_hook(Box::new(|panic| match panic.location() {
        Some(at) => tracing::error!(file = at.file(), line = at.line(), "panic"),
        None => tracing::error!("panic"),
    }));
}

/// Writes each event as one line.
struct Lines {
    format: OutputFormat,
    writer: Writer,
    repeats: Repeats,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut main = MainFields::default();
        event.record(&mut main);
        let now = Timestamp::now();
        let mut line = Line::new(
            self.format,
            now,
            *metadata.level(),
            metadata.target(),
            &main.message,
        );
        let mut fields = Fields {
            line: &mut line,
            hash: DefaultHasher::new(),
        };
        main.message.hash(&mut fields.hash);
        event.record(&mut fields);
        let hash = fields.hash.finish();
        let admitted = self
            .repeats
            .admit(metadata, &main.reason, hash, Instant::now());
        let Some(suppressed) = admitted else {
            return;
        };
        if suppressed > 0 {
            line.plain("suppressed", suppressed);
        }
        self.writer.write(&line.finish());
    }
}

const MESSAGE: &str = "message";

/// The fields that distinguish the kinds of lines of one call site.
#[derive(Default)]
struct MainFields {
    message: String,
    reason: String,
}

impl Visit for MainFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            MESSAGE => self.message.push_str(value),
            "reason" => self.reason.push_str(value),
            _ => {}
        }
    }
}

/// Writes every field but the message, and hashes the texts.
struct Fields<'a> {
    line: &'a mut Line,
    hash: DefaultHasher,
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            MESSAGE => return,
            // Names of the line's fixed fields, which must not occur twice in a JSON object.
            "ts" => self.line.text("field.ts", value),
            "level" => self.line.text("field.level", value),
            "target" => self.line.text("field.target", value),
            "msg" => self.line.text("field.msg", value),
            name => self.line.text(name, value),
        }
        value.hash(&mut self.hash);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.line.plain(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.line.plain(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.line.plain(field.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use tracing::subscriber::with_default;

    use super::*;
    use crate::telemetry::writer::tests::Recorder;

    fn logged(format: OutputFormat, filter_text: &str, log: impl FnOnce()) -> String {
        let recorder = Recorder::default();
        let (writer, flush) = Writer::new(recorder.clone(), Counter::default());
        let repeats = Repeats::new(Counter::default());
        let subscriber = subscriber(format, filter(filter_text).unwrap(), writer, repeats);
        with_default(subscriber, log);
        drop(flush);
        recorder.text()
    }

    #[test]
    fn event_is_one_json_object_with_its_fields() {
        let text = logged(OutputFormat::Json, "info", || {
            tracing::info!(
                count = 3,
                ok = true,
                ratio = 0.5,
                level = "forged",
                name = %"a\nb",
                "hello \"there\""
            );
        });

        let mut object: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(object["ts"].take().as_str().unwrap().ends_with('Z'));
        let expected = serde_json::json!({
            "ts": null, "level": "INFO", "target": "rds_task_facade::telemetry::log::tests", "msg": "hello \"there\"",
            "count": 3, "ok": true, "ratio": "0.5", "field.level": "forged", "name": "a\nb",
        });
        assert_eq!(object, expected);
    }

    #[test]
    fn other_crates_log_nothing_below_warn_with_any_filter() {
        let text = logged(OutputFormat::Json, "trace", || {
            tracing::trace!(target: "hyper::proto", "header-canary");
            tracing::debug!(target: "h2::codec", "header-canary");
            tracing::info!(target: "reqwest::connect", "header-canary");
            tracing::info!(target: "rds_task_facade_other", "header-canary");
            tracing::warn!(target: "rustls::server", "warned");
            tracing::trace!("own");
        });

        assert!(!text.contains("canary"), "{text}");
        assert!(text.contains("warned"));
        assert!(text.contains("own"));
    }

    #[test]
    fn filter_selects_lines_of_this_crate() {
        let cases = [
            ("info", true, false),
            ("warn", false, false),
            ("debug", true, true),
            ("rds_task_facade=debug", true, true),
            ("off", false, false),
        ];

        for (filter_text, info, debug) in cases {
            let text = logged(OutputFormat::Json, filter_text, || {
                tracing::info!("informed");
                tracing::debug!("debugged");
            });
            assert_eq!(text.contains("informed"), info, "{filter_text}");
            assert_eq!(text.contains("debugged"), debug, "{filter_text}");
        }
    }

    #[test]
    fn only_repeated_warnings_are_suppressed() {
        let warn = |reason: &str, cause: &str| tracing::warn!(reason, cause, "flood");
        let text = logged(OutputFormat::Json, "info", || {
            for number in 0..50 {
                warn("SAME", "cause");
                warn("DIFFERENT", &format!("cause {number}"));
                tracing::info!("information");
            }
            warn("RARE", "cause");
        });

        assert_eq!(text.matches("SAME").count(), 1);
        assert_eq!(text.matches("DIFFERENT").count(), 5);
        assert_eq!(text.matches("RARE").count(), 1);
        assert_eq!(text.matches("information").count(), 50);
    }

    #[test]
    fn invalid_filter_is_rejected() {
        let cases = [
            ("info", true),
            ("info,rds_task_facade=debug,access=off", true),
            ("info,=", false),
            ("rds_task_facade=loud", false),
        ];

        for (text, expected) in cases {
            assert_eq!(filter(text).is_some(), expected, "{text:?}");
        }
    }
}
