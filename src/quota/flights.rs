//! Merges equal questions in flight: the first starts the work, the others wait for the same result.
//!
//! The work is one future that every waiter polls. It goes on while anyone waits, whoever came first, and is dropped with
//! the last waiter. No task is spawned, so a question that nobody shares costs little more than asking it directly.

use std::{
    collections::{HashMap, hash_map::Entry},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

use super::{Answer, Question};
use crate::{
    deadline::{Deadline, Limit},
    upstream::Progress,
};

/// Enough that workers rarely meet on one lock.
const SHARDS: usize = 32;

/// Work that others can join.
pub(super) type Work = Shared<BoxFuture<'static, Answer>>;

/// All questions in flight. As many entries as there are RPCs in flight, at most.
#[derive(Debug)]
pub(super) struct Flights {
    shards: [Mutex<Shard>; SHARDS],
}

type Shard = HashMap<Arc<Question>, Flight>;

#[derive(Debug)]
struct Flight {
    work: WeakShared<BoxFuture<'static, Answer>>,
    limit: Limit,
    /// Tells one flight from another, too.
    progress: Arc<Progress>,
}

/// A place in a flight.
pub(super) struct Seat {
    pub(super) work: Work,
    pub(super) progress: Arc<Progress>,
    /// Whether the work had been started by another call.
    pub(super) joined: bool,
}

impl Flights {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
        })
    }

    /// Joins the flight of an equal question, or starts one with what `start` returns.
    pub(super) fn join<F>(
        self: &Arc<Self>,
        question: &Arc<Question>,
        deadline: Deadline,
        start: impl FnOnce(Limit, Arc<Progress>) -> F,
    ) -> Seat
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        let mut shard = self.shard(question);
        let place = shard.entry(Arc::clone(question));
        if let Entry::Occupied(flight) = &place
            && let flight = flight.get()
            && let Some(work) = flight.work.upgrade()
        {
            flight.limit.extend(deadline);
            return Seat {
                work,
                progress: Arc::clone(&flight.progress),
                joined: true,
            };
        }
        let limit = Limit::new(deadline);
        let progress = Arc::new(Progress::default());
        let landing = Landing {
            flights: Arc::clone(self),
            question: Arc::clone(question),
            progress: Arc::clone(&progress),
        };
        let answer = start(limit.clone(), Arc::clone(&progress));
        // Dropped before the result is handed out, so nobody joins a flight that is over.
        let work = answer.inspect(move |_| drop(landing)).boxed().shared();
        let weak = work
            .downgrade()
            .expect("work that was never polled is not over");
        place.insert_entry(Flight {
            work: weak,
            limit,
            progress: Arc::clone(&progress),
        });
        Seat {
            work,
            progress,
            joined: false,
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let lock = |shard: &Mutex<Shard>| shard.lock().expect("no panic under the lock").len();
        self.shards.iter().map(lock).sum()
    }

    fn shard(&self, question: &Question) -> MutexGuard<'_, Shard> {
        self.shards[question.hash as usize % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a flight off the list when its work is done or dropped.
struct Landing {
    flights: Arc<Flights>,
    question: Arc<Question>,
    progress: Arc<Progress>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut shard = self.flights.shard(&self.question);
        // A new flight may stand there already, started after the last waiter of this one had left.
        if let Entry::Occupied(flight) = shard.entry(Arc::clone(&self.question))
            && Arc::ptr_eq(&flight.get().progress, &self.progress)
        {
            flight.remove();
        }
    }
}
