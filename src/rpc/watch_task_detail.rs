//! `WatchTaskDetail`.

use std::sync::Arc;

use http::HeaderMap;

use super::{Facade, request::validate};
use crate::{
    call::Call,
    error::{Error, Violation},
    pb::{GetTaskDetailRequest, WatchTaskDetailRequest},
    watch::{WatchStream, Watcher},
};

const MAX_ETAG: usize = 64;

/// Starts one watch: validation, allowed projects, credentials, first poll.
pub(super) async fn handle(
    facade: &Facade,
    call: &mut Call,
    metadata: &HeaderMap,
    request: WatchTaskDetailRequest,
) -> Result<WatchStream, Error> {
    let WatchTaskDetailRequest {
        project_id,
        instance_id,
        workflow_id,
        workflow_name,
        etag,
        allow_missing,
    } = request;
    let task = GetTaskDetailRequest {
        project_id,
        instance_id,
        workflow_id,
        workflow_name,
    };
    let query = validate(task, etag_violation(&etag))?;
    call.record.project_id = Some(query.project_id.clone());
    facade.check_allowed(&query.project_id)?;
    let lookups = &facade.lookups;
    let auth = lookups
        .credentials
        .resolve(metadata, call.caller, call.deadline)
        .await
        .map_err(Error::Credentials)?;
    let key = lookups.coalescer.key(auth.identity(), query);
    let watcher = Watcher {
        caller: call.caller,
        auth,
        span: call.record.span.clone(),
        resumes: !etag.is_empty(),
    };
    let watch = facade
        .hub
        .watch(lookups, &key, watcher, etag, allow_missing);
    watch.await.map_err(Arc::unwrap_or_clone)
}

/// Why the etag of a request is invalid, if so.
pub fn etag_violation(etag: &str) -> Option<Violation> {
    let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_valid = etag.len() <= MAX_ETAG && etag.bytes().all(is_hex);
    (!is_valid).then(|| Violation {
        field: "etag",
        description: format!(
            "must be the etag of a message, at most {MAX_ETAG} of 0-9 and a-f, or empty"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_has_at_most_64_hex_digits() {
        let longest = "a".repeat(64);
        let too_long = "a".repeat(65);
        let cases = [
            ("", true),
            ("0", true),
            ("0123456789abcdef", true),
            (&longest, true),
            (&too_long, false),
            ("A", false),
            ("g", false),
            ("a b", false),
            ("\u{4e2d}", false),
        ];

        for (etag, expected) in cases {
            assert_eq!(etag_violation(etag).is_none(), expected, "{etag:?}");
        }
    }
}
