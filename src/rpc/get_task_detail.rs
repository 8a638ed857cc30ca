//! `GetTaskDetail`.

use std::sync::Arc;

use http::HeaderMap;

use super::{Facade, request::validate};
use crate::{
    call::Call,
    error::Error,
    lookup::{self, Origin},
    pb::GetTaskDetailRequest,
    task::Task,
};

/// Handles one call: validation, allowed projects, credentials, lookup, reply.
pub(super) async fn handle(
    facade: &Facade,
    call: &mut Call,
    metadata: &HeaderMap,
    request: GetTaskDetailRequest,
) -> Result<Arc<Task>, Error> {
    let query = validate(request, None)?;
    call.record.project_id = Some(query.project_id.clone());
    facade.check_allowed(&query.project_id)?;
    let lookups = &facade.lookups;
    let auth = lookups
        .credentials
        .resolve(metadata, call.caller, call.deadline)
        .await
        .map_err(Error::Credentials)?;
    let key = lookups.coalescer.key(auth.identity(), query);
    let span = call.record.span.clone();
    let origin = Origin {
        caller: call.caller,
        deadline: call.deadline,
        span: span.as_ref(),
        max_age: None,
    };
    let follow = |progress: &Arc<_>| call.record.progress = Some(Arc::clone(progress));
    let lookup = lookups.look_up(&key, &auth, origin, follow).await;
    lookup::into_task(lookup, &key, auth.owner())
}
