//! A gRPC facade over one REST call of Huawei Cloud RDS, "Obtaining Task Information" (`ShowTaskDetail`).
//!
//! # A request's path
//!
//! ```text
//! caller -> server (connection, deadline, limits) -> rpc (validate) -> credentials (token or key)
//!        -> coalescer (cache, single-flight) -> upstream (throttle window, rate limiter, attempts) -> http_client -> RDS
//! ```
//!
//! and back: [`upstream`] says what an answer means, [`rpc`] turns it into the reply, [`status`] turns every failure into
//! the one gRPC status.
//!
//! # Layout
//!
//! - [`app`]: the composition root of `serve` and `sandbox`: starts the rooms below, runs them until a signal
//! - [`cli`]: the command line: merges flags and variables, validates, reports all problems together
//! - [`options`], [`regions`]: what the options of all rooms share; the vendor's regions
//! - [`server`]: the gRPC listener: accept loop, TLS, limits, drain, and what every RPC passes on its way in and out
//! - [`rpc`]: one file per RPC: validation, the path through the rooms below, the reply
//! - [`credentials`]: where tokens and keys come from, how they are renewed, how a request is signed
//! - [`coalescer`]: coalesces identical calls, caches their results for a short time
//! - [`upstream`]: the vendor's operation: request, throttling, pace, attempts, retry, breaker, wire format, meaning of errors
//! - [`http_client`]: one bounded HTTP exchange; the HTTP client of the request's path, and what every HTTP client has in common
//! - [`wait`]: how long to wait before something is tried again
//! - [`error_chain`]: walks an error and its sources
//! - [`files`]: reads and watches small files: certificates, tokens, passwords
//! - [`deadline`], [`reason`], [`code`], [`status`]: the RPC's deadline, the closed list of reasons, names of codes, the
//!   only maker of statuses
//! - [`telemetry`]: log, access line, metrics, traces
//! - [`admin`]: `/metrics`, `/livez`, `/readyz`
//! - [`client`]: the subcommands `call` and `health`
//! - [`sandbox`]: an embedded imitation of RDS, IAM and the metadata service

pub mod admin;
pub mod app;
pub mod call;
pub mod caller;
pub mod cli;
pub mod client;
pub mod coalescer;
pub mod code;
pub mod credentials;
pub mod deadline;
pub mod error;
pub mod error_chain;
pub mod fair_limit;
pub mod files;
pub mod http_client;
pub mod lateness;
pub mod method;
pub mod options;
pub mod reason;
pub mod regions;
pub mod rpc;
pub mod sandbox;
pub mod server;
pub mod status;
pub mod telemetry;
/// Shared with the service tests, which use all of it.
#[cfg(test)]
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod test_support;
pub mod upstream;
pub mod wait;

/// What the proto generates, and its descriptor set.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::doc_markdown)]
pub mod pb {
    tonic::include_proto!("huaweicloud.rds.task.v1");

    /// The encoded `FileDescriptorSet` of the service, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
