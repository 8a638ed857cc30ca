//! `grpc-timeout` is parsed exactly by the grammar of gRPC over HTTP/2: a positive integer of at most 8 ASCII digits and a letter
//! for the unit.

use std::time::Duration;

use rds_task_facade::deadline::{Deadline, THIRTY_YEARS, parse_grpc_timeout};

pub(crate) fn check(input: &[u8]) {
    let timeout = parse_grpc_timeout(input);

    assert_eq!(
        timeout.map(|timeout| timeout.as_nanos()),
        nanoseconds(input)
    );
    // The longest timeout must not overflow the clock.
    assert!(Deadline::after(timeout.unwrap_or(Duration::ZERO)).remaining() <= THIRTY_YEARS);
}

/// The timeout in nanoseconds, by the grammar. Zero is accepted too: callers send it when their deadline has just passed.
fn nanoseconds(input: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(input).ok()?;
    let units = [
        ("H", 3_600_000_000_000),
        ("M", 60_000_000_000),
        ("S", 1_000_000_000),
        ("m", 1_000_000),
        ("u", 1_000),
        ("n", 1),
    ];
    let (value, unit) = units
        .into_iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    if value.is_empty() || value.len() > 8 {
        return None;
    }
    let mut nanoseconds = 0;
    for (place, digit) in value.chars().rev().enumerate() {
        let digit = "0123456789".find(digit)? as u128;
        nanoseconds += digit * 10_u128.pow(place as u32) * unit;
    }
    Some(nanoseconds)
}
