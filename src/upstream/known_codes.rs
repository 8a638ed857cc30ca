//! The error codes of the vendor, with their documented HTTP status.
//! Sources: RDS API reference, "Error Codes"; API request signing guide, "Error Codes"; IAM API reference, "Error Codes". Newer
//! editions of these pages may list more codes.

/// Columns: error code, HTTP status. Four codes are not on the pages (`DBS.200080`, `DBS.201206`, `DBS.280011`, `DBS.280816`): the vendor's
/// Terraform provider retries them as those of a busy instance.
const TABLE: &str = include_str!("known_codes.tsv");

/// The documented HTTP status of a code; `None` for an unknown code and for `APIGW.0201`, which has six.
pub(super) fn documented_status(error_code: &str) -> Option<u16> {
    let mut rows = TABLE.lines().skip(1).filter_map(|row| row.split_once('\t'));
    let (_, status) = rows.find(|(code, _)| *code == error_code)?;
    status.parse().ok()
}

/// The service that replies with such a code: `RDS`, `APIGW` or `IAM`; `None` if the code does not show it.
pub fn service(error_code: &str) -> Option<&'static str> {
    match error_code.split_once('.') {
        Some(("DBS", _)) => Some("RDS"),
        Some(("APIGW", _)) => Some("APIGW"),
        Some(("IAM", _)) => Some("IAM"),
        // IAM's codes without a prefix are the only bare ones in the table.
        None if documented_status(error_code).is_some() => Some("IAM"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    #[test]
    fn exactly_the_documented_codes_are_known_with_their_one_status() {
        let table = include_str!("../../tests/fixtures/errors/error-codes.tsv");
        let mut documented: HashMap<&str, HashSet<u16>> = HashMap::new();
        for line in table.lines().skip(1) {
            let columns: Vec<_> = line.split('\t').collect();
            let statuses = documented.entry(columns[0]).or_default();
            statuses.insert(columns[1].parse().unwrap());
        }

        for (code, statuses) in documented {
            let only = statuses
                .iter()
                .copied()
                .next()
                .filter(|_| statuses.len() == 1);

            assert_eq!(documented_status(code), only, "{code}");
        }
        for unknown in ["", "DBS.200", "401", "DBS.999999", "dbs.200543"] {
            assert_eq!(documented_status(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_code_shows_which_service_replied() {
        let cases = [
            ("DBS.200543", Some("RDS")),
            ("DBS.999999", Some("RDS")),
            ("APIGW.0301", Some("APIGW")),
            ("IAM.0001", Some("IAM")),
            ("1101", Some("IAM")),
            ("401", None),
            ("DBSX.1", None),
            ("VPC.0101", None),
            ("Forbidden", None),
        ];

        for (code, expected) in cases {
            assert_eq!(service(code), expected, "{code}");
        }
    }
}
