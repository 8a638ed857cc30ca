//! Keeps the gateway from locking a wrong key, and fails calls at once while a key is locked.
//!
//! The gateway locks a key for five minutes after more than five bad signatures in a row ("API request signing guide"). So a
//! key is unproven until the gateway accepts its first signature, and again after a rejected signature or a lock: an unproven
//! key signs one request at a time. Once proven, an admission costs one atomic load.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::Error;
use crate::deadline::Deadline;

/// How long the gateway locks a key after too many bad signatures. Source: "API request signing guide", FAQ.
pub const KEY_LOCK: Duration = Duration::from_secs(5 * 60);

/// Rejected signatures in a row after which the guard locks the key. The gateway counts to five; the rest is for other programs
/// that use the same key.
const REJECTIONS_BEFORE_LOCK: u32 = 3;

/// The guard of one key.
#[derive(Debug)]
pub struct KeyGuard {
    /// The gateway accepted the last judged signature, and the key is not locked.
    proven: AtomicBool,
    state: Mutex<State>,
    /// Wakes the calls that wait for an admission.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The one request of an unproven key is in flight.
    probing: bool,
    /// Rejected signatures since the last accepted one.
    rejections: u32,
    /// The next rejected signature locks at once: the key was locked before, or its previous secret was rejected.
    wary: bool,
    locked_until: Option<Instant>,
}

impl KeyGuard {
    /// The guard of a key without a history.
    pub fn new() -> Self {
        Self::with(State::default())
    }

    /// The guard of a key with the same AK and another secret. The gateway may still count the old secret's bad signatures.
    pub(super) fn for_another_secret(&self) -> Self {
        let old = self.state();
        Self::with(State {
            wary: old.wary || old.rejections > 0,
            ..State::default()
        })
    }

    fn with(state: State) -> Self {
        Self {
            proven: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    /// Waits until a request may be signed with the key.
    ///
    /// # Errors
    /// - [`Error::Locked`]: the key is locked; calls do not wait for the end of a lock.
    /// - [`Error::DeadlineExceeded`]: requests of other calls were probing the key until the deadline.
    pub async fn admit(&self, deadline: Deadline) -> Result<Admission<'_>, Error> {
        loop {
            if self.proven.load(Ordering::Acquire) {
                return Ok(Admission {
                    guard: self,
                    probe: false,
                });
            }
            // Subscribe before the check, so that the end of a probe in between is not missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(admitted) = self.try_probe() {
                return admitted;
            }
            deadline
                .bound(changed)
                .await
                .map_err(|_| Error::DeadlineExceeded)?;
        }
    }

    /// `None` while the probe of another call is in flight.
    fn try_probe(&self) -> Option<Result<Admission<'_>, Error>> {
        let mut state = self.state();
        if let Some(until) = state.locked_until {
            let retry_after = until.saturating_duration_since(Instant::now());
            if !retry_after.is_zero() {
                return Some(Err(Error::Locked { retry_after }));
            }
            state.locked_until = None;
        }
        // The key may have been proven before this call took the mutex.
        if self.proven.load(Ordering::Acquire) {
            return Some(Ok(Admission {
                guard: self,
                probe: false,
            }));
        }
        if state.probing {
            return None;
        }
        state.probing = true;
        Some(Ok(Admission {
            guard: self,
            probe: true,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for KeyGuard {
    fn default() -> Self {
        Self::new()
    }
}

/// Permission to sign one request. Dropped without a verdict (a timeout, a cut connection), it leaves the key's state as it was.
#[derive(Debug)]
#[must_use = "hold it until the response is there"]
pub struct Admission<'a> {
    guard: &'a KeyGuard,
    probe: bool,
}

impl Admission<'_> {
    /// The gateway accepted the signature, whatever else it answered.
    pub fn accepted(self) {
        // Only a probe proves a key: the response to a request from before a rejection does not.
        if self.probe {
            let mut state = self.guard.state();
            if state.locked_until.is_none() {
                state.rejections = 0;
                state.wary = false;
                self.guard.proven.store(true, Ordering::Release);
            }
            drop(state);
            self.guard.changed.notify_waiters();
        }
    }

    /// The gateway rejected the signature; `lock_announced` if its message says that the key is locked.
    pub fn signature_refused(self, lock_announced: bool) {
        let mut state = self.guard.state();
        self.guard.proven.store(false, Ordering::Release);
        state.rejections = state.rejections.saturating_add(1);
        if lock_announced || state.wary || state.rejections >= REJECTIONS_BEFORE_LOCK {
            state.wary = true;
            state.locked_until = Some(Instant::now() + KEY_LOCK);
            drop(state);
            self.guard.changed.notify_waiters();
        }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if self.probe {
            self.guard.state().probing = false;
            self.guard.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn in_seconds(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds))
    }

    async fn admit(guard: &KeyGuard) -> Admission<'_> {
        guard.admit(in_seconds(1)).await.unwrap()
    }

    async fn reject_times(guard: &KeyGuard, times: u32) {
        for _ in 0..times {
            admit(guard).await.signature_refused(false);
        }
    }

    async fn remaining_lock(guard: &KeyGuard) -> Duration {
        match guard.admit(in_seconds(1)).await.unwrap_err() {
            Error::Locked { retry_after } => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn until_the_first_accepted_signature_one_request_is_in_flight_at_a_time() {
        let guard = KeyGuard::new();
        let first = admit(&guard).await;

        assert_eq!(
            guard.admit(in_seconds(1)).await.unwrap_err(),
            Error::DeadlineExceeded
        );

        drop(first);
        let second = admit(&guard).await;
        let (third, ()) = tokio::join!(guard.admit(in_seconds(1)), async { second.accepted() });
        let fourth = guard.admit(in_seconds(1)).await;
        assert!(third.is_ok() && fourth.is_ok(), "both in flight at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_with_a_wrong_key_sends_three_requests_and_fails_all_waiters_with_the_lock() {
        let guard = Arc::new(KeyGuard::new());
        let calls: Vec<_> = (0..100)
            .map(|_| {
                let guard = guard.clone();
                tokio::spawn(async move {
                    let admission = guard.admit(in_seconds(30)).await?;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    admission.signature_refused(false);
                    Ok::<(), Error>(())
                })
            })
            .collect();

        let mut sent = 0;
        for call in calls {
            match call.await.unwrap() {
                Ok(()) => sent += 1,
                Err(error) => assert_eq!(
                    error,
                    Error::Locked {
                        retry_after: KEY_LOCK
                    }
                ),
            }
        }

        assert_eq!(sent, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_lock_one_probe_is_sent_and_its_rejection_locks_again_at_once() {
        let guard = KeyGuard::new();
        reject_times(&guard, 3).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(remaining_lock(&guard).await, Duration::from_secs(240));

        tokio::time::sleep(Duration::from_secs(240)).await;
        let probe = admit(&guard).await;
        assert_eq!(
            guard.admit(in_seconds(1)).await.unwrap_err(),
            Error::DeadlineExceeded
        );
        probe.signature_refused(false);
        assert_eq!(remaining_lock(&guard).await, KEY_LOCK);

        tokio::time::sleep(KEY_LOCK).await;
        admit(&guard).await.accepted();
        reject_times(&guard, 2).await;
        admit(&guard).await.accepted();
    }

    #[tokio::test(start_paused = true)]
    async fn an_announced_lock_holds_at_once_even_for_a_proven_key_and_a_rejection_repeats_it() {
        let guard = KeyGuard::new();
        admit(&guard).await.accepted();

        admit(&guard).await.signature_refused(true);
        assert_eq!(remaining_lock(&guard).await, KEY_LOCK);

        tokio::time::sleep(KEY_LOCK).await;
        admit(&guard).await.signature_refused(false);
        assert_eq!(remaining_lock(&guard).await, KEY_LOCK);
    }

    #[tokio::test(start_paused = true)]
    async fn responses_to_older_requests_neither_lift_a_lock_nor_prove_a_rejected_key() {
        let guard = KeyGuard::new();
        admit(&guard).await.accepted();
        let (older, another) = (admit(&guard).await, admit(&guard).await);

        admit(&guard).await.signature_refused(false);
        older.accepted();
        let probe = admit(&guard).await;
        assert_eq!(
            guard.admit(in_seconds(1)).await.unwrap_err(),
            Error::DeadlineExceeded
        );
        another.signature_refused(true);
        probe.accepted();

        assert_eq!(remaining_lock(&guard).await, KEY_LOCK);
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_signature_resets_the_count_of_rejections() {
        let guard = KeyGuard::new();
        reject_times(&guard, 2).await;
        admit(&guard).await.accepted();

        reject_times(&guard, 2).await;

        assert!(guard.admit(in_seconds(1)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_gives_up_does_not_take_the_turn_of_the_next() {
        let guard = KeyGuard::new();
        let probe = admit(&guard).await;
        let ten_milliseconds = Duration::from_millis(10);

        let (_, patient, ()) = tokio::join!(
            async {
                guard
                    .admit(Deadline::after(ten_milliseconds))
                    .await
                    .map(drop)
            },
            guard.admit(in_seconds(5)),
            async {
                tokio::time::sleep(ten_milliseconds).await;
                drop(probe);
            }
        );

        assert!(patient.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn another_secret_for_a_rejected_key_may_fail_only_once() {
        let guard = KeyGuard::new();
        reject_times(&guard, 2).await;

        let changed = guard.for_another_secret();
        admit(&changed).await.signature_refused(false);

        assert_eq!(remaining_lock(&changed).await, KEY_LOCK);
    }
}
