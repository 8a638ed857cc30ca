//! What unit tests and service tests share: waits with a deadline, and the scripted upstream.

pub(crate) mod upstream;
pub(crate) mod wait;
