//! The profile file of the vendor's SDKs: an INI file whose section `basic` holds the key for regional services.
//!
//! A `%` stands for itself, as in the Go SDK; the Python SDK reads `%%` as one `%`.

use super::{auth::AccessKey, file};

/// A profile file without a usable key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not an INI file.
    #[error("line {line} is neither a section, nor a comment, nor `key = value`")]
    Syntax {
        /// Counted from 1.
        line: usize,
    },
    /// No section `basic`.
    #[error("the section [basic] is missing")]
    NoSection,
    /// `ak` or `sk` is missing.
    #[error("the section [basic] needs both ak and sk")]
    NoKey,
    /// Only an identity provider's token is configured.
    #[error(
        "the section [basic] names idp_id or id_token_file, which is not supported; give ak and sk"
    )]
    IdToken,
}

/// Parses the text of a profile file. `previous` is the key that the new one replaces.
pub fn parse(text: &str, previous: Option<&AccessKey>) -> Result<AccessKey, file::Error> {
    let basic = section_basic(text)?;
    let given = |name: &str| {
        let (_, value) = basic
            .iter()
            .rfind(|(key, _)| key.eq_ignore_ascii_case(name))?;
        let value = unquoted(value);
        (!value.is_empty()).then_some(value)
    };
    match (given("ak"), given("sk")) {
        (Some(ak), Some(sk)) => {
            Ok(AccessKey::parse(ak, sk, given("security_token"))?.following(previous))
        }
        _ if given("idp_id").is_some() || given("id_token_file").is_some() => {
            Err(Error::IdToken.into())
        }
        _ => Err(Error::NoKey.into()),
    }
}

/// A value without the quotes around it, which the Go SDK removes too (`hasSurroundedQuote` of gopkg.in/ini.v1).
fn unquoted(value: &str) -> &str {
    let inner = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    let unquoted = |quote| inner(quote).filter(|inner| !inner.contains(quote));
    unquoted('"').or_else(|| unquoted('\'')).unwrap_or(value)
}

/// Names and values of the section, as written: escapes, continued lines and comments after a value are not interpreted, because
/// that could change a secret.
fn section_basic(text: &str) -> Result<Vec<(&str, &str)>, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut basic = None;
    let mut section = "";
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with([';', '#']) {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            section = name;
            if section == "basic" {
                basic.get_or_insert_with(Vec::new);
            }
            continue;
        }
        let (key, value) = line
            .split_once(['=', ':'])
            .ok_or(Error::Syntax { line: index + 1 })?;
        if section == "basic"
            && let Some(pairs) = &mut basic
        {
            pairs.push((key.trim(), value.trim()));
        }
    }
    basic.ok_or(Error::NoSection)
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hmac;

    use super::*;

    fn signs_with(key: &AccessKey, secret: &str) -> bool {
        let expected = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        hmac::sign(&key.signing_key, b"x").as_ref() == hmac::sign(&expected, b"x").as_ref()
    }

    #[test]
    fn the_key_of_section_basic_is_read_as_it_is_written() {
        let text = "\u{feff}; comment\n# comment\n[global]\nak = wrong\nsk = wrong\n\n[basic]\r\n  AK = AK1\r\n\
                    sk=%%a\\n\"q\"'#;=b:%\n; security_token = old\nsecurity_token : st\nproject_id = p\n[other]\nak = wrong\n";

        let key = parse(text, None).unwrap();

        assert_eq!(key.access_key_id, "AK1");
        assert!(signs_with(&key, "%%a\\n\"q\"'#;=b:%"));
        assert_eq!(key.security_token.unwrap(), "st");
    }

    #[test]
    fn quotes_around_a_value_are_not_part_of_it() {
        let text = "[basic]\nak = \"AK1\"\nsk='s\"k'\nsecurity_token = \"\"\n";

        let key = parse(text, None).unwrap();

        assert_eq!(key.access_key_id, "AK1");
        assert!(signs_with(&key, "s\"k"));
        assert_eq!(key.security_token, None);
    }

    #[test]
    fn the_error_of_a_file_without_a_usable_key_names_what_is_missing() {
        let cases = [
            ("ak = a\nsk = b", "the section [basic] is missing"),
            (
                "[basic]\nak = canary",
                "the section [basic] needs both ak and sk",
            ),
            (
                "[basic]\nak =\nsk = canary",
                "the section [basic] needs both ak and sk",
            ),
            (
                "[basic]\nidp_id = canary\nid_token_file = /canary",
                "the section [basic] names idp_id or id_token_file, which is not supported; give ak and sk",
            ),
            (
                "[basic]\nak = a\ncanary\nsk = b",
                "line 3 is neither a section, nor a comment, nor `key = value`",
            ),
            (
                "[basic]\nak = a\nsk = can ary",
                "the secret access key (SK) holds a blank",
            ),
            (
                "[basic]\nak = \"\"\nsk = b",
                "the section [basic] needs both ak and sk",
            ),
            (
                "[basic]\nak = a\nsk = \"can\"ary\"",
                "the secret access key (SK) is in quotes; write it without them",
            ),
            (
                "[basic]\nak = a\nsk = can\u{200b}ary",
                "the secret access key (SK) holds an invisible character",
            ),
        ];

        for (text, expected) in cases {
            let error = parse(text, None).unwrap_err();

            assert_eq!(error.to_string(), expected);
        }
    }
}
