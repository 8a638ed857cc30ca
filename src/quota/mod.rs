//! Makes upstream calls follow the number of different questions, not of callers, because the vendor allows few (60 calls
//! per minute and user): equal questions in flight are merged, and answers are kept for a moment where that is configured.
//! What holds a throttled identity back, and the local pace, belong to each attempt and so to [`crate::upstream`].
//!
//! Nothing is ever shared between identities: the identity is a part of the question.

mod flights;
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
use tonic::Code;

use self::flights::{Flights, Seat};
use crate::{
    credentials::{self, Identity},
    deadline::{Deadline, Limit},
    options,
    telemetry::metrics::Metrics,
    upstream::{Error, ErrorKind, Found, Progress, TaskQuery},
};

/// Answers above this size are not kept: a few of them would outweigh all others.
const MAX_CACHED_BYTES: usize = 64 << 10;

/// What is asked, and as whom. Made by [`Quota::question`].
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// Hash of the rest, computed once: every map that knows the question asks for it. Its key is random for each process,
    /// so nobody can make questions that collide.
    hash: u64,
    /// Whose credential asks.
    pub identity: Identity,
    /// The task.
    pub query: TaskQuery,
}

impl Hash for Question {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// What a question brings, shared by all who asked it.
pub type Answer = Result<Arc<Found>, Error>;

/// The options of the cache.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Cache")]
pub struct Options {
    /// How long a reply is cached; 0s coalesces equal calls in flight and caches nothing
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = options::duration_or_zero)]
    pub cache_ttl: Duration,
    /// Cache entries at most
    #[arg(long, value_name = "NUMBER", default_value = "10000", value_parser = options::limit)]
    pub cache_entries: usize,
}

/// One per process: its state is shared by all workers.
#[derive(Debug)]
pub struct Quota {
    hasher: RandomState,
    flights: Arc<Flights>,
    cache: Option<Cache<Arc<Question>, Answer>>,
    metrics: Arc<Metrics>,
}

impl Quota {
    /// An empty guard.
    pub fn new(options: &Options, metrics: Arc<Metrics>) -> Arc<Self> {
        let cache = (!options.cache_ttl.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(options.cache_entries as u64)
                .time_to_live(options.cache_ttl)
                .build()
        });
        Arc::new(Self {
            hasher: RandomState::new(),
            flights: Flights::new(),
            cache,
            metrics,
        })
    }

    /// The question for `query`, asked as `identity`.
    pub fn question(&self, identity: Identity, query: TaskQuery) -> Arc<Question> {
        Arc::new(Question {
            hash: self.hasher.hash_one((&identity, &query)),
            identity,
            query,
        })
    }

    /// Answers from the cache, by joining an equal question in flight, or by doing `work`. `watch` is told the progress of
    /// whatever work answers. The caller stops waiting by dropping the future.
    ///
    /// # Errors
    /// Those of `work`, its panic among them.
    pub async fn ask<F>(
        self: &Arc<Self>,
        question: &Arc<Question>,
        deadline: Deadline,
        watch: impl Fn(Arc<Progress>),
        work: impl Fn(Limit, Arc<Progress>) -> F,
    ) -> Answer
    where
        F: Future<Output = Result<Found, Error>> + Send + 'static,
    {
        let mut merged = false;
        let answer = loop {
            if let Some(answer) = self.cache.as_ref().and_then(|cache| cache.get(question)) {
                self.metrics.cache_hits.inc();
                break answer;
            }
            let seat = self.flights.join(question, deadline, |limit, progress| {
                Arc::clone(self).look_up(Arc::clone(question), work(limit, progress))
            });
            let Seat {
                work,
                progress,
                joined,
            } = seat;
            if joined && !merged {
                merged = true;
                self.metrics.coalesced.inc();
            }
            watch(progress);
            let answer = work.await;
            if !(joined && concerns_others_only(&answer, deadline)) {
                break answer;
            }
        };
        if let Err(Error {
            kind: ErrorKind::Throttled { .. },
            ..
        }) = answer
        {
            self.metrics.throttled.inc();
        }
        answer
    }

    /// The work of a flight. Its panic becomes an answer: it would reach only the waiter that happens to poll, and leave
    /// the others waiting.
    fn look_up(
        self: Arc<Self>,
        question: Arc<Question>,
        work: impl Future<Output = Result<Found, Error>>,
    ) -> impl Future<Output = Answer> {
        // No `async` block: it would hold the work twice, and every call pays for moving it.
        AssertUnwindSafe(work).catch_unwind().map(move |answered| {
            let answer = match answered {
                Ok(answer) => answer.map(Arc::new),
                Err(_) => {
                    self.metrics.panics.inc();
                    Err(Error::from(ErrorKind::Panicked))
                }
            };
            if let Some(cache) = &self.cache
                && is_worth_keeping(&answer)
            {
                cache.insert(question, answer.clone());
            }
            answer
        })
    }
}

/// Whether work gave up for lack of time, and this call, which joined at that moment, has more of it.
fn concerns_others_only(answer: &Answer, deadline: Deadline) -> bool {
    let remaining = deadline.remaining();
    match answer {
        Err(Error { kind, .. }) => match kind {
            ErrorKind::DeadlineExceeded
            | ErrorKind::Credentials(credentials::Error::DeadlineExceeded) => !remaining.is_zero(),
            // The local pace refused what did not fit before the deadline it knew.
            ErrorKind::Throttled { retry_after } => *retry_after < remaining,
            _ => false,
        },
        Ok(_) => false,
    }
}

fn is_worth_keeping(answer: &Answer) -> bool {
    match answer {
        Ok(found) => found.task.heap_bytes() <= MAX_CACHED_BYTES,
        Err(Error {
            kind: ErrorKind::Rejected(rejection),
            ..
        }) => {
            rejection.verdict.code == Code::NotFound && rejection.message.len() <= MAX_CACHED_BYTES
        }
        Err(_) => false,
    }
}
