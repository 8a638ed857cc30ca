//! A reply of the quota store becomes a decision with a wait of at most five minutes, or a problem that quotes nothing but an error code.
//!
//! The input's first line is the longest acceptable wait, the rest is a reply in the protocol of Redis.

use std::time::Duration;

use rds_task_facade::quota_store::{
    Answer, Problem, Slot, admission::Reply, connection::is_cluster,
};
use redis::{FromRedisValue as _, RedisError, Value, parse_redis_value};

use super::{lines, text};

const FIVE_MINUTES: Duration = Duration::from_secs(300);

pub(crate) fn check(input: &[u8]) {
    let [longest, reply] = lines(input);
    let millis = text(longest).parse().unwrap_or(0);
    let slot = Slot {
        longest: Duration::from_millis(millis),
        ..Slot::UNLIMITED
    };
    let value = match parse_redis_value(reply).and_then(Value::extract_error) {
        Ok(value) => value,
        Err(error) => return check_error(error),
    };
    assert_eq!(is_cluster(&value), names_cluster(&value));

    // What the scripts of admission and of shared results return.
    if let Err(error) = <Option<(String, u64, Vec<u8>)>>::from_redis_value(value.clone()) {
        check_error(error.into());
    }
    match <Option<Reply>>::from_redis_value(value) {
        Ok(reply) => check_answer(reply, slot),
        Err(error) => check_error(error.into()),
    }
}

fn check_answer(reply: Option<Reply>, slot: Slot) {
    let answer = Answer::from_reply(reply.clone(), slot);

    let Some((kind, number, subject)) = reply else {
        return assert_eq!(answer, Some(Answer::Unavailable));
    };
    let number = u64::try_from(number).unwrap_or(0);
    let (micros, millis) = (Duration::from_micros(number), Duration::from_millis(number));
    let expected = match (&*kind, micros.min(FIVE_MINUTES) > slot.longest) {
        ("start", false) => Answer::Start(micros.min(FIVE_MINUTES)),
        ("start" | "late", _) => Answer::Late(micros.min(FIVE_MINUTES)),
        ("throttled", _) => Answer::Throttled(millis.min(FIVE_MINUTES), subject),
        ("rests", _) => Answer::Rests(millis.min(FIVE_MINUTES)),
        ("fresh", _) => Answer::Fresh,
        ("busy", _) => Answer::Busy,
        ("probed", _) => return assert_eq!(answer, None),
        _ => Answer::Unavailable,
    };
    assert_eq!(answer, Some(expected));
}

/// An error is logged, so it holds nothing of a reply except a code in capital letters.
fn check_error(error: RedisError) {
    let is_server = error.code().is_some();
    let problem = Problem::from(error);
    match &problem {
        Problem::Error(text) => {
            let is_code = text.len() <= 16 && text.bytes().all(|byte| byte.is_ascii_uppercase());
            assert!(is_code || CATEGORIES.contains(&&**text), "{text:?}");
        }
        Problem::Connection(_) => assert!(!is_server, "{problem:?}"),
        Problem::Cluster | Problem::Timeout(_) => panic!("{problem:?}"),
        Problem::Credential | Problem::ReadOnly | Problem::OutOfMemory | Problem::Forbidden => {
            assert!(is_server, "{problem:?}");
        }
    }
}

/// The client library's names of errors that replies lead to.
const CATEGORIES: [&str; 4] = [
    "extension error",
    "incompatible type",
    "parse error",
    "type error",
];

/// Whether an array of names and values has the mode `cluster`.
fn names_cluster(hello: &Value) -> bool {
    let Value::Array(fields) = hello else {
        return false;
    };
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => Some(bytes.clone()),
        Value::SimpleString(string) => Some(string.clone().into_bytes()),
        _ => None,
    };
    (1..fields.len()).step_by(2).any(|at| {
        let pair = [&fields[at - 1], &fields[at]].map(text);
        pair == [Some(b"mode".to_vec()), Some(b"cluster".to_vec())]
    })
}
