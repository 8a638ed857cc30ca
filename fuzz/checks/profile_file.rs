//! A profile file is parsed to its key, or to an error that does not depend on the values.

use rds_task_facade::credentials::{AccessKey, profile, signer};

use super::{lines, text};

pub(crate) fn check(input: &[u8]) {
    check_any(&text(input));
    check_written(input);
}

fn check_any(file: &str) {
    let masked: String = file.split_inclusive('\n').map(mask).collect();

    match (profile::parse(file, None), profile::parse(&masked, None)) {
        (Err(error), Err(masked_error)) => {
            assert_eq!(error.to_string(), masked_error.to_string());
            assert_eq!(format!("{error:?}"), format!("{masked_error:?}"));
            assert!(!error.to_string().chars().any(char::is_control));
        }
        (Ok(key), Ok(_)) => assert!(!key.access_key_id.is_empty()),
        (original, masked) => panic!("{original:?} and, with masked values, {masked:?}"),
    }
}

/// Replaces letters and digits in the line's value, or in the whole line if it is not an assignment.
fn mask(line: &str) -> String {
    let trimmed = line.trim_start_matches('\u{feff}').trim();
    let section = trimmed.starts_with('[') && trimmed.ends_with(']');
    if section || trimmed.starts_with([';', '#']) {
        return line.to_owned();
    }
    let value_at = line.find(['=', ':']).unwrap_or_default();
    let (name, value) = line.split_at(value_at);
    let masked = |c: char| if c.is_ascii_alphanumeric() { 'x' } else { c };
    name.chars().chain(value.chars().map(masked)).collect()
}

/// A key written among comments and other sections is parsed unchanged.
fn check_written(input: &[u8]) {
    let [ak, sk, security_token, rest] = lines(input);
    let (ak, sk, security_token) = (visible(ak), visible(sk), visible(security_token));
    let comment = text(rest).replace(char::is_control, " ");
    let assign = if rest.len().is_multiple_of(2) {
        " = "
    } else {
        ":"
    };
    let end = if rest.len().is_multiple_of(3) {
        "\r\n"
    } else {
        "\n"
    };
    let file = [
        "[other]",
        "ak = another",
        &format!("# {comment}"),
        "[basic]",
        &format!("ak{assign}{ak}"),
        &format!("; sk = {comment}"),
        &format!("  SK{assign}{sk}  "),
        &format!("security_token{assign}{security_token}"),
        "[last]",
        "sk = another",
    ]
    .join(end);

    let read = profile::parse(&file, None);

    let [ak, sk, security_token] = [&ak, &sk, &security_token].map(|text| unquoted(text));
    let expected = AccessKey::parse(ak, sk, Some(security_token));
    match (read, expected) {
        (Ok(read), Ok(expected)) => {
            assert_eq!(read.access_key_id, expected.access_key_id);
            assert_eq!(read.security_token, expected.security_token);
            assert_eq!(
                signer::signature(&read, "x"),
                signer::signature(&expected, "x")
            );
        }
        (read, expected) => assert!(read.is_err() && expected.is_err(), "{read:?} {expected:?}"),
    }
}

/// A value without quotes, if the only two of their kind surround it.
fn unquoted(text: &str) -> &str {
    let surrounded = |quote: char| {
        let places: Vec<usize> = text.match_indices(quote).map(|(at, _)| at).collect();
        places.len() == 2 && places == [0, text.len() - 1]
    };
    match surrounded('"') || surrounded('\'') {
        true => &text[1..text.len() - 1],
        false => text,
    }
}

/// Maps each byte to a visible character.
fn visible(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| char::from(b'!' + byte % 94))
        .collect()
}
