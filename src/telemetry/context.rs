//! Reads the caller's trace context (W3C Trace Context or B3) and writes the upstream one (W3C only).

use std::fmt;

use http::{HeaderMap, HeaderValue};

use super::Propagators;

/// A longer `tracestate` is dropped. Systems should propagate at least this length (W3C Trace Context, section 3.3.1.5).
const MAX_TRACE_STATE: usize = 512;

/// The identity of a span. [`fmt::Display`] writes a `traceparent`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Not zero.
    pub trace_id: u128,
    /// Not zero.
    pub span_id: u64,
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// `tracestate`, visible ASCII, not interpreted.
    pub trace_state: String,
}

impl Context {
    /// The caller's span: W3C if accepted and valid, else B3 if accepted and valid.
    pub fn from_headers(headers: &HeaderMap, accepted: Propagators) -> Option<Self> {
        let w3c = accepted.w3c.then(|| w3c(headers)).flatten();
        w3c.or_else(|| accepted.b3.then(|| b3(headers)).flatten())
    }

    /// The caller's decision whether to record a trace that begins here: B3 allows a decision without ids.
    pub(super) fn decision_from_headers(
        headers: &HeaderMap,
        accepted: Propagators,
    ) -> Option<bool> {
        accepted.b3.then(|| b3_decision(headers)).flatten()
    }

    /// Parses a `traceparent`; `None` if it is invalid (W3C Trace Context, section 3.2).
    pub fn from_traceparent(value: &HeaderValue) -> Option<Self> {
        let mut parts = value.to_str().ok()?.split('-');
        let (version, trace_id, span_id, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let valid = lower_hex(version, 2)
            && version != "ff"
            && lower_hex(flags, 2)
            // Later versions may add parts.
            && (version != "00" || parts.next().is_none());
        let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        Self::from_ids(trace_id, span_id, sampled).filter(|_| valid && trace_id.len() == 32)
    }

    fn from_ids(trace_id: &str, span_id: &str, sampled: bool) -> Option<Self> {
        // B3 allows 64-bit trace ids.
        let valid = (lower_hex(trace_id, 32) || lower_hex(trace_id, 16)) && lower_hex(span_id, 16);
        let context = Self {
            trace_id: u128::from_str_radix(trace_id, 16).ok()?,
            span_id: u64::from_str_radix(span_id, 16).ok()?,
            sampled,
            trace_state: String::new(),
        };
        (valid && context.trace_id != 0 && context.span_id != 0).then_some(context)
    }

    /// Adds `traceparent` and `tracestate` to a request.
    pub fn write(&self, headers: &mut HeaderMap) {
        let traceparent =
            HeaderValue::from_str(&self.to_string()).expect("hex digits and dashes are ASCII");
        headers.insert("traceparent", traceparent);
        if !self.trace_state.is_empty()
            && let Ok(trace_state) = HeaderValue::from_str(&self.trace_state)
        {
            headers.insert("tracestate", trace_state);
        }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.sampled);
        write!(
            f,
            "00-{:032x}-{:016x}-{flags:02x}",
            self.trace_id, self.span_id
        )
    }
}

fn lower_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn w3c(headers: &HeaderMap) -> Option<Context> {
    let mut parents = headers.get_all("traceparent").iter();
    // Not a list header: a repeated one is invalid.
    let parent = parents.next().filter(|_| parents.next().is_none())?;
    Some(Context {
        trace_state: trace_state(headers),
        ..Context::from_traceparent(parent)?
    })
}

/// All `tracestate` headers joined; empty if absent, invalid or too long.
fn trace_state(headers: &HeaderMap) -> String {
    let parts: Result<Vec<&str>, _> = headers
        .get_all("tracestate")
        .iter()
        .map(HeaderValue::to_str)
        .collect();
    let joined = parts.unwrap_or_default().join(",");
    if joined.len() > MAX_TRACE_STATE || joined.contains('\t') {
        return String::new();
    }
    joined
}

/// Zipkin's headers: `b3: {trace}-{span}[-{sampled}[-{parent}]]`, or one header for each (B3 propagation, "Overall
/// Process"). Without a decision the trace is recorded.
fn b3(headers: &HeaderMap) -> Option<Context> {
    let sampled = b3_decision(headers).unwrap_or(true);
    if let Some(single) = text(headers, "b3") {
        let mut parts = single.split('-');
        return Context::from_ids(parts.next()?, parts.next()?, sampled);
    }
    Context::from_ids(
        text(headers, "x-b3-traceid")?,
        text(headers, "x-b3-spanid")?,
        sampled,
    )
}

/// The decision in Zipkin's headers: the third part of `b3`, or all of it (`b3: 0`), else `x-b3-flags` and `x-b3-sampled`. A debug
/// trace, `d` or the flag, is recorded.
fn b3_decision(headers: &HeaderMap) -> Option<bool> {
    let decision = match text(headers, "b3") {
        Some(single) if single.contains('-') => single.split('-').nth(2)?,
        Some(single) => single,
        None if text(headers, "x-b3-flags") == Some("1") => "d",
        None => text(headers, "x-b3-sampled")?,
    };
    match decision {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";
    const ALL: Propagators = Propagators {
        w3c: true,
        b3: true,
    };

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn malformed_traceparent_is_ignored() {
        let cases = [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("01-{TRACE}-{SPAN}-01-more"), true),
            (format!("00-{TRACE}-{SPAN}-01-more"), false),
            (format!("ff-{TRACE}-{SPAN}-01"), false),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), false),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), false),
            (format!("00-{TRACE}-{}-01", "0".repeat(16)), false),
            (format!("00-{TRACE}-{SPAN}"), false),
            (format!("00-{}-{SPAN}-01", &TRACE[1..]), false),
            (format!("00-{}-{SPAN}-01", &TRACE[16..]), false),
            (format!("00-{TRACE}-{SPAN}-0x"), false),
            (String::new(), false),
        ];

        for (text, expected) in cases {
            let value = HeaderValue::from_str(&text).unwrap();
            assert_eq!(
                Context::from_traceparent(&value).is_some(),
                expected,
                "{text}"
            );
        }
        assert_eq!(
            Context::from_traceparent(&HeaderValue::from_bytes(b"\xff").unwrap()),
            None
        );
    }

    #[test]
    fn written_context_equals_parsed_context() {
        let cases = [
            (
                vec![
                    (
                        "traceparent",
                        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                    ),
                    ("tracestate", "a=1"),
                    ("tracestate", "b=2"),
                ],
                "01",
                "a=1,b=2",
            ),
            (
                vec![(
                    "traceparent",
                    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
                )],
                "00",
                "",
            ),
            (
                vec![("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1")],
                "01",
                "",
            ),
            (
                vec![(
                    "b3",
                    "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0-00f067aa0ba902b6",
                )],
                "00",
                "",
            ),
            (
                vec![("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7")],
                "01",
                "",
            ),
            (
                vec![
                    ("x-b3-traceid", TRACE),
                    ("x-b3-spanid", SPAN),
                    ("x-b3-sampled", "0"),
                ],
                "00",
                "",
            ),
        ];

        for (pairs, flags, state) in cases {
            let context = Context::from_headers(&headers(&pairs), ALL).unwrap();
            let mut written = HeaderMap::new();
            context.write(&mut written);
            assert_eq!(
                written["traceparent"],
                format!("00-{TRACE}-{SPAN}-{flags}"),
                "{pairs:?}"
            );
            let state_written = written
                .get("tracestate")
                .map_or("", |value| value.to_str().unwrap());
            assert_eq!(state_written, state, "{pairs:?}");
        }
    }

    #[test]
    fn repeated_traceparent_is_ignored() {
        let parent = (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        );

        assert_eq!(
            Context::from_headers(&headers(&[parent, parent]), ALL),
            None
        );
    }

    #[test]
    fn w3c_wins_over_b3_and_unaccepted_formats_are_ignored() {
        let w3c = (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        );
        let zipkin = ("b3", "0bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1");
        let none = Propagators {
            w3c: false,
            b3: false,
        };

        let both = Context::from_headers(&headers(&[zipkin, w3c]), ALL).unwrap();
        let unaccepted = Context::from_headers(&headers(&[zipkin, w3c]), none);

        assert_eq!(format!("{:032x}", both.trace_id), TRACE);
        assert_eq!(unaccepted, None);
    }

    #[test]
    fn a_b3_decision_counts_without_ids() {
        let cases: &[(&[(&'static str, &str)], _)] = &[
            (&[("b3", "0")], Some(false)),
            (&[("b3", "1")], Some(true)),
            (&[("b3", "d")], Some(true)),
            (&[("b3", "")], None),
            (&[("b3", "2")], None),
            (&[("b3", TRACE)], None),
            (&[("x-b3-sampled", "0")], Some(false)),
            (&[("x-b3-sampled", "false")], Some(false)),
            (&[("x-b3-sampled", "1")], Some(true)),
            (&[("x-b3-sampled", "true")], Some(true)),
            (&[("x-b3-sampled", "d")], Some(true)),
            (&[("x-b3-sampled", "maybe")], None),
            (&[("x-b3-flags", "1")], Some(true)),
            (&[("x-b3-flags", "0")], None),
            (&[("x-b3-flags", "1"), ("x-b3-sampled", "0")], Some(true)),
            (
                &[("x-b3-traceid", TRACE), ("x-b3-sampled", "0")],
                Some(false),
            ),
            (&[("b3", "0"), ("x-b3-sampled", "1")], Some(false)),
            (&[("traceparent", "00-0-0-01"), ("b3", "0")], Some(false)),
            (&[], None),
        ];

        for (pairs, expected) in cases {
            let headers = headers(pairs);
            let found = Context::decision_from_headers(&headers, ALL);
            assert_eq!(found, *expected, "{pairs:?}");
            assert_eq!(Context::from_headers(&headers, ALL), None, "{pairs:?}");
            let only_w3c = Propagators { b3: false, ..ALL };
            assert_eq!(Context::decision_from_headers(&headers, only_w3c), None);
        }
    }

    #[test]
    fn overlong_tracestate_is_dropped_without_the_trace() {
        let long = format!("a={}", "x".repeat(600));
        let parent = format!("00-{TRACE}-{SPAN}-01");

        let context = Context::from_headers(
            &headers(&[("traceparent", &parent), ("tracestate", &long)]),
            ALL,
        )
        .unwrap();

        assert_eq!(context.trace_state, "");
    }
}
