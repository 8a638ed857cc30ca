//! The options of the task service.

use super::request::{MAX_ID, id_problem};
use crate::options::{Parsed, not};

/// The options of the task service.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Access")]
pub struct Options {
    /// Allow only these project ids; may be repeated; by default any
    #[arg(long, value_name = "ID,...", value_delimiter = ',', value_parser = project_id)]
    pub allow_project: Vec<String>,
}

fn project_id(text: &str) -> Parsed<String> {
    let id = text.trim();
    match id_problem(id, MAX_ID) {
        None => Ok(id.to_owned()),
        Some(_) => Err(not(
            id,
            "a project id; separate ids by commas, each 1 to 64 of letters, digits, '-' and '_'",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn project_ids_have_the_vendors_form() {
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
