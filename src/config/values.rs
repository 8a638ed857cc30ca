//! Pure parsers: text of one setting in, typed value or the rest of a sentence out. No environment, no files but
//! [`file`], and no text that could be a secret in any sentence.

use std::{
    fs, net::SocketAddr, num::NonZeroU32, ops::RangeInclusive, path::PathBuf, time::Duration,
};

use secrecy::SecretString;

use super::Rate;
use crate::{credentials::secret::visible, deadline::THIRTY_YEARS};

/// A value, or why the text is none: lower case, no full stop, says the accepted form.
pub(super) type Parsed<T> = Result<T, String>;

/// `250ms`, `10s`, `5m`, `1h`; zero where `0s` means something. More than 30 years count as 30 years.
pub(super) fn duration(text: &str, zero_allowed: bool) -> Parsed<Duration> {
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
        return Err(format!(
            "{}no duration; write it like 250ms, 10s, 5m or 1h",
            quoted(text)
        ));
    }
    // Only too many digits can fail here.
    let count = digits.parse().unwrap_or(u64::MAX);
    let duration = Duration::from_millis(unit_ms.saturating_mul(count)).min(THIRTY_YEARS);
    if duration.is_zero() && !zero_allowed {
        return Err("must be longer than zero".to_owned());
    }
    Ok(duration)
}

/// `true`, `false`, `1` or `0`.
pub(super) fn boolean(text: &str) -> Parsed<bool> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(format!("{}not true, false, 1 or 0", quoted(text))),
    }
}

/// A whole number within `bounds`.
pub(super) fn number(text: &str, bounds: RangeInclusive<u32>) -> Parsed<u32> {
    text.parse()
        .ok()
        .filter(|number| text.bytes().all(|b| b.is_ascii_digit()) && bounds.contains(number))
        .ok_or_else(|| {
            format!(
                "{}no whole number from {} to {}",
                quoted(text),
                bounds.start(),
                bounds.end()
            )
        })
}

/// An IP address with a port.
pub(super) fn address(text: &str) -> Parsed<SocketAddr> {
    text.parse().map_err(|_| {
        format!(
            "{}no address; write it like 127.0.0.1:50051, 0.0.0.0:50051 or [::1]:50051",
            quoted(text)
        )
    })
}

/// [`address`], or `off`.
pub(super) fn address_or_off(text: &str) -> Parsed<Option<SocketAddr>> {
    if text == "off" {
        return Ok(None);
    }
    address(text)
        .map(Some)
        .map_err(|problem| format!("{problem}, or off"))
}

/// One of a closed list of words.
pub(super) fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Parsed<T> {
    let known = words.iter().map(|(word, _)| *word);
    match words.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(*value),
        None => Err(format!(
            "{}not one of {}",
            quoted(text),
            known.collect::<Vec<_>>().join(", ")
        )),
    }
}

/// `60/1m`: so many calls per duration; or `off`.
pub(super) fn rate(text: &str) -> Parsed<Option<Rate>> {
    if text == "off" {
        return Ok(None);
    }
    let parsed = text.split_once('/').and_then(|(calls, per)| {
        Some(Rate {
            calls: NonZeroU32::new(number(calls, 1..=1_000_000).ok()?)?,
            per: duration(per, false).ok()?,
        })
    });
    match parsed {
        Some(rate) => Ok(Some(rate)),
        None => Err(format!(
            "{}no rate; write it like 60/1m, or off",
            quoted(text)
        )),
    }
}

/// Project ids with commas between, each 1 to 64 of letters, digits, `-` and `_`.
pub(super) fn project_ids(text: &str) -> Parsed<Vec<String>> {
    let sound = |id: &str| {
        (1..=64).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let ids: Vec<&str> = text.split(',').map(str::trim).collect();
    if !ids.iter().all(|id| sound(id)) {
        return Err(
            "must be project ids with commas between, each 1 to 64 of letters, digits, '-' and '_'"
                .to_owned(),
        );
    }
    Ok(ids.into_iter().map(str::to_owned).collect())
}

/// Text of an identity (a user's or project's name): no control characters, at most 256 characters.
pub(super) fn name(text: &str) -> Parsed<String> {
    if text.chars().count() > 256 || text.chars().any(char::is_control) {
        return Err("may hold at most 256 characters and no control characters".to_owned());
    }
    Ok(text.to_owned())
}

/// A secret that travels in a header.
pub(super) fn secret(text: &str) -> Parsed<SecretString> {
    visible(text)
        .map(SecretString::from)
        .map_err(|fault| fault.to_string())
}

/// A file that can be opened now. The path is not quoted: a secret typed in place of its file's name must not be shown.
pub(super) fn file(text: &str) -> Parsed<PathBuf> {
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

/// `"text" is ` for the start of a sentence, when the text is short and plain; else nothing.
fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/+".contains(&b);
    if text.is_empty() || text.len() > 24 || !text.bytes().all(plain) {
        return "is ".to_owned();
    }
    format!("\"{text}\" is ")
}

/// The candidate that `word` was probably meant to be: at most two letters wrong, at most a third of them.
pub(super) fn closest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 2 && distance * 3 <= candidate.len())
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in bytes; words are short.
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
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
            assert_eq!(duration(text, false).ok(), expected, "{text:?}");
        }
        assert_eq!(duration("0s", true), Ok(Duration::ZERO));
    }

    #[test]
    fn numbers_outside_their_bounds_are_refused() {
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
            assert_eq!(number(text, 1..=10).ok(), expected, "{text:?}");
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
    fn rates_are_calls_per_duration() {
        let cases = [
            ("60/1m", Some(Some((60, 60)))),
            ("off", Some(None)),
            ("0/1m", None),
            ("60/0s", None),
            ("60", None),
            ("60/minute", None),
        ];

        for (text, expected) in cases {
            let parsed = rate(text)
                .ok()
                .map(|rate| rate.map(|rate| (rate.calls.get(), rate.per.as_secs())));
            assert_eq!(parsed, expected, "{text:?}");
        }
    }

    #[test]
    fn a_list_with_an_empty_or_odd_project_id_is_refused_whole() {
        let cases = [
            ("a", true),
            ("a,b", true),
            ("a, b", true),
            ("", false),
            (",", false),
            ("a,", false),
            ("a/b", false),
            ("a.b", false),
        ];

        for (text, expected) in cases {
            assert_eq!(project_ids(text).is_ok(), expected, "{text:?}");
        }
        assert!(project_ids(&"a".repeat(64)).is_ok());
        assert!(project_ids(&"a".repeat(65)).is_err());
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
