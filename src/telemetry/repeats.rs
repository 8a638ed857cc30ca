//! Keeps one place in the code from flooding the log: a few WARN and ERROR lines in a time, the rest counted. The access
//! line does not pass here.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata, callsite::Identifier};

/// Lines of one place in one [`PERIOD`]: enough to see that a fault has more than one face.
const LINES: u64 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts lines by the place in the code that writes them. There are as many entries as places.
#[derive(Debug)]
pub(super) struct Repeats {
    places: Mutex<HashMap<Identifier, Place>>,
    suppressed: Counter,
}

#[derive(Debug)]
struct Place {
    began: Instant,
    lines: u64,
}

impl Repeats {
    /// Counts the lines it holds back in `suppressed`.
    pub(super) fn new(suppressed: Counter) -> Self {
        Self {
            places: Mutex::default(),
            suppressed,
        }
    }

    /// Whether a line may be written; with it comes how many of its place were held back since the last one.
    pub(super) fn admit(&self, metadata: &Metadata<'_>, now: Instant) -> Option<u64> {
        if *metadata.level() > Level::WARN {
            return Some(0);
        }
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(metadata.callsite()).or_insert(Place {
            began: now,
            lines: 0,
        });
        let mut held_back = 0;
        if now.saturating_duration_since(place.began) >= PERIOD {
            held_back = place.lines.saturating_sub(LINES);
            *place = Place {
                began: now,
                lines: 0,
            };
        }
        place.lines += 1;
        if place.lines > LINES {
            self.suppressed.inc();
            return None;
        }
        Some(held_back)
    }
}

#[cfg(test)]
mod tests {
    use tracing::callsite::Callsite;

    use super::*;

    /// The metadata of one place in the code.
    fn place(level: Level) -> &'static Metadata<'static> {
        match level {
            Level::ERROR => tracing::callsite!(name: "error", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::ERROR, fields:).metadata(),
            Level::WARN => tracing::callsite!(name: "warn", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::WARN, fields:).metadata(),
            _ => tracing::callsite!(name: "info", kind: tracing::metadata::Kind::EVENT, target: "a", level: Level::INFO, fields:).metadata(),
        }
    }

    #[test]
    fn the_rest_of_a_flood_is_counted_and_told_by_the_next_line() {
        let suppressed = Counter::default();
        let repeats = Repeats::new(suppressed.clone());
        let now = Instant::now();

        let flood: Vec<_> = (0..100)
            .map(|_| repeats.admit(place(Level::ERROR), now))
            .collect();
        let other = repeats.admit(place(Level::WARN), now);
        let next = repeats.admit(place(Level::ERROR), now + PERIOD);

        assert_eq!(flood.iter().filter(|line| line.is_some()).count(), 5);
        assert_eq!(suppressed.get(), 95);
        assert_eq!(other, Some(0), "another place has a count of its own");
        assert_eq!(next, Some(95));
    }

    #[test]
    fn lines_below_warn_are_not_counted() {
        let repeats = Repeats::new(Counter::default());
        let now = Instant::now();

        let held_back = (0..100)
            .filter(|_| repeats.admit(place(Level::INFO), now).is_none())
            .count();

        assert_eq!(held_back, 0);
    }
}
