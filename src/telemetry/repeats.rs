//! Suppresses repeated warnings: of the WARN and ERROR lines of one call site, a few per period are written and the rest are
//! counted. The access line is not subject to this.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata, callsite::Identifier};

/// Lines of one call site per [`PERIOD`]: enough to see different causes of the same warning.
const LINES: u64 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts lines by call site. The number of call sites bounds its size.
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
    /// `suppressed` counts the lines that are not written.
    pub(super) fn new(suppressed: Counter) -> Self {
        Self {
            sites: Mutex::default(),
            suppressed,
        }
    }

    /// Returns the number of lines that this call site has not written since its last one, or `None` to suppress this line.
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
    fn the_rest_of_a_flood_is_counted_and_the_next_line_has_the_count() {
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
        assert_eq!(other, Some(0), "each call site has its own count");
        assert_eq!(next, Some(95));
    }

    #[test]
    fn lines_below_warn_are_not_counted() {
        let repeats = Repeats::new(Counter::default());
        let now = Instant::now();

        let suppressed = (0..100)
            .filter(|_| repeats.admit(site(Level::INFO), now).is_none())
            .count();

        assert_eq!(suppressed, 0);
    }
}
