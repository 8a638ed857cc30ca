pub(crate) mod canary;
pub(crate) mod certificates;
pub(crate) mod http;
pub(crate) mod program;
pub(crate) mod raw;
pub(crate) mod sandbox;
pub(crate) mod status;
pub(crate) mod tls;
pub(crate) mod upstream;

pub(crate) use self::{
    program::{Program, example_request},
    raw::Connection,
    sandbox::Sandbox,
    status::Failure,
    upstream::{Step, Upstream, answer, example},
};
