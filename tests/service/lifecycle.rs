use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{
    Failure, Gate, Program, Step, Upstream, eventually, example, example_request, gated_example,
    within,
};

const SERVICE: &str = "huaweicloud.rds.task.v1.TaskService";

async fn check(health: &mut HealthClient<Channel>, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    let response = health.check(request).await.expect("a health reply");
    response.into_inner().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_in_flight_at_the_signal_completes_and_the_exit_code_is_0() {
    for signal in ["TERM", "INT"] {
        let gate = Gate::default();
        let upstream = Upstream::always(gated_example(&gate)).await;
        let mut program = Program::patient(&upstream.url(), &["--shutdown-grace", "60s"]);
        let mut client = program.client().await;
        let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
        upstream.wait_for_requests(1).await;

        program.signal(signal);
        program.wait_for_log(|line| line["msg"] == "signal: draining");
        gate.open();
        let result = call.await.expect("no panic");
        let ended = program.wait();

        assert!(result.is_ok(), "{signal}: {result:?}");
        assert_eq!(ended.code(), Some(0), "{signal}");
        program.wait_for_log(|line| line["msg"] == "stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_program_with_open_connections_exits_before_the_grace_period_ends() {
    let mut program = Program::sandboxed(&["--shutdown-grace", "60s"]);
    let mut client = program.client().await;
    client
        .get_task_detail(example_request())
        .await
        .expect("the example");

    program.signal("TERM");
    let ended = program.wait();

    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_signal_ends_the_program_at_once_with_a_failure_exit_code() {
    for [first, second] in [["TERM", "TERM"], ["INT", "INT"], ["TERM", "INT"]] {
        let upstream = Upstream::always(vec![Step::Hold]).await;
        let mut program = Program::patient(&upstream.url(), &["--shutdown-grace", "60s"]);
        let mut client = program.client().await;
        let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
        upstream.wait_for_requests(1).await;

        program.signal(first);
        program.wait_for_log(|line| line["msg"] == "signal: draining");
        program.signal(second);
        let ended = program.wait();

        assert!(!ended.success(), "{first} {second}: {ended}");
        assert!(call.await.expect("no panic").is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_signals_do_not_end_the_program() {
    let mut program = Program::sandboxed(&[]);

    for signal in ["USR1", "USR2", "HUP", "HUP"] {
        program.signal(signal);
    }
    program.wait_for_log(|line| line["msg"] == "SIGHUP: reading certificates and secrets again");
    let served = program.call(example_request()).await;
    program.signal("TERM");
    let ended = program.wait();

    assert!(served.is_ok(), "{served:?}");
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn during_the_drain_delay_calls_are_served_and_health_and_readyz_report_not_serving() {
    let program = Program::sandboxed(&["--drain-delay", "60s"]);
    let mut client = program.client().await;
    let mut old = program.health().await;
    assert_eq!(check(&mut old, "").await, ServingStatus::Serving);
    assert_eq!(program.admin("/readyz").await.0, 200);

    program.signal("TERM");
    program.wait_for_log(|line| line["msg"] == "signal: draining");
    eventually("not ready", async || {
        program.admin("/readyz").await.0 != 200
    })
    .await;
    for service in ["", SERVICE] {
        assert_eq!(check(&mut old, service).await, ServingStatus::NotServing);
        let mut new = program.health().await;
        assert_eq!(check(&mut new, service).await, ServingStatus::NotServing);
    }
    let on_old = client.get_task_detail(example_request()).await;
    let on_new = program.call(example_request()).await;
    let alive = program.admin("/livez").await.0;

    assert!(on_old.is_ok(), "{on_old:?}");
    assert!(on_new.is_ok(), "{on_new:?}");
    assert_eq!(alive, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_does_not_exit_before_the_end_of_the_drain_delay() {
    let mut program = Program::sandboxed(&["--drain-delay", "1500ms"]);

    let signalled = Instant::now();
    program.signal("TERM");
    let ended = program.wait();

    assert_eq!(ended.code(), Some(0));
    assert!(signalled.elapsed() >= Duration::from_millis(1500));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_clients_do_not_delay_the_exit_beyond_the_grace_period() {
    let mut program = Program::sandboxed(&["--shutdown-grace", "1s"]);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut peers = Vec::new();
    for opening in [
        Vec::new(),
        preface[..10].to_vec(),
        // Sends its preface and then does not acknowledge PINGs.
        [&preface[..], &settings].concat(),
    ] {
        let mut peer = TcpStream::connect(program.grpc).await.expect("it listens");
        peer.write_all(&opening).await.expect("it reads");
        peers.push(peer);
    }
    // Once the settings of the program arrive, the last connection is served by HTTP/2.
    let mut frame = [0; 9];
    let mute = peers.last_mut().expect("there are three");
    within("the program's settings", mute.read_exact(&mut frame))
        .await
        .expect("its settings");
    let mut watching = program.health().await;
    let watched = HealthCheckRequest::default();
    let mut watch = watching.watch(watched).await.expect("a watch").into_inner();
    let first = within("the first status", watch.message()).await;
    first.expect("a status");

    let signalled = Instant::now();
    program.signal("TERM");
    let ended = program.wait();
    let took = signalled.elapsed();

    assert_eq!(ended.code(), Some(0));
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_outlives_the_grace_period_gets_shutting_down_before_the_exit() {
    let grace = Duration::from_secs(5);
    let mut late = Vec::new();
    // The call is cut off 500 ms before the grace period ends, and the program waits 250 ms for the reply to be sent. A busy machine may
    // take longer and may lose the reply, but not five times in a row.
    let usual = Duration::from_millis(4700);
    while late.len() < 5 {
        let upstream = Upstream::always(vec![Step::Hold]).await;
        let mut program = Program::patient(&upstream.url(), &["--shutdown-grace", "5s"]);
        let mut client = program.client().await;
        let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
        upstream.wait_for_requests(1).await;

        let signalled = Instant::now();
        program.signal("TERM");
        let ended = program.wait();
        let took = signalled.elapsed();

        assert_eq!(ended.code(), Some(0));
        assert!(took >= grace / 2, "{took:?}");
        if took >= usual {
            late.push(took);
            continue;
        }
        let failure = Failure::from_status(&call.await.expect("no panic").expect_err("cut off"));
        assert_eq!(
            failure.code_and_reason(),
            (Code::Unavailable, "SHUTTING_DOWN")
        );
        let counted = program.access_line(&failure.request_id.expect("an id"));
        assert_eq!(counted["grpc_code"], "Unavailable");
        let line =
            program.wait_for_log(|line| line["level"] == "WARN" && line.get("calls").is_some());
        assert_eq!(line["calls"], 1);
        return;
    }
    panic!("never within {usual:?}: {late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_callers_get_unavailable_and_a_new_process_serves_again() {
    let upstream = Upstream::start(|request| match request.number {
        1 => vec![Step::Hold],
        _ => example(),
    })
    .await;
    let started = Instant::now();
    let mut program = Program::over(&upstream.url(), &[]);
    program.call(example_request()).await.expect("a reply");
    let first_took = started.elapsed();
    let address = program.grpc.to_string();
    let mut client = program.client().await;
    let mut calling = client.clone();
    let call = tokio::spawn(async move { calling.get_task_detail(example_request()).await });
    upstream.wait_for_requests(2).await;

    program.signal("KILL");
    program.wait();
    let lost = call.await.expect("no panic").expect_err("the process died");
    let killed = Instant::now();
    let again = Program::start_under(
        &[],
        &address,
        &["--endpoint", &upstream.url(), "--credentials", "token"],
        &[("RDS_TASK_FACADE_TOKEN", "a-token")],
    );
    let result = again.call(example_request()).await;
    let took = killed.elapsed();
    let same_client = client.get_task_detail(example_request()).await;

    assert!(
        matches!(lost.code(), Code::Unavailable | Code::Unknown),
        "{lost:?}"
    );
    assert!(result.is_ok(), "{result:?}");
    assert!(
        took < 5 * first_took + Duration::from_secs(2),
        "{took:?}, the first {first_took:?}"
    );
    assert!(same_client.is_ok(), "{same_client:?}");
}
