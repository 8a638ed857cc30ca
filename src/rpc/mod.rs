//! The RPCs: one file each, and what they have in common.

mod codec;
pub mod get_task_detail;

use std::{
    borrow::Cow,
    collections::HashSet,
    sync::{Arc, OnceLock},
};

pub use codec::Codec;
use tonic::{Request, Response, Status};

use crate::{
    credentials::{self, Credentials, Owner},
    deadline::Deadline,
    pb::{GetTaskDetailRequest, GetTaskDetailResponse, task_service_server::TaskService},
    quota::Quota,
    reason::Reason,
    status,
    telemetry::ServerSpan,
    upstream::{self, Found, Progress},
};

/// Implements the service. Each worker has its own, with its own upstream connections; all else is shared.
#[derive(Debug, Clone)]
pub struct Facade {
    credentials: Credentials,
    quota: Arc<Quota>,
    upstream: upstream::Client,
    /// `None` allows any.
    allowed_projects: Option<Arc<HashSet<String>>>,
}

impl Facade {
    /// A facade over one upstream client.
    pub fn new(
        credentials: Credentials,
        quota: Arc<Quota>,
        upstream: upstream::Client,
        allowed_projects: Option<Arc<HashSet<String>>>,
    ) -> Self {
        Self {
            credentials,
            quota,
            upstream,
            allowed_projects,
        }
    }

    fn allow(&self, project_id: &str) -> Result<(), Error> {
        match &self.allowed_projects {
            Some(allowed) if !allowed.contains(project_id) => Err(Error::ProjectNotAllowed),
            _ => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl TaskService for Facade {
    async fn get_task_detail(
        &self,
        request: Request<GetTaskDetailRequest>,
    ) -> Result<Response<GetTaskDetailResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = extensions
            .get::<Arc<Call>>()
            .expect("the edge gives every call its Call");
        match get_task_detail::handle(self, call, metadata.as_ref(), message).await {
            Ok(found) => {
                let Found { task, facts } = Arc::unwrap_or_clone(found);
                let mut response = Response::new(get_task_detail::reply(task));
                if let Some(id) = &facts.upstream_request_id
                    && let Some(id) = status::upstream_id_value(id)
                {
                    response.metadata_mut().insert("x-upstream-request-id", id);
                }
                call.end(facts, None);
                Ok(response)
            }
            Err(error) => {
                call.end(error.facts(), Some(status::reason(&error)));
                Err(status::of_error(&error, &call.request_id))
            }
        }
    }
}

/// What one RPC carries besides its message. The edge makes it when the headers arrive and puts an `Arc<Call>` into the
/// request's extensions; the RPC fills in what its upstream work showed, and the edge reads it back for the access line.
#[derive(Debug)]
pub struct Call {
    /// When the RPC must be over.
    pub deadline: Deadline,
    /// The caller's `x-request-id`, or one of ours: 1 to 128 of `[A-Za-z0-9._-]`.
    pub request_id: String,
    /// The RPC's span, where traces are exported.
    pub span: Option<Arc<ServerSpan>>,
    /// Work that the RPC waits for, if it got that far: tells of an RPC that was cut short.
    progress: OnceLock<Arc<Progress>>,
    /// What the RPC came to, set once when it is over.
    outcome: OnceLock<Outcome>,
}

impl Call {
    /// A call of which only the headers are known.
    pub fn new(deadline: Deadline, request_id: String, span: Option<Arc<ServerSpan>>) -> Self {
        Self {
            deadline,
            request_id,
            span,
            progress: OnceLock::new(),
            outcome: OnceLock::new(),
        }
    }

    /// What the RPC came to; of one that was cut short, how far it got.
    pub fn outcome(&self) -> Cow<'_, Outcome> {
        match (self.outcome.get(), self.progress.get()) {
            (Some(outcome), _) => Cow::Borrowed(outcome),
            (None, Some(progress)) => Cow::Owned(Outcome {
                facts: progress.facts(),
                reason: None,
            }),
            (None, None) => Cow::default(),
        }
    }

    /// A call that asks again after work it had joined gave up keeps the first progress; both tell of the same task.
    fn watch(&self, progress: Arc<Progress>) {
        let _ = self.progress.set(progress);
    }

    /// The edge itself answered, for a reason of its own.
    pub(crate) fn failed(&self, reason: Reason) {
        let facts = self
            .progress
            .get()
            .map(|progress| progress.facts())
            .unwrap_or_default();
        self.end(facts, Some(reason));
    }

    fn end(&self, facts: upstream::Facts, reason: Option<Reason>) {
        let _ = self.outcome.set(Outcome { facts, reason });
    }
}

/// What the access line says about the upstream work of one RPC.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What the attempts showed.
    pub facts: upstream::Facts,
    /// `ErrorInfo.reason` of a failure.
    pub reason: Option<Reason>,
}

/// Why an RPC failed. Only [`crate::status`] turns it into a status.
#[derive(Debug, Clone)]
pub enum Error {
    /// The request breaks the rules of the proto: (field, what is wrong), all of them. `INVALID_ARGUMENT`.
    InvalidRequest(Vec<Violation>),
    /// The call breaks the rules of gRPC over HTTP/2: the code says which, the text what. `INVALID_REQUEST`.
    Protocol(tonic::Code, &'static str),
    /// The operator does not serve this project.
    ProjectNotAllowed,
    /// No credential.
    Credentials(credentials::Error),
    /// The upstream work failed. `owner` is whose credential it carried; `query` names what may be missing.
    Upstream {
        /// What happened.
        error: upstream::Error,
        /// Whose credential was used.
        owner: Owner,
        /// What was asked.
        query: Box<upstream::TaskQuery>,
    },
    /// The deadline passed outside of the upstream work.
    DeadlineExceeded,
    /// Too many RPCs at once.
    Overloaded,
    /// The process ends before the call does.
    ShuttingDown,
    /// A fault of ours (a panic).
    Internal,
}

impl Error {
    fn facts(&self) -> upstream::Facts {
        match self {
            Self::Upstream { error, .. } => error.facts.clone(),
            _ => upstream::Facts::default(),
        }
    }
}

/// One broken rule of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The proto's field name.
    pub field: &'static str,
    /// What is wrong and which form is accepted; never the whole value.
    pub description: String,
}
