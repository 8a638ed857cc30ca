//! The send loop: as many attempts as answer, deadline, budget and breaker allow, each with a credential that is valid now.

use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;

use super::{
    Error, ErrorKind, Facts, Found, Options, TaskQuery,
    attempt::{Failed, Remedy},
    breaker::Breaker,
    clock::Clock,
    rate::Rate,
    request::TaskRequest,
    retry::{Attempts, Budget},
    throttle::Throttle,
};
use crate::{
    credentials::{Auth, Credentials},
    deadline::Limit,
    http,
    reason::Reason,
    telemetry::{ServerSpan, metrics::Metrics},
};

/// What all workers share about the endpoint.
#[derive(Debug)]
pub struct Endpoint {
    base_url: Url,
    pub(super) options: Options,
    pub(super) breaker: Breaker,
    pub(super) clock: Clock,
    pub(super) rate: Option<Rate>,
    pub(super) throttle: Throttle,
    pub(super) metrics: Arc<Metrics>,
    budget: Budget,
}

impl Endpoint {
    /// An endpoint of which nothing is known yet.
    pub fn new(base_url: Url, options: Options, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            base_url,
            breaker: Breaker::new(metrics.circuit_open.clone()),
            clock: Clock::default(),
            rate: options.upstream_rate.map(Rate::new),
            throttle: Throttle::new(),
            budget: Budget::new(options.retry_budget),
            options,
            metrics,
        })
    }
}

/// What the attempts of a call have shown so far, readable while they go on.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Facts>);

impl Progress {
    /// The facts until now.
    pub fn facts(&self) -> Facts {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Makes calls. Each worker has its own, with its own connections.
#[derive(Debug, Clone)]
pub struct Client {
    pub(super) http: http::Client,
    pub(super) endpoint: Arc<Endpoint>,
    credentials: Credentials,
}

impl Client {
    /// A client that shares what is known of the endpoint with its siblings.
    pub fn new(http: http::Client, endpoint: Arc<Endpoint>, credentials: Credentials) -> Self {
        Self {
            http,
            endpoint,
            credentials,
        }
    }

    /// Looks up one task. At most `max_attempts` attempts, and one more after a renewed token or a corrected clock.
    ///
    /// Each attempt is a child of `span`. A renewed token takes the place of the one in `auth`.
    ///
    /// The call only reads, so repeating it after a lost answer costs quota and nothing else.
    ///
    /// # Errors
    /// [`Error`], with what the attempts showed.
    pub async fn show_task_detail(
        &self,
        query: &TaskQuery,
        auth: &mut Auth,
        limit: &Limit,
        progress: &Progress,
        span: Option<&Arc<ServerSpan>>,
    ) -> Result<Found, Error> {
        let request = TaskRequest::new(&self.endpoint.base_url, query);
        let mut attempts = Attempts::new(self.endpoint.options.max_attempts);
        let mut renewed = false;
        let mut clock_corrected = false;
        let mut last = None;
        self.endpoint.budget.call();
        loop {
            let failed = match self
                .attempt(&request, auth, clock_corrected, limit, progress, span)
                .await
            {
                Ok(task) => {
                    return Ok(Found {
                        task,
                        facts: progress.facts(),
                    });
                }
                Err(failed) => failed,
            };
            match failed.remedy {
                Remedy::Renew if !renewed => {
                    renewed = true;
                    match self.credentials.renew(auth, limit.deadline()).await {
                        Ok(Some(newer)) => {
                            *auth = newer;
                            self.endpoint
                                .metrics
                                .upstream_retry(Reason::CredentialRejected);
                            continue;
                        }
                        Ok(None) => {}
                        Err(error) => return Err(fail(ErrorKind::Credentials(error), progress)),
                    }
                }
                Remedy::SignAgain if !clock_corrected => {
                    clock_corrected = true;
                    self.endpoint.metrics.upstream_retry(Reason::ClockSkew);
                    continue;
                }
                _ => {}
            }
            let remaining = limit.deadline().remaining();
            let Some(wait) = attempts.next(failed.policy, remaining, &self.endpoint.budget) else {
                return Err(fail(told(last, failed), progress));
            };
            self.endpoint.metrics.upstream_retry(failed.reason);
            last = Some(failed.kind);
            tokio::time::sleep(wait).await;
        }
    }
}

/// What the caller is told: what upstream did, not that the breaker opened in between.
fn told(last: Option<ErrorKind>, failed: Failed) -> ErrorKind {
    match (last, failed.kind) {
        (Some(last), ErrorKind::CircuitOpen { .. }) => last,
        (_, kind) => kind,
    }
}

fn fail(kind: ErrorKind, progress: &Progress) -> Error {
    Error {
        kind,
        facts: progress.facts(),
    }
}
