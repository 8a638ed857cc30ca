//! Service tests: the built program over real sockets, against the embedded sandbox or a scripted upstream.

/// Starts the program, scripts upstreams, reads statuses.
mod support;

/// The command line, and the subcommands that are clients.
mod cli;
/// What the caller is told for every answer and every broken answer of upstream.
mod errors;
/// The request upstream receives, the reply, the rules of the request.
mod get_task_detail;
/// Merged calls, kept answers, throttling, the local rate.
mod quota;
/// Attempts, deadlines, cancellation, breaker, overload.
mod resilience;
