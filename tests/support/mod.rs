//! What unit tests and service tests share: waits with a deadline, the scripted upstream, and the test ids of the sandbox.

pub(crate) mod scenarios;
pub(crate) mod upstream;
pub(crate) mod wait;
