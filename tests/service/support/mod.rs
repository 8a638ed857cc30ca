pub(crate) mod canary;
pub(crate) mod certificates;
pub(crate) mod http;
pub(crate) mod ports;
pub(crate) mod program;
pub(crate) mod raw;
pub(crate) mod sandbox;
pub(crate) mod status;
pub(crate) mod store;
pub(crate) mod tls;

pub(crate) use self::{
    ports::free_address,
    program::{Program, example_request, numbered},
    raw::Connection,
    sandbox::Sandbox,
    status::Failure,
    store::Store,
};
pub(crate) use crate::shared::{
    upstream::{self, Gate, Step, Upstream, example, gated_example, reply},
    wait::{LONGER_THAN_PATIENCE, PATIENCE, eventually, within},
};
