//! The task service: one file per method, and the state that the methods share.

pub mod get_task_detail;
mod options;

use std::{collections::HashSet, sync::Arc};

use http::HeaderMap;
pub use options::Options;

use crate::{
    call::Call,
    coalescer::Coalescer,
    credentials::Credentials,
    error::Error,
    pb::{GetTaskDetailRequest, GetTaskDetailResponse},
    upstream,
};

/// The task service as the server calls it, after the checks of the edge.
pub trait Service: Clone + Send + Sync + 'static {
    /// The keyed hash of the caller's token, if callers send their own and this one is well-formed.
    fn token_hash(&self, metadata: &HeaderMap) -> Option<[u8; 16]>;

    /// `GetTaskDetail`.
    fn get_task_detail(
        &self,
        call: &mut Call,
        metadata: &HeaderMap,
        request: GetTaskDetailRequest,
    ) -> impl Future<Output = Result<GetTaskDetailResponse, Error>> + Send;
}

/// The task service over one upstream client. Each worker has its own client, with its own connections; the rest is shared.
#[derive(Debug, Clone)]
pub struct Facade {
    credentials: Credentials,
    coalescer: Arc<Coalescer>,
    upstream: upstream::Client,
    /// `None` allows any project.
    allowed_projects: Option<Arc<HashSet<String>>>,
}

impl Facade {
    /// A facade over one upstream client.
    pub fn new(
        credentials: Credentials,
        coalescer: Arc<Coalescer>,
        upstream: upstream::Client,
        options: &Options,
    ) -> Self {
        let allowed: HashSet<String> = options.allow_project.iter().cloned().collect();
        Self {
            credentials,
            coalescer,
            upstream,
            allowed_projects: (!allowed.is_empty()).then(|| Arc::new(allowed)),
        }
    }

    fn check_allowed(&self, project_id: &str) -> Result<(), Error> {
        match &self.allowed_projects {
            Some(allowed) if !allowed.contains(project_id) => Err(Error::ProjectNotAllowed),
            _ => Ok(()),
        }
    }
}

impl Service for Facade {
    fn token_hash(&self, metadata: &HeaderMap) -> Option<[u8; 16]> {
        self.credentials.token_hash(metadata)
    }

    fn get_task_detail(
        &self,
        call: &mut Call,
        metadata: &HeaderMap,
        request: GetTaskDetailRequest,
    ) -> impl Future<Output = Result<GetTaskDetailResponse, Error>> + Send {
        get_task_detail::handle(self, call, metadata, request)
    }
}
