//! What must hold of every reader of bytes from outside, whatever the bytes are: one file and one check for each reader.
//!
//! `cargo test` runs each check for a second, on the inputs in `tests/corpora` and on what comes of them by small changes.
//! `bash fuzz/run TARGET SECONDS` runs one of them for as long as wanted, guided by coverage. Compiled for these two only.

mod canonical_request;
mod error_envelope;
mod grpc_timeout;
mod profile_file;
mod reply_json;
mod request_validation;
mod retry_after;
#[cfg(test)]
mod short_run;
mod trace_context;

/// Panics when what it is given shows that something does not hold.
pub type Check = fn(&[u8]);

/// The name of each target, as in `tests/corpora`, with its check.
pub const TARGETS: [(&str, Check); 8] = [
    ("canonical_request", canonical_request::check),
    ("error_envelope", error_envelope::check),
    ("grpc_timeout", grpc_timeout::check),
    ("profile_file", profile_file::check),
    ("reply_json", reply_json::check),
    ("request_validation", request_validation::check),
    ("retry_after", retry_after::check),
    ("trace_context", trace_context::check),
];

/// The input's lines, with all that is left in the last; empty where there is none.
fn lines<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == b'\n');
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Any bytes as text, with a mark in place of what is none.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
