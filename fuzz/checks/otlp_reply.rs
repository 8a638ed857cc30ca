//! The number of rejected spans is that of a slow parser of protobuf, and 0 for anything that is not a reply of a collector.

use rds_task_facade::telemetry::export::rejected;

pub(crate) fn check(input: &[u8]) {
    let mut spans = 0;
    let is_valid = message(
        input,
        100,
        &mut |number, value, depth| match (number, value) {
            (1, Value::Bytes(partial)) => message(partial, depth, &mut |number, value, _| match (
                number, value,
            ) {
                (1, Value::Varint(value)) => {
                    spans = value as i64;
                    true
                }
                (2, Value::Bytes(text)) => str::from_utf8(text).is_ok(),
                (number, _) => number > 2,
            }),
            (number, _) => number > 1,
        },
    );
    let expected = if is_valid { spans.max(0) as u64 } else { 0 };

    assert_eq!(rejected(input), expected);
}

enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Other,
}

/// Reads a field: its number, its value, the further depth of messages. Returns whether it is valid.
type Field<'f> = &'f mut dyn FnMut(u64, Value<'_>, u32) -> bool;

/// Whether the bytes are a message with valid fields. `depth` is the limit on messages and groups in it.
fn message(mut bytes: &[u8], depth: u32, field: Field<'_>) -> bool {
    while !bytes.is_empty() {
        let Some((number, kind, value)) = next(&mut bytes, depth) else {
            return false;
        };
        if kind == 4 || depth == 0 || !field(number, value, depth - 1) {
            return false;
        }
    }
    true
}

/// The next field: number, wire type, value. A group is skipped.
fn next<'a>(bytes: &mut &'a [u8], depth: u32) -> Option<(u64, u64, Value<'a>)> {
    let key = varint(bytes)?;
    let (number, kind) = (key >> 3, key & 7);
    if key > u64::from(u32::MAX) || number == 0 {
        return None;
    }
    let value = match kind {
        0 => Value::Varint(varint(bytes)?),
        1 => take(bytes, 8).map(|_| Value::Other)?,
        2 => {
            let length = varint(bytes)?;
            Value::Bytes(take(bytes, length)?)
        }
        3 => {
            let depth = depth.checked_sub(1)?;
            loop {
                match next(bytes, depth)? {
                    (end, 4, _) if end == number => break Value::Other,
                    (_, 4, _) => return None,
                    _ => {}
                }
            }
        }
        4 => Value::Other,
        5 => take(bytes, 4).map(|_| Value::Other)?,
        _ => return None,
    };
    Some((number, kind, value))
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    *bytes = rest;
    Some(taken)
}

/// At most ten bytes, seven bits each, 64 bits together.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u128;
    for place in 0..10 {
        let [byte] = take(bytes, 1)? else { return None };
        number |= u128::from(byte & 0x7f) << (7 * place);
        if *byte < 0x80 {
            return u64::try_from(number).ok();
        }
    }
    None
}
