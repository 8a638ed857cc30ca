//! Keeps one credential of the facade fresh, wherever it comes from.
//!
//! ```text
//! calls ---- read / wait for ---------------> State <---- publishes ---- refresher ---- refresh ----> source
//!       ---- "upstream rejected this one" --->       ----- wakes ------->
//! ```
//!
//! Only the refresher task fetches, so there is one fetch at a time whatever the calls do, and none ends with its caller. A value
//! that is still good hides every failure. Times are monotonic: setting the clock back or ahead changes nothing.

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Issuer, fetch::FetchError, server_time};
use crate::{
    deadline::{Deadline, THIRTY_YEARS},
    telemetry::metrics::Metrics,
    wait,
};

/// Bound of one refresh, with all exchanges that belong to it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// The backoff after the first failure; it doubles up to [`Refresh::MAX_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// The shortest pause between two refreshes, whatever lifetime and jitter give. Only the refresh that replaces a result
/// overtaken by a rejection follows at once.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// A value is given out until this long before its end, or until the last tenth of its life: longer than a call takes, so
/// that no request starts with a token that expires on the way.
const LAST_USE_BEFORE_END: Duration = Duration::from_secs(60);

/// A source of credentials.
pub(super) trait Refresh: Send + 'static {
    /// The credential. A refreshed value that equals the current one is the same credential: calls see no new generation.
    type Value: Clone + PartialEq + Send + Sync + 'static;

    /// The longest pause after a failure, unless the issuer asks for a longer one.
    const MAX_BACKOFF: Duration = Duration::from_secs(60);

    /// Fetches a value. Dropped when it takes too long.
    fn refresh(&mut self) -> impl Future<Output = Result<Fetched<Self::Value>, FetchError>> + Send;

    /// Resolves when another refresh would have another outcome, so that it does not wait until it is due.
    fn changed(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// A value that was just fetched.
#[derive(Debug)]
pub(super) struct Fetched<V> {
    pub(super) value: V,
    /// How long it lives from now; `None` if it has no end.
    pub(super) lifetime: Option<Duration>,
}

/// What the cache does when upstream rejects the current value.
#[derive(Debug, Clone, Copy)]
pub(super) enum OnRejection {
    /// Drops the value and fetches another one. Rejections within `spacing` of the previous one are ignored: an upstream that
    /// rejects every value must not cause a fetch for each call.
    Replace { spacing: Duration },
    /// Fetches another value, spaced in the same way, and gives out the current one until then.
    Keep { spacing: Duration },
    /// Refreshes at once, even during backoff, and makes the rejected call wait for the outcome; gives out the current value
    /// until another one is there. For sources that cost nothing to ask.
    Recheck,
}

/// The cache of one source. Dropping it ends its refresher.
pub(super) struct Cache<V> {
    state: Arc<watch::Sender<State<V>>>,
    on_rejection: OnRejection,
    _refresher: AbortOnDropHandle<()>,
}

/// What the calls see.
struct State<V> {
    lease: Option<Lease<V>>,
    /// Set if the last refresh failed.
    failed: Option<FailedFetch>,
    /// The generation of the last value; grows with each new value.
    generation: u64,
    /// Counts the rejections that require a refresh.
    rejections: u64,
    rejected_at: Option<Instant>,
    /// The rejections that preceded the last finished refresh.
    refreshed_after: u64,
}

struct Lease<V> {
    value: V,
    /// `None` for a value without an end.
    usable_until: Option<Instant>,
}

struct FailedFetch {
    rejected_by: Option<(Issuer, u16)>,
    next_fetch_at: Instant,
}

impl<V: Clone> State<V> {
    /// The value with its generation, or why there is none; `None` until the first refresh has ended, and while a rejected
    /// value is being replaced.
    fn current(&self) -> Option<Result<(V, u64), Error>> {
        let now = Instant::now();
        let usable = |lease: &&Lease<V>| lease.usable_until.is_none_or(|until| now < until);
        if let Some(lease) = self.lease.as_ref().filter(usable) {
            return Some(Ok((lease.value.clone(), self.generation)));
        }
        let failed = self.failed.as_ref()?;
        Some(Err(match failed.rejected_by {
            Some((issuer, http_status)) => Error::Rejected {
                issuer,
                http_status,
            },
            None => Error::Unavailable {
                retry_after: failed
                    .next_fetch_at
                    .saturating_duration_since(now)
                    .max(FIRST_BACKOFF),
            },
        }))
    }

    /// Notes that upstream rejected the current value. Returns whether that requires a refresh.
    fn reject(&mut self, on_rejection: OnRejection) -> bool {
        let now = Instant::now();
        let spacing = match on_rejection {
            OnRejection::Replace { spacing } | OnRejection::Keep { spacing } => spacing,
            OnRejection::Recheck => Duration::ZERO,
        };
        let too_soon = self.rejected_at.is_some_and(|at| now < at + spacing);
        if self.lease.is_none() || too_soon {
            return false;
        }
        self.rejected_at = Some(now);
        self.rejections += 1;
        if matches!(on_rejection, OnRejection::Replace { .. }) {
            self.lease = None;
        }
        true
    }
}

impl<V: Clone + PartialEq + Send + Sync + 'static> Cache<V> {
    /// Starts the refresher. `ready` turns true with the first value; `name` is the source in the log.
    pub(super) fn start<R: Refresh<Value = V>>(
        name: impl Into<String>,
        source: R,
        on_rejection: OnRejection,
        ready: Arc<watch::Sender<bool>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let state = Arc::new(watch::Sender::new(State {
            lease: None,
            failed: None,
            generation: 0,
            rejections: 0,
            rejected_at: None,
            refreshed_after: 0,
        }));
        let refresher = Refresher {
            name: name.into(),
            source,
            on_rejection,
            state: state.clone(),
            ready,
            metrics,
        };
        Self {
            state,
            on_rejection,
            _refresher: AbortOnDropHandle::new(tokio::spawn(refresher.run())),
        }
    }

    /// The value with its generation. Waits only for the first refresh, and while a rejected value is being replaced.
    pub(super) async fn current(&self, deadline: Deadline) -> Result<(V, u64), Error> {
        self.wait_for(State::current, deadline).await
    }

    /// Upstream rejected the value of generation `used`: returns a newer one, fetched for all who ask at the same time.
    /// `None` if the source has no newer value, or is not asked again so soon.
    pub(super) async fn refresh(
        &self,
        used: u64,
        deadline: Deadline,
    ) -> Result<Option<(V, u64)>, Error> {
        let mut awaited = 0;
        self.state.send_if_modified(|state| {
            let refresh = state.generation == used && state.reject(self.on_rejection);
            if refresh && matches!(self.on_rejection, OnRejection::Recheck) {
                awaited = state.rejections;
            }
            refresh
        });
        let refreshed = |state: &State<V>| match state.refreshed_after >= awaited {
            true => state.current(),
            false => None,
        };
        let (value, generation) = self.wait_for(refreshed, deadline).await?;
        Ok((generation > used).then_some((value, generation)))
    }

    /// Upstream rejected a value, which may be the current one; the caller does not wait for another.
    pub(super) fn rejected(&self, is_rejected: impl Fn(&V) -> bool) {
        self.state.send_if_modified(|state| {
            state
                .lease
                .as_ref()
                .is_some_and(|lease| is_rejected(&lease.value))
                && state.reject(self.on_rejection)
        });
    }

    async fn wait_for(
        &self,
        find: impl Fn(&State<V>) -> Option<Result<(V, u64), Error>>,
        deadline: Deadline,
    ) -> Result<(V, u64), Error> {
        if let Some(found) = find(&self.state.borrow()) {
            return found;
        }
        let mut changes = self.state.subscribe();
        let found = async {
            loop {
                let found = find(&changes.borrow_and_update());
                if let Some(found) = found {
                    return found;
                }
                changes.changed().await.expect("the cache holds the sender");
            }
        };
        // Boxed, because few calls wait, and the future of every call would have to hold its state.
        Box::pin(deadline.bound(found))
            .await
            .map_err(|_| Error::DeadlineExceeded)?
    }
}

/// The task that fetches.
struct Refresher<R: Refresh> {
    name: String,
    source: R,
    on_rejection: OnRejection,
    state: Arc<watch::Sender<State<R::Value>>>,
    ready: Arc<watch::Sender<bool>>,
    metrics: Arc<Metrics>,
}

impl<R: Refresh> Refresher<R> {
    async fn run(mut self) {
        let mut changes = self.state.subscribe();
        let mut failures = 0;
        let mut last_error = None;
        loop {
            let rejections = self.state.borrow().rejections;
            let outcome = timeout(FETCH_TIMEOUT, self.source.refresh())
                .await
                .unwrap_or_else(|_| {
                    Err(FetchError::unavailable("no credential within ten seconds"))
                });
            let (pause, rejection_ends_pause) = match outcome {
                Ok(fetched) => {
                    failures = 0;
                    last_error = None;
                    let lifetime = fetched.lifetime;
                    if !self.publish(fetched, rejections) {
                        continue;
                    }
                    (lifetime.map_or(THIRTY_YEARS, refresh_delay), true)
                }
                Err(error) => {
                    let pause = backoff(failures, R::MAX_BACKOFF).max(error.wait);
                    failures = failures.saturating_add(1);
                    self.note_failure(&error, pause, rejections);
                    if last_error.as_ref() != Some(&error) {
                        self.log_failure(&error, pause);
                    }
                    last_error = Some(error);
                    // A rejected value does not shorten the wait of an issuer that fails or rejects.
                    (pause, matches!(self.on_rejection, OnRejection::Recheck))
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.source.changed() => {}
                _ = changes.wait_for(|state| state.rejections != rejections), if rejection_ends_pause => {}
            }
        }
    }

    /// Makes a value the current one. Not if the value before it was replaced because of a rejection during this fetch: the
    /// fetched value may have been revoked with it, so false asks for another fetch.
    fn publish(&self, fetched: Fetched<R::Value>, rejections: u64) -> bool {
        let Fetched { value, lifetime } = fetched;
        let usable = lifetime.map(|lifetime| lifetime - LAST_USE_BEFORE_END.min(lifetime / 10));
        let mut unchanged = false;
        let mut generation = 0;
        let published = self.state.send_if_modified(|state| {
            let overtaken = state.rejections != rejections;
            if overtaken && matches!(self.on_rejection, OnRejection::Replace { .. }) {
                return false;
            }
            let value = match state.lease.take() {
                Some(lease) if lease.value == value => {
                    unchanged = true;
                    lease.value
                }
                _ => {
                    state.generation += 1;
                    value
                }
            };
            generation = state.generation;
            state.failed = None;
            state.refreshed_after = rejections;
            state.lease = Some(Lease {
                value,
                usable_until: usable.map(|usable| Instant::now() + usable),
            });
            true
        });
        if !published {
            self.metrics.credential_refreshed(true);
            return false;
        }
        self.ready.send_replace(true);
        if let Some(lifetime) = lifetime {
            self.metrics
                .credential_expires(server_time::our_clock() + lifetime);
        }
        // A file read again without a change is not reported: every rejected call causes such a read.
        if lifetime.is_some() || !unchanged {
            self.metrics.credential_refreshed(true);
            tracing::info!(
                source = self.name,
                generation,
                lifetime_seconds = lifetime.map(|lifetime| lifetime.as_secs()),
                "credential fetched"
            );
        }
        true
    }

    fn note_failure(&self, error: &FetchError, pause: Duration, rejections: u64) {
        self.metrics.credential_refreshed(false);
        self.state.send_modify(|state| {
            state.refreshed_after = rejections;
            state.failed = Some(FailedFetch {
                rejected_by: error.rejected_by,
                next_fetch_at: Instant::now() + pause,
            });
        });
    }

    fn log_failure(&self, error: &FetchError, pause: Duration) {
        tracing::warn!(
            source = self.name,
            %error,
            retry_seconds = pause.as_secs(),
            "credential cannot be fetched"
        );
    }
}

/// The pause before a value of this lifetime is replaced: 75 to 85 % of it, so that many facades do not ask at the same
/// moment, and an issuer that is down has hours to come back before a token of 24 hours ends.
fn refresh_delay(lifetime: Duration) -> Duration {
    lifetime
        .mul_f64(0.75 + 0.1 * fastrand::f64())
        .max(SHORTEST_PAUSE)
}

/// The pause after a failure that follows `failures` others.
fn backoff(failures: u32, max: Duration) -> Duration {
    wait::backoff(FIRST_BACKOFF, max, failures).max(SHORTEST_PAUSE)
}
