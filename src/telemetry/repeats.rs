//! Suppresses repeated warnings. Each call site may write a few different WARN and ERROR lines per reason and period, and each text
//! once. Further lines are counted. The access log is exempt.
//!
//! A line without the field `reason` has the empty reason. Reasons come from closed sets, so a flood of lines with one reason hides no
//! line with another.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata, callsite::Identifier};

/// Lines per call site, reason and [`PERIOD`]: enough to see different causes of the same warning.
const LINES: usize = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// The recent lines by call site and reason. Bounded by the number of both.
#[derive(Debug)]
pub(super) struct Repeats {
    kinds: Mutex<HashMap<(Identifier, String), Period>>,
    suppressed: Counter,
}

/// The current period of one call site and reason.
#[derive(Debug)]
struct Period {
    began: Instant,
    /// Hashes of the written texts.
    written: Vec<u64>,
    /// Lines suppressed since the last written line.
    suppressed: u64,
}

impl Repeats {
    /// `suppressed` counts the suppressed lines.
    pub(super) fn new(suppressed: Counter) -> Self {
        Self {
            kinds: Mutex::default(),
            suppressed,
        }
    }

    /// Returns `None` to suppress a line, else the number of lines suppressed since the last line of its call site and reason. `text` is
    /// the hash of message and fields.
    pub(super) fn admit(
        &self,
        metadata: &Metadata<'_>,
        reason: &str,
        text: u64,
        now: Instant,
    ) -> Option<u64> {
        if *metadata.level() > Level::WARN {
            return Some(0);
        }
        let new = || Period {
            began: now,
            written: Vec::new(),
            suppressed: 0,
        };
        let mut kinds = self.kinds.lock();
        let kind = (metadata.callsite(), reason.to_owned());
        let period = kinds.entry(kind).or_insert_with(new);
        if now.saturating_duration_since(period.began) >= PERIOD {
            period.began = now;
            period.written.clear();
        }
        if period.written.len() == LINES || period.written.contains(&text) {
            period.suppressed += 1;
            self.suppressed.inc();
            return None;
        }
        period.written.push(text);
        Some(std::mem::take(&mut period.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use tracing::callsite::Callsite;

    use super::*;

    /// The metadata of one call site.
    fn site(level: Level) -> &'static Metadata<'static> {
        match level {
            Level::ERROR => tracing::callsite!(name: "error", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::ERROR, fields:).metadata(),
            Level::WARN => tracing::callsite!(name: "warn", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::WARN, fields:).metadata(),
            _ => tracing::callsite!(name: "info", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::INFO, fields:).metadata(),
        }
    }

    #[test]
    fn suppressed_lines_are_counted_and_reported_with_the_next_line() {
        let suppressed = Counter::default();
        let repeats = Repeats::new(suppressed.clone());
        let now = Instant::now();

        let flood: Vec<_> = (0..100)
            .map(|text| repeats.admit(site(Level::ERROR), "a", text, now))
            .collect();
        let other = repeats.admit(site(Level::WARN), "a", 0, now);
        let other_reason = repeats.admit(site(Level::ERROR), "b", 0, now);
        let next = repeats.admit(site(Level::ERROR), "a", 0, now + PERIOD);

        assert_eq!(flood.iter().filter(|line| line.is_some()).count(), 5);
        assert_eq!(suppressed.get(), 95);
        assert_eq!(other, Some(0), "call sites are counted separately");
        assert_eq!(other_reason, Some(0), "reasons are counted separately");
        assert_eq!(next, Some(95));
    }

    #[test]
    fn each_text_is_written_once_per_period() {
        let repeats = Repeats::new(Counter::default());
        let now = Instant::now();
        let admit = |text, now| repeats.admit(site(Level::WARN), "", text, now);

        assert_eq!(admit(1, now), Some(0));
        assert_eq!(admit(1, now), None);
        assert_eq!(admit(2, now), Some(1));
        assert_eq!(admit(1, now + PERIOD), Some(0));
    }

    #[test]
    fn lines_below_warn_are_never_suppressed() {
        let repeats = Repeats::new(Counter::default());
        let now = Instant::now();

        let suppressed = (0..100)
            .filter(|_| repeats.admit(site(Level::INFO), "", 0, now).is_none())
            .count();

        assert_eq!(suppressed, 0);
    }
}
