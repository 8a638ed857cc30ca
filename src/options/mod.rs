//! Parsers for option values, and the [`Validation`] that collects all problems.
//!
//! Each module declares its options once, as a struct with clap's derive. A field's `value_parser` returns the final type, so the
//! module uses the validated struct itself. No parser echoes a text that may be a secret.

pub mod url;
mod validation;

use std::{borrow::Cow, fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Command, ValueEnum, builder::PossibleValue};

pub use self::validation::{Environment, PREFIX, Validation, variable_name};
use crate::deadline::THIRTY_YEARS;

/// The value, or the rest of an error sentence: lower case, no full stop, ends with the accepted form.
pub type Parsed<T> = Result<T, String>;

/// The effective value of an option, as `--print-config` and the log show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// The text of the value; empty if the option is not set.
    Value(String),
    /// In the place of a value, for example because it is a secret.
    Note(Cow<'static, str>),
}

impl Shown {
    /// For a secret that is set.
    pub const SECRET: Self = Self::Note(Cow::Borrowed("set"));
}

/// The format of the log, or of results on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The declared defaults of a module's options.
///
/// # Panics
/// When a default does not parse; a test parses every default.
pub fn defaults<T: Args>() -> T {
    let command = T::augment_args(Command::new("")).no_binary_name(true);
    // Flags that must be set together are declared as required.
    let command = command.mut_args(|arg| arg.required(false));
    let matches = command.try_get_matches_from([""; 0]);
    matches
        .and_then(|matches| T::from_arg_matches(&matches))
        .expect("defaults parse")
}

/// Parses a positive duration: `250ms`, `10s`, `5m`, `1h`. At most 30 years; a longer one counts as 30 years.
///
/// # Errors
/// The rest of an error sentence.
pub fn duration(text: &str) -> Parsed<Duration> {
    match duration_or_zero(text) {
        Ok(Duration::ZERO) => Err(not(text, "longer than zero")),
        parsed => parsed,
    }
}

/// As [`duration`], but also accepts `0s`.
///
/// # Errors
/// The rest of an error sentence.
pub fn duration_or_zero(text: &str) -> Parsed<Duration> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit_at);
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    if digits.is_empty() || unit_ms == 0 {
        return Err(not(text, "a duration; write it like 250ms, 10s, 5m or 1h"));
    }
    // Parsing can only fail with too many digits.
    let count = digits.parse().unwrap_or(u64::MAX);
    Ok(Duration::from_millis(unit_ms.saturating_mul(count)).min(THIRTY_YEARS))
}

/// The value name of boolean flags. Such a flag without a value is true.
pub const BOOL: &str = "BOOL";

/// Parses `true`, `false`, `1` or `0`.
///
/// # Errors
/// The rest of an error sentence.
pub fn boolean(text: &str) -> Parsed<bool> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(not(text, "true, false, 1 or 0")),
    }
}

/// Parses a whole number from `MIN` to `MAX`.
///
/// # Errors
/// The rest of an error sentence.
pub fn number<const MIN: u32, const MAX: u32>(text: &str) -> Parsed<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits && (MIN..=MAX).contains(&number) => Ok(number),
        _ => Err(not(text, &format!("a whole number from {MIN} to {MAX}"))),
    }
}

/// Parses a limit from 1 to a million: more than any use needs, and small enough for every counter.
///
/// # Errors
/// The rest of an error sentence.
pub fn limit(text: &str) -> Parsed<usize> {
    number::<1, 1_000_000>(text).map(|number| number as usize)
}

/// Parses an IP address with a port.
///
/// # Errors
/// The rest of an error sentence.
pub fn address(text: &str) -> Parsed<SocketAddr> {
    text.parse().map_err(|_| {
        not(
            text,
            "an address; write it like 127.0.0.1:50051, 0.0.0.0:50051 or [::]:50051",
        )
    })
}

/// Parses the name of a variant.
///
/// # Errors
/// The rest of an error sentence.
pub fn word<T: ValueEnum>(text: &str) -> Parsed<T> {
    T::from_str(text, false).map_err(|_| {
        let variants = T::value_variants().iter();
        let variants: Vec<_> = variants.filter_map(T::to_possible_value).collect();
        let names: Vec<&str> = variants.iter().map(PossibleValue::get_name).collect();
        not(text, &format!("one of {}", names.join(", ")))
    })
}

/// The path of a readable file. The path is not echoed, because users mistakenly type the secret instead of its file.
///
/// # Errors
/// The rest of an error sentence.
pub fn file(text: &str) -> Parsed<PathBuf> {
    let path = PathBuf::from(text);
    let opened = fs::metadata(&path).and_then(|metadata| {
        // Only regular files, because a pipe of a shell's process substitution can be opened only once.
        if metadata.is_file() {
            fs::File::open(&path).map(drop)?;
        }
        Ok(metadata.is_dir())
    });
    match opened {
        Ok(false) => Ok(path),
        Ok(true) => Err("is a directory; it must be a file".to_owned()),
        Err(error) => Err(format!("the file cannot be read: {}", error.kind())),
    }
}

/// As [`file()`] for a file without secrets: an error echoes the path.
///
/// # Errors
/// The rest of an error sentence.
pub fn public_file(text: &str) -> Parsed<PathBuf> {
    file(text).map_err(|problem| match quoted(text) {
        Some(path) => format!("{path}: {problem}"),
        None => problem,
    })
}

/// The sentence `"text" is not what`, with the text only if it is harmless.
pub fn not(text: &str, what: &str) -> String {
    match quoted(text) {
        Some(text) => format!("{text} is not {what}"),
        None => format!("is not {what}"),
    }
}

/// The text in quotes and without control characters; `None` if it is long like a token, may be a URL with a password, or is a key
/// in PEM.
pub fn quoted(text: &str) -> Option<String> {
    let secret = ["@", "?", "-----"].iter().any(|part| text.contains(part));
    let harmless = !text.is_empty() && text.len() <= 256 && !secret;
    harmless.then(|| format!("{text:?}"))
}

/// The candidate that differs least from `word`, without regard to case; `None` without candidates.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    candidates.min_by_key(|candidate| strsim::osa_distance(&word, &candidate.to_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_of_four_units() {
        let cases = [
            ("250ms", Some(Duration::from_millis(250))),
            ("10s", Some(Duration::from_secs(10))),
            ("5m", Some(Duration::from_secs(300))),
            ("1h", Some(Duration::from_secs(3600))),
            ("1ms", Some(Duration::from_millis(1))),
            ("99999999999999999999999h", Some(THIRTY_YEARS)),
            ("0s", None),
            ("0", None),
            ("10", None),
            ("", None),
            ("s", None),
            ("-5s", None),
            ("+5s", None),
            ("1.5s", None),
            ("1m30s", None),
            ("5 s", None),
            ("5S", None),
            ("\u{0665}s", None),
        ];

        for (text, expected) in cases {
            assert_eq!(duration(text).ok(), expected, "{text:?}");
        }
        assert_eq!(duration_or_zero("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn numbers_outside_the_bounds_are_invalid() {
        let cases = [
            ("1", Some(1)),
            ("10", Some(10)),
            ("0", None),
            ("11", None),
            ("+3", None),
            ("-1", None),
            ("3.0", None),
            ("99999999999", None),
            ("", None),
        ];

        for (text, expected) in cases {
            assert_eq!(number::<1, 10>(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn only_four_words_are_booleans() {
        let cases = [
            ("true", Some(true)),
            ("1", Some(true)),
            ("false", Some(false)),
            ("0", Some(false)),
            ("yes", None),
            ("TRUE", None),
            ("", None),
        ];

        for (text, expected) in cases {
            assert_eq!(boolean(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn directories_and_missing_files_are_rejected_without_echo() {
        let existing = tempfile::NamedTempFile::new().unwrap();
        let directory = tempfile::tempdir().unwrap();

        assert!(file(existing.path().to_str().unwrap()).is_ok());
        assert!(file(directory.path().to_str().unwrap()).is_err());
        let problem = file("/nowhere/MIIsecret").unwrap_err();
        assert!(!problem.contains("MIIsecret"), "{problem}");
    }

    #[test]
    fn the_nearest_word_is_suggested() {
        let words = ["timeout", "max-attempts", "region"];
        let cases = [
            ("timout", "timeout"),
            ("max-attempt", "max-attempts"),
            ("REGOIN", "region"),
        ];

        for (word, expected) in cases {
            assert_eq!(nearest(word, words.into_iter()), Some(expected), "{word:?}");
        }
    }

    #[test]
    fn values_are_echoed_unless_they_may_hold_a_password() {
        let long = "x".repeat(257);
        let cases = [
            ("cn-north-4x", true),
            ("\"cn-north-4\"", true),
            ("北京", true),
            ("a b\u{202e}\n", true),
            ("https://ann:canary@rds", false),
            ("https://rds?token=canary", false),
            ("-----BEGIN PRIVATE KEY-----\ncanary", false),
            (&long, false),
            ("", false),
        ];

        for (text, echoed) in cases {
            let sentence = not(text, "a region");
            assert_eq!(sentence != "is not a region", echoed, "{sentence}");
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
            assert!(!sentence.contains('\u{202e}'), "{sentence:?}");
        }
    }
}
