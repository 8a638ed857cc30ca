//! Connections that are slow, silent, too many, too old or not HTTP/2.

use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{frames, *};

#[tokio::test]
async fn a_connection_without_a_complete_preface_is_closed_and_counted_as_refused() {
    let running = start(with_timings(|timings| {
        timings.preface_timeout = Duration::from_millis(50)
    }));

    let cases = [
        ("nothing", &b""[..]),
        ("half", b"PRI * HTTP/2.0\r\n"),
        ("something else", b"HELO facade\r\n"),
    ];

    for (name, bytes) in cases {
        let mut socket = TcpStream::connect(running.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let started = Instant::now();

        let received = until_closed(&mut socket).await;

        assert!(received.is_empty(), "{name}");
        // Without the configured timeout it would be the default of 10 s.
        assert!(started.elapsed() < Duration::from_secs(8), "{name}");
    }
    eventually(|| running.refused("timeout") == 2).await;
    eventually(|| running.refused("protocol") == 1).await;
    eventually(|| running.metric("grpc_server_connections ") == 0).await;
}

#[tokio::test]
async fn http1_gets_505_and_an_orderly_close() {
    let running = start(options());
    let mut socket = TcpStream::connect(running.address).await.unwrap();
    socket
        .write_all(b"GET / HTTP/1.1\r\nhost: facade\r\n\r\n")
        .await
        .unwrap();

    let mut response = String::new();
    within(socket.read_to_string(&mut response))
        .await
        .expect("closed without a reset");

    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 505 "), "{head}");
    assert!(
        head.contains(&format!("content-length: {}\r\n", body.len())),
        "{head}"
    );
}

#[tokio::test]
async fn a_connection_that_does_not_acknowledge_a_ping_is_closed() {
    let running = start(with_timings(|timings| {
        timings.keepalive_interval = Duration::from_millis(50);
        timings.keepalive_timeout = Duration::from_millis(50);
    }));
    let mut socket = TcpStream::connect(running.address).await.unwrap();
    socket.write_all(&frames::opening()).await.unwrap();

    let seen = frames::parse(&until_closed(&mut socket).await);

    let pings = |frame: &&frames::Frame| frame.kind == frames::PING && frame.flags == 0;
    assert_eq!(seen.iter().filter(pings).count(), 1, "{seen:?}");
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_the_others_keep_working() {
    let limited = Options {
        max_connections: 2,
        ..options()
    };
    let running = start_with_workers(limited, 2);
    let (first, _) = connect(running.address).await;
    let (second, second_connection) = connect(running.address).await;
    assert_eq!(call(&first, "i").await.unwrap().code(), Code::Ok);
    assert_eq!(call(&second, "i").await.unwrap().code(), Code::Ok);

    for _ in 0..20 {
        let mut socket = TcpStream::connect(running.address).await.unwrap();
        assert!(until_closed(&mut socket).await.is_empty());
    }

    assert_eq!(running.refused("limit"), 20);
    assert_eq!(call(&first, "i").await.unwrap().code(), Code::Ok);
    drop(second);
    second_connection.abort();
    eventually(|| running.metric("grpc_server_connections ") == 1).await;
    let (third, _) = connect(running.address).await;
    assert_eq!(call(&third, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn connections_are_spread_evenly_over_the_workers() {
    let running = start_with_workers(options(), 2);
    let mut clients = Vec::new();

    // Hanging calls on four connections; the services of the workers share the script.
    for _ in 0..4 {
        let (client, _) = connect(running.address).await;
        let response = hanging(&running, &client).await;
        clients.push((client, response));
    }
    running.script.released.send_replace(true);

    for (_, response) in clients {
        assert_eq!(receive(response).await.unwrap().code(), Code::Ok);
    }
    let threads = running.script.threads.lock().unwrap().clone();
    let mut counts: Vec<_> = threads.values().copied().collect();
    counts.sort_unstable();
    assert_eq!(counts, [2, 2]);
}

#[tokio::test]
async fn an_old_connection_gets_goaway_and_its_call_completes() {
    let age = Duration::from_secs(1);
    let running = start(with_timings(|timings| timings.max_connection_age = age));
    let started = Instant::now();
    let (client, connection) = connect(running.address).await;
    let response = hanging(&running, &client).await;

    goaway(&client).await;
    let lasted = started.elapsed();
    running.script.released.send_replace(true);

    assert!(lasted >= age.mul_f64(0.9), "{lasted:?}");
    assert_eq!(receive(response).await.unwrap().code(), Code::Ok);
    within(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_call_that_outlives_connection_age_and_grace_period_is_cancelled() {
    let running = start(with_timings(|timings| {
        timings.max_connection_age = Duration::from_secs(1);
        timings.max_connection_age_grace = Duration::from_millis(50);
    }));
    let (client, connection) = connect(running.address).await;

    let response = hanging(&running, &client).await;

    assert!(receive(response).await.is_err());
    let _ = within(connection).await.unwrap();
    assert_eq!(running.ended(1).await, [Code::Cancelled]);
}

/// User and system time of this process so far, in ticks of 10 ms.
fn ticks(stat: &std::fs::File) -> u64 {
    use std::os::unix::fs::FileExt as _;

    let mut bytes = [0; 1024];
    let count = stat.read_at(&mut bytes, 0).unwrap();
    let text = std::str::from_utf8(&bytes[..count]).unwrap();
    // Fields 14 and 15; field 2 is the name in brackets.
    let fields = text.rsplit(") ").next().unwrap().split(' ');
    let times = fields.skip(11).take(2);
    times.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Runs in a separate process, because the descriptor limit applies to the process.
#[tokio::test]
#[ignore = "run by without_descriptors_the_accept_loop_pauses_and_recovers"]
async fn in_a_process_with_forty_descriptors() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
    let stat = std::fs::File::open("/proc/self/stat").unwrap();
    // The clients' sockets use descriptors too: take all that are left before the accept loop runs again.
    let mut sockets = Vec::new();
    while let Ok(socket) = std::net::TcpStream::connect(running.address) {
        sockets.push(socket);
    }

    let before = ticks(&stat);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = ticks(&stat) - before;

    assert!(used < 20, "{used} ticks of 10 ms in one second");
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
    drop(sockets);
    // The pause of the accept loop is at most a second.
    let (late, _) = within(connect(running.address)).await;
    assert_eq!(call(&late, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn without_descriptors_the_accept_loop_pauses_and_recovers() {
    let this = std::env::current_exe().unwrap();
    let test = "server::tests::connections::in_a_process_with_forty_descriptors";

    let output = tokio::process::Command::new("sh")
        .args(["-c", "ulimit -n 40 && exec \"$0\" --ignored --exact \"$1\""])
        .arg(this)
        .arg(test)
        .kill_on_drop(true)
        .output();
    let output = within(output).await.unwrap();

    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}
