//! Service tests: the built program over real sockets, against the embedded sandbox or a scripted upstream.

/// Scripted upstreams, and waits with a deadline; shared with the unit tests.
#[path = "../support/mod.rs"]
mod shared;
/// Starts the program, calls it, reads statuses.
mod support;

/// The command line, and the subcommands that are clients.
mod cli;
/// Connections: limits, descriptors, silence.
mod connections;
/// The facade's own credentials: sources, refresh, keys, secrets.
mod credentials;
/// The details of a failure: retry delays, messages, ids, and their limits.
mod details;
/// Failures without a reply: the cause in the log, and the message for the caller.
mod diagnosis;
/// The edge: hostile metadata, prompt replies, overload.
mod edge;
/// The status for every error reply and every incomplete reply of upstream.
mod errors;
/// Several replicas with a quota store.
mod fleet;
/// The request that upstream receives, the reply, and validation.
mod get_task_detail;
/// The subcommands `call` and `health` against servers that hang, break the protocol or send unsafe text.
mod hostile_servers;
/// Signals, drain, restart.
mod lifecycle;
/// Coalescing, cache, throttling, the local rate limiter.
mod quota;
/// Attempts, deadlines, cancellation, breaker, overload.
mod resilience;
/// Errors that are the caller's or the server's own: level, metrics, spans.
mod responsibility;
/// What the program needs to start, and its message if it cannot.
mod startup;
/// Log lines that cannot be forged, spans without secrets, the start line.
mod telemetry;
/// TLS on both sides, and the upstream proxy.
mod tls;
/// The lines that docs/troubleshooting.md quotes.
mod troubleshooting;
/// The CA certificates that each client of the program trusts.
mod trust;
/// Connections to upstream: reuse, a name that moves, name lookups, large replies.
mod upstream_connections;
/// Watches: messages, ends, polls.
mod watch;
/// The subcommand `watch`.
mod watch_command;
