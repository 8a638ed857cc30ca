//! Remembers whom the vendor throttles, and until when: no attempt of theirs goes out before that.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use moka::sync::Cache;
use tokio::time::Instant;

use super::Rejection;
use crate::{credentials::Identity, reason::Reason, wait::MAX_RETRY_AFTER};

/// Identities that are remembered at once; beyond it the least used are forgotten and ask upstream again.
const MAX_IDENTITIES: u64 = 10_000;

/// The windows of one endpoint, shared by all workers.
#[derive(Debug)]
pub(super) struct Throttle {
    base: Instant,
    windows: Cache<Identity, Instant>,
    /// End of the latest window of anyone, in nanoseconds since `base`: mostly past, and then nothing else is looked at.
    latest: AtomicU64,
    /// End of the window of all identities, for a limit that counts by address.
    everyone: AtomicU64,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self {
            base: Instant::now(),
            windows: Cache::builder()
                .max_capacity(MAX_IDENTITIES)
                .time_to_live(MAX_RETRY_AFTER)
                .build(),
            latest: AtomicU64::new(0),
            everyone: AtomicU64::new(0),
        }
    }

    /// Lets an attempt of `identity` pass.
    ///
    /// # Errors
    /// How long it has to wait.
    pub(super) fn check(&self, identity: Identity) -> Result<(), Duration> {
        let now = Instant::now();
        let since_base = nanos(now - self.base);
        if self.latest.load(Ordering::Relaxed) <= since_base {
            return Ok(());
        }
        let everyone = self
            .everyone
            .load(Ordering::Relaxed)
            .saturating_sub(since_base);
        let own = self
            .windows
            .get(&identity)
            .map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        let wait = own.max(Duration::from_nanos(everyone));
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }

    /// Remembers what an answer to `identity` says about its rate, if it does.
    pub(super) fn learn(&self, identity: Identity, rejection: &Rejection) {
        if rejection.verdict.reason == Reason::Throttled
            && let Some(wait) = rejection.retry_after
        {
            let by_address = rejection.throttled_subject.as_deref() == Some("ip");
            self.remember(identity, wait, by_address);
        }
    }

    /// Upstream throttles `identity`, or with `by_address` everyone who calls from here. Of two windows the longer counts:
    /// the answers of calls that were out together come in any order.
    fn remember(&self, identity: Identity, wait: Duration, by_address: bool) {
        let until = Instant::now() + wait.min(MAX_RETRY_AFTER);
        let since_base = nanos(until - self.base);
        if by_address {
            self.everyone.fetch_max(since_base, Ordering::Relaxed);
        } else {
            self.windows.entry(identity).and_upsert_with(|known| {
                known.map_or(until, |known| known.into_value().max(until))
            });
        }
        self.latest.fetch_max(since_base, Ordering::Relaxed);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http::{HeaderMap, header::RETRY_AFTER};

    use super::*;
    use crate::upstream::rejection;

    const ANN: Identity = Identity::Caller([1; 16]);
    const BOB: Identity = Identity::Caller([2; 16]);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn throttle_after(http_status: u16, retry_after: Option<&str>, text: &str) -> Throttle {
        let throttle = Throttle::new();
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, value.parse().unwrap());
        }
        let body = format!(r#"{{"error_code":"APIGW.0308","error_msg":"{text}"}}"#);
        let body = if text.is_empty() { "" } else { &body };
        let answer = rejection::of_answer(
            http_status,
            &headers,
            body.as_bytes(),
            SystemTime::UNIX_EPOCH,
        );
        throttle.learn(ANN, &answer.0);
        throttle
    }

    #[tokio::test(start_paused = true)]
    async fn the_window_is_the_headers_else_the_texts_else_a_minute_and_by_address_everyones() {
        let user = "policy user over ratelimit,limit:200,time:2 minute";
        let ip = "policy ip over ratelimit,limit:200,time:2 minute";
        let cases = [
            ("nothing said", 429, None, "", Some(60), None),
            ("header", 429, Some("7"), "", Some(7), None),
            ("header and text", 429, Some("7"), user, Some(7), None),
            ("text", 429, None, user, Some(120), None),
            ("text by address", 429, None, ip, Some(120), Some(120)),
            (
                "header, text by address",
                429,
                Some("7"),
                ip,
                Some(7),
                Some(7),
            ),
            ("an hour", 429, Some("3600"), "", Some(300), None),
            ("over already", 429, Some("0"), "", None, None),
            ("another answer", 503, Some("7"), "", None, None),
        ];

        for (case, http_status, retry_after, text, ann, bob) in cases {
            let throttle = throttle_after(http_status, retry_after, text);

            let waits = [ANN, BOB].map(|identity| throttle.check(identity).err());

            assert_eq!(waits, [ann.map(seconds), bob.map(seconds)], "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_is_forgotten_when_it_is_over_and_not_before() {
        for by_address in [false, true] {
            let throttle = Throttle::new();
            throttle.remember(ANN, seconds(7), by_address);

            tokio::time::advance(seconds(7) - Duration::from_nanos(1)).await;

            assert_eq!(throttle.check(ANN), Err(Duration::from_nanos(1)));
            tokio::time::advance(Duration::from_nanos(1)).await;
            assert_eq!(throttle.check(ANN), Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_shorter_window_does_not_end_a_longer_one() {
        for by_address in [false, true] {
            let throttle = Throttle::new();

            throttle.remember(ANN, seconds(60), by_address);
            throttle.remember(ANN, seconds(1), by_address);

            assert_eq!(throttle.check(ANN), Err(seconds(60)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ever_new_identities_are_not_all_remembered() {
        let throttle = Throttle::new();

        for number in 0..3 * u128::from(MAX_IDENTITIES) {
            throttle.remember(Identity::Caller(number.to_be_bytes()), seconds(60), false);
        }

        throttle.windows.run_pending_tasks();
        assert!(throttle.windows.entry_count() <= MAX_IDENTITIES);
    }
}
