//! The only place where a failure becomes a `tonic::Status`.
