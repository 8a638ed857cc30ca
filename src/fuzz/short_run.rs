//! Runs each check for a second. No coverage guides it, so it starts from the corpus and changes little at a time.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    time::{Duration, Instant},
};

use super::{Check, TARGETS};

const SHORT: Duration = Duration::from_secs(1);
const LONGEST_INPUT: usize = 4096;

/// Runs the check of this target on its corpus, and for a second on inputs made of it.
pub(super) fn holds(target: &str) {
    let (_, check) = TARGETS
        .into_iter()
        .find(|(name, _)| *name == target)
        .expect("a target of this name");
    let corpus = corpus(target);
    for input in &corpus {
        run(check, input);
    }

    let mut random = fastrand::Rng::new();
    let end = Instant::now() + SHORT;
    while Instant::now() < end {
        let mut input = random.choice(&corpus).expect("a corpus").clone();
        for _ in 0..random.usize(1..6) {
            change(&mut input, &corpus, &mut random);
        }
        input.truncate(LONGEST_INPUT);
        run(check, &input);
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpora");
    let files = fs::read_dir(folder.join(target)).expect("the target has a corpus");
    let corpus: Vec<_> = files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!corpus.is_empty(), "{target}");
    corpus
}

fn run(check: Check, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(input))) {
        eprintln!("the input was b\"{}\"", input.escape_ascii());
        resume_unwind(panic);
    }
}

/// One small change: a byte, a bit, a part gone or doubled, or a part of another input.
fn change(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut fastrand::Rng) {
    const TELLING: &[u8] = b"\0\t\n\r \"%+,-./09:;=[\\]aAfFzZ{}~\x7f\x80\xc2\xe2\xff";
    let begin = random.usize(..=input.len());
    let end = random.usize(begin..=input.len().min(begin + 16));
    match random.u8(0..6) {
        0 => input.insert(begin, *random.choice(TELLING).expect("not empty")),
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
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpora");
    let mut folders: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();

    assert_eq!(folders, TARGETS.map(|(name, _)| name));
}
