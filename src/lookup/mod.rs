//! One lookup of a task: coalesced with identical lookups, and passed to RDS with the credential of the call. Unary calls and the polls
//! of watches share this path.

mod shared;

use std::{pin::pin, sync::Arc, time::Duration};

pub use self::shared::task_name;
use crate::{
    caller::Caller,
    coalescer::{Coalescer, Found, Lookup, LookupKey},
    credentials::{Auth, Credentials, Owner},
    deadline::Deadline,
    error::{Error, FailedLookup},
    quota_store::QuotaStore,
    task::Task,
    telemetry::{Progress, ServerSpan},
    upstream::{self, LookupContext},
};

/// Looks up tasks. Each worker has its own, with its own connections to RDS; clones share them.
#[derive(Debug, Clone)]
pub struct Lookups {
    /// The source of credentials.
    pub credentials: Credentials,
    /// Coalesces and caches.
    pub coalescer: Arc<Coalescer>,
    /// The client of RDS.
    pub upstream: upstream::Client,
    /// What replicas share, if there is a quota store.
    pub store: Option<Arc<QuotaStore>>,
}

/// On whose behalf a lookup is made.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// Whose share of rates and budgets it uses.
    pub caller: Caller,
    /// When it must end.
    pub deadline: Deadline,
    /// The parent of its attempts' spans.
    pub span: Option<&'a Arc<ServerSpan>>,
    /// The greatest age of a cached result; `None` for any that the cache still holds.
    pub max_age: Option<Duration>,
}

impl Lookups {
    /// Looks up a task. Passes `follow` the progress of each lookup that this one waits for.
    pub async fn look_up(
        &self,
        key: &Arc<LookupKey>,
        auth: &Auth,
        origin: Origin<'_>,
        follow: impl FnMut(&Arc<Progress>),
    ) -> Arc<Lookup> {
        let Origin {
            caller,
            deadline,
            max_age,
            ..
        } = origin;
        let span = origin.span.cloned();
        self.coalescer
            .look_up(key, deadline, max_age, follow, |deadline, progress| {
                // Identical calls share the work, so it owns its inputs. Its attempts belong to the leader's span, even if followers
                // still wait when the leader's call has ended.
                let (upstream, key) = (self.upstream.clone(), Arc::clone(key));
                let (mut auth, span) = (auth.clone(), span.clone());
                let session = self.store.as_ref().map(|store| {
                    let identity = self.credentials.shared_identity(&auth);
                    store.session(&identity, deadline.deadline())
                });
                let shared_age = max_age.or(self.coalescer.ttl());
                async move {
                    let lookup = LookupContext {
                        query: &key.query,
                        caller,
                        deadline: &deadline,
                        progress: &progress,
                        span: span.as_ref(),
                        store: session.as_ref(),
                    };
                    let ask = pin!(upstream.show_task_detail(&mut auth, lookup));
                    match (&session, shared_age) {
                        // Boxed, so that calls without a store do not pay for its size.
                        (Some(session), Some(max_age)) => {
                            Box::pin(shared::look_up(session, lookup, max_age, ask)).await
                        }
                        _ => Found::from(ask.await),
                    }
                }
            })
            .await
    }
}

/// The task of a finished lookup, or the error of the call.
///
/// # Errors
/// [`Error::Upstream`].
pub fn into_task(lookup: Arc<Lookup>, key: &LookupKey, owner: Owner) -> Result<Arc<Task>, Error> {
    let lookup = Arc::unwrap_or_clone(lookup);
    lookup.result.map_err(|error| {
        Error::Upstream(Box::new(FailedLookup {
            error,
            facts: lookup.progress.facts(),
            owner,
            query: key.query.clone(),
        }))
    })
}
