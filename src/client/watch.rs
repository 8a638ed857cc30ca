//! `watch`: follows a task to its end and continues after every interruption.

use std::{pin::pin, process::ExitCode, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::{interval, sleep},
};
use tonic::{
    Code, Request, Streaming,
    metadata::{Ascii, MetadataValue},
};
use tonic_types::StatusExt as _;

use super::{
    Error, Server, Task, Token, connect, escape_json, print, progress::Progress, report, token,
    warn,
};
use crate::{
    deadline::{Deadline, Passed},
    options::{self, BOOL, OutputFormat, boolean, word},
    pb::{
        GetTaskDetailResponse, TaskState, WatchTaskDetailRequest, WatchTaskDetailResponse,
        task_service_client::TaskServiceClient,
    },
    reason::Reason,
};

/// The task failed or was canceled.
const EXIT_NOT_SUCCEEDED: u8 = 3;
/// The time is over before the task.
const EXIT_TIME_OVER: u8 = 4;
/// As shells report the end by SIGINT.
const EXIT_INTERRUPTED: u8 = 130;

/// The first pause before the watch is continued, its growth, and its limit. Each is longer or shorter by up to a fifth.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_GROWTH: f64 = 1.6;
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The time limit for connecting.
const MAX_CONNECT: Duration = Duration::from_secs(10);

/// A stream that is silent for longer is dead: the server sends a heartbeat after at most 25 s.
const MAX_SILENCE: Duration = Duration::from_secs(90);

/// The options of `watch`.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct WatchOptions {
    /// The task; `None` for a task of the sandbox.
    #[command(flatten)]
    pub task: Option<Task>,
    /// The server.
    #[command(flatten)]
    pub server: Server,
    /// Time limit for the whole watch
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = options::duration)]
    pub timeout: Duration,
    /// Print the final task (text), or each state of the task as one line of JSON (json)
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = word::<OutputFormat>)]
    pub output: OutputFormat,
    /// Wait for a task that RDS does not know yet
    #[arg(long, value_name = BOOL, default_value = "false", value_parser = boolean, action = clap::ArgAction::Set)]
    pub allow_missing: bool,
    /// The token.
    #[command(flatten)]
    pub token: Token,
}

/// Watches the task. Prints results on standard output and the progress on standard error.
pub async fn watch(options: WatchOptions) -> ExitCode {
    let mut progress = Progress::on_stderr();
    let mut interrupt = match signal(SignalKind::interrupt()) {
        Ok(interrupt) => interrupt,
        Err(error) => {
            let problem = format!("cannot listen for signals: {error}");
            return report(&Error::File("watch", problem));
        }
    };
    let ended = tokio::select! {
        biased;
        _ = interrupt.recv() => End::Interrupted,
        end = Watch::new(&options).follow(&mut progress) => end,
    };
    progress.finish();
    match ended {
        End::Over(task) => {
            if options.output == OutputFormat::Text {
                let json = serde_json::to_string_pretty(&task).expect("the task serializes");
                let _ = print(&escape_json(&json));
            }
            match task.state() {
                TaskState::Succeeded => ExitCode::SUCCESS,
                _ => ExitCode::from(EXIT_NOT_SUCCEEDED),
            }
        }
        End::TimeOver => {
            warn(&format!("the task is not over after {:?}", options.timeout));
            ExitCode::from(EXIT_TIME_OVER)
        }
        End::Failed(error) => report(&error),
        End::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
    }
}

/// How the watch ended.
enum End {
    /// The task is over.
    Over(Box<GetTaskDetailResponse>),
    /// The time limit came first.
    TimeOver,
    /// The call failed, and another one would not help.
    Failed(Error),
    /// The user ended the program.
    Interrupted,
}

/// The watch across all its streams.
struct Watch<'a> {
    options: &'a WatchOptions,
    deadline: Deadline,
    /// The etag of the latest message.
    etag: String,
    /// A message has arrived.
    has_begun: bool,
    /// The latest state.
    task: Option<GetTaskDetailResponse>,
    /// The pause before the next stream.
    pause: Duration,
}

impl<'a> Watch<'a> {
    fn new(options: &'a WatchOptions) -> Self {
        Self {
            options,
            deadline: Deadline::after(options.timeout),
            etag: String::new(),
            has_begun: false,
            task: None,
            pause: FIRST_PAUSE,
        }
    }

    /// Opens one stream after the other until the watch is over.
    async fn follow(mut self, progress: &mut Progress) -> End {
        let token = token(&self.options.token, &self.options.server, self.deadline);
        let token = match token.await {
            Ok(token) => token,
            Err(error) => return End::Failed(error),
        };
        loop {
            let error = match self.stream(token.clone(), progress).await {
                Ok(task) => return End::Over(task),
                Err(error) => error,
            };
            if self.deadline.remaining().is_zero() {
                return End::TimeOver;
            }
            // Before the first message a wrong target is more likely than a restart.
            if !is_transient(&error, self.has_begun) {
                return End::Failed(error);
            }
            let jitter = 0.8 + 0.4 * fastrand::f64();
            let pause = self.pause.mul_f64(jitter).max(retry_after(&error));
            self.pause = self.pause.mul_f64(PAUSE_GROWTH).min(MAX_PAUSE);
            progress.interrupted(&error, pause);
            let waited = self.deadline.bound(ticking(progress, sleep(pause))).await;
            if waited.is_err() {
                return End::TimeOver;
            }
        }
    }

    /// Follows one stream. Returns the task if it is over.
    async fn stream(
        &mut self,
        token: Option<MetadataValue<Ascii>>,
        progress: &mut Progress,
    ) -> Result<Box<GetTaskDetailResponse>, Error> {
        let WatchOptions {
            server, timeout, ..
        } = self.options;
        let deadline = self.deadline;
        let failed = |status| Error::from_status(status, server, *timeout);
        let connect_timeout = MAX_CONNECT.min(*timeout);
        let connect_deadline = deadline.min(Deadline::after(MAX_CONNECT));
        let connecting = connect(server, connect_timeout, connect_deadline);
        let channel = ticking(progress, connecting).await?;
        let mut request = Request::new(self.request());
        request.set_timeout(deadline.remaining());
        if let Some(token) = token {
            request.metadata_mut().insert("x-auth-token", token);
        }
        let mut client = TaskServiceClient::new(channel);
        let opened = self
            .heard(progress, client.watch_task_detail(request))
            .await?;
        let mut stream: Streaming<WatchTaskDetailResponse> = opened.map_err(failed)?.into_inner();
        loop {
            let message = self.heard(progress, stream.message()).await?;
            let Some(message) = message.map_err(failed)? else {
                return self
                    .task
                    .take()
                    .filter(is_over)
                    .map(Box::new)
                    .ok_or_else(|| {
                        let text = "the server ended the watch before the task";
                        Error::Status(Box::new(tonic::Status::internal(text)))
                    });
            };
            self.pause = FIRST_PAUSE;
            self.observe(message, progress)?;
        }
    }

    fn request(&self) -> WatchTaskDetailRequest {
        let task = self.options.task.clone().unwrap_or_else(lifecycle);
        WatchTaskDetailRequest {
            project_id: task.project_id,
            instance_id: task.instance_id,
            workflow_id: task.workflow_id,
            workflow_name: task.workflow_name,
            etag: self.etag.clone(),
            allow_missing: self.options.allow_missing,
        }
    }

    /// Awaits an event of the stream, for as long as a living stream can be silent.
    async fn heard<F: Future>(
        &self,
        progress: &mut Progress,
        event: F,
    ) -> Result<F::Output, Error> {
        let end = self.deadline.min(Deadline::after(MAX_SILENCE));
        let event = end.bound(ticking(progress, event)).await;
        event.map_err(|Passed| {
            let cause = format!("nothing received for {MAX_SILENCE:?}");
            Error::NoReply(self.options.server.target.clone(), cause)
        })
    }

    /// Prints a message. The final state comes again if the connection failed after it.
    ///
    /// # Errors
    /// Standard output is closed.
    fn observe(
        &mut self,
        message: WatchTaskDetailResponse,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        self.has_begun = true;
        let is_new = message.etag != self.etag;
        self.etag = message.etag;
        if let Some(task) = message.task {
            if is_new && self.options.output == OutputFormat::Json {
                let json = serde_json::to_string(&task).expect("the task serializes");
                let printed = progress.suspended(|| print(&escape_json(&json)));
                printed.map_err(|error| Error::File("--output", error.to_string()))?;
            }
            self.task = Some(task);
        }
        progress.observe(self.task.as_ref(), message.check_time);
        Ok(())
    }
}

/// The task of the sandbox that runs for 20 seconds.
fn lifecycle() -> Task {
    Task {
        instance_id: "lifecycle-20".to_owned(),
        ..Task::example()
    }
}

/// Awaits an event and redraws the progress every second.
async fn ticking<F: Future>(progress: &mut Progress, event: F) -> F::Output {
    let mut event = pin!(event);
    let mut second = interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            biased;
            output = event.as_mut() => return output,
            _ = second.tick() => progress.tick(),
        }
    }
}

fn is_over(task: &GetTaskDetailResponse) -> bool {
    matches!(
        task.state(),
        TaskState::Succeeded | TaskState::Failed | TaskState::Canceled
    )
}

/// Whether another call may help.
fn is_transient(error: &Error, has_begun: bool) -> bool {
    match error {
        Error::File(..) => false,
        Error::Connect(..) | Error::NoReply(..) => has_begun,
        Error::Status(status) => match status.code() {
            Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Cancelled => true,
            Code::ResourceExhausted => {
                let info = status.get_details_error_info();
                info.is_none_or(|info| info.reason != Reason::QuotaExhausted.as_str())
            }
            // Without details the status comes from a proxy or a connection that was cut.
            Code::Internal | Code::Unknown => {
                has_begun && status.get_details_error_info().is_none()
            }
            _ => false,
        },
    }
}

/// The delay that the server asks for.
fn retry_after(error: &Error) -> Duration {
    let Error::Status(status) = error else {
        return Duration::ZERO;
    };
    let info = status.get_details_retry_info();
    info.and_then(|info| info.retry_delay).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tonic::Status;
    use tonic_types::ErrorDetails;

    use super::*;

    fn ours(code: Code) -> Error {
        let mut details = ErrorDetails::with_error_info("X", "rds-task-facade", []);
        details.set_retry_info(Some(Duration::from_millis(1500)));
        Error::Status(Box::new(Status::with_error_details(code, "", details)))
    }

    #[test]
    fn a_watch_is_continued_if_another_call_may_help() {
        let target = || "http://localhost:1".parse().expect("a URL");
        let bare = |code| Error::Status(Box::new(Status::new(code, "")));
        let cases = [
            (ours(Code::Unavailable), true, true),
            (ours(Code::ResourceExhausted), true, true),
            (ours(Code::DeadlineExceeded), true, true),
            (ours(Code::Internal), false, false),
            (ours(Code::NotFound), false, false),
            (ours(Code::Unauthenticated), false, false),
            (ours(Code::PermissionDenied), false, false),
            (ours(Code::InvalidArgument), false, false),
            (bare(Code::Unavailable), true, true),
            (bare(Code::Unimplemented), false, false),
            (bare(Code::Internal), false, true),
            (bare(Code::Unknown), false, true),
            (Error::NoReply(target(), String::new()), false, true),
            (Error::Connect(target(), String::new()), false, true),
            (Error::File("--ca", String::new()), false, false),
        ];

        for (error, first, later) in cases {
            let found = (is_transient(&error, false), is_transient(&error, true));

            assert_eq!(found, (first, later), "{error:?}");
        }
        assert_eq!(
            retry_after(&ours(Code::Aborted)),
            Duration::from_millis(1500)
        );
    }
}
