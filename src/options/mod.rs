//! What the options of all rooms share: parsers for single values, and the [`Validation`] that collects the problems.
//!
//! A room declares its options once, as a struct with clap's derive. A field's `value_parser` gives the final type, so a
//! validated struct is what the room works with. No parser echoes a text that may be a secret.

pub mod url;
mod validation;

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Command};

pub use self::validation::{Environment, PREFIX, Validation, variable_of};
use crate::deadline::THIRTY_YEARS;

/// The value, or the rest of an error sentence: lower case, no full stop, ends with the accepted form.
pub type Parsed<T> = Result<T, String>;

/// A room's options when nothing is set: the defaults of its declaration.
///
/// # Panics
/// When a default does not parse; a test parses the defaults of every room.
pub fn defaults<T: Args>() -> T {
    let command = T::augment_args(Command::new("")).no_binary_name(true);
    // A flag that another one requires is declared as required.
    let command = command.mut_args(|arg| arg.required(false));
    let matches = command.try_get_matches_from([""; 0]);
    matches
        .and_then(|matches| T::from_arg_matches(&matches))
        .expect("defaults parse")
}

/// `250ms`, `10s`, `5m`, `1h`, longer than zero. More than 30 years count as 30 years.
///
/// # Errors
/// The rest of the sentence.
pub fn duration(text: &str) -> Parsed<Duration> {
    match duration_or_zero(text) {
        Ok(Duration::ZERO) => Err("must be longer than zero".to_owned()),
        parsed => parsed,
    }
}

/// As [`duration`], with `0s` for none.
///
/// # Errors
/// The rest of the sentence.
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
    // Only too many digits can fail here.
    let count = digits.parse().unwrap_or(u64::MAX);
    Ok(Duration::from_millis(unit_ms.saturating_mul(count)).min(THIRTY_YEARS))
}

/// `true`, `false`, `1` or `0`.
///
/// # Errors
/// The rest of the sentence.
pub fn boolean(text: &str) -> Parsed<bool> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(not(text, "true, false, 1 or 0")),
    }
}

/// A whole number from `MIN` to `MAX`.
///
/// # Errors
/// The rest of the sentence.
pub fn number<const MIN: u32, const MAX: u32>(text: &str) -> Parsed<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits && (MIN..=MAX).contains(&number) => Ok(number),
        _ => Err(not(text, &format!("a whole number from {MIN} to {MAX}"))),
    }
}

/// A limit on things that take memory: a million is far beyond any use and still fits every counter.
///
/// # Errors
/// The rest of the sentence.
pub fn limit(text: &str) -> Parsed<usize> {
    number::<1, 1_000_000>(text).map(|number| number as usize)
}

/// An IP address with a port.
///
/// # Errors
/// The rest of the sentence.
pub fn address(text: &str) -> Parsed<SocketAddr> {
    text.parse().map_err(|_| {
        not(
            text,
            "an address; write it like 127.0.0.1:50051, 0.0.0.0:50051 or [::1]:50051",
        )
    })
}

/// One of a closed list of words.
///
/// # Errors
/// The rest of the sentence.
pub fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Parsed<T> {
    match words.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(*value),
        None => {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            Err(not(text, &format!("one of {}", words.join(", "))))
        }
    }
}

/// A file that can be opened now. The path is not echoed: a secret typed in place of its file's name must not be shown.
///
/// # Errors
/// The rest of the sentence.
pub fn file(text: &str) -> Parsed<PathBuf> {
    let path = PathBuf::from(text);
    let opened = fs::metadata(&path).and_then(|metadata| {
        // A pipe (process substitution of a shell) must not be opened twice.
        if metadata.is_file() {
            fs::File::open(&path).map(drop)?;
        }
        Ok(metadata.is_dir())
    });
    match opened {
        Ok(false) => Ok(path),
        Ok(true) => Err("is a folder; it must be the path of a file".to_owned()),
        Err(error) => Err(format!("the file cannot be read: {}", error.kind())),
    }
}

/// `"text" is not what`, without the text when it is long or holds characters that harmless values do not have.
pub fn not(text: &str, what: &str) -> String {
    let harmless = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/+".contains(&b);
    if text.is_empty() || text.len() > 64 || !text.bytes().all(harmless) {
        return format!("is not {what}");
    }
    format!("\"{text}\" is not {what}")
}

/// The candidate that `word` is probably a typo of: at most two letters wrong, and at most a third of them.
pub fn closest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::osa_distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 2 && distance * 3 <= candidate.len())
        .min()
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_four_units_and_nothing_else() {
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
    fn numbers_outside_their_bounds_are_invalid() {
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
    fn booleans_are_four_words() {
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
    fn a_file_must_exist_and_be_no_folder() {
        let file_there = tempfile::NamedTempFile::new().unwrap();
        let folder = tempfile::tempdir().unwrap();

        assert!(file(file_there.path().to_str().unwrap()).is_ok());
        assert!(file(folder.path().to_str().unwrap()).is_err());
        let problem = file("/nowhere/MIIsecret").unwrap_err();
        assert!(!problem.contains("MIIsecret"), "{problem}");
    }

    #[test]
    fn only_a_close_word_is_suggested() {
        let words = ["timeout", "max-attempts", "region"];
        let cases = [
            ("timout", Some("timeout")),
            ("max-attempt", Some("max-attempts")),
            ("regoin", Some("region")),
            ("token", None),
            ("", None),
        ];

        for (word, expected) in cases {
            assert_eq!(closest(word, words.into_iter()), expected, "{word:?}");
        }
    }
}
