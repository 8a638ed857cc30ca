//! The context of one call, made when its headers arrive and handed down from the edge to the method's handler.

use tokio::sync::OwnedSemaphorePermit;

use crate::{deadline::Deadline, telemetry::Record};

/// One call, from its headers to the last byte of its reply.
#[derive(Debug)]
pub struct Call {
    /// When the call must be over.
    pub deadline: Deadline,
    /// What is reported at its end.
    pub record: Record,
    /// Released when the call is over: its reply has been read, or the caller has gone.
    permit: Option<OwnedSemaphorePermit>,
}

impl Call {
    /// A call without a permit.
    pub fn new(deadline: Deadline, record: Record) -> Self {
        Self {
            deadline,
            record,
            permit: None,
        }
    }

    /// Keeps a permit until the call is over.
    pub fn hold(&mut self, permit: OwnedSemaphorePermit) {
        self.permit = Some(permit);
    }
}
