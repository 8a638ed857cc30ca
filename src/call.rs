//! The context of one call, made when its headers arrive and handed down from the edge to the method's handler.

use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use crate::{caller::Caller, deadline::Deadline, fair_limit, telemetry::Record};

/// One call, from its headers to the last byte of its reply.
#[derive(Debug)]
pub struct Call {
    /// When the call must be over.
    pub deadline: Deadline,
    /// The caller's own deadline, if it set one.
    pub caller_deadline: Option<Deadline>,
    /// Who makes it.
    pub caller: Caller,
    /// What is reported at its end.
    pub record: Record,
    /// Released when the call is over: its reply has been read, or the caller has gone.
    permit: Option<Permit>,
}

/// Of one of the limits on concurrency.
#[derive(Debug)]
pub enum Permit {
    /// A unary call of the task service.
    InFlight(fair_limit::Permit),
    /// An auxiliary stream: health, reflection, a request that is not gRPC.
    Auxiliary(OwnedSemaphorePermit),
}

impl Call {
    /// A call without a permit.
    pub fn new(
        deadline: Deadline,
        caller_deadline: Option<Deadline>,
        caller: Caller,
        record: Record,
    ) -> Self {
        Self {
            deadline,
            caller_deadline,
            caller,
            record,
            permit: None,
        }
    }

    /// The time that the caller has left.
    pub fn caller_remaining(&self) -> Duration {
        self.caller_deadline
            .map_or(Duration::MAX, Deadline::remaining)
    }

    /// Keeps a permit until the call is over.
    pub fn hold(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }
}
