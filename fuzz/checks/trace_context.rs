//! A caller's `traceparent` is accepted if and only if W3C Trace Context allows it, and the context written for upstream parses to
//! the same context.
//!
//! The input's lines: two `traceparent` headers (an empty second one is left out), two of `tracestate`, one of `b3`.

use http::{HeaderMap, HeaderValue};
use rds_task_facade::telemetry::{Propagators, context::Context};

use super::lines;

pub(crate) fn check(input: &[u8]) {
    let [first, second, state, more_state, b3] = lines(input);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("traceparent", first),
        ("traceparent", second),
        ("tracestate", state),
        ("tracestate", more_state),
        ("b3", b3),
    ] {
        if let Ok(value) = HeaderValue::from_bytes(value)
            && !value.is_empty()
        {
            headers.append(name, value);
        }
    }
    let accepted = |w3c, b3| Context::from_headers(&headers, Propagators { w3c, b3 });
    assert_eq!(accepted(false, false), None);

    let w3c = accepted(true, false);
    let mut parents = headers.get_all("traceparent").iter();
    let expected = match (parents.next(), parents.next()) {
        (Some(only), None) => traceparent(only.as_bytes()),
        _ => None,
    };
    let read = w3c
        .as_ref()
        .map(|context| (context.trace_id, context.span_id, context.sampled));
    assert_eq!(read, expected);
    assert_eq!(
        accepted(true, true).is_some(),
        w3c.is_some() || accepted(false, true).is_some()
    );

    for context in [w3c, accepted(false, true), accepted(true, true)]
        .into_iter()
        .flatten()
    {
        assert!(context.trace_state.len() <= 512);
        let mut sent = HeaderMap::new();
        context.write(&mut sent);
        assert!(traceparent(sent["traceparent"].as_bytes()).is_some());
        assert_eq!(
            Context::from_headers(
                &sent,
                Propagators {
                    w3c: true,
                    b3: false
                }
            ),
            Some(context)
        );
    }
}

/// W3C Trace Context, section 3.2, by byte positions: version, trace id, parent id, flags.
fn traceparent(value: &[u8]) -> Option<(u128, u64, bool)> {
    let visible = value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~'));
    if value.len() < 55 || !visible {
        return None;
    }
    let version = hex(&value[..2])?;
    let dashes = [2, 35, 52].into_iter().all(|at| value[at] == b'-');
    let ends = match version {
        0 => value.len() == 55,
        255 => false,
        _ => value.len() == 55 || value[55] == b'-',
    };
    let (trace_id, span_id, flags) = (
        hex(&value[3..35])?,
        hex(&value[36..52])?,
        hex(&value[53..55])?,
    );
    let valid = dashes && ends && trace_id != 0 && span_id != 0;
    valid.then_some((trace_id, u64::try_from(span_id).ok()?, flags % 2 == 1))
}

fn hex(digits: &[u8]) -> Option<u128> {
    let mut number = 0;
    for digit in digits {
        let value = b"0123456789abcdef"
            .iter()
            .position(|known| known == digit)?;
        number = number * 16 + value as u128;
    }
    Some(number)
}
