//! The typed fields of a task are parsed from its texts, or unset; a percentage is 0 to 100, a time within the range of protobuf.
//!
//! The input's lines: status, process, time of creation; the rest is the time of the last change.

use prost_types::Timestamp;
use rds_task_facade::{
    pb::{GetTaskDetailResponse, SubTask, TaskState},
    task::Task,
};

use super::{lines, text};

/// In seconds since 1970, from the first `google.protobuf.Timestamp`, 0001-01-01T00:00:00Z, to the last time of the parser's library,
/// 9999-12-30T22:00:00Z, a day before the last `google.protobuf.Timestamp`.
const TIMES: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_207_200;

pub(crate) fn check(input: &[u8]) {
    let [status, process, created, updated] = lines(input).map(text);
    let mut task = Task::new(GetTaskDetailResponse {
        status: Some(status.clone()),
        process: Some(process.clone()),
        created_at: Some(created.clone()),
        update_at: Some(updated.clone()),
        ..GetTaskDetailResponse::default()
    });
    task.push(SubTask {
        status: Some(status.clone()),
        percent: Some(process.clone()),
        ..SubTask::default()
    });

    let message = task.message();
    assert_eq!(message.state(), state(&status), "{status:?}");
    match percent(&process) {
        Percent::Exact(expected) => {
            assert_eq!(message.progress_percent, expected, "{process:?}");
        }
        Percent::RoundedUp => assert!(message.progress_percent.is_none_or(|n| n <= 100)),
    }
    let part = task.parts().next().expect("a part");
    assert_eq!(part.state(), message.state());
    assert_eq!(part.progress_percent, message.progress_percent);
    check_time(&created, message.create_time);
    check_time(&updated, message.update_time);
    assert_eq!(Task::from_bytes(&task.to_bytes()).as_ref(), Ok(&task));
}

fn state(status: &str) -> TaskState {
    match status.trim().to_ascii_lowercase().as_str() {
        "initing" | "pending" | "unauthorized" => TaskState::Pending,
        "running" => TaskState::Running,
        "completed" => TaskState::Succeeded,
        "failed" => TaskState::Failed,
        "canceled" | "cancelled" => TaskState::Canceled,
        _ => TaskState::Unspecified,
    }
}

enum Percent {
    Exact(Option<u32>),
    /// So close below the next number, or above 100, that floating point may round it.
    RoundedUp,
}

/// `1*DIGIT ["." *DIGIT] ["e" ["+" / "-"] 1*DIGIT] ["%"]`, calculated with decimal digits.
fn percent(text: &str) -> Percent {
    let text = text.trim();
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let is_digits = |text: &str| text.chars().all(|c| "0123456789".contains(c));
    let magnitude = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let is_number = !whole.is_empty() && !magnitude.is_empty();
    if !is_number || ![whole, fraction, magnitude].into_iter().all(is_digits) {
        return Percent::Exact(None);
    }
    let magnitude = magnitude.trim_start_matches('0');
    // More than the digits of any input.
    let magnitude = match magnitude.len() {
        0 => 0,
        1..=5 => magnitude.parse().expect("a number"),
        _ => 100_000,
    };
    let shift = if exponent.starts_with('-') {
        -magnitude
    } else {
        magnitude
    };
    let point = whole.len() as i64 + shift;
    let digits = [whole, fraction].concat();
    let digit = |at: i64| match usize::try_from(at) {
        Ok(at) => digits.as_bytes().get(at).map_or(0, |digit| digit - b'0'),
        Err(_) => 0,
    };
    let Some(first) = (0..digits.len() as i64).find(|at| digit(*at) != 0) else {
        return Percent::Exact(Some(0));
    };
    if point - first > 3 {
        return Percent::Exact(None);
    }
    let value = (point - 3..point).fold(0, |value, at| value * 10 + u32::from(digit(at)));
    let decimals = |expected| (point..point + 12).all(|at| digit(at) == expected);
    let has_fraction = (point.max(0)..digits.len() as i64).any(|at| digit(at) != 0);
    match value {
        0..=99 if decimals(9) => Percent::RoundedUp,
        0..=99 => Percent::Exact(Some(value)),
        100 if !has_fraction => Percent::Exact(Some(100)),
        100 if decimals(0) => Percent::RoundedUp,
        _ => Percent::Exact(None),
    }
}

/// Compares the time with that of RFC 3339, the colon of its offset optional. Other texts, which the parser may accept too, must have its form
/// up to the second and a time at most 26 hours away from the date and time in the text.
fn check_time(text: &str, parsed: Option<Timestamp>) {
    let text = text.trim();
    if let Some(time) = &parsed {
        assert!(TIMES.contains(&time.seconds), "{text:?} {time:?}");
        assert!(
            (0..1_000_000_000).contains(&time.nanos),
            "{text:?} {time:?}"
        );
        let local = local_seconds(text).unwrap_or_else(|| panic!("{text:?} {time:?}"));
        assert!(
            (local - time.seconds).abs() <= 26 * 3600,
            "{text:?} {time:?}"
        );
    }
    if let Some(expected) = rfc3339(text) {
        let expected = Some(expected).filter(|time| TIMES.contains(&time.seconds));
        assert_eq!(parsed, expected, "{text:?}");
    }
}

fn rfc3339(text: &str) -> Option<Timestamp> {
    let local = local_seconds(text)?;
    let mut rest = text.get(19..)?;
    let mut nanos = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let length = fraction.find(|c: char| !c.is_ascii_digit())?;
        if !(1..=9).contains(&length) {
            return None;
        }
        nanos = number(&fraction[..length])? as i32 * 10_i32.pow(9 - length as u32);
        rest = &fraction[length..];
    }
    let offset = match rest.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), ..] => {
            let (hours, minutes) = match rest.len() {
                5 => (rest.get(1..3)?, rest.get(3..)?),
                6 if rest.as_bytes()[3] == b':' => (rest.get(1..3)?, rest.get(4..)?),
                _ => return None,
            };
            let (hours, minutes) = (number(hours)?, number(minutes)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = (hours * 60 + minutes) * 60;
            if *sign == b'-' { -offset } else { offset }
        }
        _ => return None,
    };
    Some(Timestamp {
        seconds: local - offset,
        nanos,
    })
}

/// The date and time at the beginning of the text, read as UTC.
fn local_seconds(text: &str) -> Option<i64> {
    let part = |from: usize, to: usize| number(text.get(from..to)?);
    let (year, month, day) = (part(0, 4)?, part(5, 7)?, part(8, 10)?);
    let (hour, minute, second) = (part(11, 13)?, part(14, 16)?, part(17, 19)?);
    let separators = [4, 7, 10, 13, 16].map(|at| text.as_bytes()[at]);
    let is_form = matches!(separators, [b'-', b'-', b'T' | b't' | b' ', b':', b':']);
    let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_of = |month: i64| match month {
        2 => 28 + i64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => 0,
    };
    let is_valid = (1..=days_of(month)).contains(&day) && hour < 24 && minute < 60 && second < 61;
    if !is_form || !is_valid {
        return None;
    }
    let days_before = |year: i64| {
        (year - 1) * 365 + (year - 1).div_euclid(4) - (year - 1).div_euclid(100)
            + (year - 1).div_euclid(400)
    };
    let days =
        days_before(year) - days_before(1970) + (1..month).map(days_of).sum::<i64>() + day - 1;
    // The parser takes a leap second for the second before it.
    Some(((days * 24 + hour) * 60 + minute) * 60 + second.min(59))
}

/// The number of ASCII digits.
fn number(digits: &str) -> Option<i64> {
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok())?
}
