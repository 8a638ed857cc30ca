//! The form that tokens, keys and passwords must have. Errors name what is wrong and never repeat the value.

use http::HeaderValue;
use zeroize::Zeroizing;

use crate::telemetry::is_invisible;

/// The longest accepted token or key. IAM's tokens take up to 31 KiB; the vendor's gateway rejects a header of 32 KB.
const MAX_BYTES: usize = 31 * 1024;

/// What is wrong with the text of a token or key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Nothing is left after the final line break.
    #[error("is empty")]
    Empty,
    /// More than one line.
    #[error("holds a line break; write it on one line")]
    LineBreak,
    /// A blank or tab, inside or around it.
    #[error("holds a blank")]
    Blank,
    /// A control character or anything beyond ASCII.
    #[error("holds a character that is not visible ASCII")]
    NotVisibleAscii,
    /// A character that cannot be seen: a control character, a zero-width or a direction mark.
    #[error("holds an invisible character")]
    Invisible,
    /// Quotes around it, as in a shell or an `.env` file.
    #[error("is in quotes; write it without them")]
    Quoted,
    /// More than 31 KiB.
    #[error("is longer than 31 KiB")]
    TooLong,
}

/// Parses a token for `X-Auth-Token`. A final line break is removed, because files often end with one.
///
/// # Errors
/// [`Malformed`] when it is empty, over 31 KiB, or holds anything but visible ASCII.
pub fn parse_token(text: &str) -> Result<HeaderValue, Malformed> {
    let text = visible(text)?;
    let mut value = HeaderValue::from_str(text).expect("visible ASCII is a header value");
    value.set_sensitive(true);
    Ok(value)
}

/// Parses a password: any text on one line, without a byte order mark before it and a line break after it.
///
/// # Errors
/// [`Malformed`] when it is empty, in quotes, or holds an invisible character.
pub fn parse_password(text: &str) -> Result<Zeroizing<String>, Malformed> {
    let text = bare(text)?;
    if text.contains(['\r', '\n']) {
        return Err(Malformed::LineBreak);
    }
    if text.contains(is_invisible) {
        return Err(Malformed::Invisible);
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// The text without a byte order mark and one final line break, if it is 1 to 31 KiB of visible ASCII.
///
/// # Errors
/// [`Malformed`] when it is not.
pub fn visible(text: &str) -> Result<&str, Malformed> {
    let text = bare(text)?;
    if text.len() > MAX_BYTES {
        return Err(Malformed::TooLong);
    }
    match text.bytes().find(|byte| !byte.is_ascii_graphic()) {
        None => Ok(text),
        Some(b'\r' | b'\n') => Err(Malformed::LineBreak),
        Some(b' ' | b'\t') => Err(Malformed::Blank),
        Some(_) if text.contains(is_invisible) => Err(Malformed::Invisible),
        Some(_) => Err(Malformed::NotVisibleAscii),
    }
}

/// The text without a byte order mark and one final line break, which editors add to files.
fn bare(text: &str) -> Result<&str, Malformed> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(Malformed::Empty);
    }
    let quoted = |quote| text.len() > 1 && text.starts_with(quote) && text.ends_with(quote);
    match quoted('"') || quoted('\'') {
        true => Err(Malformed::Quoted),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_final_line_break_is_trimmed_and_everything_else_outside_visible_ascii_is_rejected() {
        let longest = "t".repeat(MAX_BYTES);
        let too_long = "t".repeat(MAX_BYTES + 1);
        let cases = [
            ("plain", "canary", Ok("canary")),
            ("unix line end", "canary\n", Ok("canary")),
            ("windows line end", "canary\r\n", Ok("canary")),
            ("symbols", "a+/=~!\"", Ok("a+/=~!\"")),
            ("longest", &longest, Ok(&*longest)),
            ("empty", "", Err(Malformed::Empty)),
            ("only a line end", "\n", Err(Malformed::Empty)),
            ("two line ends", "canary\n\n", Err(Malformed::LineBreak)),
            (
                "header injection",
                "canary\r\nX: y",
                Err(Malformed::LineBreak),
            ),
            ("blank inside", "can ary", Err(Malformed::Blank)),
            ("blank at the end", "canary \n", Err(Malformed::Blank)),
            ("tab", "can\tary", Err(Malformed::Blank)),
            ("umlaut", "canäry", Err(Malformed::NotVisibleAscii)),
            ("nul", "can\0ary", Err(Malformed::Invisible)),
            ("zero-width", "can\u{200b}ary", Err(Malformed::Invisible)),
            ("byte order mark", "\u{feff}canary\r\n", Ok("canary")),
            (
                "two byte order marks",
                "\u{feff}\u{feff}canary",
                Err(Malformed::Invisible),
            ),
            ("only a byte order mark", "\u{feff}", Err(Malformed::Empty)),
            ("double quotes", "\"canary\"\n", Err(Malformed::Quoted)),
            ("single quotes", "'canary'", Err(Malformed::Quoted)),
            ("only quotes", "\"\"", Err(Malformed::Quoted)),
            (
                "typographic quotes",
                "\u{201c}canary\u{201d}",
                Err(Malformed::NotVisibleAscii),
            ),
            ("too long", &too_long, Err(Malformed::TooLong)),
        ];

        for (name, text, expected) in cases {
            let parsed = parse_token(text);

            assert_eq!(
                parsed
                    .as_ref()
                    .map(|value| value.to_str().unwrap())
                    .map_err(|error| *error),
                expected,
                "{name}"
            );
            if let Ok(value) = &parsed {
                assert!(value.is_sensitive(), "{name}");
            }
            if let Err(error) = parsed {
                assert!(!error.to_string().contains("canary"), "{name}");
            }
        }
    }

    #[test]
    fn a_password_may_hold_blanks_and_umlauts_but_no_line_break() {
        assert_eq!(*parse_password("pass wörd\n").unwrap(), "pass wörd");
        assert_eq!(parse_password("\n"), Err(Malformed::Empty));
        assert_eq!(parse_password("a\nb"), Err(Malformed::LineBreak));
        assert_eq!(*parse_password("\u{feff}päss'\r\n").unwrap(), "päss'");
        assert_eq!(parse_password("'a'"), Err(Malformed::Quoted));
        for invisible in [
            "\0", "\t", "\u{7f}", "\u{85}", "\u{200d}", "\u{2066}", "\u{feff}",
        ] {
            let password = format!("a{invisible}b");
            assert_eq!(
                parse_password(&password),
                Err(Malformed::Invisible),
                "{invisible:?}"
            );
        }
    }
}
