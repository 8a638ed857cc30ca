use std::{
    fs,
    time::{Duration, Instant},
};

use rds_task_facade::pb::GetTaskDetailRequest;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::{io::AsyncReadExt as _, net::TcpStream, task::JoinSet};
use tonic::Code;

use crate::support::{
    Connection, Failure, Gate, Program, Step, Upstream, eventually, example, example_request,
    gated_example, numbered, within,
};

/// The CPU time that all threads of the program have used so far.
fn processor_time(program: &Program) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", program.pid())).expect("it runs");
    let used = |task: std::io::Result<fs::DirEntry>| -> Option<u64> {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    Duration::from_nanos(tasks.filter_map(used).sum())
}

/// Whether a call on a new connection succeeds; `false` also if there is no reply within 5 s.
async fn is_served(program: &Program) -> bool {
    let call = async {
        let stream = TcpStream::connect(program.grpc).await.ok()?;
        let connection = Connection::over(stream).await.ok()?;
        let ended = connection.call_within("5S", &example_request()).await;
        Some(ended.ok()?.status()?.code() == Code::Ok)
    };
    // Without descriptors the connection waits in the kernel's queue.
    let served = tokio::time::timeout(Duration::from_secs(5), call).await;
    served.ok().flatten().unwrap_or(false)
}

#[tokio::test]
async fn an_idle_program_with_open_connections_uses_less_than_a_thousandth_of_a_core() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    fs::write(&token, "sandbox-token").expect("a file");
    let program = Program::sandboxed(&["--token-file", &token.display().to_string()]);
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = program.client().await;
        client
            .get_task_detail(example_request())
            .await
            .expect("the example");
        clients.push(client);
    }
    // Lets work that follows the calls finish.
    tokio::time::sleep(Duration::from_secs(1)).await;

    // The best of several windows: on a busy machine each wake-up costs more.
    let mut shares = Vec::new();
    while shares.len() < 6 && shares.iter().all(|share| *share >= 0.001) {
        let before = processor_time(&program);
        let started = Instant::now();
        tokio::time::sleep(Duration::from_secs(10)).await;
        let used = processor_time(&program) - before;
        shares.push(used.as_secs_f64() / started.elapsed().as_secs_f64());
    }

    println!("idle: shares of a core {shares:?}");
    assert!(
        shares.iter().any(|share| *share < 0.001),
        "shares of a core: {shares:?}"
    );
}

/// Starts the program with this limit of open descriptors, set by a command of the shell.
fn with_descriptors(ulimit: &str, args: &[&str]) -> Program {
    let command = format!("ulimit {ulimit} && exec \"$@\"");
    let shell = ["/bin/sh", "-c", &command, "sh"];
    let token = [("RDS_TASK_FACADE_TOKEN", "token")];
    Program::start_under(&shell, "127.0.0.1:0", args, &token)
}

#[tokio::test]
async fn the_soft_limit_of_descriptors_is_raised_to_the_hard_one() {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.expect("Linux limits it") as f64;
    let program = with_descriptors("-S -n 100", &["--sandbox", "--max-in-flight", "100"]);

    assert_eq!(program.metric("process_max_fds").await, hard);
    let warned = |line: &String| line.contains("descriptors");
    assert!(!program.logs().iter().any(warned), "{:?}", program.logs());
}

#[tokio::test]
async fn idle_connections_leave_descriptors_for_calls_and_probes() {
    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let source = ["--credentials", "token", "--endpoint", &upstream.url()].map(str::to_owned);
    let args: Vec<_> = source.iter().map(String::as_str).collect();
    let program = with_descriptors("-n 128", &args);
    let mut client = program.client().await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        let socket = TcpStream::connect(program.grpc).await;
        idle.push(socket.expect("the queue takes it"));
    }
    eventually("more than half are refused", async || {
        program.refused("limit").await > 100.0
    })
    .await;

    // Each needs an upstream connection, and the limit of descriptors allows no more.
    let mut calls = JoinSet::new();
    let allowed = fitted(&program, "max_in_flight");
    for number in 0..allowed {
        let mut client = client.clone();
        let request = numbered(number);
        calls.spawn(async move { client.get_task_detail(request).await });
    }
    upstream.wait_for_requests(allowed).await;
    let beyond = client.get_task_detail(numbered(allowed)).await;
    let live = program.admin("/livez").await.0;
    let before = processor_time(&program);
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = (processor_time(&program) - before).as_secs_f64() / started.elapsed().as_secs_f64();
    gate.open();
    let ended = calls.join_all().await;
    drop(idle);
    eventually("served again", async || is_served(&program).await).await;

    let beyond = Failure::from_status(&beyond.expect_err("no descriptor is left"));
    assert_eq!(
        beyond.code_and_reason(),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    assert_eq!(live, 200);
    assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    assert!(used < 0.05, "{used} of a core");
    assert_eq!(fitted(&program, "limit"), 128);
    assert!(fitted(&program, "needed") > 3048);
    assert!(!program.logs().iter().any(|line| line.contains("\"ERROR\"")));
}

/// A number in the warning about the limit of descriptors.
fn fitted(program: &Program, field: &str) -> usize {
    let warning = program.wait_for_log(|line| line["needed"].is_number());
    warning[field].as_u64().expect("a number") as usize
}

#[tokio::test]
async fn a_lack_of_descriptors_is_overload_and_does_not_count_against_upstream() {
    let upstream = Upstream::always(example()).await;
    let by_name = upstream.url().replace("127.0.0.1", "localhost");
    for url in [upstream.url(), by_name] {
        let program = Program::over(&url, &[]);
        let mut client = program.client().await;
        // The connection has been accepted, and none to upstream is open.
        let empty = client.get_task_detail(GetTaskDetailRequest::default());
        assert_eq!(
            empty.await.expect_err("no ids").code(),
            Code::InvalidArgument
        );
        let lacking = DescriptorLimit::of(&program);
        lacking.exhaust();

        let mut seen = Vec::new();
        for number in 0..50 {
            let status = client.get_task_detail(numbered(number)).await;
            seen.push(Failure::from_status(
                &status.expect_err("no descriptor is left"),
            ));
        }
        lacking.reset();
        let after = client.get_task_detail(numbered(50)).await;

        for failure in seen {
            assert_eq!(
                failure.code_and_reason(),
                (Code::ResourceExhausted, "OVERLOADED"),
                "{url}"
            );
            assert!(failure.retry_delay.is_some(), "{failure:?}");
        }
        assert!(after.is_ok(), "{url}: {after:?}");
    }
}

/// Changes the limit of descriptors of a running program.
struct DescriptorLimit(Pid, Rlimit);

impl DescriptorLimit {
    fn of(program: &Program) -> Self {
        let pid = i32::try_from(program.pid()).expect("a pid");
        let pid = Pid::from_raw(pid).expect("a pid");
        let limit = getrlimit(Resource::Nofile);
        Self(pid, limit)
    }

    /// Lets the program open nothing: each new descriptor has a number from three on, because standard input and output are open.
    fn exhaust(&self) {
        self.put(Rlimit {
            current: Some(3),
            ..self.1
        });
    }

    fn reset(&self) {
        self.put(self.1);
    }

    fn put(&self, limit: Rlimit) {
        prlimit(Some(self.0), Resource::Nofile, limit).expect("a child of this process");
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_the_others_keep_working() {
    let program = Program::sandboxed(&["--max-connections", "5"]);
    let mut first = program.client().await;
    first
        .get_task_detail(example_request())
        .await
        .expect("within");
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(Connection::open(program.grpc).await);
    }

    for _ in 0..20 {
        let mut beyond = TcpStream::connect(program.grpc)
            .await
            .expect("the queue takes it");
        let mut byte = [0];
        // Closed or reset at once, without a byte.
        let read = within("the end of the connection", beyond.read(&mut byte)).await;
        assert!(!matches!(read, Ok(1..)));
    }
    let within_limit = first.get_task_detail(example_request()).await;
    let refused = program.refused("limit").await;
    drop(others);
    eventually("a closed connection makes room", async || {
        is_served(&program).await
    })
    .await;

    assert!(within_limit.is_ok(), "{within_limit:?}");
    assert_eq!(refused, 20.0);
}

#[tokio::test]
async fn http1_on_the_grpc_port_gets_505_and_does_not_flood_the_log() {
    use tokio::io::AsyncWriteExt as _;
    let program = Program::sandboxed(&[]);
    let first = [("x-request-id", "first")];
    let called = program.call_with(example_request(), &first).await;
    assert!(called.is_ok(), "{called:?}");
    // All lines of the start come before this one.
    program.access_line("first");
    let lines = program.logs().len();

    for _ in 0..50 {
        let mut peer = TcpStream::connect(program.grpc).await.expect("it listens");
        peer.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("it reads");
        let mut response = String::new();
        within("an orderly close", peer.read_to_string(&mut response))
            .await
            .expect("an orderly close");
        assert!(response.starts_with("HTTP/1.1 505 "), "{response}");
    }

    assert!(is_served(&program).await);
    // The access log line of that call.
    assert!(program.logs().len() <= lines + 2, "{:#?}", program.logs());
}

#[tokio::test]
async fn an_upstream_that_accepts_no_connection_fails_after_the_connect_timeout() {
    // A listener whose queue is full: the kernel drops further connection attempts silently.
    let socket =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().expect("an address");
    socket.bind(&any.into()).expect("a port");
    socket.listen(0).expect("it listens");
    let address = socket.local_addr().expect("an address");
    let address = address.as_socket().expect("of IPv4");
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_secs(1), TcpStream::connect(address)).await
    {
        queued.push(stream);
    }
    let program = Program::over(
        &format!("http://{address}"),
        &["--connect-timeout", "300ms", "--max-attempts", "2"],
    );

    let started = Instant::now();
    let failure = program.failure(example_request()).await;
    let took = started.elapsed();

    assert_eq!(
        failure.code_and_reason(),
        (Code::Unavailable, "UPSTREAM_CONNECT")
    );
    assert!(took >= Duration::from_millis(600), "two attempts: {took:?}");
    assert!(
        took < Duration::from_secs(5),
        "{took:?}; 6 s with the default of 3 s"
    );
}

#[tokio::test]
async fn a_lost_connection_cancels_its_calls_and_their_upstream_requests() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &[]);
    let socket = TcpStream::connect(program.grpc).await.expect("it listens");
    // Closing it sends a reset.
    socket.set_zero_linger().expect("a TCP option");
    let (send, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let mut send = send.ready().await.expect("ready");
    let mut results = Vec::new();
    for number in 0..5 {
        let mut request = example_request();
        request.workflow_id = format!("w-{number}");
        let head = crate::support::raw::headers().body(()).expect("a request");
        let (reply, mut body) = send.send_request(head, false).expect("a stream");
        // Dropping it would cancel the call.
        results.push(reply);
        body.send_data(crate::support::raw::framed(&request), true)
            .expect("room");
        send = send.ready().await.expect("ready");
    }
    upstream.wait_for_requests(5).await;

    connection.abort();
    drop(send);
    upstream.wait_for_closed(5).await;
    eventually("calls and connection have ended", async || {
        program.handled("Canceled").await >= 5.0
            && program.metric("grpc_server_connections").await == 0.0
    })
    .await;

    assert_eq!(program.handled("Canceled").await, 5.0);
    assert_eq!(program.metric("rds_upstream_in_flight").await, 0.0);
}
