//! Tracks the vendor's throttle windows: no attempt goes out before the end of its window.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::Instant;

use super::{Rejection, throttling_text::Subject};
use crate::{credentials::Identity, reason::Reason, wait::MAX_RETRY_AFTER};

/// Limit on tracked windows; the least recently used ones are evicted.
const MAX_WINDOWS: u64 = 10_000;

/// The windows of one endpoint, shared by all workers.
#[derive(Debug)]
pub(super) struct Throttle {
    base: Instant,
    windows: Cache<Key, Window>,
    /// The end of the latest window, in nanoseconds since `base`. Once it has passed, a check is one atomic load.
    latest: AtomicU64,
}

/// The identity, or `None` for a limit per address or of the API as a whole; and the instance, or `None` for all instances.
type Key = (Option<Identity>, Option<String>);

/// A throttle window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    until: Instant,
    subject: Option<Subject>,
}

/// An attempt inside a throttle window, or beyond the configured rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Throttled {
    pub(super) retry_after: Duration,
    /// Whose requests the vendor counts, if its message names a subject.
    pub(super) subject: Option<Subject>,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self {
            base: Instant::now(),
            windows: Cache::builder()
                .max_capacity(MAX_WINDOWS)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(MAX_RETRY_AFTER)
                .build(),
            latest: AtomicU64::new(0),
        }
    }

    /// Checks that `identity` is in no window, for `instance` if windows are kept for each instance.
    ///
    /// # Errors
    /// [`Throttled`] with the time to the end of the window.
    pub(super) fn check(
        &self,
        identity: Identity,
        instance: Option<&str>,
    ) -> Result<(), Throttled> {
        let now = Instant::now();
        if self.latest.load(Ordering::Relaxed) <= nanos(now - self.base) {
            return Ok(());
        }
        let longest = [Some(identity), None]
            .into_iter()
            .filter_map(|identity| self.windows.get(&(identity, instance.map(str::to_owned))))
            .max_by_key(|window| window.until);
        match longest.filter(|window| window.until > now) {
            Some(Window { until, subject }) => Err(Throttled {
                retry_after: until - now,
                subject,
            }),
            None => Ok(()),
        }
    }

    /// Records the window that a reply to `identity` opens, if any.
    pub(super) fn record(&self, identity: Identity, instance: Option<&str>, rejection: &Rejection) {
        if rejection.verdict.reason == Reason::Throttled
            && let Some(wait) = rejection.retry_after
        {
            self.open(identity, instance, wait, rejection.throttled_subject);
        }
    }

    /// Opens a window. Replies to concurrent attempts come in any order, so the longer of two windows counts.
    pub(super) fn open(
        &self,
        identity: Identity,
        instance: Option<&str>,
        wait: Duration,
        subject: Option<Subject>,
    ) {
        let until = Instant::now() + wait.min(MAX_RETRY_AFTER);
        let window = Window { until, subject };
        let longer = |known: Window| if known.until > until { known } else { window };
        let is_everyone = subject.is_some_and(Subject::is_everyone);
        let key = (
            (!is_everyone).then_some(identity),
            instance.map(str::to_owned),
        );
        self.windows
            .entry(key)
            .and_upsert_with(|known| known.map_or(window, |known| longer(known.into_value())));
        self.latest
            .fetch_max(nanos(until - self.base), Ordering::Relaxed);
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
        let reply = rejection::from_reply(
            http_status,
            &headers,
            body.as_bytes(),
            SystemTime::UNIX_EPOCH,
        );
        throttle.record(ANN, None, &reply.0);
        throttle
    }

    #[tokio::test(start_paused = true)]
    async fn the_window_is_the_headers_else_the_texts_else_a_minute_and_everyones_by_address_or_api()
     {
        let user = "policy user over ratelimit,limit:200,time:2 minute";
        let ip = "policy ip over ratelimit,limit:200,time:2 minute";
        let api = "policy api over ratelimit,limit:200,time:2 minute";
        let cases = [
            ("no wait stated", 429, None, "", Some(60), None),
            ("header", 429, Some("7"), "", Some(7), None),
            ("header and text", 429, Some("7"), user, Some(7), None),
            ("text", 429, None, user, Some(120), None),
            ("text by address", 429, None, ip, Some(120), Some(120)),
            (
                "text of the whole API",
                429,
                None,
                api,
                Some(120),
                Some(120),
            ),
            (
                "header, text by address",
                429,
                Some("7"),
                ip,
                Some(7),
                Some(7),
            ),
            ("an hour", 429, Some("3600"), "", Some(300), None),
            ("no wait", 429, Some("0"), "", Some(60), None),
            ("no wait, text", 429, Some("0"), user, Some(120), None),
            (
                "a date in the past",
                429,
                Some("Thu, 01 Jan 1970 00:00:00 GMT"),
                "",
                Some(60),
                None,
            ),
            ("negative", 429, Some("-5"), "", Some(60), None),
            ("another status", 503, Some("7"), "", None, None),
        ];

        for (case, http_status, retry_after, text, ann, bob) in cases {
            let throttle = throttle_after(http_status, retry_after, text);

            let waits = [ANN, BOB]
                .map(|identity| throttle.check(identity, None).err())
                .map(|throttled| throttled.map(|throttled| throttled.retry_after));

            assert_eq!(waits, [ann.map(seconds), bob.map(seconds)], "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_ends_on_time() {
        for subject in [None, Some(Subject::Ip), Some(Subject::Api)] {
            let throttle = Throttle::new();
            throttle.open(ANN, None, seconds(7), subject);

            tokio::time::advance(seconds(7) - Duration::from_nanos(1)).await;

            let throttled = throttle.check(ANN, None).unwrap_err();
            assert_eq!(throttled.retry_after, Duration::from_nanos(1));
            assert_eq!(throttled.subject, subject);
            tokio::time::advance(Duration::from_nanos(1)).await;
            assert_eq!(throttle.check(ANN, None), Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_shorter_window_does_not_end_a_longer_one() {
        for subject in [None, Some(Subject::Ip), Some(Subject::Api)] {
            let throttle = Throttle::new();

            throttle.open(ANN, None, seconds(60), subject);
            throttle.open(ANN, None, seconds(1), subject);

            let throttled = throttle.check(ANN, None).unwrap_err();
            assert_eq!(throttled.retry_after, seconds(60));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_of_an_instance_applies_to_no_other_instance() {
        for (subject, bob) in [(None, Ok(())), (Some(Subject::Ip), Err(seconds(60)))] {
            let throttle = Throttle::new();

            throttle.open(ANN, Some("i"), seconds(60), subject);

            let check = |identity, instance| {
                let checked = throttle.check(identity, Some(instance));
                checked.map_err(|throttled| throttled.retry_after)
            };
            assert_eq!(check(ANN, "i"), Err(seconds(60)));
            assert_eq!(check(BOB, "i"), bob);
            for identity in [ANN, BOB] {
                assert_eq!(check(identity, "j"), Ok(()));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn windows_are_tracked_up_to_a_limit() {
        let throttle = Throttle::new();

        for number in 0..3 * u128::from(MAX_WINDOWS) {
            let identity = Identity::Caller(number.to_be_bytes());
            throttle.open(identity, None, seconds(60), None);
        }

        throttle.windows.run_pending_tasks();
        assert!(throttle.windows.entry_count() <= MAX_WINDOWS);
    }
}
