//! Service tests: the built program over real sockets, against the embedded sandbox or a scripted upstream.

/// Starts the program, scripts upstreams, reads statuses.
mod support;

/// The request upstream receives, the reply, the rules of the request.
mod get_task_detail;
/// What the caller is told for every answer and every broken answer of upstream.
mod errors;
/// Attempts, deadlines, cancellation, breaker, overload.
mod resilience;
/// Merged calls, kept answers, throttling, the local rate.
mod quota;
