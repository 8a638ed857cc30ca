//! Single-flight: the leader of identical lookups starts the work, its followers wait for the same result.
//!
//! The work is one future that every waiting call polls. It goes on while any call waits, and is dropped with the last one. No task
//! is spawned, so that a lookup without followers costs little more than the bare work.

use std::{
    collections::{HashMap, hash_map::Entry},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

use super::{Key, Lookup};
use crate::{
    deadline::{Deadline, SharedDeadline},
    telemetry::Progress,
};

/// Enough that workers rarely contend for one lock.
const SHARDS: usize = 32;

/// All lookups in flight: at most one entry per call in flight.
#[derive(Debug)]
pub(super) struct SingleFlight {
    shards: [Mutex<Shard>; SHARDS],
}

type Shard = HashMap<Arc<Key>, InFlight>;

#[derive(Debug)]
struct InFlight {
    lookup: WeakShared<BoxFuture<'static, Arc<Lookup>>>,
    deadline: SharedDeadline,
    /// Also identifies the entry.
    progress: Arc<Progress>,
}

/// What a call gets when it joins.
pub(super) struct Joined {
    pub(super) lookup: Shared<BoxFuture<'static, Arc<Lookup>>>,
    pub(super) progress: Arc<Progress>,
    /// Whether another call has started the work.
    pub(super) is_follower: bool,
}

impl SingleFlight {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
        })
    }

    /// Joins an identical lookup, or starts one with the future that `start` returns.
    pub(super) fn join<F>(
        self: &Arc<Self>,
        key: &Arc<Key>,
        deadline: Deadline,
        start: impl FnOnce(SharedDeadline, Arc<Progress>) -> F,
    ) -> Joined
    where
        F: Future<Output = Arc<Lookup>> + Send + 'static,
    {
        let mut shard = self.shard(key);
        let entry = shard.entry(Arc::clone(key));
        if let Entry::Occupied(in_flight) = &entry
            && let in_flight = in_flight.get()
            && let Some(lookup) = in_flight.lookup.upgrade()
        {
            in_flight.deadline.extend(deadline);
            return Joined {
                lookup,
                progress: Arc::clone(&in_flight.progress),
                is_follower: true,
            };
        }
        let deadline = SharedDeadline::new(deadline);
        let progress = Arc::new(Progress::default());
        let removal = Removal {
            lookups: Arc::clone(self),
            key: Arc::clone(key),
            progress: Arc::clone(&progress),
        };
        let work = start(deadline.clone(), Arc::clone(&progress));
        // The entry goes before the result is handed out, so that no call joins a lookup that is over.
        let lookup = work.inspect(move |_| drop(removal)).boxed().shared();
        let weak = lookup
            .downgrade()
            .expect("a future that was never polled is not over");
        entry.insert_entry(InFlight {
            lookup: weak,
            deadline,
            progress: Arc::clone(&progress),
        });
        Joined {
            lookup,
            progress,
            is_follower: false,
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let lock = |shard: &Mutex<Shard>| shard.lock().expect("no panic under the lock").len();
        self.shards.iter().map(lock).sum()
    }

    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        self.shards[key.hash as usize % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the entry of a lookup when its work is done or dropped.
struct Removal {
    lookups: Arc<SingleFlight>,
    key: Arc<Key>,
    progress: Arc<Progress>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut shard = self.lookups.shard(&self.key);
        // The entry may belong to a new lookup already, started after the last call had stopped waiting for this one.
        if let Entry::Occupied(in_flight) = shard.entry(Arc::clone(&self.key))
            && Arc::ptr_eq(&in_flight.get().progress, &self.progress)
        {
            in_flight.remove();
        }
    }
}
