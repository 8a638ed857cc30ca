//! `WatchTaskDetail` against a scripted upstream.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use rds_task_facade::pb::{
    GetTaskDetailRequest, TaskState, WatchTaskDetailRequest, WatchTaskDetailResponse,
};
use tokio::{net::TcpStream, task::JoinSet};
use tonic::{Code, Request, Status, Streaming};

use crate::support::{
    Failure, Gate, Program, Step, Upstream, eventually, example_request, reply, within,
};

/// Polls as fast as a test can stand.
const FAST: [&str; 4] = ["--watch-interval", "10ms", "--watch-rate", "off"];

const UNKNOWN_TASK: &str = r#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;

fn watch_request() -> WatchTaskDetailRequest {
    let GetTaskDetailRequest {
        project_id,
        instance_id,
        workflow_id,
        workflow_name,
    } = example_request();
    WatchTaskDetailRequest {
        project_id,
        instance_id,
        workflow_id,
        workflow_name,
        ..WatchTaskDetailRequest::default()
    }
}

fn task(status: &str, process: &str) -> Vec<Step> {
    let body = format!(r#"{{"job_id":"j","status":"{status}","process":"{process}"}}"#);
    reply(200, &[], body)
}

fn unknown() -> Vec<Step> {
    reply(404, &[], UNKNOWN_TASK)
}

/// An upstream that sends each reply when the test allows it, because a watch may skip states that follow each other quickly.
struct Steps {
    upstream: Upstream,
    gates: Vec<Gate>,
}

impl Steps {
    async fn new(replies: Vec<Vec<Step>>) -> Self {
        let gates: Vec<Gate> = replies.iter().map(|_| Gate::default()).collect();
        let gated = gates.iter().zip(replies);
        let gated = gated.map(|(gate, reply)| [vec![Step::WaitFor(gate.clone())], reply].concat());
        Self {
            upstream: sequence(gated.collect()).await,
            gates,
        }
    }

    /// Allows the first replies, this many in all.
    fn allow(&self, count: usize) {
        self.gates[..count].iter().for_each(Gate::open);
    }

    /// Allows replies up to each of these numbers, and expects the text of the message that follows.
    async fn expect(
        &self,
        stream: &mut Streaming<WatchTaskDetailResponse>,
        expected: &[(usize, &str)],
    ) -> Vec<WatchTaskDetailResponse> {
        let mut messages = Vec::new();
        for (count, text) in expected {
            self.allow(*count);
            let message = next(stream).await.expect("open").expect("a message");
            assert_eq!(texts(std::slice::from_ref(&message)), [*text]);
            messages.push(message);
        }
        messages
    }
}

/// An upstream that replies with one element after the other, and then with the last one again.
async fn sequence(replies: Vec<Vec<Step>>) -> Upstream {
    Upstream::start(move |request| {
        let index = request.number.min(replies.len() - 1);
        replies[index].clone()
    })
    .await
}

impl Program {
    async fn watch(
        &self,
        request: impl tonic::IntoRequest<WatchTaskDetailRequest>,
    ) -> Result<Streaming<WatchTaskDetailResponse>, Status> {
        let mut client = self.client().await;
        let stream = within("the first reply", client.watch_task_detail(request)).await;
        stream.map(tonic::Response::into_inner)
    }

    /// The status of a watch that ends without a message.
    async fn failed_watch(&self, request: WatchTaskDetailRequest) -> Failure {
        let status = match self.watch(request).await {
            Err(status) => status,
            Ok(mut stream) => next(&mut stream).await.expect_err("the watch fails"),
        };
        Failure::from_status(&status)
    }
}

/// The next message; `None` at the end with OK.
async fn next(
    stream: &mut Streaming<WatchTaskDetailResponse>,
) -> Result<Option<WatchTaskDetailResponse>, Status> {
    within("a message of the watch", stream.message()).await
}

/// All messages up to the end of the stream, and its end.
async fn messages(
    stream: &mut Streaming<WatchTaskDetailResponse>,
) -> (Vec<WatchTaskDetailResponse>, Result<(), Status>) {
    let mut all = Vec::new();
    loop {
        match next(stream).await {
            Ok(Some(message)) => all.push(message),
            Ok(None) => return (all, Ok(())),
            Err(status) => return (all, Err(status)),
        }
    }
}

fn texts(messages: &[WatchTaskDetailResponse]) -> Vec<String> {
    let text = |message: &WatchTaskDetailResponse| match &message.task {
        Some(task) => format!(
            "{} {}",
            task.status.as_deref().unwrap_or_default(),
            task.process.as_deref().unwrap_or_default()
        ),
        None => "unchanged".to_owned(),
    };
    messages.iter().map(text).collect()
}

#[tokio::test]
async fn a_watch_sends_each_state_and_ends_with_the_task() {
    let steps = Steps::new(vec![
        task("Pending", ""),
        task("Running", "10"),
        task("Running", "10"),
        task("Running", "70%"),
        task("Completed", ""),
    ])
    .await;
    let program = Program::patient(&steps.upstream.url(), &FAST);
    let mut request = Request::new(watch_request());
    request
        .metadata_mut()
        .insert("x-request-id", "the-watch".parse().expect("ASCII"));

    steps.allow(1);
    let mut stream = program.watch(request).await.expect("a first reply");
    let expected = [
        (1, "Pending "),
        (2, "Running 10"),
        (4, "Running 70%"),
        (5, "Completed "),
    ];
    let messages = steps.expect(&mut stream, &expected).await;

    assert_eq!(next(&mut stream).await.expect("the task is over"), None);
    let last = messages.last().expect("messages");
    let last_task = last.task.as_ref().expect("the task");
    assert_eq!(last_task.state(), TaskState::Succeeded);
    assert!(messages.iter().all(|message| message.check_time.is_some()));
    let etags: std::collections::HashSet<_> = messages.iter().map(|m| &m.etag).collect();
    assert_eq!(etags.len(), 4, "each state has an etag of its own");
    assert_eq!(last.etag.len(), 32);
    assert_eq!(steps.upstream.requests().len(), 5);
    let line = program.access_line("the-watch");
    assert_eq!(line["grpc_code"], "OK");
    assert_eq!(line["messages"], 4);
    let metrics = program.metrics().await;
    for (series, value) in [
        ("rds_watch_polls_total{outcome=\"changed\"}", 4.0),
        ("rds_watch_polls_total{outcome=\"unchanged\"}", 1.0),
        ("rds_watch_messages_total{kind=\"state\"}", 4.0),
        ("rds_watch_ended_total{cause=\"over\"}", 1.0),
        ("rds_watches_limit", 1000.0),
    ] {
        assert_eq!(metrics.get(series), Some(&value), "{series}");
    }
    for gauge in ["rds_watches", "rds_watched_tasks"] {
        eventually(gauge, async || program.metric(gauge).await == 0.0).await;
    }
}

#[tokio::test]
async fn failed_and_canceled_tasks_end_with_ok_and_unknown_words_never_end() {
    for (status, expected) in [
        ("Failed", TaskState::Failed),
        (" canceled", TaskState::Canceled),
        ("CANCELLED", TaskState::Canceled),
    ] {
        let steps = Steps::new(vec![task("Odd", "1"), task("", "2"), task(status, "3")]).await;
        let program = Program::patient(&steps.upstream.url(), &FAST);

        steps.allow(1);
        let mut stream = program.watch(watch_request()).await.expect("a reply");
        let last = format!("{status} 3");
        let allowed = [(1, "Odd 1"), (2, " 2"), (3, last.as_str())];
        let messages = steps.expect(&mut stream, &allowed).await;

        assert_eq!(next(&mut stream).await.expect("the task is over"), None);
        let states: Vec<TaskState> = messages
            .iter()
            .map(|message| message.task.as_ref().expect("a task").state())
            .collect();
        let odd = TaskState::Unspecified;
        assert_eq!(states, [odd, odd, expected], "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_watchers_of_a_task_cost_the_upstream_calls_of_one() {
    let gate = Gate::default();
    let held = [vec![Step::WaitFor(gate.clone())], task("Completed", "")].concat();
    let upstream = sequence(vec![task("Running", "1"), held]).await;
    let program = Program::patient(&upstream.url(), &FAST);
    let mut watches = JoinSet::new();
    for _ in 0..6 {
        let client = program.client().await;
        for _ in 0..10 {
            let mut client = client.clone();
            watches.spawn(async move {
                let stream = client.watch_task_detail(watch_request()).await;
                let mut stream = stream.expect("a reply").into_inner();
                messages(&mut stream).await
            });
        }
    }
    eventually("60 watches", async || {
        program
            .metric("rds_watch_messages_total{kind=\"state\"}")
            .await
            >= 60.0
    })
    .await;

    gate.open();
    let ended = watches.join_all().await;

    for (messages, end) in ended {
        end.expect("the task is over");
        assert_eq!(texts(&messages), ["Running 1", "Completed "]);
    }
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn an_error_of_the_first_poll_is_that_of_a_unary_call() {
    let cases = [
        unknown(),
        reply(
            401,
            &[],
            r#"{"error_code":"APIGW.0301","error_msg":"Incorrect IAM authentication information: expired"}"#,
        ),
        reply(
            403,
            &[],
            r#"{"error_code":"DBS.200011","error_msg":"no permission"}"#,
        ),
        reply(429, &[("retry-after", "7")], ""),
        reply(503, &[], ""),
        reply(200, &[], "no JSON"),
        vec![Step::Reset],
    ];
    for steps in cases {
        let upstream = Upstream::always(steps.clone()).await;
        let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);
        let unary = program.failure(example_request()).await;
        // Without the state that the unary call has left, such as a throttle window.
        let program = Program::over(&upstream.url(), &["--max-attempts", "1"]);

        let failure = program.failed_watch(watch_request()).await;

        let facts = |failure: &Failure| {
            (
                failure.code,
                failure.reason.clone(),
                failure.message.clone(),
                failure.metadata.clone(),
                failure.resource.clone(),
                failure.quota_subjects.clone(),
                failure.retry_delay.is_some(),
            )
        };
        assert_eq!(facts(&failure), facts(&unary), "{steps:?}");
    }
}

#[tokio::test]
async fn violations_are_reported_together_and_before_any_poll() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &["--allow-project", "other"]);
    let invalid = WatchTaskDetailRequest {
        project_id: "a/b".into(),
        etag: "XYZ".into(),
        ..watch_request()
    };

    let failure = program.failed_watch(invalid).await;
    let not_allowed = program.failed_watch(watch_request()).await;

    let fields: Vec<_> = failure.violations.iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["project_id", "etag"]);
    assert_eq!(
        not_allowed.code_and_reason(),
        (Code::PermissionDenied, "PROJECT_NOT_ALLOWED")
    );
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_resumed_watch_sends_the_task_only_if_it_has_changed_or_is_over() {
    let upstream = sequence(vec![task("Running", "1")]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let mut first = program.watch(watch_request()).await.expect("a reply");
    let seen = next(&mut first).await.expect("open").expect("a message");
    let resume = |etag: &str| WatchTaskDetailRequest {
        etag: etag.to_owned(),
        ..watch_request()
    };

    let mut unchanged = program.watch(resume(&seen.etag)).await.expect("a reply");
    let mut changed = program.watch(resume("00ff")).await.expect("a reply");

    let unchanged = next(&mut unchanged)
        .await
        .expect("open")
        .expect("a message");
    let changed = next(&mut changed).await.expect("open").expect("a message");
    assert_eq!(
        (unchanged.task.is_some(), &unchanged.etag),
        (false, &seen.etag)
    );
    assert_eq!((changed.task.is_some(), &changed.etag), (true, &seen.etag));

    let upstream = sequence(vec![task("Completed", "")]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let mut over = program.watch(watch_request()).await.expect("a reply");
    let (seen, end) = messages(&mut over).await;
    end.expect("over");
    let mut again = program.watch(resume(&seen[0].etag)).await.expect("a reply");
    let (again, end) = messages(&mut again).await;
    end.expect("over");
    assert_eq!(texts(&again), ["Completed "]);
}

#[tokio::test]
async fn a_resumed_watch_gets_no_state_that_may_be_older_than_the_one_it_knows() {
    let state = std::sync::Arc::new(Mutex::new(task("Running", "1")));
    let current = std::sync::Arc::clone(&state);
    let upstream = Upstream::start(move |_| current.lock().expect("no panic").clone()).await;
    let set = |next| *state.lock().expect("no panic") = next;
    // The first poll uses the cached reply to the unary call.
    let flags = ["--watch-interval", "1s", "--cache-ttl", "1h"];
    let program = Program::over(&upstream.url(), &flags);
    program.call(example_request()).await.expect("a reply");
    set(task("Running", "2"));
    let other_instance = Program::over(&upstream.url(), &FAST);
    let mut other = other_instance
        .watch(watch_request())
        .await
        .expect("an answer");
    let newest = next(&mut other).await.expect("open").expect("a message");
    let _first = program.watch(watch_request()).await.expect("an answer");
    let resumed = WatchTaskDetailRequest {
        etag: newest.etag.clone(),
        ..watch_request()
    };

    let mut stream = program.watch(resumed).await.expect("an answer");
    let first = next(&mut stream).await.expect("open").expect("a message");
    set(task("Completed", ""));
    let (rest, end) = messages(&mut stream).await;

    end.expect("the task is over");
    assert_eq!(texts(&[newest]), ["Running 2"]);
    assert_eq!(texts(&[first]), ["unchanged"]);
    assert_eq!(texts(&rest), ["Completed "]);
}

#[tokio::test]
async fn a_resumed_watch_whose_state_this_instance_has_replaced_needs_no_poll() {
    let gate = Gate::default();
    let held = vec![Step::WaitFor(gate)];
    let upstream = sequence(vec![task("Running", "1"), task("Running", "2"), held]).await;
    let program = Program::over(&upstream.url(), &FAST);
    let mut first = program.watch(watch_request()).await.expect("an answer");
    let former = next(&mut first).await.expect("open").expect("a message");
    let newest = next(&mut first).await.expect("open").expect("a message");
    let resumed = WatchTaskDetailRequest {
        etag: former.etag,
        ..watch_request()
    };

    let mut stream = program.watch(resumed).await.expect("an answer");
    let message = next(&mut stream).await.expect("open").expect("a message");

    assert_eq!(texts(&[newest]), ["Running 2"]);
    assert_eq!(texts(&[message]), ["Running 2"]);
}

#[tokio::test]
async fn a_task_that_rds_does_not_know_yet_is_awaited_on_request() {
    let steps = Steps::new(vec![
        unknown(),
        unknown(),
        task("Running", "1"),
        task("Completed", ""),
    ])
    .await;
    let program = Program::patient(&steps.upstream.url(), &FAST);
    let patient = WatchTaskDetailRequest {
        allow_missing: true,
        ..watch_request()
    };

    steps.allow(1);
    let mut stream = program.watch(patient).await.expect("a reply");
    let expected = [(1, "unchanged"), (3, "Running 1"), (4, "Completed ")];
    let messages = steps.expect(&mut stream, &expected).await;

    assert_eq!(next(&mut stream).await.expect("the task is over"), None);
    assert_eq!(messages[0].etag, "");
    assert!(messages[0].check_time.is_some());
}

#[tokio::test]
async fn a_task_that_vanishes_ends_the_watch_when_rds_says_so_twice() {
    let steps = Steps::new(vec![
        task("Running", "1"),
        unknown(),
        task("Running", "2"),
        unknown(),
        unknown(),
    ])
    .await;
    let program = Program::patient(&steps.upstream.url(), &FAST);

    steps.allow(1);
    let mut stream = program.watch(watch_request()).await.expect("a reply");
    let expected = [(1, "Running 1"), (3, "Running 2")];
    steps.expect(&mut stream, &expected).await;
    steps.allow(5);
    let end = next(&mut stream).await.expect_err("the task is gone");

    let failure = Failure::from_status(&end);
    assert_eq!(
        failure.code_and_reason(),
        (Code::NotFound, "TASK_NOT_FOUND")
    );
    assert_eq!(steps.upstream.requests().len(), 5);
}

#[tokio::test]
async fn transient_errors_keep_the_stream_open() {
    let steps = Steps::new(vec![
        task("Running", "1"),
        reply(503, &[], ""),
        vec![Step::Reset],
        reply(500, &[], ""),
        reply(504, &[], ""),
        reply(
            409,
            &[],
            r#"{"error_code":"DBS.201014","error_msg":"busy"}"#,
        ),
        task("Completed", ""),
    ])
    .await;
    let flags = [&FAST[..], &["--max-attempts", "1"]].concat();
    let program = Program::patient(&steps.upstream.url(), &flags);

    steps.allow(1);
    let mut stream = program.watch(watch_request()).await.expect("a reply");
    let expected = [(1, "Running 1"), (7, "Completed ")];
    steps.expect(&mut stream, &expected).await;

    assert_eq!(next(&mut stream).await.expect("the task is over"), None);
    let failed = "rds_watch_polls_total{outcome=\"failed\"}";
    assert_eq!(program.metric(failed).await, 5.0);
}

#[tokio::test]
async fn permanent_errors_end_the_watch() {
    let cases = [
        (
            reply(400, &[], r#"{"error_code":"DBS.200001","error_msg":"bad"}"#),
            Code::InvalidArgument,
        ),
        (
            reply(
                401,
                &[],
                r#"{"error_code":"APIGW.0307","error_msg":"expired"}"#,
            ),
            Code::Unauthenticated,
        ),
        (
            reply(403, &[], r#"{"error_code":"DBS.200011","error_msg":"no"}"#),
            Code::PermissionDenied,
        ),
        (reply(200, &[], "no JSON"), Code::Internal),
        (task(&"x".repeat(65 * 1024), ""), Code::Internal),
    ];
    for (steps, expected) in cases {
        let steps = Steps::new(vec![task("Running", "1"), steps]).await;
        let program = Program::patient(&steps.upstream.url(), &FAST);

        steps.allow(1);
        let mut stream = program.watch(watch_request()).await.expect("a reply");
        steps.expect(&mut stream, &[(1, "Running 1")]).await;
        steps.allow(2);
        let end = next(&mut stream).await.expect_err("an error");

        assert_eq!(end.code(), expected);
    }
}

#[tokio::test]
async fn a_state_over_the_limit_is_too_large_for_a_watch() {
    let upstream = Upstream::always(task(&"x".repeat(65 * 1024), "")).await;
    let program = Program::over(&upstream.url(), &FAST);

    let failure = program.failed_watch(watch_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::Internal, "UPSTREAM_RESPONSE_TOO_LARGE")
    );
    program.call(example_request()).await.expect("a unary call");
}

#[tokio::test]
async fn a_completed_task_with_a_running_part_is_over_when_rds_says_so_again() {
    let early = reply(
        200,
        &[],
        r#"{"job_id":"j","status":"Completed","process":"1","sub_task_list":[{"status":"Running"}]}"#,
    );
    let cases = [
        (vec![early.clone(), early.clone()], vec![(2, "Completed 1")]),
        (
            vec![
                task("Running", "9"),
                early.clone(),
                task("Running", "99"),
                early.clone(),
                task("Completed", ""),
            ],
            vec![(1, "Running 9"), (3, "Running 99"), (5, "Completed ")],
        ),
    ];
    for (replies, expected) in cases {
        let count = replies.len();
        let steps = Steps::new(replies).await;
        let program = Program::patient(&steps.upstream.url(), &FAST);

        steps.allow(expected[0].0);
        let mut stream = program.watch(watch_request()).await.expect("a reply");
        steps.expect(&mut stream, &expected).await;

        assert_eq!(next(&mut stream).await.expect("the task is over"), None);
        assert_eq!(steps.upstream.requests().len(), count);
    }
}

#[tokio::test]
async fn watches_beyond_the_limit_are_rejected_and_a_freed_permit_is_used() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &["--max-watches", "2"]);
    let first = program.watch(watch_request()).await.expect("a reply");
    let _second = program.watch(watch_request()).await.expect("a reply");

    let failure = program.failed_watch(watch_request()).await;

    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    assert!(failure.retry_delay.is_some());
    drop(first);
    eventually("a free permit", async || {
        program.watch(watch_request()).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn watches_of_one_connection_leave_room_for_unary_calls() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &["--max-watches", "2000"]);
    let mut client = program.client().await;
    let mut open = Vec::new();

    let rejected = loop {
        let watch = within("an answer", client.watch_task_detail(watch_request())).await;
        match watch {
            Ok(stream) => open.push(stream),
            Err(status) => break Failure::from_status(&status),
        }
    };

    assert_eq!(open.len(), 768);
    assert_eq!(
        rejected.code_and_reason(),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    let unary = within("a unary call", client.get_task_detail(example_request())).await;
    unary.expect("the connection has streams left");
}

#[tokio::test]
async fn a_watch_ends_with_the_callers_deadline_or_its_own_longest_duration() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &["--max-watch-duration", "4s"]);

    let mut stream = program.watch(watch_request()).await.expect("a reply");
    let (_, expired) = messages(&mut stream).await;
    let mut short = Request::new(watch_request());
    short.set_timeout(Duration::from_secs(2));
    let mut client = program.client().await;
    let mut stream = client
        .watch_task_detail(short)
        .await
        .expect("a reply")
        .into_inner();
    let (_, deadline) = messages(&mut stream).await;

    let expired = Failure::from_status(&expired.expect_err("it ends"));
    assert_eq!(
        expired.code_and_reason(),
        (Code::Unavailable, "WATCH_EXPIRED")
    );
    assert!(expired.retry_delay.expect("RetryInfo") <= Duration::from_secs(2));
    assert_eq!(
        deadline.expect_err("it ends").code(),
        Code::DeadlineExceeded
    );
    let metrics = program.metrics().await;
    assert_eq!(
        metrics.get("rds_watch_ended_total{cause=\"expired\"}"),
        Some(&1.0)
    );
}

#[tokio::test]
async fn a_watch_ends_when_its_connection_reaches_its_age() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &["--max-connection-age", "3s"]);

    let mut stream = program.watch(watch_request()).await.expect("a reply");
    let (_, end) = messages(&mut stream).await;

    let end = Failure::from_status(&end.expect_err("it ends"));
    assert_eq!(end.code_and_reason(), (Code::Unavailable, "WATCH_EXPIRED"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_watches_one_after_the_other_and_exits_with_0() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let mut program = Program::over(&upstream.url(), &["--shutdown-grace", "6s"]);
    let mut watches = JoinSet::new();
    for _ in 0..100 {
        let stream = program.watch(watch_request()).await.expect("a reply");
        watches.spawn(async move {
            let mut stream = stream;
            let (_, end) = messages(&mut stream).await;
            let failure = Failure::from_status(&end.expect_err("it ends"));
            (Instant::now(), failure)
        });
    }

    program.signal("TERM");
    let mut ends = watches.join_all().await;

    let code = program.wait().code();
    assert_eq!(code, Some(0));
    for (_, failure) in &ends {
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unavailable, "SHUTTING_DOWN")
        );
        assert!(failure.retry_delay.is_some());
    }
    // Over three seconds.
    ends.sort_unstable_by_key(|(at, _)| *at);
    let spread = ends[99].0 - ends[0].0;
    assert!(spread > Duration::from_secs(1), "{spread:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_watches_whose_clients_do_not_read() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let mut program = Program::over(&upstream.url(), &["--shutdown-grace", "20s"]);
    let socket = TcpStream::connect(program.grpc).await.expect("a server");
    let mut client = h2::client::Builder::new();
    let handshake = client.initial_window_size(0).handshake::<_, Bytes>(socket);
    let (send, connection) = handshake.await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut send = send.ready().await.expect("ready");
    let request =
        http::Request::post("http://facade/huaweicloud.rds.task.v1.TaskService/WatchTaskDetail")
            .header("content-type", "application/grpc")
            .body(())
            .expect("valid");
    let (response, mut body) = send.send_request(request, false).expect("a stream");
    let message = watch_request().encode_to_vec();
    let length = u32::try_from(message.len()).expect("short").to_be_bytes();
    let framed = [&[0][..], &length, &message].concat();
    body.send_data(framed.into(), true).expect("sent");
    let response = within("the headers", response).await.expect("a reply");
    assert!(!response.headers().contains_key("grpc-status"));

    let begun = Instant::now();
    program.signal("TERM");
    let code = program.wait().code();

    assert_eq!(code, Some(0));
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(
        program
            .logs()
            .iter()
            .all(|line| !line.contains("cut off at the end"))
    );
}

#[tokio::test]
async fn a_first_poll_without_room_in_the_rate_is_rejected_at_once() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let flags = ["--watch-rate", "2/5m", "--watch-interval", "1h"];
    let program = Program::over(&upstream.url(), &flags);
    let other = |number: usize| WatchTaskDetailRequest {
        workflow_id: format!("other-{number}"),
        ..watch_request()
    };
    let _first = program.watch(other(1)).await.expect("a reply");
    let _second = program.watch(other(2)).await.expect("a reply");

    let begun = Instant::now();
    let failure = program.failed_watch(other(3)).await;
    let _known = program
        .watch(other(1))
        .await
        .expect("the state of the first watch");

    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "THROTTLED")
    );
    let wait = failure.retry_delay.expect("RetryInfo");
    assert!(
        wait > Duration::from_secs(280) && wait < Duration::from_secs(301),
        "{wait:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(9));
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn polls_of_many_tasks_stay_within_the_rate() {
    let times = std::sync::Arc::new(Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&times);
    let upstream = Upstream::start(move |_| {
        seen.lock().expect("no panic").push(Instant::now());
        task("Running", "1")
    })
    .await;
    let flags = ["--watch-rate", "6/3s", "--watch-interval", "10ms"];
    let program = Program::over(&upstream.url(), &flags);
    let mut open = Vec::new();
    for number in 0..5 {
        let request = WatchTaskDetailRequest {
            workflow_id: format!("task-{number}"),
            ..watch_request()
        };
        open.push(program.watch(request).await.expect("a reply"));
    }

    upstream.wait_for_requests(20).await;

    let times = times.lock().expect("no panic").clone();
    for window in times.windows(7) {
        let span = window[6] - window[0];
        assert!(span >= Duration::from_secs(2), "{span:?}");
    }
}

#[tokio::test]
async fn watchers_share_polls_only_if_their_tokens_are_equal() {
    let counts = std::sync::Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let seen = std::sync::Arc::clone(&counts);
    let upstream = Upstream::start(move |request| {
        let token = request
            .header("x-auth-token")
            .unwrap_or_default()
            .to_owned();
        *seen
            .lock()
            .expect("no panic")
            .entry(token.clone())
            .or_default() += 1;
        task("Running", &token)
    })
    .await;
    let args = ["--endpoint", &upstream.url(), "--watch-interval", "1h"];
    let program = Program::start(&args, &[]);
    let mut open = Vec::new();

    for token in ["ann", "bob", "ann"] {
        let mut request = Request::new(watch_request());
        request
            .metadata_mut()
            .insert("x-auth-token", token.parse().expect("ASCII"));
        let mut stream = program.watch(request).await.expect("a reply");
        let message = next(&mut stream).await.expect("open").expect("a message");
        assert_eq!(texts(&[message]), [format!("Running {token}")]);
        open.push(stream);
    }
    let missing = program.failed_watch(watch_request()).await;

    let counts = counts.lock().expect("no panic").clone();
    assert_eq!(
        counts,
        HashMap::from([("ann".into(), 1), ("bob".into(), 1)])
    );
    assert_eq!(
        missing.code_and_reason(),
        (Code::Unauthenticated, "CREDENTIAL_MISSING")
    );
}

#[tokio::test]
async fn polling_stops_with_the_last_watcher() {
    let upstream = Upstream::always(task("Running", "1")).await;
    let program = Program::over(&upstream.url(), &FAST);
    let stream = program.watch(watch_request()).await.expect("a reply");
    upstream.wait_for_requests(3).await;

    drop(stream);

    eventually("no poller", async || {
        program.metric("rds_watched_tasks").await == 0.0
    })
    .await;
    let polls = upstream.requests().len();
    program.call(example_request()).await.expect("a unary call");
    assert_eq!(upstream.requests().len(), polls + 1);
}

#[tokio::test]
async fn a_poll_uses_the_cache_only_while_it_is_younger_than_the_interval() {
    let upstream = sequence(vec![task("Running", "1"), task("Completed", "")]).await;
    let flags = [
        "--cache-ttl",
        "1h",
        "--watch-interval",
        "100ms",
        "--watch-rate",
        "off",
    ];
    let program = Program::over(&upstream.url(), &flags);
    program.call(example_request()).await.expect("a reply");

    let mut stream = program.watch(watch_request()).await.expect("a reply");
    let (messages, end) = messages(&mut stream).await;
    let cached = program.call(example_request()).await.expect("a reply");

    end.expect("the task is over");
    assert_eq!(
        texts(&messages).last().map(String::as_str),
        Some("Completed ")
    );
    assert_eq!(cached.into_inner().status.as_deref(), Some("Completed"));
    assert_eq!(upstream.requests().len(), 2);
}
