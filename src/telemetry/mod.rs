//! What an operator sees from outside: log, access line, metrics.

pub mod metrics;
