//! Single-flight: the leader of identical lookups starts the work, its followers wait for the same result.
//!
//! The work is one future that every waiting call polls. It runs while any call waits, and is dropped with the last one. No task is
//! spawned, so a lookup without followers costs little more than its work.

use std::{
    collections::{HashMap, hash_map::Entry},
    future::Future,
    sync::Arc,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

use parking_lot::{Mutex, MutexGuard};

use super::{Lookup, LookupKey};
use crate::{
    deadline::{Deadline, SharedDeadline},
    telemetry::Progress,
};

/// Enough shards that workers rarely contend for a lock.
const SHARDS: usize = 32;

/// All lookups in flight: at most one entry per call in flight.
#[derive(Debug)]
pub(super) struct SingleFlight {
    shards: [Mutex<Shard>; SHARDS],
}

type Shard = HashMap<Arc<LookupKey>, LookupInFlight>;

#[derive(Debug)]
struct LookupInFlight {
    lookup: WeakShared<BoxFuture<'static, Arc<Lookup>>>,
    deadline: SharedDeadline,
    /// Its address also identifies the entry.
    progress: Arc<Progress>,
}

/// The lookup that a call has joined or started.
pub(super) struct Joined {
    pub(super) lookup: Shared<BoxFuture<'static, Arc<Lookup>>>,
    pub(super) progress: Arc<Progress>,
    /// Whether another call started the work.
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
        key: &Arc<LookupKey>,
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
        // The entry is removed before the result is returned, so that no call joins a finished lookup.
        let lookup = work.inspect(move |_| drop(removal)).boxed().shared();
        let weak = lookup
            .downgrade()
            .expect("a future that was never polled is not finished");
        entry.insert_entry(LookupInFlight {
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
        let lock = |shard: &Mutex<Shard>| shard.lock().len();
        self.shards.iter().map(lock).sum()
    }

    fn shard(&self, key: &LookupKey) -> MutexGuard<'_, Shard> {
        self.shards[key.hash as usize % SHARDS].lock()
    }
}

/// Removes the entry of a lookup when its work is done or dropped.
struct Removal {
    lookups: Arc<SingleFlight>,
    key: Arc<LookupKey>,
    progress: Arc<Progress>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut shard = self.lookups.shard(&self.key);
        // The entry may already belong to a newer lookup, started after the last call stopped waiting for this one.
        if let Entry::Occupied(in_flight) = shard.entry(Arc::clone(&self.key))
            && Arc::ptr_eq(&in_flight.get().progress, &self.progress)
        {
            in_flight.remove();
        }
    }
}
