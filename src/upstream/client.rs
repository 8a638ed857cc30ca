//! The send loop: as many attempts as answer, deadline, budget and breaker allow, each with a credential that is valid now.

use std::sync::Arc;

use reqwest::Url;

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
    http_client,
    reason::Reason,
    telemetry::{Progress, ServerSpan, metrics::Metrics},
};

/// What all workers share about the endpoint.
#[derive(Debug)]
pub struct Endpoint {
    base_url: Url,
    pub(super) options: Options,
    pub(super) breaker: Breaker,
    pub(super) clock: Clock,
    pub(super) pacing: Option<Pacing>,
    pub(super) throttle: Throttle,
    pub(super) metrics: Arc<Metrics>,
    budget: Budget,
}

impl Endpoint {
    /// An endpoint of which nothing is known yet.
    pub fn new(base_url: Url, options: Options, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            base_url,
            breaker: Breaker::new(
                metrics.circuit_open.clone(),
                metrics.instances_held_back.clone(),
            ),
            clock: Clock::default(),
            pacing: options.upstream_rate.map(Pacing::new),
            throttle: Throttle::new(),
            budget: Budget::new(options.retry_budget),
            options,
            metrics,
        })
    }
}

/// What the attempts of one lookup have in common.
#[derive(Debug, Clone, Copy)]
pub struct LookupContext<'a> {
    /// What is looked up.
    pub query: &'a TaskQuery,
    /// Who shares turns and retries with others.
    pub caller: Caller,
    /// The latest deadline of those who wait.
    pub deadline: &'a SharedDeadline,
    /// Shows what the attempts brought.
    pub progress: &'a Progress,
    /// The parent of each attempt's span.
    pub span: Option<&'a Arc<ServerSpan>>,
}

/// Makes calls. Each worker has its own, with its own connections.
#[derive(Debug, Clone)]
pub struct Client {
    pub(super) http: http_client::Client,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) credentials: Credentials,
}

impl Client {
    /// A client that shares what is known of the endpoint with its siblings.
    pub fn new(
        http: http_client::Client,
        endpoint: Arc<Endpoint>,
        credentials: Credentials,
    ) -> Self {
        Self {
            http,
            endpoint,
            credentials,
        }
    }

    /// Looks up one task. At most `max_attempts` attempts, and one more after a refreshed token or a corrected clock.
    ///
    /// A refreshed token replaces the one in `auth`.
    ///
    /// The operation only reads, so that repeating it after a lost reply costs quota and nothing else.
    ///
    /// # Errors
    /// [`Error`]: what upstream did in the last attempt that reached it.
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
        let mut last = None;
        self.endpoint.budget.call();
        loop {
            let failed = match self.attempt(&request, auth, clock_corrected, &lookup).await {
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
            let budget = &self.endpoint.budget;
            let Some(wait) = attempts.next(failed.advice, remaining, budget, lookup.caller) else {
                // The caller learns what upstream did, not that the breaker opened between two attempts.
                return Err(match (last, failed.error) {
                    (Some(last), Error::CircuitOpen { .. }) => last,
                    (_, error) => error,
                });
            };
            self.endpoint.metrics.upstream_retry(failed.reason);
            last = Some(failed.error);
            tokio::time::sleep(wait).await;
        }
    }
}
