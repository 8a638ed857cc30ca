pub mod program;
pub mod status;
pub mod upstream;

pub use self::{
    program::{Program, example_request},
    status::Failure,
    upstream::{Step, Upstream, answer, example},
};
