//! The `OTEL_*` variables of trace export ("OpenTelemetry Environment Variable Specification", "OpenTelemetry Protocol
//! Exporter"). Without an endpoint the others are ignored.

use std::{fs, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use crate::options::{self, Parsed, Validation, number};

/// How spans are created and exported.
#[derive(Debug, Clone)]
pub struct Tracing {
    /// The URL of the collector, with the path.
    pub endpoint: String,
    /// Sent with every export request; the values are marked sensitive.
    pub headers: HeaderMap,
    /// Upper bound of one export, retries included.
    pub timeout: Duration,
    /// PEM certificates to trust instead of the system's.
    pub certificate_pem: Option<Vec<u8>>,
    /// Which traces are recorded.
    pub sampler: Sampler,
    /// Which trace context formats are accepted.
    pub propagators: Propagators,
    /// `service.name`.
    pub service_name: String,
    /// Other attributes of the resource.
    pub resource: Vec<(String, String)>,
    /// Maximum number of queued spans.
    pub queue_spans: usize,
    /// Maximum number of spans in one export request.
    pub batch_spans: usize,
    /// Maximum time that a span waits for its batch to fill.
    pub delay: Duration,
}

/// Which traces are recorded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Whether to follow the caller's decision.
    pub parent_based: bool,
    /// The fraction of the other traces to record, 0 to 1.
    pub ratio: f64,
}

impl Sampler {
    /// Whether to record a trace. `parent` is the caller's decision, if any. Processes with the same ratio decide alike.
    pub fn samples(self, trace_id: u128, parent: Option<bool>) -> bool {
        match parent {
            Some(sampled) if self.parent_based => sampled,
            // The low 64 bits of a trace id are random.
            _ => {
                self.ratio >= 1.0
                    || ((trace_id as u64) >> 1) < (self.ratio * (1u64 << 63) as f64) as u64
            }
        }
    }
}

/// Which trace context formats are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagators {
    /// `traceparent` and `tracestate`.
    pub w3c: bool,
    /// `b3` and `x-b3-*`.
    pub b3: bool,
}

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

/// Reads the variables; `None` without trace export.
pub(super) fn read(validation: &mut Validation<'_>) -> Option<Tracing> {
    let disabled = validation.variable("OTEL_SDK_DISABLED");
    let exporter = validation.variable("OTEL_TRACES_EXPORTER");
    let off = disabled.is_some_and(|text| text.eq_ignore_ascii_case("true"))
        || exporter.is_some_and(|text| text == "none");
    let (own, base) = (
        validation.variable(TRACES_ENDPOINT),
        validation.variable(ENDPOINT),
    );
    let endpoint = match (own, base) {
        _ if off => return None,
        (Some(text), _) => validation.accept(TRACES_ENDPOINT, url(&text)),
        (None, Some(text)) => {
            let base = validation.accept(ENDPOINT, url(&text));
            base.map(|base| format!("{}/v1/traces", base.trim_end_matches('/')))
        }
        (None, None) => return None,
    };
    exporter_setting(validation, "PROTOCOL", protocol);
    let headers = exporter_setting(validation, "HEADERS", headers).unwrap_or_default();
    let timeout =
        exporter_setting(validation, "TIMEOUT", milliseconds).unwrap_or(Duration::from_secs(10));
    let certificate_pem = exporter_setting(validation, "CERTIFICATE", certificate);
    let sampler = sampler(validation);
    let propagators = validation.parsed_variable("OTEL_PROPAGATORS", propagators);
    let mut resource = validation
        .parsed_variable("OTEL_RESOURCE_ATTRIBUTES", pairs)
        .unwrap_or_default();
    let named = resource.iter().position(|(key, _)| key == "service.name");
    let named = named.map(|at| resource.remove(at).1);
    // The exporter sets service.version itself.
    resource.retain(|(key, _)| key != "service.version");
    let service_name = validation
        .variable("OTEL_SERVICE_NAME")
        .or(named)
        .unwrap_or_else(|| env!("CARGO_PKG_NAME").to_owned());
    let queue_spans = validation
        .parsed_variable("OTEL_BSP_MAX_QUEUE_SIZE", options::limit)
        .unwrap_or(2048);
    let batch_spans = validation
        .parsed_variable("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", options::limit)
        .unwrap_or(512);
    let delay = validation.parsed_variable("OTEL_BSP_SCHEDULE_DELAY", milliseconds);
    Some(Tracing {
        endpoint: endpoint?,
        headers,
        timeout,
        certificate_pem,
        sampler,
        propagators: propagators.unwrap_or(Propagators {
            w3c: true,
            b3: true,
        }),
        service_name,
        resource,
        queue_spans,
        batch_spans: batch_spans.min(queue_spans),
        delay: delay.unwrap_or(Duration::from_secs(5)),
    })
}

/// Reads an exporter setting: the variable for traces wins over the variable for all signals.
fn exporter_setting<T>(
    validation: &mut Validation<'_>,
    name: &str,
    parse: impl Fn(&str) -> Parsed<T>,
) -> Option<T> {
    let own = format!("OTEL_EXPORTER_OTLP_TRACES_{name}");
    if validation.variable(&own).is_some() {
        return validation.parsed_variable(&own, parse);
    }
    validation.parsed_variable(&format!("OTEL_EXPORTER_OTLP_{name}"), parse)
}

/// Rejects a URL with a password, because the log shows the URL. Credentials belong into `OTEL_EXPORTER_OTLP_HEADERS`.
fn url(text: &str) -> Parsed<String> {
    let form = || {
        "must be an http or https URL without user and query, like http://127.0.0.1:4318".to_owned()
    };
    let uri: Uri = text.parse().map_err(|_| form())?;
    let authority = uri.authority().ok_or_else(form)?;
    let valid = matches!(uri.scheme_str(), Some("http" | "https"))
        && !authority.as_str().contains('@')
        && !authority.host().is_empty()
        && uri.query().is_none()
        && reqwest::Url::parse(text).is_ok();
    if valid {
        Ok(uri.to_string())
    } else {
        Err(form())
    }
}

fn protocol(text: &str) -> Parsed<()> {
    match text {
        "http/protobuf" => Ok(()),
        "grpc" => Err("grpc is not supported; use http/protobuf and the collector's HTTP port (4318 by default)".to_owned()),
        _ => Err("must be http/protobuf".to_owned()),
    }
}

fn headers(text: &str) -> Parsed<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs(text)? {
        let value = HeaderValue::from_str(&value).ok();
        let Some((name, mut value)) = HeaderName::try_from(name).ok().zip(value) else {
            return Err(
                "must be name=value pairs separated by commas, values percent-encoded".to_owned(),
            );
        };
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

/// Parses `name=value` pairs separated by commas, with percent-encoded values. Errors never echo the text, since headers hold
/// secrets.
fn pairs(text: &str) -> Parsed<Vec<(String, String)>> {
    let form = || "must be name=value pairs separated by commas, values percent-encoded".to_owned();
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=').ok_or_else(form)?;
            let name = name.trim();
            let value = percent_decode_str(value.trim()).decode_utf8();
            let value = value.map_err(|_| form())?;
            (!name.is_empty())
                .then(|| (name.to_owned(), value.into_owned()))
                .ok_or_else(form)
        })
        .collect()
}

fn milliseconds(text: &str) -> Parsed<Duration> {
    number::<1, 3_600_000>(text).map(|number| Duration::from_millis(number.into()))
}

fn certificate(text: &str) -> Parsed<Vec<u8>> {
    let path = options::file(text)?;
    fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}

fn sampler(validation: &mut Validation<'_>) -> Sampler {
    // Parent-based or not, and the ratio; `None` if OTEL_TRACES_SAMPLER_ARG sets it.
    let known = [
        ("always_on", (false, Some(1.0))),
        ("always_off", (false, Some(0.0))),
        ("traceidratio", (false, None)),
        ("parentbased_always_on", (true, Some(1.0))),
        ("parentbased_always_off", (true, Some(0.0))),
        ("parentbased_traceidratio", (true, None)),
    ];
    let chosen =
        validation.parsed_variable("OTEL_TRACES_SAMPLER", |text| options::word(text, &known));
    let (parent_based, fixed) = chosen.unwrap_or((true, Some(1.0)));
    let ratio = fixed.or_else(|| validation.parsed_variable("OTEL_TRACES_SAMPLER_ARG", ratio));
    Sampler {
        parent_based,
        ratio: ratio.unwrap_or(1.0),
    }
}

fn ratio(text: &str) -> Parsed<f64> {
    let ratio = text
        .parse()
        .ok()
        .filter(|ratio| (0.0..=1.0).contains(ratio));
    ratio.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

fn propagators(text: &str) -> Parsed<Propagators> {
    let mut accepted = Propagators {
        w3c: false,
        b3: false,
    };
    for name in text.split(',') {
        match name.trim() {
            "tracecontext" => accepted.w3c = true,
            "b3" | "b3multi" => accepted.b3 = true,
            // The facade neither reads nor forwards baggage.
            "baggage" | "none" => {}
            _ => {
                return Err(
                    "must be a list of tracecontext, b3, b3multi, baggage or none".to_owned(),
                );
            }
        }
    }
    Ok(accepted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Environment;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Tracing>, Vec<String>> {
        let environment: Environment = pairs
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        let mut validation = Validation::new(&environment);
        let tracing = super::read(&mut validation);
        let problems = validation.into_problems();
        problems.is_empty().then_some(tracing).ok_or(problems)
    }

    #[test]
    fn path_is_appended_to_the_base_endpoint_only() {
        let cases = [
            (ENDPOINT, "http://c:4318", "http://c:4318/v1/traces"),
            (ENDPOINT, "http://c:4318/", "http://c:4318/v1/traces"),
            (ENDPOINT, "https://c/otlp", "https://c/otlp/v1/traces"),
            (TRACES_ENDPOINT, "http://c:4318", "http://c:4318/"),
            (TRACES_ENDPOINT, "http://c/own/path", "http://c/own/path"),
        ];

        for (name, value, expected) in cases {
            let tracing = read(&[(name, value)]).unwrap().unwrap();
            assert_eq!(tracing.endpoint, expected, "{name}={value}");
        }
        let both = [(ENDPOINT, "http://a"), (TRACES_ENDPOINT, "http://b/x")];
        assert_eq!(read(&both).unwrap().unwrap().endpoint, "http://b/x");
    }

    #[test]
    fn other_variables_are_ignored_without_an_endpoint_or_when_disabled() {
        let bad = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        let cases: [&[(&str, &str)]; 4] = [
            &[bad],
            &[bad, (ENDPOINT, "")],
            &[bad, (ENDPOINT, "http://c"), ("OTEL_SDK_DISABLED", "true")],
            &[
                bad,
                (ENDPOINT, "http://c"),
                ("OTEL_TRACES_EXPORTER", "none"),
            ],
        ];

        for case in cases {
            assert!(read(case).unwrap().is_none(), "{case:?}");
        }
    }

    #[test]
    fn problems_are_reported_together_and_echo_no_secret() {
        let problems = read(&[
            (ENDPOINT, "http://user:canary@c"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "canary"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
            ("OTEL_PROPAGATORS", "jaeger"),
        ])
        .unwrap_err();

        let names: Vec<&str> = problems
            .iter()
            .filter_map(|m| Some(m.split_once(':')?.0))
            .collect();
        let expected = [
            ENDPOINT,
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_TIMEOUT",
            "OTEL_TRACES_SAMPLER_ARG",
            "OTEL_PROPAGATORS",
        ];
        assert_eq!(names, expected);
        assert!(!problems.concat().contains("canary"), "{problems:?}");
    }

    #[test]
    fn every_setting_is_parsed() {
        let tracing = read(&[
            (ENDPOINT, "http://c"),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "authorization=Bearer%20x, a=b",
            ),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,k=v%2Cw"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_PROPAGATORS", "tracecontext,baggage"),
        ])
        .unwrap()
        .unwrap();

        assert_eq!(tracing.headers["authorization"], "Bearer x");
        assert!(!format!("{tracing:?}").contains("Bearer"));
        assert_eq!(tracing.timeout, Duration::from_millis(2500));
        assert_eq!(tracing.service_name, "a");
        assert_eq!(tracing.resource, [("k".to_owned(), "v,w".to_owned())]);
        assert_eq!((tracing.queue_spans, tracing.batch_spans), (100, 100));
        assert_eq!(
            tracing.propagators,
            Propagators {
                w3c: true,
                b3: false
            }
        );
    }

    #[test]
    fn sampler_follows_the_caller_only_if_parent_based() {
        let sampler = |parent_based, ratio| Sampler {
            parent_based,
            ratio,
        };
        let half = u128::from(u64::MAX / 2);
        let cases = [
            (sampler(true, 0.0), 1, Some(true), true),
            (sampler(true, 1.0), 1, Some(false), false),
            (sampler(false, 1.0), u128::MAX, Some(false), true),
            (sampler(true, 1.0), u128::MAX, None, true),
            (sampler(true, 0.0), 0, None, false),
            (sampler(false, 0.5), half, None, true),
            (sampler(false, 0.5), half + 2, None, false),
        ];

        for (sampler, trace_id, parent, expected) in cases {
            assert_eq!(
                sampler.samples(trace_id, parent),
                expected,
                "{sampler:?} {parent:?}"
            );
        }
    }
}
