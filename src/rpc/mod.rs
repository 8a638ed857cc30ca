//! The task service: one file per method, and the state that the methods share.

mod get_task_detail;
mod options;
pub mod request;
pub mod watch_task_detail;

use std::{collections::HashSet, sync::Arc};

use http::HeaderMap;
pub use options::Options;

use crate::{
    call::Call,
    error::Error,
    lookup::Lookups,
    pb::{GetTaskDetailRequest, WatchTaskDetailRequest},
    task::Task,
    watch::{Hub, WatchStream},
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
    ) -> impl Future<Output = Result<Arc<Task>, Error>> + Send;

    /// `WatchTaskDetail`. Returns after the first poll.
    fn watch_task_detail(
        &self,
        call: &mut Call,
        metadata: &HeaderMap,
        request: WatchTaskDetailRequest,
    ) -> impl Future<Output = Result<WatchStream, Error>> + Send;
}

/// The task service over one upstream client. Each worker has its own client, with its own connections; the rest is shared.
#[derive(Debug, Clone)]
pub struct Facade {
    lookups: Lookups,
    hub: Arc<Hub>,
    /// Empty if all projects are allowed.
    allowed_projects: Arc<HashSet<String>>,
}

impl Facade {
    /// A facade over one upstream client.
    pub fn new(lookups: Lookups, hub: Arc<Hub>, options: &Options) -> Self {
        Self {
            lookups,
            hub,
            allowed_projects: Arc::new(options.allow_project.iter().cloned().collect()),
        }
    }

    fn check_allowed(&self, project_id: &str) -> Result<(), Error> {
        if self.allowed_projects.is_empty() || self.allowed_projects.contains(project_id) {
            Ok(())
        } else {
            Err(Error::ProjectNotAllowed)
        }
    }
}

impl Service for Facade {
    fn token_hash(&self, metadata: &HeaderMap) -> Option<[u8; 16]> {
        self.lookups.credentials.token_hash(metadata)
    }

    fn get_task_detail(
        &self,
        call: &mut Call,
        metadata: &HeaderMap,
        request: GetTaskDetailRequest,
    ) -> impl Future<Output = Result<Arc<Task>, Error>> + Send {
        get_task_detail::handle(self, call, metadata, request)
    }

    fn watch_task_detail(
        &self,
        call: &mut Call,
        metadata: &HeaderMap,
        request: WatchTaskDetailRequest,
    ) -> impl Future<Output = Result<WatchStream, Error>> + Send {
        watch_task_detail::handle(self, call, metadata, request)
    }
}
