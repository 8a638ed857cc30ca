use std::{
    fs,
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tonic::Code;

use crate::support::{Connection, Program, Step, Upstream, eventually, example_request, within};

const REFUSED: &str = "grpc_server_connections_refused_total";

/// Time on a processor that all threads of the program have used until now.
fn processor_time(program: &Program) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", program.pid())).expect("it runs");
    let used = |task: std::io::Result<fs::DirEntry>| -> Option<u64> {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    Duration::from_nanos(tasks.filter_map(used).sum())
}

/// Whether a call on a new connection works. `false` too when nobody answers.
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
async fn an_idle_program_with_open_connections_uses_hardly_any_processor_time() {
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
    // What the calls leave to be done is over.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let before = processor_time(&program);
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let used = processor_time(&program) - before;

    let share = used.as_secs_f64() / started.elapsed().as_secs_f64();
    println!(
        "idle: {used:?} of processor time in 10 s, {:.4} %",
        share * 100.0
    );
    assert!(share < 0.001, "{used:?}");
}

#[tokio::test]
async fn without_descriptors_the_program_rests_keeps_its_connections_and_recovers() {
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
    // The upstream connection of the first call is still there.
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
    assert_eq!(errors, 1, "one line however long it lasts");
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_those_within_it_unhurt() {
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
        // Closed or reset, but at once and without a word.
        let read = within("the end of the connection", beyond.read(&mut byte)).await;
        assert!(!matches!(read, Ok(1..)));
    }
    let unhurt = first.get_task_detail(example_request()).await;
    let refused = program.metric(REFUSED).await;
    drop(others);
    eventually("a closed connection makes room", async || {
        is_served(&program).await
    })
    .await;

    assert!(unhurt.is_ok(), "{unhurt:?}");
    assert_eq!(refused, 20.0);
}

#[tokio::test]
async fn http1_on_the_grpc_port_is_told_so_and_floods_no_log() {
    use tokio::io::AsyncWriteExt as _;
    let program = Program::sandboxed(&[]);
    let lines = program.logs().len();

    for _ in 0..50 {
        let mut peer = TcpStream::connect(program.grpc).await.expect("it listens");
        peer.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("it reads");
        let mut told = String::new();
        within("an orderly end", peer.read_to_string(&mut told))
            .await
            .expect("an orderly end");
        assert!(told.starts_with("HTTP/1.1 505 "), "{told}");
    }

    assert!(is_served(&program).await);
    // The access line of that one call.
    assert!(program.logs().len() <= lines + 2, "{:#?}", program.logs());
}

#[tokio::test]
async fn an_upstream_that_takes_no_connection_is_given_up_after_the_connect_timeout() {
    // A listener whose queue is full: the kernel answers no further hello, as a black hole does.
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
async fn a_lost_connection_ends_its_calls_and_leaves_nothing_behind() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &[]);
    let socket = TcpStream::connect(program.grpc).await.expect("it listens");
    // Its end will be a reset.
    socket.set_zero_linger().expect("a TCP option");
    let (send, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let mut send = send.ready().await.expect("ready");
    let mut answers = Vec::new();
    for number in 0..5 {
        let mut request = example_request();
        request.workflow_id = format!("w-{number}");
        let head = crate::support::raw::headers().body(()).expect("a request");
        let (answer, mut body) = send.send_request(head, false).expect("a stream");
        // Dropping it would cancel the call.
        answers.push(answer);
        body.send_data(crate::support::raw::framed(&request), true)
            .expect("room");
        send = send.ready().await.expect("ready");
    }
    upstream.wait_for_requests(5).await;

    connection.abort();
    drop(send);
    upstream.wait_for_closed(5).await;
    eventually("calls and connection are counted as over", async || {
        program.handled("Canceled").await >= 5.0
            && program.metric("grpc_server_connections").await == 0.0
    })
    .await;

    assert_eq!(program.handled("Canceled").await, 5.0);
    assert_eq!(program.metric("rds_upstream_in_flight").await, 0.0);
}
