//! `GetTaskDetail`.

use std::sync::Arc;

use http::HeaderMap;

use super::{Facade, reply::to_reply, request::validate};
use crate::{
    call::Call,
    error::{Error, FailedLookup},
    pb::{GetTaskDetailRequest, GetTaskDetailResponse},
    upstream::LookupContext,
};

/// Handles one call: validation, allowed projects, credentials, coalescer, upstream, reply.
pub(super) async fn handle(
    facade: &Facade,
    call: &mut Call,
    metadata: &HeaderMap,
    request: GetTaskDetailRequest,
) -> Result<GetTaskDetailResponse, Error> {
    let query = validate(request)?;
    facade.check_allowed(&query.project_id)?;
    let auth = facade
        .credentials
        .resolve(metadata, call.caller, call.deadline)
        .await
        .map_err(Error::Credentials)?;
    let key = facade.coalescer.key(auth.identity(), query);
    let (caller, span) = (call.caller, call.record.span().cloned());
    let lookup = facade.coalescer.look_up(
        &key,
        call.deadline,
        |progress| call.record.follow(Arc::clone(progress)),
        |deadline, progress| {
            // Identical calls share the work, so it owns its inputs. Its attempts belong to the leader's span, even if followers
            // still wait when the leader's call has ended.
            let (upstream, key) = (facade.upstream.clone(), Arc::clone(&key));
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
        },
    );
    let lookup = Arc::unwrap_or_clone(lookup.await);
    lookup.result.map(to_reply).map_err(|error| {
        Error::Upstream(Box::new(FailedLookup {
            error,
            facts: lookup.progress.facts(),
            owner: auth.owner(),
            query: key.query.clone(),
        }))
    })
}
