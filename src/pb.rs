//! The code generated from the proto, its descriptor set, and the JSON form of its messages, which `call` prints.

use jiff::Timestamp;
use serde::{Serialize as _, Serializer};

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::doc_markdown)]
mod generated {
    use super::{is_unspecified, serialize_state, serialize_time};

    tonic::include_proto!("huaweicloud.rds.task.v1");
}

pub use generated::*;

/// The encoded `FileDescriptorSet` of the service, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Serializes a state as its name in the proto.
fn serialize_state<S: Serializer>(state: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    match TaskState::try_from(*state) {
        Ok(state) => state.as_str_name().serialize(serializer),
        Err(_) => state.serialize(serializer),
    }
}

fn is_unspecified(state: &i32) -> bool {
    *state == TaskState::Unspecified as i32
}

/// Serializes a time in the format of RFC 3339.
fn serialize_time<S: Serializer>(
    time: &Option<prost_types::Timestamp>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let time = time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok());
    time.map(|time| time.to_string()).serialize(serializer)
}
