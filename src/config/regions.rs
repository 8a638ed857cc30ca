//! The regions of RDS and their hosts, as the vendor's SDK lists them.

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// For example `cn-north-4`.
    pub(super) id: &'static str,
    /// Host of RDS.
    pub(super) rds_host: &'static str,
    /// Host of IAM; `None` where the SDK knows none and its fallback belongs to another site (`eu-west-101`).
    pub(super) iam_host: Option<&'static str>,
}

/// Columns: region, RDS host, IAM host, where the IAM host comes from (`table`, or the global `fallback`), STS host.
const TABLE: &str = include_str!("regions.tsv");

/// Every region, in the order of its id.
pub(super) fn all() -> impl Iterator<Item = Region> {
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
pub(super) fn find(id: &str) -> Option<Region> {
    all().find(|region| region.id == id)
}

fn top_domain(host: &str) -> &str {
    host.rsplit('.').next().unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_has_hosts_that_make_a_url() {
        assert_eq!(all().count(), 34);
        for region in all() {
            for host in [Some(region.rds_host), region.iam_host]
                .into_iter()
                .flatten()
            {
                assert!(host.contains(".myhuaweicloud."), "{region:?}");
                assert!(format!("https://{host}").parse::<http::Uri>().is_ok());
            }
        }
    }

    #[test]
    fn known_regions_have_the_hosts_of_the_sdk() {
        let north = find("cn-north-4").unwrap();

        assert_eq!(north.rds_host, "rds.cn-north-4.myhuaweicloud.com");
        assert_eq!(north.iam_host, Some("iam.cn-north-4.myhuaweicloud.com"));
        assert_eq!(
            find("af-north-1").unwrap().iam_host,
            Some("iam.myhuaweicloud.com")
        );
        assert_eq!(find("eu-west-101").unwrap().iam_host, None);
        assert_eq!(find("region_id"), None);
    }
}
