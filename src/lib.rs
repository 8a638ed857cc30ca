//! A gRPC facade over one REST call of Huawei Cloud RDS, "Obtaining Task Information" (`ShowTaskDetail`).
//!
//! # The path of a call
//!
//! ```text
//! client -> server (connection, limits, deadline) -> rpc (validation) -> credentials (token or key)
//!        -> lookup -> coalescer (cache, single-flight) -> upstream (throttle, pacing, attempts) -> http_client -> RDS
//! ```
//!
//! On the way back, [`upstream`] maps a reply of RDS to a [`task`], the message of the proto, or to an error, and
//! [`status`] converts every error to a gRPC status.
//!
//! # Modules
//!
//! Start and configuration:
//!
//! - [`app`]: the composition root of `serve` and `sandbox`: starts the other modules and runs them until a signal
//! - [`cli`]: the command line: merges flags and variables, validates them, reports all problems together
//! - [`check`]: the subcommand `check`: whether `serve` can work with a configuration
//! - [`options`], [`regions`]: the option parsers that all modules share; the regions of RDS
//!
//! The service:
//!
//! - [`server`]: the gRPC server: accept loop, TLS, limits, drain, the checks and the reply of every call
//! - [`pb`]: the code generated from the proto
//! - [`method`]: the table of methods that routing, metrics, access log and traces read
//! - [`call`], [`caller`], [`deadline`]: the context of a call: who makes it, and when it must end
//! - [`fair_limit`]: the limit of calls in flight, shared fairly among callers
//! - [`rpc`]: one file per method of the task service: validation, handler, reply
//! - [`lookup`]: one lookup of a task, for a call or for a poll of a watch; [`task`]: its result, as the message of the proto
//! - [`watch`]: polls each watched task once for all its watchers
//! - [`coalescer`]: coalesces identical lookups in flight and caches results
//! - [`error`], [`reason`], [`code`], [`status`]: why a call fails, and the gRPC status for it
//! - [`admin`]: `/metrics`, `/livez`, `/readyz`
//!
//! RDS and its credentials:
//!
//! - [`upstream`]: the operation of RDS: request, throttling, pacing, attempts, retry, breaker, wire format, meaning of errors
//! - [`credentials`]: the sources of tokens and keys, their refresh, the signature of a request
//! - [`http_client`]: the HTTP clients for the vendor's endpoints and their limits
//! - [`quota_store`]: what the replicas of a fleet share in a Valkey or Redis server
//! - [`wait`]: `Retry-After` and backoff
//!
//! Used by all:
//!
//! - [`telemetry`]: log, access log, metrics, traces
//! - [`files`]: reads and watches small files: certificates, tokens, passwords
//! - [`pem`]: PEM files of certificates and keys
//! - [`accept`]: accepts TCP connections, for all listeners
//! - [`descriptors`]: the limit of open descriptors
//! - [`error_chain`]: walks an error and its sources
//! - [`lateness`]: whether this thread lacks CPU time, so that a timeout is not evidence against a peer
//! - [`supervise`]: restarts background tasks that panic
//!
//! Tools:
//!
//! - [`client`]: the subcommands `call`, `watch` and `health`
//! - [`sandbox`]: an embedded fake of RDS, IAM and the metadata service

pub mod accept;
pub mod admin;
pub mod app;
pub mod call;
pub mod caller;
pub mod check;
pub mod cli;
pub mod client;
pub mod coalescer;
pub mod code;
pub mod credentials;
pub mod deadline;
pub mod descriptors;
pub mod error;
pub mod error_chain;
pub mod fair_limit;
pub mod files;
pub mod http_client;
pub mod lateness;
pub mod lookup;
pub mod method;
pub mod options;
pub mod pb;
pub mod pem;
pub mod quota_store;
pub mod reason;
pub mod regions;
pub mod rpc;
pub mod sandbox;
pub mod server;
pub mod status;
pub mod supervise;
pub mod task;
pub mod telemetry;
/// Helpers that the service tests share.
#[cfg(test)]
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod test_support;
pub mod upstream;
pub mod wait;
pub mod watch;
