//! Callers that vanish, stop reading or ask for too much; health beside all that.

use std::time::Instant;

use futures_util::poll;
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
};

use super::*;

/// The request message of health for a service's name.
fn named(service: &str) -> Bytes {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    framed(0, &request.encode_to_vec())
}

async fn check(client: &Client, service: &str) -> Answer {
    send(client, head(CHECK), &[named(service)]).await.unwrap()
}

#[track_caller]
fn serving(answer: &Answer) -> ServingStatus {
    assert_eq!(answer.code(), Code::Ok);
    HealthCheckResponse::decode(&answer.data[5..])
        .unwrap()
        .status()
}

#[tokio::test]
async fn a_cancelled_call_ends_its_work_and_is_counted_once() {
    let running = start(Options {
        max_in_flight: 1,
        ..config()
    });
    let (client, _) = connect(running.address).await;

    let answer = hanging(&running, &client).await;
    drop(answer);
    running.script.left(1).await;

    assert_eq!(running.ended(1).await, [Code::Cancelled]);
    // The only permit is free again.
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_lost_connection_ends_its_calls_and_is_forgotten() {
    let running = start(config());
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
async fn a_caller_that_does_not_read_loses_its_stream_a_second_or_more_after_the_deadline() {
    let running = start(config());
    let mut client = deaf(running.address).await;

    let started = Instant::now();
    let (answer, mut body) = client
        .send_request(head_with("grpc-timeout", "50m"), false)
        .unwrap();
    body.send_data(instance("i"), true).unwrap();
    let error = receive(answer).await.unwrap_err();

    assert!(error.is_reset(), "{error:?}");
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(1050)..Duration::from_secs(10)).contains(&took),
        "{took:?}"
    );
    assert_eq!(running.ended(1).await, [Code::Cancelled]);
}

/// A client that opens no window for answers.
async fn deaf(address: SocketAddr) -> Client {
    let socket = TcpStream::connect(address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    let handshake = builder.initial_window_size(0).handshake(socket);
    let (deaf, connection) = within(handshake).await.unwrap();
    tokio::spawn(connection);
    deaf
}

#[tokio::test]
async fn answers_of_health_and_to_what_is_no_grpc_must_be_read_in_time_too() {
    let running = start(config());
    let mut health = head(CHECK);
    health
        .headers_mut()
        .insert("grpc-timeout", "50m".parse().unwrap());
    let mut html = head_with("content-type", "text/html");
    html.headers_mut()
        .insert("grpc-timeout", "50m".parse().unwrap());

    for (name, head, message) in [("health", health, named("")), ("html", html, Bytes::new())] {
        let mut deaf = deaf(running.address).await;
        let (answer, mut body) = deaf.send_request(head, false).unwrap();
        body.send_data(message, true).unwrap();
        let mut unread = within(answer).await.unwrap().into_body();

        let error = within(unread.data()).await.unwrap().unwrap_err();

        assert!(error.is_reset(), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_caller_that_stops_reading_half_way_loses_its_stream_too() {
    let running = start(config());
    let (mut client, _) = connect(running.address).await;

    let (answer, mut body) = client
        .send_request(head_with("grpc-timeout", "50m"), false)
        .unwrap();
    body.send_data(instance("big-300000"), true).unwrap();
    // The window is 64 KiB and nothing is released.
    let (_, mut unread) = within(answer).await.unwrap().into_parts();
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
async fn calls_beyond_the_limit_are_refused_promptly_and_health_is_not() {
    let running = start(Options {
        max_in_flight: 1,
        ..config()
    });
    let (client, _) = connect(running.address).await;
    let held = hanging(&running, &client).await;

    let (mut fastest, mut round_trip) = (Duration::MAX, Duration::MAX);
    for _ in 0..20 {
        let started = Instant::now();
        let refused = call(&client, "i").await.unwrap();

        fastest = fastest.min(started.elapsed());
        refused.assert_failed(Code::ResourceExhausted, "second call");
        let started = Instant::now();
        check(&client, "").await;
        round_trip = round_trip.min(started.elapsed());
    }
    let healthy = check(&client, "").await;
    running.script.released.send_replace(true);

    let most = Duration::from_millis(10) + 4 * round_trip;
    assert!(fastest < most, "{fastest:?}, health {round_trip:?}");
    assert_eq!(serving(&healthy), ServingStatus::Serving);
    assert_eq!(receive(held).await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_call_whose_answer_is_not_read_keeps_its_permit() {
    let running = start(Options {
        max_in_flight: 1,
        ..config()
    });
    let mut deaf = deaf(running.address).await;

    let (answer, mut body) = deaf.send_request(head(GET_TASK_DETAIL), false).unwrap();
    body.send_data(instance("i"), true).unwrap();
    let unread = within(answer).await.unwrap();
    let (client, _) = connect(running.address).await;
    let beside = call(&client, "i").await.unwrap();
    // The client library resets the stream when both halves are gone.
    drop((unread, body));
    running.ended(2).await;

    beside.assert_failed(Code::ResourceExhausted, "beside an unread answer");
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

/// A stream of health that stays open until it is dropped.
async fn watching(client: &Client) -> (Option<Code>, h2::RecvStream) {
    let mut client = within(client.clone().ready()).await.unwrap();
    let (answer, mut body) = client.send_request(head(WATCH), false).unwrap();
    body.send_data(named(""), true).unwrap();
    let (head, body) = within(answer).await.unwrap().into_parts();
    (
        Status::from_header_map(&head.headers).map(|status| status.code()),
        body,
    )
}

#[tokio::test]
async fn streams_of_health_have_a_limit_and_each_connection_two_beyond_it() {
    let running = start(Options {
        max_connections: 3,
        ..config()
    });
    let (greedy, _) = connect(running.address).await;
    let (honest, _) = connect(running.address).await;

    let mut open = Vec::new();
    for number in 1..=5 {
        let (code, stream) = watching(&greedy).await;
        assert_eq!(code, None, "stream {number}");
        open.push(stream);
    }
    let refused = check(&greedy, "").await;
    let first = check(&honest, "").await;
    let (second, _stream) = watching(&honest).await;
    drop(open);
    running.ended(7).await;
    let again = check(&greedy, "").await;

    refused.assert_failed(Code::ResourceExhausted, "the sixth");
    assert_eq!(serving(&first), ServingStatus::Serving);
    assert_eq!(second, None);
    assert_eq!(serving(&again), ServingStatus::Serving);
}

#[tokio::test]
async fn what_is_no_grpc_waits_for_its_end_only_within_that_limit() {
    let running = start(Options {
        max_connections: 1,
        timeout: Duration::from_secs(5),
        ..config()
    });
    let (client, _) = connect(running.address).await;
    let endless = async || {
        let mut client = within(client.clone().ready()).await.unwrap();
        let head = Request::post("http://facade/").body(()).unwrap();
        let (answer, mut body) = client.send_request(head, false).unwrap();
        body.send_data(Bytes::from_static(b"a"), false).unwrap();
        (answer, body)
    };

    let started = Instant::now();
    let mut waiting = [endless().await, endless().await, endless().await];
    let (answer, _body) = endless().await;
    let answered = within(answer).await.unwrap();
    for (answer, _body) in &mut waiting {
        assert!(poll!(answer).is_pending(), "answered before its end");
    }
    for (answer, _body) in waiting {
        assert_eq!(within(answer).await.unwrap().status(), 415);
    }

    assert_eq!(answered.status(), 415);
    assert!(started.elapsed() >= Duration::from_secs(5));
}

#[tokio::test]
async fn a_long_message_to_health_is_refused_before_it_is_there() {
    let running = start(config());
    let (client, _) = connect(running.address).await;
    let mut half = framed(0, &[0; 5000]).to_vec();
    half.truncate(100);

    let mut client = within(client.clone().ready()).await.unwrap();
    let (answer, mut body) = client.send_request(head(CHECK), false).unwrap();
    body.send_data(Bytes::from(half), false).unwrap();
    let answer = receive(answer).await.unwrap();

    answer.assert_failed(Code::ResourceExhausted, "5000 bytes");
}

#[tokio::test]
async fn health_follows_the_first_credential_under_both_names() {
    let running = start_with_ready(config(), false);
    let (client, _) = connect(running.address).await;

    for name in ["", "huaweicloud.rds.task.v1.TaskService"] {
        let answer = check(&client, name).await;
        assert_eq!(serving(&answer), ServingStatus::NotServing, "{name:?}");
    }
    assert!(!*running.serving.borrow());
    running.ready.send_replace(true);
    let mut state = running.serving.clone();
    within(state.wait_for(|serving| *serving)).await.unwrap();

    for name in ["", "huaweicloud.rds.task.v1.TaskService"] {
        let answer = check(&client, name).await;
        assert_eq!(serving(&answer), ServingStatus::Serving, "{name:?}");
    }
    check(&client, "nobody")
        .await
        .assert_failed(Code::NotFound, "unknown name");
}

#[tokio::test]
async fn a_watch_outlives_the_servers_maximum_but_not_the_callers_deadline() {
    let running = start(Options {
        timeout: Duration::from_millis(50),
        ..config()
    });
    let (client, _) = connect(running.address).await;
    let mut bounded = head(WATCH);
    bounded
        .headers_mut()
        .insert("grpc-timeout", "300m".parse().unwrap());

    let started = Instant::now();
    let answer = send(&client, bounded, &[named("")]).await.unwrap();

    assert!(started.elapsed() >= Duration::from_millis(300));
    answer.assert_failed(Code::DeadlineExceeded, "watch");
    assert_eq!(answer.data.len(), 7, "one update came before");
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
    let running = start(config());
    let (client, _) = connect(running.address).await;
    for path in paths {
        let answer = send(&client, head(path), &[framed(0, &list.encode_to_vec())]).await;

        // Both versions have the same fields.
        let reply = v1alpha::ServerReflectionResponse::decode(&answer.unwrap().data[5..]).unwrap();
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
        ..config()
    });
    let (client, _) = connect(running.address).await;
    for path in paths {
        let answer = send(&client, head(path), &[framed(0, &list.encode_to_vec())]).await;

        answer.unwrap().assert_failed(Code::Unimplemented, path);
    }
}
