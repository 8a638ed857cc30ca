//! Keeps one credential of the facade fresh.
//!
//! ```text
//! calls ---- read / wait for ---------> State <---- publishes ---- refresher ---- refresh ----> source
//!       ---- rejected by upstream ---->       ----- wakes ------->
//! ```
//!
//! Only the refresher task fetches, so there is one fetch at a time and none ends with the call that wanted it. A fetched value
//! stays in use until its successor is published or its life ends, even if upstream rejects it for one call: the rejection may
//! be about that call. Times are monotonic: setting the clock changes nothing.

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Error, Issuer, TokenEvidence, fetch::FetchError, server_time};
use crate::{
    deadline::{Deadline, THIRTY_YEARS},
    files,
    supervise::{self, Task},
    telemetry::metrics::Metrics,
    wait,
};

/// Upper bound of one refresh, which may take several requests.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// The backoff after the first failure; it doubles up to [`Refresh::MAX_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// The shortest pause between two refreshes. Only a refresh that was overtaken by a rejection is repeated at once.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// A value is used until this long before its end, or until the last tenth of its life: longer than a call takes, so that no
/// request starts with a token that expires on the way.
const LAST_USE_BEFORE_END: Duration = Duration::from_secs(60);

/// A value that upstream accepted within this time is still good: an unclear rejection is about the call.
const PROOF_LASTS: Duration = Duration::from_secs(60);

/// A source of credentials.
pub(super) trait Refresh: Send + 'static {
    /// The credential. A refreshed value that equals the current one is the same credential: calls see no new generation.
    type Value: Clone + PartialEq + Send + Sync + 'static;

    /// The longest pause after a failure, unless the reply of the issuer requests a longer pause.
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
pub struct Fetched<V> {
    /// The value.
    pub value: V,
    /// How long it lives from now; `None` if it has no end.
    pub lifetime: Option<Duration>,
}

/// What the cache does when upstream rejects the current value.
#[derive(Debug, Clone, Copy)]
pub(super) enum OnRejection {
    /// Fetches a successor, unless the previous rejection that did so is less than `spacing` ago: an upstream that rejects every
    /// value must not cause a fetch for each call.
    Fetch { spacing: Duration },
    /// Refreshes at once, even during backoff. For files, which cost nothing to read.
    Recheck,
}

/// The cache of one source. Dropping it ends its refresher.
pub(super) struct Cache<V> {
    state: Arc<watch::Sender<State<V>>>,
    on_rejection: OnRejection,
    last_success: Arc<LastSuccess>,
    _refresher: AbortOnDropHandle<()>,
}

struct State<V> {
    lease: Option<Lease<V>>,
    /// Set if the last refresh failed.
    failed: Option<FailedFetch>,
    /// The generation of the last value; grows with each new value.
    generation: u64,
    /// Counts the rejections that require a refresh.
    rejections: u64,
    /// The time of the last one.
    rejected_at: Option<Instant>,
    /// The value of `rejections` up to which a refresh has ended.
    refreshed_after: u64,
    last_success: Arc<LastSuccess>,
}

struct Lease<V> {
    value: V,
    /// `None` for a value without an end.
    usable_until: Option<Instant>,
    /// When upstream last rejected the value itself.
    rejected_at: Option<Instant>,
}

struct FailedFetch {
    rejected_by: Option<(Issuer, u16)>,
    cause: String,
    next_fetch_at: Instant,
}

impl FailedFetch {
    fn error(&self) -> Error {
        match self.rejected_by {
            Some((issuer, http_status)) => Error::Rejected {
                issuer,
                http_status,
            },
            None => Error::Unavailable {
                retry_after: self
                    .next_fetch_at
                    .saturating_duration_since(Instant::now())
                    .max(FIRST_BACKOFF),
            },
        }
    }
}

/// The last attempt that upstream accepted. Each call writes it, so it is one atomic number: the generation of the value, then the
/// milliseconds from `epoch` to the sending of the attempt. A later attempt has a larger number.
struct LastSuccess {
    epoch: Instant,
    stamp: AtomicU64,
}

impl LastSuccess {
    /// Enough for 34 years.
    const TIME_BITS: u32 = 40;

    fn new() -> Self {
        Self {
            epoch: Instant::now(),
            stamp: AtomicU64::new(0),
        }
    }

    fn record(&self, generation: u64, sent_at: Instant) {
        let millis = sent_at.saturating_duration_since(self.epoch).as_millis() as u64;
        let stamp = (generation << Self::TIME_BITS) | millis;
        // Most calls share a millisecond with another one, and then need not write.
        if self.stamp.load(Ordering::Relaxed) < stamp {
            self.stamp.fetch_max(stamp, Ordering::Relaxed);
        }
    }

    /// When the attempt with this generation was sent, if there was one; rounded down.
    fn sent_at(&self, generation: u64) -> Option<Instant> {
        let stamp = self.stamp.load(Ordering::Relaxed);
        let millis = stamp & ((1 << Self::TIME_BITS) - 1);
        (stamp >> Self::TIME_BITS == generation).then(|| self.epoch + Duration::from_millis(millis))
    }
}

impl<V: Clone> State<V> {
    /// The value with its generation, or the reason for not having one; `None` until the first refresh has ended.
    fn current(&self) -> Option<Result<(V, u64), Error>> {
        let now = Instant::now();
        let is_usable = |lease: &&Lease<V>| {
            lease.usable_until.is_none_or(|until| now < until) && !self.is_withheld(lease, now)
        };
        if let Some(lease) = self.lease.as_ref().filter(is_usable) {
            return Some(Ok((lease.value.clone(), self.generation)));
        }
        self.failed.as_ref().map(|failed| Err(failed.error()))
    }

    /// Both upstream and the issuer have rejected us, and no call shows the contrary.
    fn is_withheld(&self, lease: &Lease<V>, now: Instant) -> bool {
        let rejected_by_issuer = |failed: &FailedFetch| failed.rejected_by.is_some();
        self.failed.as_ref().is_some_and(rejected_by_issuer)
            && self.is_suspect(lease)
            && !self.is_proven(now)
    }

    /// Whether upstream has rejected the value itself and accepted no attempt since.
    fn is_suspect(&self, lease: &Lease<V>) -> bool {
        let success = self.last_success.sent_at(self.generation);
        lease
            .rejected_at
            .is_some_and(|rejected_at| success.is_none_or(|sent_at| sent_at <= rejected_at))
    }

    /// Whether upstream has accepted the value not long ago.
    fn is_proven(&self, now: Instant) -> bool {
        let success = self.last_success.sent_at(self.generation);
        success.is_some_and(|sent_at| now < sent_at + PROOF_LASTS)
    }

    /// The outcome for a call whose value of generation `used` was rejected: `None` while the refresh after `awaited` rejections has
    /// not ended.
    fn successor(&self, used: u64, awaited: u64) -> Option<Result<Option<(V, u64)>, Error>> {
        if self.generation == used {
            if self.refreshed_after < awaited {
                return None;
            }
            let suspect = self.lease.as_ref().filter(|lease| self.is_suspect(lease));
            if let (Some(_), Some(failed)) = (suspect, &self.failed) {
                return Some(Err(failed.error()));
            }
        }
        let newer = |(value, generation)| (generation > used).then_some((value, generation));
        self.current().map(|current| current.map(newer))
    }

    /// Records a rejection of the current value. Returns whether a refresh follows that the rejected call can wait for.
    fn reject(&mut self, evidence: TokenEvidence, on_rejection: OnRejection) -> bool {
        let now = Instant::now();
        let is_proven = self.is_proven(now);
        let is_pending = self.is_refresh_pending();
        let Some(lease) = &mut self.lease else {
            return false;
        };
        if let OnRejection::Fetch { spacing } = on_rejection {
            match evidence {
                TokenEvidence::Unclear if is_proven => return false,
                TokenEvidence::Unclear => {}
                TokenEvidence::Rejected => lease.rejected_at = Some(now),
            }
            // After a failure the next refresh comes when the issuer can be asked again.
            let too_soon = self.rejected_at.is_some_and(|at| now < at + spacing);
            if is_pending || self.failed.is_some() || too_soon {
                return is_pending;
            }
        }
        self.rejected_at = Some(now);
        self.rejections += 1;
        true
    }

    fn is_refresh_pending(&self) -> bool {
        self.refreshed_after < self.rejections
    }
}

impl<V: Clone + PartialEq + Send + Sync + 'static> Cache<V> {
    /// Starts the refresher. It sends each new value to `latest`; `name` is the source in the log.
    pub(super) fn start<R: Refresh<Value = V>>(
        name: impl Into<String>,
        source: R,
        on_rejection: OnRejection,
        latest: watch::Sender<Option<V>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let last_success = Arc::new(LastSuccess::new());
        let state = Arc::new(watch::Sender::new(State {
            lease: None,
            failed: None,
            generation: 0,
            rejections: 0,
            rejected_at: None,
            refreshed_after: 0,
            last_success: last_success.clone(),
        }));
        let refresher = Refresher {
            name: name.into(),
            source,
            on_rejection,
            state: state.clone(),
            latest,
            metrics,
        };
        Self {
            state,
            on_rejection,
            last_success,
            _refresher: AbortOnDropHandle::new(tokio::spawn(refresher.supervised())),
        }
    }

    /// The value with its generation. Waits only for the first refresh.
    pub(super) async fn current(&self, deadline: Deadline) -> Result<(V, u64), Error> {
        self.wait_for(State::current, deadline).await
    }

    /// Why the last refresh failed, if it did. Holds no secret.
    pub(super) fn failure(&self) -> Option<String> {
        let state = self.state.borrow();
        state.failed.as_ref().map(|failed| failed.cause.clone())
    }

    /// Upstream accepted the value of generation `used` in an attempt that was sent then.
    pub(super) fn accepted(&self, used: u64, sent_at: Instant) {
        self.last_success.record(used, sent_at);
    }

    /// Upstream rejected the value of generation `used`: returns a newer one, fetched once for all calls that want it. `None` if
    /// the source has no newer value or is not asked now: the rejection is about the call.
    pub(super) async fn refresh(
        &self,
        used: u64,
        evidence: TokenEvidence,
        deadline: Deadline,
    ) -> Result<Option<(V, u64)>, Error> {
        let mut awaited = 0;
        self.state.send_if_modified(|state| {
            let before = state.rejections;
            if state.generation == used && state.reject(evidence, self.on_rejection) {
                awaited = state.rejections;
            }
            state.rejections != before
        });
        self.wait_for(|state| state.successor(used, awaited), deadline)
            .await
    }

    /// Upstream rejected a value, which may be the current one: fetches another in the background.
    pub(super) fn rejected(&self, is_rejected: impl Fn(&V) -> bool) {
        self.state.send_if_modified(|state| {
            state
                .lease
                .as_ref()
                .is_some_and(|lease| is_rejected(&lease.value))
                && state.reject(TokenEvidence::Unclear, self.on_rejection)
        });
    }

    async fn wait_for<T>(
        &self,
        find: impl Fn(&State<V>) -> Option<Result<T, Error>>,
        deadline: Deadline,
    ) -> Result<T, Error> {
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
    latest: watch::Sender<Option<R::Value>>,
    metrics: Arc<Metrics>,
}

impl<R: Refresh> Refresher<R> {
    async fn supervised(mut self) {
        let metrics = self.metrics.clone();
        loop {
            metrics.background.catch(Task::Credential, self.run()).await;
            // Calls without a value must not wait for a refresh that may panic again.
            let error = FetchError::unavailable("the refresh panicked");
            let rejections = self.state.borrow().rejections;
            self.record_failure(&error, supervise::PAUSE, rejections);
        }
    }

    async fn run(&mut self) {
        let mut changes = self.state.subscribe();
        let mut failures = 0;
        let mut logged: Option<(FetchError, Instant)> = None;
        loop {
            let began = Instant::now();
            let rejections = self.state.borrow().rejections;
            let outcome = timeout(FETCH_TIMEOUT, self.source.refresh())
                .await
                .unwrap_or_else(|_| {
                    Err(FetchError::unavailable("no credential within ten seconds"))
                });
            let (pause, rejection_ends_pause) = match outcome {
                Ok(fetched) => {
                    failures = 0;
                    logged = None;
                    let lifetime = fetched.lifetime;
                    if !self.publish(fetched, began, rejections) {
                        continue;
                    }
                    (lifetime.map_or(THIRTY_YEARS, refresh_delay), true)
                }
                Err(error) => {
                    let pause = backoff(failures, R::MAX_BACKOFF).max(error.wait);
                    failures = failures.saturating_add(1);
                    self.record_failure(&error, pause, rejections);
                    let is_known = logged.as_ref().is_some_and(|(known, at)| {
                        *known == error && at.elapsed() < files::REPORT_INTERVAL
                    });
                    if !is_known {
                        tracing::warn!(
                            source = self.name,
                            %error,
                            retry_seconds = pause.as_secs(),
                            "credential cannot be fetched"
                        );
                        logged = Some((error, Instant::now()));
                    }
                    // A rejected value does not shorten the wait of an issuer that fails or rejects us.
                    (pause, matches!(self.on_rejection, OnRejection::Recheck))
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.source.changed() => {}
                _ = changes.wait_for(State::is_refresh_pending), if rejection_ends_pause => {}
            }
        }
    }

    /// Makes a value the current one. Returns false for another fetch if the current value itself was rejected during this one: the
    /// fetched value may have been revoked with it.
    fn publish(&self, fetched: Fetched<R::Value>, began: Instant, rejections: u64) -> bool {
        let Fetched { value, lifetime } = fetched;
        let usable = lifetime.map(|lifetime| lifetime - LAST_USE_BEFORE_END.min(lifetime / 10));
        let mut new = None;
        let mut generation = 0;
        let published = self.state.send_if_modified(|state| {
            let is_revoked = |lease: &Lease<R::Value>| {
                lease.rejected_at.is_some_and(|at| began <= at) && state.is_suspect(lease)
            };
            if state.rejections != rejections
                && matches!(self.on_rejection, OnRejection::Fetch { .. })
                && state.lease.as_ref().is_some_and(is_revoked)
            {
                return false;
            }
            let previous = state.lease.take();
            // An equal value is not replaced, because calls compare keys by their address.
            let value = match previous.filter(|lease| lease.value == value) {
                Some(lease) => {
                    state.refreshed_after = rejections;
                    lease.value
                }
                None => {
                    state.generation += 1;
                    // All rejections so far were about the previous value.
                    state.refreshed_after = state.rejections;
                    new = Some(value.clone());
                    value
                }
            };
            generation = state.generation;
            state.failed = None;
            state.lease = Some(Lease {
                value,
                usable_until: usable.map(|usable| Instant::now() + usable),
                rejected_at: None,
            });
            true
        });
        if !published {
            self.metrics.credential_refreshed(true);
            return false;
        }
        let is_new = new.is_some();
        if is_new {
            self.latest.send_replace(new);
        }
        if let Some(lifetime) = lifetime {
            self.metrics
                .credential_expires(server_time::our_clock() + lifetime);
        }
        // A file read again without a change is not reported: every rejected call causes such a read.
        if lifetime.is_some() || is_new {
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

    fn record_failure(&self, error: &FetchError, pause: Duration, rejections: u64) {
        self.metrics.credential_refreshed(false);
        self.state.send_modify(|state| {
            state.refreshed_after = match self.on_rejection {
                // No rejection causes another refresh before the pause is over.
                OnRejection::Fetch { .. } => state.rejections,
                OnRejection::Recheck => rejections,
            };
            state.failed = Some(FailedFetch {
                rejected_by: error.rejected_by,
                cause: error.cause.clone(),
                next_fetch_at: Instant::now() + pause,
            });
        });
    }
}

/// The pause before a value of this lifetime is replaced: a random 75 to 85 % of it, so that many facades do not fetch at the same
/// time, and an issuer that is down has hours to recover before a token of 24 hours ends.
fn refresh_delay(lifetime: Duration) -> Duration {
    lifetime
        .mul_f64(0.75 + 0.1 * fastrand::f64())
        .max(SHORTEST_PAUSE)
}

/// The pause after a failure that follows `failures` others.
fn backoff(failures: u32, max: Duration) -> Duration {
    wait::backoff(FIRST_BACKOFF, max, failures).max(SHORTEST_PAUSE)
}
