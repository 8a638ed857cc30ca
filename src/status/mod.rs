//! The only place where an error becomes a gRPC status: its code, reason, message and `google.rpc` details.
//!
//! [`failure`] maps an error to its code and reason, [`sentence`] holds the messages, [`details`] encodes both within the size that
//! clients accept.

mod details;
mod failure;
mod sentence;
#[cfg(test)]
mod tests;

pub use failure::Failure;

pub(crate) use details::upstream_id_value;
pub(crate) use sentence::{UNKNOWN_ENCODING, UNKNOWN_METHOD, UNREADABLE_REQUEST};
