//! Removes the facade's own credential, and the password of its proxy, from a reply, before anything else reads the reply.
//!
//! An upstream, gateway or proxy may echo the request. A message that repeats the credential is replaced by a sentence of the facade,
//! any other text is dropped. A caller's own token is left in the reply to this caller, but not in what is logged.

use std::sync::Once;

use super::Rejection;
use crate::{
    credentials::{Auth, fragments::Fragments},
    telemetry::Facts,
};

/// The secrets of one attempt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Secrets<'a> {
    pub(super) auth: &'a Auth,
    /// The password of the proxy, which receives it with plain requests.
    pub(super) proxy: Option<&'a Fragments>,
}

impl Secrets<'_> {
    /// Whether a text of a reply repeats a secret that the caller must not see.
    fn are_in_reply(&self, text: &str) -> bool {
        self.auth.is_own_in([text]) || self.are_of_proxy(text)
    }

    /// Whether a text of a reply repeats a secret that no log may contain.
    fn are_in_log(&self, text: &str) -> bool {
        self.auth.is_in(text) || self.are_of_proxy(text)
    }

    fn are_of_proxy(&self, text: &str) -> bool {
        self.proxy.is_some_and(|proxy| proxy.are_in([text]))
    }
}

/// Removes the credential from what logs, spans and error details contain.
pub(super) fn redact_facts(facts: &mut Facts, secrets: Secrets<'_>) {
    for text in [&mut facts.upstream_code, &mut facts.upstream_request_id] {
        if text.take_if(|text| secrets.are_in_log(text)).is_some() {
            warn();
        }
    }
}

/// Removes the credential from an error.
pub(super) fn redact_rejection(rejection: &mut Rejection, secrets: Secrets<'_>) {
    let authorization = &mut rejection.encoded_authorization_message;
    if authorization
        .take_if(|text| secrets.are_in_reply(text))
        .is_some()
    {
        warn();
    }
    if secrets.are_in_reply(&rejection.message) {
        rejection.message.clear();
        warn();
    }
}

/// Whether a text of one task repeats the credential. Warns once.
pub(super) fn is_secret(secrets: Secrets<'_>) -> impl Fn(&str) -> bool {
    let warned = Once::new();
    move |text| {
        let is_secret = secrets.are_in_reply(text);
        if is_secret {
            warned.call_once(warn);
        }
        is_secret
    }
}

fn warn() {
    tracing::warn!("a reply of upstream repeats the credential; the text is not passed on");
}
