use std::{
    fs,
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tonic::Code;

use crate::support::{Connection, Program, Step, Upstream, eventually, example_request, within};

const REFUSED: &str = "grpc_server_connections_refused_total";

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

#[tokio::test]
async fn without_descriptors_the_program_pauses_keeps_its_connections_and_recovers() {
    let shell = ["/bin/sh", "-c", "ulimit -n 40 && exec \"$@\"", "sh"];
    let program = Program::start_under(&shell, "127.0.0.1:0", &["--sandbox"], &[]);
    let mut client = program.client().await;
    client
        .get_task_detail(example_request())
        .await
        .expect("before");

    let mut crowd = Vec::new();
    for _ in 0..60 {
        crowd.push(
            TcpStream::connect(program.grpc)
                .await
                .expect("the queue takes it"),
        );
    }
    program.wait_for_log(|line| line["level"] == "ERROR");
    let before = processor_time(&program);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = processor_time(&program) - before;
    // This call uses the upstream connection of the first call.
    let meanwhile = client.get_task_detail(example_request()).await;
    drop(crowd);
    eventually("served again", async || is_served(&program).await).await;

    println!("out of descriptors: {used:?} of processor time in 2 s");
    assert!(used < Duration::from_millis(100), "{used:?}");
    assert!(meanwhile.is_ok(), "{meanwhile:?}");
    let errors = program
        .logs()
        .iter()
        .filter(|line| line.contains("\"ERROR\""))
        .count();
    assert_eq!(errors, 1, "one line per minute");
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
    let refused = program.metric(REFUSED).await;
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
