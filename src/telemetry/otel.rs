//! The `OTEL_*` variables of trace export ("OpenTelemetry Environment Variable Specification", "OpenTelemetry Protocol
//! Exporter"). Platforms inject them for all programs, so a value that cannot be used is never a problem at start.

use std::{ffi::OsStr, fs, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;

use crate::{
    options::{self, Environment, Parsed, number, url},
    pem,
};

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

/// The trace export, if the variables configure it, and the variables that cannot be used, each with its value and the reason.
/// Without a usable exporter and endpoint there is no trace export; any other setting gets its default.
pub(super) fn read(environment: &Environment) -> (Option<Tracing>, Vec<String>) {
    let mut variables = Variables {
        environment,
        unusable: Vec::new(),
    };
    let tracing = variables.tracing();
    (tracing, variables.unusable)
}

struct Variables<'a> {
    environment: &'a Environment,
    unusable: Vec<String>,
}

impl Variables<'_> {
    fn tracing(&mut self) -> Option<Tracing> {
        if self.parsed("OTEL_SDK_DISABLED", boolean) == Some(true) || !self.exports_otlp() {
            return None;
        }
        let endpoint = self.parsed(TRACES_ENDPOINT, endpoint).or_else(|| {
            let base = self.parsed(ENDPOINT, endpoint)?;
            Some(format!("{}/v1/traces", base.trim_end_matches('/')))
        });
        self.exporter_setting("PROTOCOL", |text| only(text, "http/protobuf"));
        self.exporter_setting("COMPRESSION", |text| only(text, "none"));
        let headers = self.exporter_setting("HEADERS", headers);
        let timeout = self.exporter_setting("TIMEOUT", milliseconds);
        let certificate_pem = self.exporter_setting("CERTIFICATE", certificate);
        let sampler = self.sampler();
        let propagators = self.parsed("OTEL_PROPAGATORS", propagators);
        let resource = self.parsed("OTEL_RESOURCE_ATTRIBUTES", pairs);
        let mut resource = resource.unwrap_or_default();
        let named = resource.iter().position(|(key, _)| key == "service.name");
        let named = named.map(|at| resource.remove(at).1);
        // The exporter sets service.version itself.
        resource.retain(|(key, _)| key != "service.version");
        let service_name = self.parsed("OTEL_SERVICE_NAME", |text| Ok(text.to_owned()));
        let queue_spans = self
            .parsed("OTEL_BSP_MAX_QUEUE_SIZE", count)
            .unwrap_or(2048);
        let batch_spans = self.parsed("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", count);
        let delay = self.parsed("OTEL_BSP_SCHEDULE_DELAY", milliseconds);
        let export_timeout = self.parsed("OTEL_BSP_EXPORT_TIMEOUT", milliseconds);
        Some(Tracing {
            endpoint: endpoint?,
            headers: headers.unwrap_or_default(),
            timeout: timeout
                .unwrap_or(Duration::from_secs(10))
                .min(export_timeout.unwrap_or(Duration::from_secs(30))),
            certificate_pem,
            sampler,
            propagators: propagators.unwrap_or(Propagators {
                w3c: true,
                b3: true,
            }),
            service_name: service_name
                .or(named)
                .unwrap_or_else(|| env!("CARGO_PKG_NAME").to_owned()),
            resource,
            queue_spans,
            batch_spans: batch_spans.unwrap_or(512).min(queue_spans),
            delay: delay.unwrap_or(Duration::from_secs(5)),
        })
    }

    /// The parsed value of a variable; `None` if it is unset, empty, or cannot be used.
    fn parsed<T>(&mut self, name: &str, parse: impl Fn(&str) -> Parsed<T>) -> Option<T> {
        let value = self.environment.get(OsStr::new(name))?.to_string_lossy();
        let text = value.trim();
        if text.is_empty() {
            return None;
        }
        let parsed = parse(text).map_err(|reason| {
            // Headers hold secrets.
            let shown = match name.ends_with("HEADERS") {
                true => None,
                false => options::quoted(text),
            };
            let value = shown.map_or_else(String::new, |value| format!("={value}"));
            self.unusable.push(format!("{name}{value} {reason}"));
        });
        parsed.ok()
    }

    /// An exporter setting: the variable for traces wins over the variable for all signals.
    fn exporter_setting<T>(&mut self, name: &str, parse: fn(&str) -> Parsed<T>) -> Option<T> {
        self.parsed(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"), parse)
            .or_else(|| self.parsed(&format!("OTEL_EXPORTER_OTLP_{name}"), parse))
    }

    /// Whether `otlp` is among the exporters. It is the default.
    fn exports_otlp(&mut self) -> bool {
        const NAME: &str = "OTEL_TRACES_EXPORTER";
        let Some(list) = self.parsed(NAME, |text| Ok(text.to_ascii_lowercase())) else {
            return true;
        };
        let exporters = || list.split(',').map(str::trim);
        let known = exporters().all(|exporter| matches!(exporter, "otlp" | "none"));
        self.parsed(NAME, |_| match known {
            true => Ok(()),
            false => Err("must be otlp or none".to_owned()),
        });
        exporters().any(|exporter| exporter == "otlp")
    }

    fn sampler(&mut self) -> Sampler {
        let chosen = self.parsed("OTEL_TRACES_SAMPLER", sampler);
        let (parent_based, fixed) = chosen.unwrap_or((true, Some(1.0)));
        let ratio = fixed.or_else(|| self.parsed("OTEL_TRACES_SAMPLER_ARG", ratio));
        Sampler {
            parent_based,
            ratio: ratio.unwrap_or(1.0),
        }
    }
}

fn boolean(text: &str) -> Parsed<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

fn only(text: &str, supported: &str) -> Parsed<()> {
    match text.eq_ignore_ascii_case(supported) {
        true => Ok(()),
        false => Err(format!("is not supported; {supported} is used")),
    }
}

/// Rejects a URL with a password, because the log shows the URL. Credentials belong into `OTEL_EXPORTER_OTLP_HEADERS`.
fn endpoint(text: &str) -> Parsed<String> {
    url::parse(text)
        .filter(|url| {
            url.username().is_empty() && url.password().is_none() && url.query().is_none()
        })
        .map(String::from)
        .ok_or_else(|| {
            "must be an http or https URL without user and query, like http://127.0.0.1:4318"
                .to_owned()
        })
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
    match number::<1, 3_600_000>(text) {
        Ok(number) => Ok(Duration::from_millis(number.into())),
        Err(_) => Err("must be a whole number of milliseconds, up to an hour".to_owned()),
    }
}

fn count(text: &str) -> Parsed<usize> {
    options::limit(text).map_err(|_| "must be a whole number from 1 to 1000000".to_owned())
}

fn certificate(text: &str) -> Parsed<Vec<u8>> {
    let path = options::file(text)?;
    // Reading a pipe could block the start.
    if !path.is_file() {
        return Err("must be a regular file".to_owned());
    }
    let content = fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    pem::roots(&content).map_err(|error| error.to_string())?;
    Ok(content)
}

/// Whether a sampler is parent-based, and its ratio; without a ratio, `OTEL_TRACES_SAMPLER_ARG` sets it.
fn sampler(text: &str) -> Parsed<(bool, Option<f64>)> {
    match text.to_ascii_lowercase().as_str() {
        "always_on" => Ok((false, Some(1.0))),
        "always_off" => Ok((false, Some(0.0))),
        "traceidratio" => Ok((false, None)),
        "parentbased_always_on" => Ok((true, Some(1.0))),
        "parentbased_always_off" => Ok((true, Some(0.0))),
        "parentbased_traceidratio" => Ok((true, None)),
        _ => Err(
            "must be always_on, always_off, traceidratio, or one of them after parentbased_"
                .to_owned(),
        ),
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
        match name.trim().to_ascii_lowercase().as_str() {
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

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn read(pairs: Pairs<'_>) -> (Option<Tracing>, Vec<String>) {
        let environment: Environment = pairs
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        super::read(&environment)
    }

    /// The settings of variables that can all be used.
    fn usable(pairs: &[(&str, &str)]) -> Tracing {
        let (tracing, unusable) = read(pairs);
        assert_eq!(unusable, [""; 0]);
        tracing.expect("the export is configured")
    }

    #[test]
    fn path_is_appended_to_the_base_endpoint_only() {
        let cases = [
            (ENDPOINT, "http://c:4318", "http://c:4318/v1/traces"),
            (ENDPOINT, "http://c:4318/", "http://c:4318/v1/traces"),
            (ENDPOINT, "https://c/otlp", "https://c/otlp/v1/traces"),
            (ENDPOINT, " HTTP://C:4318 ", "http://c:4318/v1/traces"),
            (TRACES_ENDPOINT, "http://c:4318", "http://c:4318/"),
            (TRACES_ENDPOINT, "http://c/own/path", "http://c/own/path"),
        ];

        for (name, value, expected) in cases {
            assert_eq!(
                usable(&[(name, value)]).endpoint,
                expected,
                "{name}={value}"
            );
        }
        let both = [(ENDPOINT, "http://a"), (TRACES_ENDPOINT, "http://b/x")];
        assert_eq!(usable(&both).endpoint, "http://b/x");
    }

    #[test]
    fn traces_are_exported_only_to_a_usable_endpoint_and_with_the_otlp_exporter() {
        let on = (ENDPOINT, "http://c");
        // The variables, whether traces are exported, and the names of the unusable variables.
        let cases: [(Pairs<'_>, bool, &[&str]); 19] = [
            (&[], false, &[]),
            (&[(ENDPOINT, " ")], false, &[]),
            (&[on, ("OTEL_SDK_DISABLED", "TRUE")], false, &[]),
            (&[on, ("OTEL_SDK_DISABLED", "False")], true, &[]),
            (
                &[on, ("OTEL_SDK_DISABLED", "1")],
                true,
                &["OTEL_SDK_DISABLED"],
            ),
            (&[on, ("OTEL_TRACES_EXPORTER", "None")], false, &[]),
            (&[on, ("OTEL_TRACES_EXPORTER", "OTLP")], true, &[]),
            (
                &[on, ("OTEL_TRACES_EXPORTER", "console")],
                false,
                &["OTEL_TRACES_EXPORTER"],
            ),
            (
                &[on, ("OTEL_TRACES_EXPORTER", "zipkin,jaeger")],
                false,
                &["OTEL_TRACES_EXPORTER"],
            ),
            (
                &[on, ("OTEL_TRACES_EXPORTER", "otlp, console")],
                true,
                &["OTEL_TRACES_EXPORTER"],
            ),
            (&[(ENDPOINT, "collector:4317")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "grpc://c:4317")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "http://10.0.0.256")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "http://a..b")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "http://[fe80::1%25eth0]")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "http://u:canary@c")], false, &[ENDPOINT]),
            (&[(ENDPOINT, "http://c/?t=canary")], false, &[ENDPOINT]),
            (&[(TRACES_ENDPOINT, "localhost")], false, &[TRACES_ENDPOINT]),
            (
                &[on, (TRACES_ENDPOINT, "localhost")],
                true,
                &[TRACES_ENDPOINT],
            ),
        ];

        for (case, exported, names) in cases {
            let (tracing, unusable) = read(case);
            assert_eq!(tracing.is_some(), exported, "{case:?}");
            assert_eq!(unusable.len(), names.len(), "{case:?}: {unusable:?}");
            for (line, name) in unusable.iter().zip(names) {
                assert!(line.starts_with(name), "{line}");
                assert!(!line.contains("canary"), "{line}");
            }
        }
    }

    #[test]
    fn unusable_settings_get_their_default_and_are_named_with_their_value() {
        let missing = "/nonexistent/ca.pem";
        let cases = [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zstd"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", missing),
            ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "/dev/null"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_TRACES_SAMPLER", "xray"),
            ("OTEL_PROPAGATORS", "jaeger"),
            ("OTEL_PROPAGATORS", "tracecontext,xray"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=%ff"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many"),
            ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
            ("OTEL_BSP_EXPORT_TIMEOUT", "1e3"),
        ];
        let on = (ENDPOINT, "http://c");
        let default = format!("{:?}", usable(&[on]));

        for (name, value) in cases {
            let (tracing, unusable) = read(&[on, (name, value)]);
            assert_eq!(format!("{:?}", tracing.unwrap()), default, "{name}");
            assert_eq!(unusable.len(), 1, "{unusable:?}");
            let start = format!("{name}=\"{value}\" ");
            assert!(unusable[0].starts_with(&start), "{unusable:?}");
            // Also without an endpoint, because the variable is wrong in any case.
            assert_eq!(read(&[(name, value)]).1, unusable);
        }
        for headers in ["canary", "a b=canary", "a=canary%0a", "=canary"] {
            let unusable = read(&[on, ("OTEL_EXPORTER_OTLP_HEADERS", headers)]).1;
            assert_eq!(unusable.len(), 1, "{headers:?}");
            assert!(!unusable[0].contains("canary"), "{unusable:?}");
        }
        let ratio = |value| {
            read(&[
                on,
                ("OTEL_TRACES_SAMPLER", "traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", value),
            ])
        };
        for value in ["2", "-0.1", "NaN", "half"] {
            let (tracing, unusable) = ratio(value);
            assert_eq!(tracing.unwrap().sampler.ratio, 1.0, "{value}");
            assert_eq!(unusable.len(), 1, "{value}");
        }
    }

    #[test]
    fn values_are_compared_without_regard_to_case() {
        let tracing = usable(&[
            (ENDPOINT, "http://c"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "HTTP/Protobuf"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "None"),
            ("OTEL_TRACES_SAMPLER", "ParentBased_TraceIdRatio"),
            ("OTEL_TRACES_SAMPLER_ARG", " 0.25 "),
            ("OTEL_PROPAGATORS", "B3Multi, Baggage"),
        ]);

        assert_eq!(
            tracing.sampler,
            Sampler {
                parent_based: true,
                ratio: 0.25
            }
        );
        assert_eq!(
            tracing.propagators,
            Propagators {
                w3c: false,
                b3: true
            }
        );
    }

    #[test]
    fn every_setting_is_parsed() {
        let tracing = usable(&[
            (ENDPOINT, "http://c"),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "authorization=Bearer%20x, a=b",
            ),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,k=v%2Cw"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_PROPAGATORS", "tracecontext,baggage"),
        ]);

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
