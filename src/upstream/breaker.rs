//! Holds calls back while upstream is down: opens when half of at least twenty attempts in ten seconds failed, lets one
//! probe through every second and a half, and closes when a probe brings any answer that is no failure.
//!
//! Failures are transport failures and 502, 503 and 504. Other answers, timeouts of ours and cancellations are none: an
//! upstream that answers slowly or refuses is up.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::window::{Count, Window};

const MIN_ATTEMPTS: u64 = 20;

/// Short enough that service is back within two seconds after upstream is; long enough that probes take no more than
/// 40 of the 60 calls a minute that the vendor allows.
const OPEN_FOR: Duration = Duration::from_millis(1500);

/// The breaker of one endpoint, shared by all workers.
#[derive(Debug)]
pub(super) struct Breaker {
    attempts_and_failures: Window,
    /// Read on every attempt; the lock is taken only while it is set.
    tripped: AtomicBool,
    state: Mutex<State>,
    /// 1 from the opening to the probe that closes.
    opened: Gauge,
}

#[derive(Debug, Clone, Copy)]
struct State {
    open_until: Instant,
    probing: bool,
}

/// Permission for one attempt. Dropped without [`Admission::answered`] or [`Admission::failed`] it says nothing about
/// upstream, and a probe's place is free again.
#[derive(Debug)]
pub(super) struct Admission<'a> {
    breaker: &'a Breaker,
    probe: bool,
}

impl Breaker {
    pub(super) fn new(opened: Gauge) -> Self {
        Self {
            attempts_and_failures: Window::new(),
            tripped: AtomicBool::new(false),
            state: Mutex::new(State {
                open_until: Instant::now(),
                probing: false,
            }),
            opened,
        }
    }

    /// Lets an attempt pass, or tells how long to wait before the next probe may.
    pub(super) fn admit(&self) -> Result<Admission<'_>, Duration> {
        if !self.tripped.load(Ordering::Acquire) {
            return Ok(Admission {
                breaker: self,
                probe: false,
            });
        }
        let mut state = self.lock();
        if !self.tripped.load(Ordering::Acquire) {
            return Ok(Admission {
                breaker: self,
                probe: false,
            });
        }
        let left = state.open_until.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Err(left);
        }
        if state.probing {
            // The probe's end decides; a second is a fair guess for it.
            return Err(Duration::from_secs(1));
        }
        state.probing = true;
        Ok(Admission {
            breaker: self,
            probe: true,
        })
    }

    fn open(&self) {
        let mut state = self.lock();
        state.open_until = Instant::now() + OPEN_FOR;
        self.tripped.store(true, Ordering::Release);
        self.opened.set(1);
    }

    fn close(&self) {
        let _state = self.lock();
        self.attempts_and_failures.clear();
        self.tripped.store(false, Ordering::Release);
        self.opened.set(0);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission<'_> {
    /// Upstream answered, and not with 502, 503 or 504.
    pub(super) fn answered(self) {
        self.breaker.attempts_and_failures.add(Count::Total);
        if self.probe {
            self.breaker.close();
        }
    }

    /// A transport failure, or 502, 503 or 504.
    pub(super) fn failed(self) {
        let window = &self.breaker.attempts_and_failures;
        window.add(Count::Total);
        window.add(Count::Part);
        let (attempts, failures) = window.sums();
        let closed = !self.breaker.tripped.load(Ordering::Acquire);
        if self.probe || (closed && attempts >= MIN_ATTEMPTS && failures * 2 >= attempts) {
            self.breaker.open();
        }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if self.probe {
            self.breaker.lock().probing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(breaker: &Breaker, times: usize) {
        for _ in 0..times {
            breaker.admit().expect("the breaker is closed").failed();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_at_half_of_twenty_and_not_before() {
        let breaker = Breaker::new(Gauge::default());
        for _ in 0..10 {
            breaker.admit().expect("closed").answered();
        }

        fail(&breaker, 9);
        assert!(breaker.admit().is_ok(), "nine of nineteen");
        fail(&breaker, 1);

        assert_eq!(breaker.admit().expect_err("ten of twenty"), OPEN_FOR);
    }

    #[tokio::test(start_paused = true)]
    async fn the_gauge_is_one_from_the_opening_to_the_probe_that_closes() {
        let opened = Gauge::default();
        let breaker = Breaker::new(opened.clone());

        fail(&breaker, 20);
        let while_open = opened.get();
        tokio::time::advance(OPEN_FOR).await;
        let probe = breaker.admit().expect("half open");
        let half_open = opened.get();
        probe.answered();

        assert_eq!((while_open, half_open, opened.get()), (1, 1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_passes_when_the_time_is_over_and_its_answer_closes_it() {
        let breaker = Breaker::new(Gauge::default());
        fail(&breaker, 20);
        tokio::time::advance(OPEN_FOR).await;

        let probe = breaker.admit().expect("half open");
        assert!(breaker.admit().is_err(), "a second probe");
        probe.answered();

        assert!(breaker.admit().is_ok());
        fail(&breaker, 19);
        assert!(breaker.admit().is_ok(), "the old failures are forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_probe_opens_it_again() {
        let breaker = Breaker::new(Gauge::default());
        fail(&breaker, 20);
        tokio::time::advance(OPEN_FOR).await;

        breaker.admit().expect("half open").failed();

        assert_eq!(breaker.admit().expect_err("open again"), OPEN_FOR);
        tokio::time::advance(OPEN_FOR).await;
        assert!(breaker.admit().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_probe_frees_its_place() {
        let breaker = Breaker::new(Gauge::default());
        fail(&breaker, 20);
        tokio::time::advance(OPEN_FOR).await;

        drop(breaker.admit().expect("half open"));

        assert!(breaker.admit().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_end_late_do_not_prolong_the_opening() {
        let breaker = Breaker::new(Gauge::default());
        let stragglers: Vec<_> = (0..30).map(|_| breaker.admit().expect("closed")).collect();
        fail(&breaker, 20);
        tokio::time::advance(OPEN_FOR / 2).await;

        stragglers.into_iter().for_each(Admission::failed);

        assert_eq!(breaker.admit().expect_err("still open"), OPEN_FOR / 2);
    }
}
