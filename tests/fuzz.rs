//! A short run of each check in `fuzz/checks`. No coverage guides it, so it starts from the corpus and mutates little at a time.
//!
//! Each input is made from a separate seed. A failure prints input and seed; `FUZZ_SEED=<seed> cargo test --test fuzz <target>`
//! runs that one input again.

#[path = "../fuzz/checks/mod.rs"]
mod checks;

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    time::{Duration, Instant},
};

use http::HeaderMap;
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use rds_task_facade::credentials::Owner;

use checks::{Check, TARGETS, error_envelope};

const RUN: Duration = Duration::from_secs(1);
const LONGEST_INPUT: usize = 4096;

/// Runs the check of this target on its corpus, and for a second on mutations of it.
fn short_run(target: &str) {
    let check = checks::find(target);
    let corpus = corpus(target);
    for (name, input) in &corpus {
        run(check, input, &format!("tests/corpora/{target}/{name}"));
    }
    let corpus: Vec<_> = corpus.into_iter().map(|(_, input)| input).collect();

    if let Some(seed) = seed() {
        return run(check, &mutated(&corpus, seed), "FUZZ_SEED");
    }
    let end = Instant::now() + RUN;
    while Instant::now() < end {
        let seed = fastrand::u64(..);
        let again = format!("FUZZ_SEED={seed} cargo test --test fuzz {target}");
        run(check, &mutated(&corpus, seed), &again);
    }
}

#[expect(clippy::disallowed_methods, reason = "not a setting of the program")]
fn seed() -> Option<u64> {
    let seed = env::var("FUZZ_SEED").ok()?;
    Some(seed.parse().expect("FUZZ_SEED is a number"))
}

/// Name and content of each file, in the order of their names, so that a seed means the same everywhere.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = corpora().join(target);
    let corpus: Vec<_> = names_in(&folder)
        .into_iter()
        .map(|name| {
            let content = fs::read(folder.join(&name)).expect("a file");
            (name, content)
        })
        .collect();
    assert!(!corpus.is_empty(), "{target}");
    corpus
}

fn corpora() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpora"))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a UTF-8 name"))
        .collect();
    names.sort();
    names
}

fn run(check: Check, input: &[u8], origin: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(input))) {
        eprintln!("input: b\"{}\"\nfrom: {origin}", input.escape_ascii());
        resume_unwind(panic);
    }
}

/// An input of the corpus with a few mutations, all chosen by the seed.
fn mutated(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut input = random.choice(corpus).expect("a corpus").clone();
    for _ in 0..random.usize(1..6) {
        mutate(&mut input, corpus, &mut random);
    }
    input.truncate(LONGEST_INPUT);
    input
}

/// One mutation: inserts or changes a byte, flips a bit, removes or doubles a part, or splices in a part of another input.
fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut fastrand::Rng) {
    const SYNTAX: &[u8] = b"\0\t\n\r \"%+,-./09:;=[\\]aAfFzZ{}~\x7f\x80\xc2\xe2\xff";
    let begin = random.usize(..=input.len());
    let end = random.usize(begin..=input.len().min(begin + 16));
    match random.u8(0..6) {
        0 => input.insert(begin, *random.choice(SYNTAX).expect("not empty")),
        1 if begin < input.len() => input[begin] ^= 1 << random.u8(0..8),
        2 if begin < input.len() => input[begin] = random.u8(..),
        3 => drop(input.drain(begin..end)),
        4 => input.extend_from_within(begin..end),
        _ => {
            let other = random.choice(corpus).expect("a corpus");
            let from = random.usize(..=other.len());
            let to = random.usize(from..=other.len());
            input.splice(begin..end, other[from..to].iter().copied());
        }
    }
}

#[test]
fn every_corpus_belongs_to_a_target() {
    assert_eq!(names_in(corpora()), TARGETS.map(|(name, _)| name));
}

#[test]
fn a_seed_always_makes_the_same_input() {
    let corpus = [b"first".to_vec(), b"second".to_vec()];

    for seed in 0..100 {
        assert_eq!(mutated(&corpus, seed), mutated(&corpus, seed), "{seed}");
    }
}

#[test]
fn canonical_request_is_signed_as_a_slow_signer_signs_it() {
    short_run("canonical_request");
}

#[test]
fn error_envelope_becomes_a_complete_status_without_secrets() {
    short_run("error_envelope");
}

#[test]
fn etag_is_equal_for_equal_texts_only() {
    short_run("etag");
}

#[test]
fn grpc_timeout_is_parsed_by_the_grammar_of_grpc() {
    short_run("grpc_timeout");
}

#[test]
fn issuer_reply_is_a_credential_or_an_error_without_secrets() {
    short_run("issuer_reply");
}

#[test]
fn otlp_reply_counts_rejected_spans_as_a_slow_parser_does() {
    short_run("otlp_reply");
}

#[test]
fn profile_file_gives_the_key_written_in_it_or_an_error_without_its_values() {
    short_run("profile_file");
}

#[test]
fn reply_json_is_the_task_in_its_json_tree_or_an_error() {
    short_run("reply_json");
}

#[test]
fn request_validation_accepts_a_request_or_names_every_broken_field() {
    short_run("request_validation");
}

#[test]
fn retry_after_asks_for_five_minutes_at_most() {
    short_run("retry_after");
}

#[test]
fn store_entry_is_used_only_if_authentic_and_young() {
    short_run("store_entry");
}

#[test]
fn store_reply_is_a_bounded_decision_or_a_problem_without_its_text() {
    short_run("store_reply");
}

#[test]
fn task_texts_give_the_typed_fields_or_none() {
    short_run("task_texts");
}

#[test]
fn trace_context_is_accepted_by_the_rules_of_w3c() {
    short_run("trace_context");
}

/// An error object of the vendor with any texts.
fn error_object() -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![
        Just("DBS.200543".to_owned()),
        Just("APIGW.0301".to_owned()),
        Just("APIGW.0308".to_owned()),
        any::<String>(),
    ];
    (code, any::<String>(), "[a-z]{0,20}", ".{0,3000}").prop_map(|(code, text, key, long)| {
        let object = serde_json::json!({
            "error_code": code, "error_msg": text, key: {"message": text},
            "encoded_authorization_message": long, "request_id": text,
        });
        object.to_string().into_bytes()
    })
}

/// `PROPTEST_RNG_SEED` sets the seed; failures are stored next to this file and run again.
fn persisted() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(persisted())]

    #[test]
    fn any_reply_becomes_a_complete_status(
        http_status: u16,
        body in prop_oneof![any::<Vec<u8>>(), error_object()],
        retry_after in prop_oneof!["[ -~]{0,20}", "[0-9]{1,30}"],
        request_id in "[ -~]{0,200}",
    ) {
        let head = format!("{http_status}\n{retry_after}\n{request_id}\n");

        error_envelope::check(&[head.as_bytes(), &body].concat());
    }

    #[test]
    fn a_body_that_is_not_json_never_reaches_the_caller(
        http_status in any::<u16>().prop_filter("a failure", |status| *status != 200),
        tail in "[a-z]{8,40}",
    ) {
        let body = format!("<p>{tail} {tail}");
        let rejection = error_envelope::rejection_of(http_status, &HeaderMap::new(), body.as_bytes());
        let (rejection, facts) = rejection.expect("not 200");

        let status = error_envelope::status_of(&rejection, &facts, Owner::Caller);

        prop_assert!(!status.message().contains(&tail));
        prop_assert!(!String::from_utf8_lossy(status.details()).contains(&tail));
    }
}
