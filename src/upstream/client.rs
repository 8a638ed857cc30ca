//! The send loop: attempts until one succeeds or deadline, retry policy, budget or breaker end it, each with a credential that is valid
//! now.

use std::sync::Arc;

use reqwest::Url;
use tokio::sync::Semaphore;

use super::{
    Error, Options, TaskQuery,
    attempt::Remedy,
    breaker::Breaker,
    clock::Clock,
    pacing::Pacing,
    request::TaskRequest,
    retry::{Attempts, Budget},
    throttle::Throttle,
    wire::TaskDetail,
};
use crate::{
    caller::Caller,
    credentials::{Auth, Credentials},
    deadline::SharedDeadline,
    http_client::{self, Reuse},
    quota_store::Session,
    reason::Reason,
    telemetry::{Progress, ServerSpan, metrics::Metrics},
};

/// Which later calls the outcome of a call affects, through the breaker, the retry budget, a throttle window or the key guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Calls to the endpoint.
    Endpoint,
    /// Calls for the same instance id. Its failures open no circuit and use up no retry budget that calls share.
    Instance,
}

impl Scope {
    /// The instance that throttle windows and evidence about keys are kept for; `None` if all instances share them.
    pub(super) fn instance(self, query: &TaskQuery) -> Option<&str> {
        match self {
            Self::Endpoint => None,
            Self::Instance => Some(&query.instance_id),
        }
    }
}

/// The state of the endpoint that all workers share.
#[derive(Debug)]
pub struct Endpoint {
    base_url: Url,
    pub(super) options: Options,
    pub(super) scope: Scope,
    pub(super) clock: Clock,
    pub(super) pacing: Option<Pacing>,
    pub(super) throttle: Throttle,
    pub(super) metrics: Arc<Metrics>,
    safeguards: Arc<Safeguards>,
}

/// Limits the load on a failing upstream.
#[derive(Debug)]
pub(super) struct Safeguards {
    pub(super) breaker: Breaker,
    budget: Budget,
}

impl Safeguards {
    fn new(options: &Options, metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
            breaker: Breaker::new(
                metrics.circuit_open.clone(),
                metrics.circuit_open_instances.clone(),
            ),
            budget: Budget::new(options.retry_budget),
        })
    }
}

impl Endpoint {
    /// An endpoint without any history.
    pub fn new(base_url: Url, options: Options, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            base_url,
            scope: options.scope(),
            clock: Clock::default(),
            pacing: options.upstream_rate.map(Pacing::new),
            throttle: Throttle::new(),
            safeguards: Safeguards::new(&options, &metrics),
            options,
            metrics,
        })
    }

    /// The safeguards of one lookup: those of all lookups, or new ones.
    fn safeguards(&self) -> Arc<Safeguards> {
        match self.scope {
            Scope::Endpoint => Arc::clone(&self.safeguards),
            Scope::Instance => Safeguards::new(&self.options, &self.metrics),
        }
    }
}

/// The parts of a lookup that all its attempts share.
#[derive(Debug, Clone, Copy)]
pub struct LookupContext<'a> {
    /// The task to look up.
    pub query: &'a TaskQuery,
    /// Whose share of the rate and of the retry budget the attempts use.
    pub caller: Caller,
    /// The latest deadline of the waiting calls.
    pub deadline: &'a SharedDeadline,
    /// Receives the facts of each attempt, for the access log and the error details.
    pub progress: &'a Progress,
    /// The parent of each attempt's span.
    pub span: Option<&'a Arc<ServerSpan>>,
    /// The quota store, if there is one.
    pub store: Option<&'a Session>,
}

/// Makes calls. Each worker has its own, with its own connections.
#[derive(Debug, Clone)]
pub struct Client {
    pub(super) http: http_client::Client,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) credentials: Credentials,
    /// The right to parse a large reply, so that those of one caller do not fill the worker's queue.
    pub(super) large_replies: Arc<Semaphore>,
}

impl Client {
    /// A client of a shared endpoint.
    pub fn new(
        http: http_client::Client,
        endpoint: Arc<Endpoint>,
        credentials: Credentials,
    ) -> Self {
        Self {
            http,
            endpoint,
            credentials,
            large_replies: Arc::new(Semaphore::new(1)),
        }
    }

    /// Looks up one task. At most `max_attempts` attempts, and one more after a refreshed token or a corrected clock.
    ///
    /// A refreshed token replaces the one in `auth`.
    ///
    /// Retrying is safe: the operation only reads, so a retry after a lost reply costs only quota.
    ///
    /// # Errors
    /// [`Error`] of the last attempt that reached upstream, if any did.
    pub async fn show_task_detail(
        &self,
        auth: &mut Auth,
        lookup: LookupContext<'_>,
    ) -> Result<TaskDetail, Error> {
        let deadline = lookup.deadline;
        let request = TaskRequest::new(&self.endpoint.base_url, lookup.query);
        let mut attempts = Attempts::new(self.endpoint.options.max_attempts);
        let mut refreshed = false;
        let mut clock_corrected = false;
        let mut reuse = Reuse::Allowed;
        let mut last = None;
        let Safeguards { breaker, budget } = &*self.endpoint.safeguards();
        budget.call();
        loop {
            let attempt = self.attempt(&request, auth, reuse, clock_corrected, breaker, &lookup);
            let failed = match attempt.await {
                Ok(task) => return Ok(task),
                Err(failed) => failed,
            };
            match failed.remedy {
                Remedy::RefreshCredential(evidence) if !refreshed => {
                    refreshed = true;
                    let refresh = self
                        .credentials
                        .refresh(auth, evidence, deadline.deadline());
                    let newer = refresh.await;
                    if let Some(newer) = newer.map_err(Error::Credentials)? {
                        *auth = newer;
                        let metrics = &self.endpoint.metrics;
                        metrics.upstream_retry(Reason::CredentialRejected);
                        continue;
                    }
                }
                Remedy::SignAgain if !clock_corrected => {
                    clock_corrected = true;
                    self.endpoint.metrics.upstream_retry(Reason::ClockSkew);
                    continue;
                }
                _ => {}
            }
            let remaining = deadline.deadline().remaining();
            let Some(wait) = attempts.next(failed.advice, remaining, budget, lookup.caller) else {
                // Upstream's error is more useful than a circuit that opened between two attempts.
                return Err(match (last, failed.error) {
                    (Some(last), Error::CircuitOpen { .. }) => last,
                    (_, error) => error,
                });
            };
            self.endpoint.metrics.upstream_retry(failed.reason);
            last = Some(failed.error);
            reuse = Reuse::Forbidden;
            tokio::time::sleep(wait).await;
        }
    }
}
