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
    /// Released when the call ends: its reply has been read, or the client has disconnected.
    pub permit: Option<Permit>,
}

/// A permit of one of the concurrency limits.
#[derive(Debug)]
pub enum Permit {
    /// A unary call of the task service.
    InFlight(FairPermit),
    /// A watch: of all watches, and of those of its connection.
    Watch(FairPermit, OwnedSemaphorePermit),
    /// An auxiliary stream: health, reflection.
    Auxiliary(OwnedSemaphorePermit),
}

impl Call {
    /// The time that the caller has left.
    pub fn caller_remaining(&self) -> Duration {
        self.caller_deadline
            .map_or(Duration::MAX, Deadline::remaining)
    }
}
