//! Keeps the vendor's call rate (60 calls per minute and user) by the number of different questions, not of callers:
//! equal questions in flight are merged, answers are kept for a moment where that is configured, and a throttled identity
//! is held back here until its window is over.
//!
//! Nothing is ever shared between identities: the identity is a part of the question.

mod flights;
mod throttle;

use std::{future::Future, sync::Arc, time::Duration};

use moka::sync::Cache;
use tonic::Code;

use self::{
    flights::{Flights, Seat},
    throttle::Throttle,
};
use crate::{
    credentials::Identity,
    deadline::{Deadline, Limit},
    reason::Reason,
    telemetry::metrics::Metrics,
    upstream::{Error, ErrorKind, Facts, Found, Progress, TaskQuery},
};

/// Answers above this size are not kept: a few of them would outweigh all others.
const MAX_CACHED_BYTES: usize = 64 << 10;

/// What is asked, and as whom.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Whose credential asks.
    pub identity: Identity,
    /// The task.
    pub query: TaskQuery,
}

/// What a question brings, shared by all who asked it.
pub type Answer = Result<Arc<Found>, Error>;

/// How long answers are kept, and how many.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Zero keeps nothing.
    pub cache_ttl: Duration,
    /// Kept answers of all identities together.
    pub cache_entries: u64,
}

/// One per process: its state is shared by all workers.
#[derive(Debug)]
pub struct Quota {
    flights: Arc<Flights>,
    cache: Option<Cache<Arc<Question>, Answer>>,
    throttle: Throttle,
    metrics: Arc<Metrics>,
}

impl Quota {
    /// An empty guard.
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Arc<Self> {
        let cache = (!config.cache_ttl.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(config.cache_entries)
                .time_to_live(config.cache_ttl)
                .build()
        });
        Arc::new(Self {
            flights: Flights::new(),
            cache,
            throttle: Throttle::new(),
            metrics,
        })
    }

    /// Answers from the cache, by joining an equal question in flight, or by doing `work`. `watch` is told the progress of
    /// whatever work answers. The caller stops waiting by dropping the future.
    ///
    /// # Errors
    /// Those of `work`, and [`ErrorKind::Throttled`] without any work.
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
        loop {
            if let Some(answer) = self.cache.as_ref().and_then(|cache| cache.get(question)) {
                self.metrics.cache_hits.inc();
                return answer;
            }
            if let Some(retry_after) = self.throttle.wait(question.identity) {
                self.metrics.throttled.inc();
                return Err(Error {
                    kind: ErrorKind::Throttled { retry_after },
                    facts: Facts::default(),
                });
            }
            let Seat {
                work,
                progress,
                joined,
            } = self.flights.join(question, deadline, |limit, progress| {
                let answer = work(limit, progress);
                let (quota, question) = (Arc::clone(self), Arc::clone(question));
                async move {
                    let answer = answer.await.map(Arc::new);
                    quota.learn(&question, &answer);
                    answer
                }
            });
            if joined {
                self.metrics.coalesced.inc();
            }
            watch(progress);
            let answer = work.await;
            // The work gave up for lack of time before this call joined with more of it: that concerns the others only.
            let out_of_time = matches!(
                &answer,
                Err(Error {
                    kind: ErrorKind::DeadlineExceeded,
                    ..
                })
            );
            if !(joined && out_of_time && !deadline.remaining().is_zero()) {
                return answer;
            }
        }
    }

    /// Keeps what is worth keeping of an answer.
    fn learn(&self, question: &Arc<Question>, answer: &Answer) {
        if let Err(Error {
            kind: ErrorKind::Rejected(rejection),
            ..
        }) = answer
            && rejection.verdict.reason == Reason::Throttled
            && let Some(wait) = rejection.retry_after
        {
            let by_address = rejection.throttled_subject.as_deref() == Some("ip");
            self.throttle.remember(question.identity, wait, by_address);
        }
        if let Some(cache) = &self.cache
            && is_cacheable(answer)
        {
            cache.insert(Arc::clone(question), answer.clone());
        }
    }
}

fn is_cacheable(answer: &Answer) -> bool {
    match answer {
        Ok(found) => found.task.text_bytes() <= MAX_CACHED_BYTES,
        Err(Error {
            kind: ErrorKind::Rejected(rejection),
            ..
        }) => {
            rejection.verdict.code == Code::NotFound && rejection.message.len() <= MAX_CACHED_BYTES
        }
        Err(_) => false,
    }
}
