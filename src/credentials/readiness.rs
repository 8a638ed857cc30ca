//! Whether the facade has a credential that calls can use.
//!
//! A key that RDS has never accepted rests after its first rejection. The facade is not ready until the rest is over, so that a rollout
//! with a wrong key stops at its first replica, before several replicas together get the key locked.

use std::{convert::Infallible, sync::Arc};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::auth::AccessKey;
use crate::deadline::THIRTY_YEARS;

/// Sets readiness, and withdraws it when the task that holds this ends, even by a panic.
pub(super) struct Readiness(pub(super) Arc<watch::Sender<bool>>);

impl Drop for Readiness {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

impl Readiness {
    /// Ready from the first token on, until the refresher ends.
    pub(super) async fn follow_tokens<V>(self, mut latest: watch::Receiver<Option<V>>) {
        if latest.wait_for(Option::is_some).await.is_ok() {
            self.0.send_replace(true);
        }
        while latest.changed().await.is_ok() {}
    }

    /// Ready while the latest key does not rest unproven, until the refresher ends.
    pub(super) async fn follow_keys(self, mut latest: watch::Receiver<Option<Arc<AccessKey>>>) {
        loop {
            let key = latest.borrow_and_update().clone();
            let rests = async {
                match &key {
                    Some(key) => self.follow_rests(key).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = latest.changed() => if changed.is_err() {
                    return;
                },
                never = rests => match never {},
            }
        }
    }

    /// Ready while the key does not rest unproven.
    pub(super) async fn follow_key(self, key: Arc<AccessKey>) {
        match self.follow_rests(&key).await {}
    }

    async fn follow_rests(&self, key: &AccessKey) -> Infallible {
        let mut rest = key.guard.unproven_rest();
        loop {
            let now = Instant::now();
            let until = rest.borrow_and_update().filter(|until| now < *until);
            self.0.send_replace(until.is_none());
            if let Some(until) = until {
                tracing::warn!(
                    retry_seconds = (until - now).as_secs(),
                    "not ready: RDS rejected a key that it has never accepted"
                );
            }
            tokio::select! {
                () = sleep_until(until.unwrap_or(now + THIRTY_YEARS)) => {}
                // The guard holds the sender.
                _ = rest.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        credentials::key_guard::{KEY_LOCK, SigningPermit},
        deadline::Deadline,
    };

    const SECOND: std::time::Duration = std::time::Duration::from_secs(1);

    fn key(secret: &str) -> Arc<AccessKey> {
        Arc::new(AccessKey::parse("AK", secret, None).unwrap())
    }

    async fn admit(key: &AccessKey) -> SigningPermit<'_> {
        let deadline = Deadline::after(SECOND);
        key.guard
            .admit("p", crate::caller::Caller::Connection(1), deadline)
            .await
            .unwrap()
    }

    fn readiness() -> (Readiness, watch::Receiver<bool>) {
        let (ready, seen) = watch::channel(false);
        (Readiness(Arc::new(ready)), seen)
    }

    async fn until(ready: &mut watch::Receiver<bool>, expected: bool) {
        let changed = ready.wait_for(|ready| *ready == expected);
        let within = tokio::time::timeout(2 * KEY_LOCK, changed).await;
        within.expect("readiness changes").unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn each_rest_of_a_key_that_was_never_accepted_withdraws_readiness_until_its_end() {
        let (readiness, mut ready) = readiness();
        let key = key("wrong");
        let task = tokio::spawn(readiness.follow_key(key.clone()));
        until(&mut ready, true).await;

        for _ in 0..2 {
            admit(&key).await.rejected();
            let begun = Instant::now();
            until(&mut ready, false).await;
            assert_eq!(begun.elapsed(), std::time::Duration::ZERO);
            until(&mut ready, true).await;
            assert_eq!(begun.elapsed().as_secs(), KEY_LOCK.as_secs());
        }
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_was_accepted_rests_without_withdrawing_readiness() {
        let (readiness, mut ready) = readiness();
        let key = key("good");
        let _task = tokio::spawn(readiness.follow_key(key.clone()));
        until(&mut ready, true).await;
        admit(&key).await.accepted();
        ready.borrow_and_update();

        admit(&key).await.locked();
        tokio::time::sleep(SECOND).await;

        assert!(*ready.borrow());
    }

    #[tokio::test(start_paused = true)]
    async fn another_key_ends_the_rest_and_the_end_of_the_refresher_ends_readiness() {
        let (readiness, mut ready) = readiness();
        let (keys, latest) = watch::channel(None);
        let _task = tokio::spawn(readiness.follow_keys(latest));
        tokio::time::sleep(SECOND).await;
        assert!(!*ready.borrow(), "no key yet");

        let wrong = key("wrong");
        keys.send_replace(Some(wrong.clone()));
        until(&mut ready, true).await;
        admit(&wrong).await.rejected();
        until(&mut ready, false).await;

        let rest_begun = Instant::now();
        keys.send_replace(Some(key("right")));
        until(&mut ready, true).await;
        assert!(rest_begun.elapsed() < KEY_LOCK);

        drop(keys);
        until(&mut ready, false).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_makes_ready_until_the_refresher_ends() {
        let (readiness, mut ready) = readiness();
        let (tokens, latest) = watch::channel(None);
        let _task = tokio::spawn(readiness.follow_tokens(latest));

        tokens.send_replace(Some("token"));
        until(&mut ready, true).await;
        drop(tokens);
        until(&mut ready, false).await;
    }
}
