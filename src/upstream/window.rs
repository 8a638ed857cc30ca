//! Two counters over the last ten seconds, for the retry budget and the breaker. Lock-free, since every call of every
//! worker counts here.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

/// The length of the window.
pub(super) const LENGTH: Duration = Duration::from_secs(10);

/// One slot a second. More slots than seconds of the window, so that a slot is out of sight before it is used again.
const SLOTS: u64 = 16;

/// Which of the two counters.
#[derive(Debug, Clone, Copy)]
pub(super) enum Count {
    /// What is counted always: calls, attempts.
    Total,
    /// The part of them that matters: retries, failures.
    Part,
}

/// Counts over the last ten seconds, in slots of one.
///
/// A slot packs the low 16 bits of its second, 16 bits for the part and 32 bits for the total into one word, so that a
/// new second is begun and a count is added in one compare-and-swap.
#[derive(Debug)]
pub(super) struct Window {
    epoch: Instant,
    slots: [AtomicU64; SLOTS as usize],
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    pub(super) fn add(&self, count: Count) {
        self.add_if(count, || true);
    }

    /// Adds one if `allowed`, and says whether it was. Nobody else's addition of this second comes in between.
    pub(super) fn add_if(&self, count: Count, allowed: impl Fn() -> bool) -> bool {
        let second = self.second();
        let slot = &self.slots[(second % SLOTS) as usize];
        let tag = (second & 0xffff) << 48;
        let added = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let word = if word & (0xffff << 48) == tag {
                word
            } else {
                tag
            };
            allowed().then_some(match count {
                Count::Total if word & 0xffff_ffff < 0xffff_ffff => word + 1,
                Count::Part if (word >> 32) & 0xffff < 0xffff => word + (1 << 32),
                Count::Total | Count::Part => word,
            })
        });
        added.is_ok()
    }

    /// (total, part) of the last ten seconds.
    pub(super) fn sums(&self) -> (u64, u64) {
        let now = self.second();
        let (mut total, mut part) = (0, 0);
        for second in now.saturating_sub(LENGTH.as_secs() - 1)..=now {
            let word = self.slots[(second % SLOTS) as usize].load(Ordering::Relaxed);
            if word >> 48 == second & 0xffff {
                total += word & 0xffff_ffff;
                part += (word >> 32) & 0xffff;
            }
        }
        (total, part)
    }

    pub(super) fn clear(&self) {
        for slot in &self.slots {
            slot.store(0, Ordering::Relaxed);
        }
    }

    fn second(&self) -> u64 {
        // Second 0 is left out: an untouched slot must not look like the current one.
        self.epoch.elapsed().as_secs() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn counts_are_forgotten_after_ten_seconds_and_not_before() {
        let window = Window::new();
        window.add(Count::Total);
        window.add(Count::Part);

        tokio::time::advance(Duration::from_secs(9)).await;
        window.add(Count::Total);
        let kept = window.sums();
        tokio::time::advance(Duration::from_secs(1)).await;
        let forgotten = window.sums();

        assert_eq!((kept, forgotten), ((2, 1), (1, 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_that_comes_round_again_starts_from_zero() {
        let window = Window::new();
        for _ in 0..5 {
            window.add(Count::Total);
        }

        tokio::time::advance(Duration::from_secs(SLOTS)).await;
        window.add(Count::Part);

        assert_eq!(window.sums(), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_part_counter_does_not_overflow_into_the_second() {
        let window = Window::new();

        for _ in 0..70_000 {
            window.add(Count::Part);
        }

        assert_eq!(window.sums(), (0, 65_535));
    }
}
