//! Service tests: the built program over real sockets, against the embedded sandbox or a scripted upstream.

/// Scripted upstreams, and waits with a deadline; the unit tests use them too.
#[path = "../support/mod.rs"]
mod shared;
/// Starts the program, calls it, reads statuses.
mod support;

/// The command line, and the subcommands that are clients.
mod cli;
/// Connections: limits, descriptors, silence.
mod connections;
/// The facade's own credentials: sources, renewal, keys, secrets.
mod credentials;
/// What goes with a failure besides its code: waits, texts, ids, and their limits.
mod details;
/// One call: what a caller may send, how prompt the answer is, overload.
mod edge;
/// What the caller is told for every answer and every broken answer of upstream.
mod errors;
/// The request upstream receives, the reply, the rules of the request.
mod get_task_detail;
/// Signals, drain, restart.
mod lifecycle;
/// Coalescing, cache, throttling, the local rate limiter.
mod quota;
/// Attempts, deadlines, cancellation, breaker, overload.
mod resilience;
/// What the program needs to start, and what it says when it cannot.
mod startup;
/// Log lines that cannot be forged, spans without secrets, the start line.
mod telemetry;
/// TLS on both sides, and the proxy on the way to upstream.
mod tls;
/// Which certificates each of the program's own clients trusts.
mod trust;
