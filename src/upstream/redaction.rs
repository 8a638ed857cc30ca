//! Removes the facade's own credential from a reply, before anything else reads the reply.
//!
//! An upstream, gateway or proxy may echo the request. A message that repeats the credential is replaced by a sentence of the facade,
//! any other text is dropped. A caller's own token is left in the reply to this caller, but not in what is logged.

use std::sync::Once;

use super::Rejection;
use crate::{credentials::Auth, telemetry::Facts};

/// Removes the credential from what logs, spans and error details contain.
pub(super) fn redact_facts(facts: &mut Facts, auth: &Auth) {
    for text in [&mut facts.upstream_code, &mut facts.upstream_request_id] {
        if text.take_if(|text| auth.is_in(text)).is_some() {
            warn();
        }
    }
}

/// Removes the credential from an error.
pub(super) fn redact_rejection(rejection: &mut Rejection, auth: &Auth) {
    let authorization = &mut rejection.encoded_authorization_message;
    if authorization
        .take_if(|text| auth.is_own_in([&**text]))
        .is_some()
    {
        warn();
    }
    if auth.is_own_in([&*rejection.message]) {
        rejection.message.clear();
        warn();
    }
}

/// Whether a text of one task repeats the credential. Warns once.
pub(super) fn is_secret(auth: &Auth) -> impl Fn(&str) -> bool {
    let warned = Once::new();
    move |text| {
        let is_secret = auth.is_own_in([text]);
        if is_secret {
            warned.call_once(warn);
        }
        is_secret
    }
}

fn warn() {
    tracing::warn!("a reply of upstream repeats the credential; the text is not passed on");
}
