//! The drain: which calls it finishes, what it does not wait for, and in which order.

use tokio::io::AsyncWriteExt as _;
use tonic_health::pb::{HealthCheckResponse, health_check_response::ServingStatus};

use super::{frames, *};

#[tokio::test]
async fn an_idle_server_drains_before_the_grace_period_ends() {
    let running = start(options());
    let (client, connection) = connect(running.address).await;
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);

    running.stop().await;

    within(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_before_the_first_credential_ends_before_the_grace_period() {
    let running = start_with_ready(options(), false);

    running.stop().await;
}

#[tokio::test]
async fn the_drain_ends_when_the_call_in_flight_completes() {
    let running = start(options());
    let (client, connection) = connect(running.address).await;
    let response = hanging(&running, &client).await;
    let script = running.script.clone();
    let metrics = Arc::clone(&running.metrics);

    let stopping = tokio::spawn(running.stop());
    goaway(&client).await;
    assert!(!stopping.is_finished());
    script.released.send_replace(true);

    assert_eq!(receive(response).await.unwrap().code(), Code::Ok);
    within(stopping).await.unwrap();
    within(connection).await.unwrap().unwrap();
    assert_eq!(ended(&metrics), [Code::Ok]);
}

#[tokio::test]
async fn misbehaving_clients_cannot_extend_the_drain_beyond_the_grace_period() {
    // Calls are cut off 500 ms before its end; with a shorter time a busy machine could lose the reply.
    let grace = Duration::from_secs(5);
    let running = start(Options {
        shutdown_grace: grace,
        ..options()
    });
    let _silent = TcpStream::connect(running.address).await.unwrap();
    let mut half = TcpStream::connect(running.address).await.unwrap();
    half.write_all(b"PRI * HT").await.unwrap();
    let mut deaf = TcpStream::connect(running.address).await.unwrap();
    deaf.write_all(&frames::opening()).await.unwrap();
    let (client, _) = connect(running.address).await;
    let held = hanging(&running, &client).await;
    eventually(|| running.metric("grpc_server_connections ") == 4).await;
    let metrics = Arc::clone(&running.metrics);

    let took = running.stop().await;

    // Any other limit that ends these connections is 10 s or longer.
    let most = grace + Duration::from_secs(8);
    assert!(took >= grace / 2 && took < most, "{took:?}");
    assert_eq!(receive(held).await.unwrap().code(), Code::Unavailable);
    assert_eq!(ended(&metrics), [Code::Unavailable]);
}

#[tokio::test]
async fn silent_clients_and_open_health_watches_do_not_delay_the_drain() {
    let running = start(options());
    let _silent = TcpStream::connect(running.address).await.unwrap();
    let mut half = TcpStream::connect(running.address).await.unwrap();
    half.write_all(b"PRI * HT").await.unwrap();
    let (mut client, _) = connect(running.address).await;
    let (response, mut body) = client.send_request(head(WATCH), false).unwrap();
    body.send_data(framed(0, &[]), true).unwrap();
    let (_, mut watch) = within(response).await.unwrap().into_parts();
    let status = |update: Bytes| HealthCheckResponse::decode(&update[5..]).unwrap().status();
    let first = within(watch.data()).await.unwrap().unwrap();

    let stopping = tokio::spawn(running.stop());
    let second = within(watch.data()).await.unwrap().unwrap();

    assert_eq!(status(first), ServingStatus::Serving);
    assert_eq!(status(second), ServingStatus::NotServing);
    assert!(within(watch.data()).await.is_none());
    assert_eq!(
        within(watch.trailers()).await.unwrap().unwrap()["grpc-status"],
        "0"
    );
    within(stopping).await.unwrap();
}

#[tokio::test]
async fn during_the_drain_delay_calls_are_served_and_health_is_not_serving() {
    let running = start(Options {
        drain_delay: Duration::from_secs(3),
        ..options()
    });
    let address = running.address;
    let mut serving = running.serving.clone();
    within(serving.wait_for(|serving| *serving)).await.unwrap();

    let stopping = tokio::spawn(running.stop());
    within(serving.wait_for(|serving| !serving)).await.unwrap();
    let (client, connection) = connect(address).await;
    let response = call(&client, "i").await.unwrap();
    let health = send(&client, head(CHECK), &[framed(0, &[])]).await.unwrap();

    assert_eq!(response.code(), Code::Ok);
    let health = HealthCheckResponse::decode(&health.data[5..]).unwrap();
    assert_eq!(health.status(), ServingStatus::NotServing);
    assert!(!stopping.is_finished());
    let took = within(stopping).await.unwrap();
    assert!(took >= Duration::from_secs(3), "{took:?}");
    within(connection).await.unwrap().unwrap();
    assert!(
        TcpStream::connect(address).await.is_err(),
        "the port is free"
    );
}

#[tokio::test]
async fn a_connection_in_the_accept_queue_is_served_when_the_drain_begins() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let waiting = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let running = start_on(listener, options(), 1, true);
    let script = running.script.clone();

    // Stops the server before the accept loop has run.
    let stopping = tokio::spawn(running.stop());
    let (client, connection) = within(h2::client::handshake(waiting)).await.unwrap();
    let connection = tokio::spawn(connection);
    let response = call(&client, "i").await.unwrap();

    assert_eq!(response.code(), Code::Ok);
    script.left(1).await;
    within(stopping).await.unwrap();
    within(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_rolling_restart_under_load_loses_no_call() {
    let mut now = start(options());
    for _ in 0..5 {
        let next = start(options());
        let old = now.address;
        let load = tokio::spawn(async move {
            let mut replies = 0;
            let (client, _) = connect(old).await;
            // Until the GOAWAY; the client library reports which calls were never processed.
            while let Ok(response) = call(&client, "i").await {
                assert_eq!(response.code(), Code::Ok);
                replies += 1;
            }
            replies
        });
        let metrics = Arc::clone(&now.metrics);
        eventually(|| ended(&metrics).len() > 20).await;

        within(now.stop()).await;

        let replies = within(load).await.unwrap();
        assert_eq!(ended(&metrics), vec![Code::Ok; replies]);
        now = next;
    }
}
