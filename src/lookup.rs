//! One lookup of a task: coalesced with identical lookups, and passed to RDS with the credential of the call. Unary calls and the polls
//! of watches share this path.

use std::{sync::Arc, time::Duration};

use crate::{
    caller::Caller,
    coalescer::{Coalescer, Lookup, LookupKey},
    credentials::{Auth, Credentials, Owner},
    deadline::Deadline,
    error::{Error, FailedLookup},
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
                async move {
                    let lookup = LookupContext {
                        query: &key.query,
                        caller,
                        deadline: &deadline,
                        progress: &progress,
                        span: span.as_ref(),
                    };
                    upstream.show_task_detail(&mut auth, lookup).await
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
