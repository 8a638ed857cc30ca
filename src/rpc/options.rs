//! The options of the RPCs.

use crate::options::Parsed;

/// The options of the RPCs.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Access")]
pub struct Options {
    /// Serve these project ids only; may be repeated; by default any
    #[arg(long, value_name = "ID,...", value_delimiter = ',', value_parser = project_id)]
    pub allow_project: Vec<String>,
}

fn project_id(text: &str) -> Parsed<String> {
    let id = text.trim();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if !(1..=64).contains(&id.len()) || !id.bytes().all(allowed) {
        return Err(
            "must be project ids separated by commas, each 1 to 64 of letters, digits, '-' and '_'"
                .to_owned(),
        );
    }
    Ok(id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn project_ids_have_the_form_of_the_vendor() {
        let longest = "a".repeat(64);
        let too_long = "a".repeat(65);
        let cases = [
            ("a", true),
            (" b", true),
            ("A-1_z", true),
            (&longest, true),
            (&too_long, false),
            ("", false),
            (" ", false),
            ("a/b", false),
            ("a.b", false),
        ];

        for (text, expected) in cases {
            assert_eq!(project_id(text).is_ok(), expected, "{text:?}");
        }
    }
}
