//! Keeps one fetched credential fresh.
//!
//! ```text
//! calls ---- look at / wait for ----> State <---- publishes ---- keeper task ---- refresh ----> issuer
//!       ---- "this one was refused" -->                <-- wakes --
//! ```
//!
//! Only the keeper fetches, so there is one fetch at a time whatever the calls do, and none dies with its caller. A value
//! that is still good hides every failure. Times are monotonic: a clock that is set back or ahead changes nothing.

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Issuer, fetch::FetchError, server_time};
use crate::{deadline::Deadline, telemetry::metrics::Metrics, wait};

/// Bound of one fetch, with all exchanges that belong to it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// The backoff after failures grows from the first to the second.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// No two fetches are closer than this, whatever the lives and the dice say, but for the one that replaces a late result.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// A value is not given out any more this long before its end, or in the last tenth of its life: longer than a call
/// takes, so that no request starts with a token that dies on the way.
const LAST_USE_BEFORE_END: Duration = Duration::from_secs(60);

/// Where a value comes from.
pub(super) trait Refresh: Send + 'static {
    /// What is fetched.
    type Value: Clone + Send + Sync + 'static;

    /// Who is asked for it.
    const ISSUER: Issuer;

    /// Fetches a new value. Dropped when it takes too long.
    fn refresh(&mut self) -> impl Future<Output = Result<Fetched<Self::Value>, FetchError>> + Send;

    /// Resolves when what was rejected has been replaced, so that the next try is another one.
    fn changed(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// A value that was just fetched.
#[derive(Debug)]
pub(super) struct Fetched<V> {
    pub(super) value: V,
    /// How long it lives from now.
    pub(super) lifetime: Duration,
}

/// What a refused value means for the calls to come.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnRefusal {
    /// Whether it is given out until there is a new one.
    pub(super) keep: bool,
    /// A refusal within this time of another one causes no fetch: an upstream that refuses whatever we fetch must not
    /// make us fetch for each call.
    pub(super) spacing: Duration,
}

/// The cache of one source. Dropping it ends its keeper.
pub(super) struct Cache<V> {
    state: Arc<watch::Sender<State<V>>>,
    on_refusal: OnRefusal,
    _keeper: AbortOnDropHandle<()>,
}

/// What the calls see.
struct State<V> {
    lease: Option<Lease<V>>,
    /// The last fetch failed.
    failure: Option<Failure>,
    /// Generation of the last value.
    generation: u64,
    /// Counts the refusals that call for a fetch. A fetch that began before one of them is worth nothing.
    refusals: u64,
    refused_at: Option<Instant>,
}

struct Lease<V> {
    value: V,
    usable_until: Instant,
}

struct Failure {
    /// Who refused us, and with which HTTP status, if it was a refusal.
    rejected: Option<(Issuer, u16)>,
    next_fetch_at: Instant,
}

impl<V: Clone> State<V> {
    /// The value with its generation, or why there is none; `None` while a fetch will tell.
    fn look(&self) -> Option<Result<(V, u64), Error>> {
        let now = Instant::now();
        if let Some(lease) = self.lease.as_ref().filter(|lease| now < lease.usable_until) {
            return Some(Ok((lease.value.clone(), self.generation)));
        }
        let failure = self.failure.as_ref()?;
        Some(Err(match failure.rejected {
            Some((issuer, http_status)) => Error::Rejected {
                issuer,
                http_status,
            },
            None => Error::Unavailable {
                retry_after: failure
                    .next_fetch_at
                    .saturating_duration_since(now)
                    .max(FIRST_BACKOFF),
            },
        }))
    }

    /// Notes that upstream refused the present value. True if that calls for a fetch.
    fn refuse(&mut self, on_refusal: OnRefusal) -> bool {
        let now = Instant::now();
        let too_soon = self
            .refused_at
            .is_some_and(|at| now < at + on_refusal.spacing);
        if self.lease.is_none() || too_soon {
            return false;
        }
        self.refused_at = Some(now);
        self.refusals += 1;
        if !on_refusal.keep {
            self.lease = None;
        }
        true
    }
}

impl<V: Clone + Send + Sync + 'static> Cache<V> {
    /// Starts to fetch. `ready` turns true with the first value.
    pub(super) fn start<R: Refresh<Value = V>>(
        name: &'static str,
        source: R,
        on_refusal: OnRefusal,
        ready: Arc<watch::Sender<bool>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let state = Arc::new(watch::Sender::new(State {
            lease: None,
            failure: None,
            generation: 0,
            refusals: 0,
            refused_at: None,
        }));
        let keeper = Keeper {
            name,
            source,
            state: state.clone(),
            ready,
            metrics,
        };
        Self {
            state,
            on_refusal,
            _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run())),
        }
    }

    /// The value with its generation. Waits only while a fetch is running that has not failed before.
    pub(super) async fn current(&self, deadline: Deadline) -> Result<(V, u64), Error> {
        if let Some(found) = self.state.borrow().look() {
            return found;
        }
        let mut changes = self.state.subscribe();
        let found = async {
            loop {
                let found = changes.borrow_and_update().look();
                if let Some(found) = found {
                    return found;
                }
                changes.changed().await.expect("the cache holds the sender");
            }
        };
        // In a box, because few calls wait, and all would carry the room for it.
        Box::pin(deadline.bound(found))
            .await
            .map_err(|_| Error::DeadlineExceeded)?
    }

    /// Upstream refused the value of generation `used`: returns a newer one, fetched for all who ask at the same time.
    /// `None` when there is none to be had so soon.
    pub(super) async fn renew(
        &self,
        used: u64,
        deadline: Deadline,
    ) -> Result<Option<(V, u64)>, Error> {
        self.state
            .send_if_modified(|state| state.generation == used && state.refuse(self.on_refusal));
        let (value, generation) = self.current(deadline).await?;
        Ok((generation > used).then_some((value, generation)))
    }

    /// Upstream refused a value, which may be the present one; nobody waits for another.
    pub(super) fn refused(&self, is_refused: impl Fn(&V) -> bool) {
        self.state.send_if_modified(|state| {
            state
                .lease
                .as_ref()
                .is_some_and(|lease| is_refused(&lease.value))
                && state.refuse(self.on_refusal)
        });
    }
}

struct Keeper<R: Refresh> {
    name: &'static str,
    source: R,
    state: Arc<watch::Sender<State<R::Value>>>,
    ready: Arc<watch::Sender<bool>>,
    metrics: Arc<Metrics>,
}

impl<R: Refresh> Keeper<R> {
    async fn run(mut self) {
        let mut changes = self.state.subscribe();
        let mut failures = 0;
        let mut last_error = None;
        loop {
            let refusals = self.state.borrow().refusals;
            let outcome = timeout(FETCH_TIMEOUT, self.source.refresh())
                .await
                .unwrap_or_else(|_| {
                    Err(FetchError::unavailable("no credential within ten seconds"))
                });
            self.metrics.credential_refreshed(outcome.is_ok());
            match outcome {
                Ok(fetched) => {
                    failures = 0;
                    last_error = None;
                    let lifetime = fetched.lifetime;
                    if !self.publish(fetched, refusals) {
                        continue;
                    }
                    let next_fetch_at = Instant::now() + refresh_delay(lifetime);
                    tokio::select! {
                        () = sleep_until(next_fetch_at) => {}
                        _ = changes.wait_for(|state| state.refusals != refusals) => {}
                    }
                }
                Err(error) => {
                    let next_fetch_at = Instant::now() + backoff(failures).max(error.wait());
                    failures = failures.saturating_add(1);
                    self.note_failure(&error, next_fetch_at, last_error.as_ref() != Some(&error));
                    // A refused value does not hurry the next try: whoever fails us is left in peace.
                    if matches!(error, FetchError::Rejected { .. }) {
                        tokio::select! {
                            () = sleep_until(next_fetch_at) => {}
                            () = self.source.changed() => {}
                        }
                    } else {
                        sleep_until(next_fetch_at).await;
                    }
                    last_error = Some(error);
                }
            }
        }
    }

    /// Puts a value in place, unless the one before it was refused while this one was on its way: then it may be as
    /// dead, and false asks for another fetch.
    fn publish(&self, fetched: Fetched<R::Value>, refusals: u64) -> bool {
        let Fetched { value, lifetime } = fetched;
        let slack = LAST_USE_BEFORE_END.min(lifetime / 10);
        let published = self.state.send_if_modified(|state| {
            if state.refusals != refusals {
                return false;
            }
            state.generation += 1;
            state.failure = None;
            state.lease = Some(Lease {
                value,
                usable_until: Instant::now() + lifetime - slack,
            });
            true
        });
        if published {
            self.metrics
                .credential_expires(server_time::our_clock() + lifetime);
            self.ready.send_replace(true);
            tracing::info!(
                source = self.name,
                lifetime_seconds = lifetime.as_secs(),
                "credential fetched"
            );
        }
        published
    }

    fn note_failure(&self, error: &FetchError, next_fetch_at: Instant, is_news: bool) {
        let rejected = match error {
            FetchError::Rejected { http_status, .. } => Some((R::ISSUER, *http_status)),
            FetchError::Unavailable { .. } => None,
        };
        self.state.send_modify(|state| {
            state.failure = Some(Failure {
                rejected,
                next_fetch_at,
            });
        });
        if is_news {
            let retry_seconds = next_fetch_at
                .saturating_duration_since(Instant::now())
                .as_secs();
            tracing::warn!(
                source = self.name,
                fault = %error,
                retry_seconds,
                "credential cannot be fetched"
            );
        }
    }
}

/// When a value of this life is replaced: at 75 to 85 % of it, so that many facades do not ask at the same moment, and
/// so that an issuer that is down has hours to come back before a token of 24 hours ends.
fn refresh_delay(lifetime: Duration) -> Duration {
    lifetime
        .mul_f64(0.75 + 0.1 * fastrand::f64())
        .max(SHORTEST_PAUSE)
}

/// The wait after a failure that follows `failures` others.
fn backoff(failures: u32) -> Duration {
    wait::backoff(FIRST_BACKOFF, LONGEST_BACKOFF, failures).max(SHORTEST_PAUSE)
}
