//! Coalesces identical lookups in flight into one upstream request and, if the operator enables it, caches results for a short time:
//! the vendor allows only 60 requests per minute and user.
//!
//! Nothing is shared between identities: the identity is part of the key. Throttle windows and pacing apply to each attempt and are in
//! [`crate::upstream`].

mod single_flight;
#[cfg(test)]
mod tests;

use std::{
    future::Future,
    hash::{BuildHasher as _, Hash, Hasher, RandomState},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use moka::sync::Cache;
use tokio::time::Instant;
use tonic::Code;

use self::single_flight::{Joined, SingleFlight};
use crate::{
    credentials::{self, Identity},
    deadline::{Deadline, SharedDeadline},
    options,
    task::Task,
    telemetry::{Progress, metrics::Metrics},
    upstream::{Error, TaskQuery},
};

/// Larger results are not cached: a few of them would take more memory than all others.
const MAX_CACHED_BYTES: usize = 64 << 10;

/// Identifies a lookup: the task and the identity. Created by [`Coalescer::key`].
#[derive(Debug, PartialEq, Eq)]
pub struct LookupKey {
    /// The hash of the other fields, computed once for all maps that use the key. The hash function is keyed with random bits, so that
    /// callers cannot construct colliding keys.
    hash: u64,
    /// The identity of the credential.
    pub identity: Identity,
    /// The task.
    pub query: TaskQuery,
}

impl Hash for LookupKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// What the work of a lookup has found.
#[derive(Debug)]
pub struct Found {
    /// The task or the error.
    pub result: Result<Arc<Task>, Error>,
    /// The time since RDS has returned it, perhaps to another replica.
    pub age: Duration,
}

/// A result that RDS has returned now.
impl From<Result<Arc<Task>, Error>> for Found {
    fn from(result: Result<Arc<Task>, Error>) -> Self {
        Self {
            result,
            age: Duration::ZERO,
        }
    }
}

/// A finished lookup, shared by all calls that waited for it.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// The task or the error.
    pub result: Result<Arc<Task>, Error>,
    /// What the attempts showed.
    pub progress: Arc<Progress>,
    /// When RDS has returned the result.
    pub finished_at: Instant,
}

/// The options of the cache.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Cache")]
pub struct Options {
    /// How long a reply is cached; 0s caches nothing, but still coalesces identical calls in flight
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = options::duration_or_zero)]
    pub cache_ttl: Duration,
    /// Maximum number of cache entries
    #[arg(long, value_name = "NUMBER", default_value = "10000", value_parser = options::limit)]
    pub cache_entries: usize,
}

/// The lookups in flight and the cache. One per process: all workers share it.
#[derive(Debug)]
pub struct Coalescer {
    hasher: RandomState,
    in_flight: Arc<SingleFlight>,
    /// How long a result is cached; zero for not at all.
    ttl: Duration,
    cache: Option<Cache<Arc<LookupKey>, Arc<Lookup>>>,
    metrics: Arc<Metrics>,
}

impl Coalescer {
    /// A coalescer with an empty cache.
    pub fn new(options: &Options, metrics: Arc<Metrics>) -> Arc<Self> {
        let cache = (!options.cache_ttl.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(options.cache_entries as u64)
                .time_to_live(options.cache_ttl)
                .build()
        });
        Arc::new(Self {
            hasher: RandomState::new(),
            in_flight: SingleFlight::new(),
            ttl: options.cache_ttl,
            cache,
            metrics,
        })
    }

    /// How long a result is cached, if results are.
    pub fn ttl(&self) -> Option<Duration> {
        (!self.ttl.is_zero()).then_some(self.ttl)
    }

    /// The key of a lookup of `query` by `identity`.
    pub fn key(&self, identity: Identity, query: TaskQuery) -> Arc<LookupKey> {
        Arc::new(LookupKey {
            hash: self.hasher.hash_one((&identity, &query)),
            identity,
            query,
        })
    }

    /// Returns a cached result that is younger than `max_age`, joins an identical lookup in flight, or starts `work`. Passes `follow`
    /// the progress of the lookup that the call waits for. Dropping the future ends the wait.
    pub async fn look_up<F>(
        self: &Arc<Self>,
        key: &Arc<LookupKey>,
        deadline: Deadline,
        max_age: Option<Duration>,
        mut follow: impl FnMut(&Arc<Progress>),
        work: impl Fn(SharedDeadline, Arc<Progress>) -> F,
    ) -> Arc<Lookup>
    where
        F: Future<Output: Into<Found>> + Send + 'static,
    {
        let mut counted = false;
        let lookup = loop {
            if let Some(lookup) = self.cached(key, max_age) {
                self.metrics.cache_hits.inc();
                follow(&lookup.progress);
                break lookup;
            }
            let joined = self.in_flight.join(key, deadline, |deadline, progress| {
                let work = work(deadline, Arc::clone(&progress));
                Arc::clone(self).run(Arc::clone(key), progress, work)
            });
            let Joined {
                lookup,
                progress,
                is_follower,
            } = joined;
            if is_follower && !counted {
                counted = true;
                self.metrics.coalesced.inc();
            }
            follow(&progress);
            if !is_follower {
                break lookup.await;
            }
            let joined_at = Instant::now();
            let lookup = lookup.await;
            // A result of another replica may be older than this call may use.
            let age = joined_at.saturating_duration_since(lookup.finished_at);
            let is_too_old = !age.is_zero() && age >= max_age.unwrap_or(self.ttl);
            if !is_too_old && !ended_by_shorter_deadline(&lookup, deadline) {
                break lookup;
            }
        };
        if let Err(Error::Throttled { .. }) = lookup.result {
            self.metrics.throttled.inc();
        }
        lookup
    }

    fn cached(&self, key: &Arc<LookupKey>, max_age: Option<Duration>) -> Option<Arc<Lookup>> {
        let lookup = self.cache.as_ref()?.get(key)?;
        // A result of another replica was not new when it was inserted.
        let max_age = max_age.unwrap_or(self.ttl);
        (lookup.finished_at.elapsed() < max_age).then_some(lookup)
    }

    /// Runs the leader's work. A panic becomes a result: otherwise it would reach only the waiter that happens to poll, and the others
    /// would keep waiting.
    fn run(
        self: Arc<Self>,
        key: Arc<LookupKey>,
        progress: Arc<Progress>,
        work: impl Future<Output: Into<Found>>,
    ) -> impl Future<Output = Arc<Lookup>> {
        // Not an `async` block, which would hold the work twice, and every call would pay for moving it.
        AssertUnwindSafe(work).catch_unwind().map(move |result| {
            let found = result.map_or_else(
                |_| {
                    self.metrics.panics.inc();
                    Found::from(Err(Error::Panicked))
                },
                Into::into,
            );
            let now = Instant::now();
            let lookup = Arc::new(Lookup {
                result: found.result,
                progress,
                finished_at: now.checked_sub(found.age).unwrap_or(now),
            });
            if let Some(cache) = &self.cache
                && is_cacheable(&lookup.result)
            {
                cache.insert(key, Arc::clone(&lookup));
            }
            lookup
        })
    }
}

/// Whether the lookup failed for lack of time although this follower, which joined at the end of the lookup, has time left.
fn ended_by_shorter_deadline(lookup: &Lookup, deadline: Deadline) -> bool {
    let remaining = deadline.remaining();
    match &lookup.result {
        Err(Error::DeadlineExceeded)
        | Err(Error::Credentials(credentials::Error::DeadlineExceeded)) => !remaining.is_zero(),
        // Pacing rejects an attempt whose turn comes after the deadline of the lookup.
        Err(Error::Throttled { retry_after, .. }) => *retry_after < remaining,
        _ => false,
    }
}

/// Whether later calls may use a result.
pub fn is_cacheable(result: &Result<Arc<Task>, Error>) -> bool {
    match result {
        Ok(task) => task.encoded_len() <= MAX_CACHED_BYTES,
        Err(Error::Rejected(rejection)) => {
            rejection.verdict.code == Code::NotFound && rejection.message.len() <= MAX_CACHED_BYTES
        }
        Err(_) => false,
    }
}
