//! A count with an upper bound that never waits: what does not fit is refused at once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A bounded number of places, shared by all workers.
#[derive(Debug)]
pub(super) struct Limit {
    taken: AtomicUsize,
    max: usize,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Limit>);

impl Limit {
    /// A limit of `max` places.
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: AtomicUsize::new(0),
            max,
        })
    }

    /// A place, unless all are taken.
    pub(super) fn try_take(self: &Arc<Self>) -> Option<Place> {
        // The order of memory does not matter: the count guards nothing but itself.
        if self.taken.fetch_add(1, Ordering::Relaxed) < self.max {
            Some(Place(Arc::clone(self)))
        } else {
            self.taken.fetch_sub(1, Ordering::Relaxed);
            None
        }
    }

    /// How many places are taken now.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_beyond_the_limit_is_refused_until_one_is_given_back() {
        let limit = Limit::new(1);
        let first = limit.try_take();

        assert!(first.is_some());
        assert!(limit.try_take().is_none());
        drop(first);
        assert!(limit.try_take().is_some());
        assert_eq!(limit.taken(), 0);
    }
}
