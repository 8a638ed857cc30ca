//! An entry of the quota store is used only if it was sealed with the same key under the same name, and is young by both clocks. Then the
//! result is exactly the sealed one.
//!
//! The input: a byte that selects a change of the entry, two bytes for its place, two each for its age by the store and by the replica in
//! units of 1 ms; the rest is the content.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message;
use rds_task_facade::{
    quota_store::{SharedResult, seal::Keys},
    task::Task,
};

const NAME: &str = "rtf1:result:1";
const MAX_AGE: Duration = Duration::from_secs(10);
const TOLERANCE: i64 = 5000;
/// The digits of the time before a sealed result.
const STAMP: usize = 13;

static KEYS: LazyLock<[Keys; 2]> = LazyLock::new(|| [7, 8].map(|key| Keys::derive(&[key; 32])));

/// A result, with the fields that only the store reads and writes.
#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    store_time: u64,
    #[prost(uint64, tag = "3")]
    replica_time: u64,
    #[prost(uint32, tag = "4")]
    http_status: u32,
    #[prost(string, optional, tag = "5")]
    request_id: Option<String>,
    #[prost(bytes = "vec", optional, tag = "6")]
    task: Option<Vec<u8>>,
    #[prost(string, optional, tag = "7")]
    error_code: Option<String>,
    #[prost(string, tag = "8")]
    error_message: String,
}

pub(crate) fn check(input: &[u8]) {
    let Some((
        &[
            change,
            place,
            more_place,
            store,
            more_store,
            replica,
            more_replica,
        ],
        content,
    )) = input.split_first_chunk()
    else {
        return;
    };
    let place = usize::from(u16::from_be_bytes([place, more_place]));
    let store_age = i64::from(i16::from_be_bytes([store, more_store]));
    let replica_age = i64::from(i16::from_be_bytes([replica, more_replica]));
    let [keys, other_keys] = &*KEYS;

    // Only the key can seal an entry.
    assert_eq!(keys.open(NAME, content), None);
    let now = now();
    assert_eq!(SharedResult::open(keys, NAME, content, now, MAX_AGE), None);

    let sealed = keys.seal(NAME, content);
    assert_eq!(keys.open(NAME, &sealed).as_deref(), Some(content));
    check_changed(keys, other_keys, &sealed, change, place);

    let Ok(mut stored) = Stored::decode(content) else {
        assert!(SharedResult::decode(content).is_err());
        return;
    };
    let is_version = stored.version == 1;
    stored.store_time = now.saturating_add_signed(-store_age);
    stored.replica_time = now.saturating_add_signed(-replica_age);
    let result = SharedResult::decode(stored.encode_to_vec().as_slice()).expect("the same fields");
    assert_eq!(result.encode_to_vec(), stored.encode_to_vec());
    let entry = result.seal(keys, NAME);
    assert_eq!(entry.len(), STAMP + 1 + 12 + result.encoded_len() + 16);
    let opened = SharedResult::open(keys, NAME, &entry, now, MAX_AGE);
    assert_eq!(
        SharedResult::open(keys, "rtf1:result:2", &entry, now, MAX_AGE),
        None
    );
    assert_eq!(
        SharedResult::open(other_keys, NAME, &entry, now, MAX_AGE),
        None
    );

    let max_age = MAX_AGE.as_millis() as i64;
    let by_store = (-TOLERANCE..max_age).contains(&store_age);
    // The clock runs on during the check.
    let slack = i64::try_from(self::now() - now).expect("a short time");
    let by_replica = |age: i64| (-TOLERANCE..max_age + TOLERANCE).contains(&age);
    if by_replica(replica_age) == by_replica(replica_age + slack) {
        let is_used = is_version && by_store && by_replica(replica_age);
        assert_eq!(
            opened.is_some(),
            is_used,
            "{store_age} {replica_age} {stored:?}"
        );
    }
    let Some((opened, age)) = opened else {
        return;
    };
    assert_eq!(opened, result);
    let oldest = store_age.max(replica_age - TOLERANCE).max(0);
    let age = age.as_millis() as i64;
    assert!((oldest..=oldest + slack).contains(&age), "{age} {oldest}");

    if let Some(Ok(task)) = opened.task.as_deref().map(Task::from_bytes) {
        assert_eq!(Task::from_bytes(&task.to_bytes()), Ok(task));
    }
}

/// A change of any byte of an entry, and another key or name, are noticed.
fn check_changed(keys: &Keys, other_keys: &Keys, sealed: &[u8], change: u8, place: usize) {
    assert_eq!(other_keys.open(NAME, sealed), None);
    assert_eq!(keys.open("rtf1:result:2", sealed), None);
    let mut changed = sealed.to_vec();
    let place = place % sealed.len();
    match change {
        0 => changed.truncate(place),
        1 => changed.push(0),
        2 => drop(changed.remove(place)),
        _ => changed[place] ^= change,
    }
    assert_eq!(keys.open(NAME, &changed), None);
}

#[expect(clippy::disallowed_methods, reason = "results are compared with it")]
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock after 1970").as_millis() as u64
}
