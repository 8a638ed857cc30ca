//! The context of one call, created when its headers arrive and passed from the edge to the method's handler.

use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use crate::{caller::Caller, deadline::Deadline, fair_limit::FairPermit, telemetry::Record};

/// One call, from its headers to the last byte of its reply.
#[derive(Debug)]
pub struct Call {
    /// When the call must end.
    pub deadline: Deadline,
    /// The caller's own deadline, if it set one.
    pub caller_deadline: Option<Deadline>,
    /// Who makes the call.
    pub caller: Caller,
    /// What metrics, log and trace report at its end.
    pub record: Record,
    /// Of the limit on calls in flight, or on watches. Like the other permit released when the call ends: its reply has been read, or the
    /// client has disconnected.
    pub fair_permit: Option<FairPermit>,
    /// Of the limit on the watches of a connection, or on auxiliary streams.
    pub permit: Option<OwnedSemaphorePermit>,
}

impl Call {
    /// The time that the caller has left.
    pub fn caller_remaining(&self) -> Duration {
        self.caller_deadline
            .map_or(Duration::MAX, Deadline::remaining)
    }
}
