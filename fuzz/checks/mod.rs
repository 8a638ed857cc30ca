//! Invariants of the parsers of untrusted bytes, one file per parser. Each check compares the parser with a simple one written from
//! the specification, or with a closed list of results.
//!
//! `cargo test --test fuzz` runs each check for a second on the inputs in `tests/corpora` and on mutations of them.
//! `bash fuzz/run TARGET SECONDS` runs one check under libFuzzer, guided by coverage.

mod canonical_request;
pub(crate) mod error_envelope;
mod etag;
mod grpc_timeout;
mod issuer_reply;
mod otlp_reply;
mod profile_file;
mod reply_json;
mod request_validation;
mod retry_after;
mod status_contract;
mod store_entry;
mod store_reply;
mod task_texts;
mod trace_context;

/// Panics if the input breaks the invariant.
pub(crate) type Check = fn(&[u8]);

/// The targets: name, which is also the directory in `tests/corpora`, and check.
pub(crate) const TARGETS: [(&str, Check); 14] = [
    ("canonical_request", canonical_request::check),
    ("error_envelope", error_envelope::check),
    ("etag", etag::check),
    ("grpc_timeout", grpc_timeout::check),
    ("issuer_reply", issuer_reply::check),
    ("otlp_reply", otlp_reply::check),
    ("profile_file", profile_file::check),
    ("reply_json", reply_json::check),
    ("request_validation", request_validation::check),
    ("retry_after", retry_after::check),
    ("store_entry", store_entry::check),
    ("store_reply", store_reply::check),
    ("task_texts", task_texts::check),
    ("trace_context", trace_context::check),
];

/// Finds the check of a target.
pub(crate) fn find(target: &str) -> Check {
    let found = TARGETS.into_iter().find(|(name, _)| *name == target);
    found
        .unwrap_or_else(|| panic!("{target:?} is not one of {TARGETS:?}"))
        .1
}

/// Splits the input into `N` lines; missing lines are empty, and the last one may contain line feeds.
fn lines<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == b'\n');
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// The bytes as text, with U+FFFD for invalid UTF-8.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
