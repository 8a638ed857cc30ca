//! The text formats of `/metrics`: `OpenMetrics`, which the metrics library writes, and the classic Prometheus format, for scrapers that
//! do not accept the former.

use http::{HeaderMap, header};

/// A text format of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    OpenMetrics,
    Classic,
}

impl Format {
    /// The format that the scraper prefers; `OpenMetrics` if it has no preference (RFC 9110, section 12.5.1).
    pub(super) fn negotiate(headers: &HeaderMap) -> Self {
        let accepts = headers.get_all(header::ACCEPT).iter();
        let ranges: Vec<_> = accepts
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(parse_range)
            .collect();
        let quality = |kind: &str, media_type: &str| {
            let by_range = |wanted: &str| {
                let found = ranges.iter().filter(|(range, _)| range == wanted);
                found.map(|(_, quality)| *quality).reduce(f32::max)
            };
            by_range(media_type)
                .or_else(|| by_range(kind))
                .or_else(|| by_range("*/*"))
                .unwrap_or(0.0)
        };
        let open_metrics = quality("application/*", "application/openmetrics-text");
        if quality("text/*", "text/plain") > open_metrics {
            Self::Classic
        } else {
            Self::OpenMetrics
        }
    }

    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// `text` in this format.
    pub(super) fn convert(self, text: String) -> String {
        match self {
            Self::OpenMetrics => text,
            Self::Classic => to_classic(&text),
        }
    }
}

/// The media range in lower case, and its quality.
fn parse_range(text: &str) -> (String, f32) {
    let mut parts = text.split(';').map(str::trim);
    let range = parts.next().unwrap_or_default().to_ascii_lowercase();
    let quality = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
    let quality = quality.map_or(1.0, |quality| quality.parse().unwrap_or(0.0));
    (range, quality)
}

/// Converts `OpenMetrics` without exemplars and timestamps, which the metrics here do not have. The classic format names counters and
/// infos with their suffix, and knows neither infos nor units.
fn to_classic(text: &str) -> String {
    let mut classic = String::with_capacity(text.len());
    let mut help = "";
    for line in text.lines() {
        let comment: Vec<_> = line.splitn(4, ' ').collect();
        match comment[..] {
            // Written with the type, which decides the name.
            ["#", "HELP", _, text] => help = text,
            ["#", "TYPE", name, kind] => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    _ => ("", kind),
                };
                let lines = format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
                classic.push_str(&lines);
            }
            ["#", ..] => {}
            _ => {
                classic.push_str(line);
                classic.push('\n');
            }
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn the_format_follows_the_preference_of_the_scraper() {
        let prometheus_2 = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
            text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,\
            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        let cases = [
            (&[][..], Format::OpenMetrics),
            (&[""], Format::OpenMetrics),
            (&["*/*"], Format::OpenMetrics),
            (&["application/json"], Format::OpenMetrics),
            (&["application/openmetrics-text"], Format::OpenMetrics),
            (&[prometheus_2], Format::OpenMetrics),
            (&[prometheus_3], Format::OpenMetrics),
            (
                &["text/html,application/xhtml+xml,*/*;q=0.8"],
                Format::OpenMetrics,
            ),
            (
                &["text/plain, application/openmetrics-text"],
                Format::OpenMetrics,
            ),
            (&["text/plain;q=0"], Format::OpenMetrics),
            (&["text/plain;version=0.0.4"], Format::Classic),
            (&["Text/Plain; Version=0.0.4; Q=0.9"], Format::Classic),
            (&["text/*"], Format::Classic),
            (
                &["text/plain;version=0.0.4;q=0.5, */*;q=0.1"],
                Format::Classic,
            ),
            (&["application/openmetrics-text;q=0, */*"], Format::Classic),
            (
                &["application/openmetrics-text;q=0.2,text/plain;q=0.3"],
                Format::Classic,
            ),
            (
                &["application/openmetrics-text;q=0.2", "text/plain"],
                Format::Classic,
            ),
            (
                &[
                    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7,\
                text/plain;version=0.0.4;q=0.3",
                ],
                Format::Classic,
            ),
        ];

        for (accept, expected) in cases {
            let mut headers = HeaderMap::new();
            for value in accept {
                headers.append(header::ACCEPT, value.parse().unwrap());
            }
            assert_eq!(Format::negotiate(&headers), expected, "{accept:?}");
        }
    }

    #[test]
    fn the_classic_format_has_the_same_samples_and_names_types_as_samples() {
        let text = Metrics::new().encode();
        let samples = |text: &str| {
            let names = text.lines().filter(|line| !line.starts_with('#'));
            let names = names.map(|line| line.rsplit_once(' ').unwrap().0.to_owned());
            names.collect::<Vec<_>>()
        };

        let classic = to_classic(&text);

        assert_eq!(samples(&classic), samples(&text));
        assert!(!classic.contains("# EOF") && !classic.contains("# UNIT"));
        for lines in [
            "# HELP grpc_server_started_total Calls started.\n# TYPE grpc_server_started_total counter\ngrpc_server_started_total{",
            "# HELP build_info The running program.\n# TYPE build_info gauge\nbuild_info{",
            "# TYPE rds_upstream_in_flight gauge\nrds_upstream_in_flight 0",
            "# TYPE rds_upstream_request_duration_seconds histogram\nrds_upstream_request_duration_seconds_sum ",
        ] {
            assert!(classic.contains(lines), "{lines}: {classic}");
        }
    }
}
