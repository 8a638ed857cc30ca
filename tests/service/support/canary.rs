//! Looks for secrets where no secret may appear.

use tonic::Status;

use super::{Program, program::run};

/// Every secret of a test holds this word, so one search finds them all.
const WORD: &str = "canary";

/// The canary in base64, at each of the three alignments.
const IN_BASE64: [&str; 3] = ["Y2FuYXJ5", "NhbmFye", "jYW5hcn"];

/// Fails when `text` holds a canary; `place` says where it comes from.
#[track_caller]
pub(crate) fn assert_no_canary(place: &str, text: &str) {
    for secret in [WORD].iter().chain(&IN_BASE64) {
        assert!(!text.contains(secret), "{place} shows a secret: {text}");
    }
}

/// Looks through message, details and metadata of a failed call.
#[track_caller]
pub(crate) fn assert_no_canary_in_status(place: &str, status: &Status) {
    assert_no_canary(place, status.message());
    assert_no_canary(place, &String::from_utf8_lossy(status.details()));
    assert_no_canary(place, &format!("{:?}", status.metadata()));
}

/// Looks through all that a running program has shown by itself: its log and its metrics.
pub(crate) async fn assert_no_canary_shown(place: &str, program: &Program) {
    let (_, metrics) = program.admin("/metrics").await;
    assert_no_canary(place, &metrics);
    for line in program.logs() {
        assert_no_canary(place, &line);
    }
}

/// Looks through what `serve` prints about itself and its configuration with these settings.
pub(crate) fn assert_no_canary_printed(place: &str, args: &[&str], env: &[(&str, &str)]) {
    for flag in ["--print-config", "--help"] {
        let (code, out, err) = run(&[&["serve"], args, &[flag]].concat(), env);
        assert_eq!(code, 0, "{place} {flag}: {err}");
        assert_no_canary(place, &out);
        assert_no_canary(place, &err);
    }
}
