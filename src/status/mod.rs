//! The only place where an error becomes a gRPC status: its code, reason, message and `google.rpc` details.
//!
//! [`failure`] decides what an error means, [`sentence`] has the messages, [`details`] encodes both within the size that clients
//! accept.

mod details;
mod failure;
mod sentence;
#[cfg(test)]
mod tests;

pub use failure::Failure;

pub(crate) use details::upstream_id_value;
