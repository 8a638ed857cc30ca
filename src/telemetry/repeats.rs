//! Suppresses repeated warnings: each call site may write a few WARN and ERROR lines per period; further lines are counted. The
//! access log is exempt.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata, callsite::Identifier};

/// Lines per call site and [`PERIOD`]: enough to see different causes of the same warning.
const LINES: u64 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts lines by call site. Bounded by the number of call sites.
#[derive(Debug)]
pub(super) struct Repeats {
    sites: Mutex<HashMap<Identifier, Period>>,
    suppressed: Counter,
}

/// The current period of one call site.
#[derive(Debug)]
struct Period {
    began: Instant,
    lines: u64,
}

impl Repeats {
    /// `suppressed` counts the suppressed lines.
    pub(super) fn new(suppressed: Counter) -> Self {
        Self {
            sites: Mutex::default(),
            suppressed,
        }
    }

    /// Returns `None` to suppress a line, else the number of lines suppressed since the call site's last line.
    pub(super) fn admit(&self, metadata: &Metadata<'_>, now: Instant) -> Option<u64> {
        if *metadata.level() > Level::WARN {
            return Some(0);
        }
        let new = Period {
            began: now,
            lines: 0,
        };
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let period = sites.entry(metadata.callsite()).or_insert(new);
        let mut suppressed = 0;
        if now.saturating_duration_since(period.began) >= PERIOD {
            suppressed = period.lines.saturating_sub(LINES);
            *period = Period {
                began: now,
                lines: 0,
            };
        }
        period.lines += 1;
        if period.lines > LINES {
            self.suppressed.inc();
            return None;
        }
        Some(suppressed)
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
            .map(|_| repeats.admit(site(Level::ERROR), now))
            .collect();
        let other = repeats.admit(site(Level::WARN), now);
        let next = repeats.admit(site(Level::ERROR), now + PERIOD);

        assert_eq!(flood.iter().filter(|line| line.is_some()).count(), 5);
        assert_eq!(suppressed.get(), 95);
        assert_eq!(other, Some(0), "call sites are counted separately");
        assert_eq!(next, Some(95));
    }

    #[test]
    fn lines_below_warn_are_never_suppressed() {
        let repeats = Repeats::new(Counter::default());
        let now = Instant::now();

        let suppressed = (0..100)
            .filter(|_| repeats.admit(site(Level::INFO), now).is_none())
            .count();

        assert_eq!(suppressed, 0);
    }
}
