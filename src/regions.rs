//! The regions of RDS and their hosts, as the vendor's SDK lists them.

use url::Url;

use crate::options::{Parsed, nearest, not};

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// For example `cn-north-4`.
    pub id: &'static str,
    /// Host of RDS.
    pub rds_host: &'static str,
    /// Host of IAM; `None` if the table has only a fallback of another site (`eu-west-101`).
    pub iam_host: Option<&'static str>,
}

impl Region {
    /// The base URL of RDS.
    pub fn rds_url(self) -> Url {
        parse_host(self.rds_host)
    }

    /// The base URL of IAM, if it is known.
    pub fn iam_url(self) -> Option<Url> {
        self.iam_host.map(parse_host)
    }
}

fn parse_host(host: &str) -> Url {
    let url = Url::parse(&format!("https://{host}"));
    url.expect("a test parses every host of the table")
}

/// Columns: region, RDS host, IAM host, where the IAM host comes from (`table`, or the global `fallback`), STS host.
const TABLE: &str = include_str!("regions.tsv");

/// Every region, ordered by id.
pub fn all() -> impl Iterator<Item = Region> {
    TABLE.lines().skip(1).filter_map(|line| {
        let mut columns = line.split('\t');
        let id = columns.next()?;
        let rds_host = columns.next()?;
        let iam_host = columns.next()?;
        Some(Region {
            id,
            rds_host,
            iam_host: (top_domain(rds_host) == top_domain(iam_host)).then_some(iam_host),
        })
    })
}

/// The region with this id.
///
/// # Errors
/// The rest of the sentence.
pub fn parse(id: &str) -> Parsed<Region> {
    all().find(|region| region.id == id).ok_or_else(|| {
        let ids: Vec<&str> = all().map(|region| region.id).collect();
        let close = nearest(id, ids.iter().copied()).expect("the table has rows");
        // A name such as `beijing` is not a misspelled id.
        let known = match strsim::osa_distance(id, close) > close.len() / 2 {
            true => format!(" known are {};", ids.join(", ")),
            false => String::new(),
        };
        not(
            id,
            &format!("a known region; did you mean {close}?{known} use --endpoint for others"),
        )
    })
}

fn top_domain(host: &str) -> &str {
    host.rsplit('.').next().unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::url;

    #[test]
    fn every_region_has_hosts_that_make_a_url() {
        assert_eq!(all().count(), 34);
        for region in all() {
            for host in [Some(region.rds_host), region.iam_host]
                .into_iter()
                .flatten()
            {
                assert!(host.contains(".myhuaweicloud."), "{region:?}");
                assert!(url::base(&format!("https://{host}")).is_ok(), "{host}");
            }
        }
    }

    #[test]
    fn known_regions_have_the_hosts_of_the_sdk() {
        let north = parse("cn-north-4").unwrap();

        assert_eq!(north.rds_host, "rds.cn-north-4.myhuaweicloud.com");
        assert_eq!(north.iam_host, Some("iam.cn-north-4.myhuaweicloud.com"));
        assert_eq!(
            parse("af-north-1").unwrap().iam_host,
            Some("iam.myhuaweicloud.com")
        );
        assert_eq!(parse("eu-west-101").unwrap().iam_host, None);
    }

    #[test]
    fn the_problem_of_an_unknown_region_has_the_nearest_id_and_if_it_is_far_all_ids() {
        let cases = [
            ("cn-north4", "did you mean cn-north-4? use", false),
            ("nowhere-9", "\"nowhere-9\" is not a known region", true),
            ("beijing", "\"beijing\" is not a known region", true),
        ];

        for (id, part, lists) in cases {
            let problem = parse(id).unwrap_err();
            assert!(problem.contains(part), "{problem}");
            assert_eq!(problem.contains("ap-southeast-1, "), lists, "{problem}");
        }
    }
}
