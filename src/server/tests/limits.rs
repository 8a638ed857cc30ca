//! Clients that disconnect, stop reading or exceed limits, and health checks meanwhile.

use std::time::Instant;

use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
};

use super::*;

/// A health check request for a service name.
fn named(service: &str) -> Bytes {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    framed(0, &request.encode_to_vec())
}

async fn check(client: &Client, service: &str) -> Reply {
    send(client, head(CHECK), &[named(service)]).await.unwrap()
}

#[track_caller]
fn health_status(reply: &Reply) -> ServingStatus {
    assert_eq!(reply.code(), Code::Ok);
    HealthCheckResponse::decode(&reply.data[5..])
        .unwrap()
        .status()
}

#[tokio::test]
async fn a_cancelled_call_stops_its_handler_and_is_counted_once() {
    let running = start(Options {
        max_in_flight: 1,
        ..options()
    });
    let (client, _) = connect(running.address).await;

    let response = hanging(&running, &client).await;
    drop(response);
    running.script.left(1).await;

    assert_eq!(running.ended(1).await, [Code::Cancelled]);
    // The only permit is free again.
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_lost_connection_cancels_its_calls_and_is_no_longer_counted() {
    let running = start(options());
    let socket = TcpStream::connect(running.address).await.unwrap();
    socket2::SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    let (client, connection) = within(h2::client::handshake(socket)).await.unwrap();
    let connection = tokio::spawn(connection);

    let _first = hanging(&running, &client).await;
    let _second = hanging(&running, &client).await;
    connection.abort();
    running.script.left(2).await;

    assert_eq!(running.ended(2).await, [Code::Cancelled; 2]);
    eventually(|| running.metric("grpc_server_connections ") == 0).await;
}

#[tokio::test]
async fn a_stream_whose_reply_is_not_read_is_reset_one_second_after_the_deadline() {
    let running = start(options());
    let mut client = deaf(running.address).await;

    let started = Instant::now();
    let (response, mut body) = client
        .send_request(head_with("grpc-timeout", "50m"), false)
        .unwrap();
    body.send_data(instance("i"), true).unwrap();
    let error = receive(response).await.unwrap_err();

    assert!(error.is_reset(), "{error:?}");
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(1050)..Duration::from_secs(10)).contains(&took),
        "{took:?}"
    );
    assert_eq!(running.ended(1).await, [Code::Cancelled]);
}

/// A client that opens no window for replies.
async fn deaf(address: SocketAddr) -> Client {
    let socket = TcpStream::connect(address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    let handshake = builder.initial_window_size(0).handshake(socket);
    let (deaf, connection) = within(handshake).await.unwrap();
    tokio::spawn(connection);
    deaf
}

#[tokio::test]
async fn streams_of_health_and_non_grpc_requests_are_reset_too_if_not_read() {
    let running = start(options());
    let mut health = head(CHECK);
    health
        .headers_mut()
        .insert("grpc-timeout", "50m".parse().unwrap());
    let mut html = head_with("content-type", "text/html");
    html.headers_mut()
        .insert("grpc-timeout", "50m".parse().unwrap());

    for (name, head, message) in [("health", health, named("")), ("html", html, Bytes::new())] {
        let mut deaf = deaf(running.address).await;
        let (response, mut body) = deaf.send_request(head, false).unwrap();
        body.send_data(message, true).unwrap();
        let mut unread = within(response).await.unwrap().into_body();

        let error = within(unread.data()).await.unwrap().unwrap_err();

        assert!(error.is_reset(), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_stream_whose_reply_is_read_only_partly_is_reset() {
    let running = start(options());
    let (mut client, _) = connect(running.address).await;

    let (response, mut body) = client
        .send_request(head_with("grpc-timeout", "50m"), false)
        .unwrap();
    body.send_data(instance("big-300000"), true).unwrap();
    // The window is 64 KiB and nothing is released.
    let (_, mut unread) = within(response).await.unwrap().into_parts();
    let mut received = 0;
    let error = loop {
        match within(unread.data()).await.unwrap() {
            Ok(piece) => received += piece.len(),
            Err(error) => break error,
        }
    };

    assert!(error.is_reset(), "{error:?}");
    assert_eq!(received, 65_535);
    assert_eq!(running.ended(1).await, [Code::Cancelled]);
}

#[tokio::test]
async fn calls_beyond_the_limit_fail_promptly_and_health_checks_succeed() {
    let running = start(Options {
        max_in_flight: 1,
        ..options()
    });
    let (client, _) = connect(running.address).await;
    let held = hanging(&running, &client).await;

    let (mut fastest, mut round_trip) = (Duration::MAX, Duration::MAX);
    for _ in 0..20 {
        let started = Instant::now();
        let rejected = call(&client, "i").await.unwrap();

        fastest = fastest.min(started.elapsed());
        rejected.assert_failed(Code::ResourceExhausted, "second call");
        let started = Instant::now();
        check(&client, "").await;
        round_trip = round_trip.min(started.elapsed());
    }
    let healthy = check(&client, "").await;
    running.script.released.send_replace(true);

    let most = Duration::from_millis(10) + 4 * round_trip;
    assert!(fastest < most, "{fastest:?}, health {round_trip:?}");
    assert_eq!(health_status(&healthy), ServingStatus::Serving);
    assert_eq!(receive(held).await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_call_whose_reply_is_not_read_keeps_its_permit() {
    let running = start(Options {
        max_in_flight: 1,
        ..options()
    });
    let mut deaf = deaf(running.address).await;

    let (response, mut body) = deaf.send_request(head(GET_TASK_DETAIL), false).unwrap();
    body.send_data(instance("i"), true).unwrap();
    let unread = within(response).await.unwrap();
    let (client, _) = connect(running.address).await;
    let second = call(&client, "i").await.unwrap();
    // The client library resets the stream when both halves are dropped.
    drop((unread, body));
    running.ended(2).await;

    second.assert_failed(Code::ResourceExhausted, "while a reply is unread");
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

/// Opens a health watch: the code if it fails, and the stream, which stays open until it is dropped.
async fn watching(client: &Client) -> (Option<Code>, h2::RecvStream) {
    let mut client = within(client.clone().ready()).await.unwrap();
    let (response, mut body) = client.send_request(head(WATCH), false).unwrap();
    body.send_data(named(""), true).unwrap();
    let (head, body) = within(response).await.unwrap().into_parts();
    (
        Status::from_header_map(&head.headers).map(|status| status.code()),
        body,
    )
}

#[tokio::test]
async fn auxiliary_streams_have_a_shared_limit_and_two_reserved_per_connection() {
    let running = start(Options {
        max_connections: 3,
        ..options()
    });
    let (greedy, _) = connect(running.address).await;
    let (honest, _) = connect(running.address).await;

    let mut open = Vec::new();
    for number in 1..=5 {
        let (code, stream) = watching(&greedy).await;
        assert_eq!(code, None, "stream {number}");
        open.push(stream);
    }
    let rejected = check(&greedy, "").await;
    let first = check(&honest, "").await;
    let (second, _stream) = watching(&honest).await;
    drop(open);
    running.ended(7).await;
    let again = check(&greedy, "").await;

    rejected.assert_failed(Code::ResourceExhausted, "the sixth");
    assert_eq!(health_status(&first), ServingStatus::Serving);
    assert_eq!(second, None);
    assert_eq!(health_status(&again), ServingStatus::Serving);
}

#[tokio::test]
async fn a_long_health_request_is_rejected_before_it_is_complete() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    let mut half = framed(0, &[0; 5000]).to_vec();
    half.truncate(100);

    let mut client = within(client.clone().ready()).await.unwrap();
    let (response, mut body) = client.send_request(head(CHECK), false).unwrap();
    body.send_data(Bytes::from(half), false).unwrap();
    let response = receive(response).await.unwrap();

    response.assert_failed(Code::ResourceExhausted, "5000 bytes");
}

#[tokio::test]
async fn health_is_serving_under_both_names_once_the_first_credential_is_available() {
    let running = start_with_ready(options(), false);
    let (client, _) = connect(running.address).await;

    for name in ["", "huaweicloud.rds.task.v1.TaskService"] {
        let response = check(&client, name).await;
        assert_eq!(
            health_status(&response),
            ServingStatus::NotServing,
            "{name:?}"
        );
    }
    assert!(!*running.serving.borrow());
    running.ready.send_replace(true);
    let mut state = running.serving.clone();
    within(state.wait_for(|serving| *serving)).await.unwrap();

    for name in ["", "huaweicloud.rds.task.v1.TaskService"] {
        let response = check(&client, name).await;
        assert_eq!(health_status(&response), ServingStatus::Serving, "{name:?}");
    }
    check(&client, "unknown")
        .await
        .assert_failed(Code::NotFound, "unknown name");
}

#[tokio::test]
async fn a_health_watch_outlives_the_timeout_but_not_the_callers_deadline() {
    let running = start(Options {
        timeout: Duration::from_millis(50),
        ..options()
    });
    let (client, _) = connect(running.address).await;
    let mut bounded = head(WATCH);
    bounded
        .headers_mut()
        .insert("grpc-timeout", "300m".parse().unwrap());

    let started = Instant::now();
    let response = send(&client, bounded, &[named("")]).await.unwrap();

    assert!(started.elapsed() >= Duration::from_millis(300));
    response.assert_failed(Code::DeadlineExceeded, "watch");
    assert_eq!(response.data.len(), 7, "one update came before");
}

#[tokio::test]
async fn reflection_lists_every_service_in_both_versions_and_can_be_off() {
    use tonic_reflection::pb::{v1, v1alpha};

    let list = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let paths = [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ];
    let names = [
        "huaweicloud.rds.task.v1.TaskService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ];
    let running = start(options());
    let (client, _) = connect(running.address).await;
    for path in paths {
        let response = send(&client, head(path), &[framed(0, &list.encode_to_vec())]).await;

        // Both versions have the same fields.
        let reply =
            v1alpha::ServerReflectionResponse::decode(&response.unwrap().data[5..]).unwrap();
        let Some(v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
            reply.message_response
        else {
            panic!("no list: {path}");
        };
        let found: Vec<_> = list.service.iter().map(|service| &service.name).collect();
        assert_eq!(found, names, "{path}");
    }

    let running = start(Options {
        reflection: false,
        ..options()
    });
    let (client, _) = connect(running.address).await;
    for path in paths {
        let response = send(&client, head(path), &[framed(0, &list.encode_to_vec())]).await;

        response.unwrap().assert_failed(Code::Unimplemented, path);
    }
}
