//! Valid and malformed requests, and the replies to them.

use std::time::Instant;

use prost::Message as _;
use tokio::io::AsyncWriteExt as _;
use tonic::codec::CompressionEncoding;

use super::{
    frames::{
        DATA, END_HEADERS, END_STREAM, Frame, HEADERS, block, frame, opening, parse,
        table_additions,
    },
    *,
};
use crate::pb::task_service_client::TaskServiceClient;

#[tokio::test]
async fn a_valid_call_gets_a_reply_and_is_counted_once() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    let response = call(&client, "i").await.unwrap();

    assert_eq!((response.http, response.code()), (200, Code::Ok));
    let reply = GetTaskDetailResponse::decode(&response.data[5..]).unwrap();
    assert_eq!(reply.job_id, "w");
    assert_eq!(running.ended(1).await, [Code::Ok]);
    assert_eq!(running.metric("grpc_server_started_total{grpc_type=\"unary\",grpc_service=\"huaweicloud.rds.task.v1.TaskService\",grpc_method=\"GetTaskDetail\"}"), 1);
}

#[tokio::test]
async fn a_request_that_is_not_grpc_gets_an_http_status_and_does_not_reach_the_service() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    let mut get = head(GET_TASK_DETAIL);
    *get.method_mut() = http::Method::GET;
    let mut untyped = head(GET_TASK_DETAIL);
    untyped.headers_mut().remove("content-type");
    let cases = [
        ("GET", get, 405),
        ("no content type", untyped, 415),
        ("json", head_with("content-type", "application/json"), 415),
        ("html", head_with("content-type", "text/html"), 415),
        (
            "grpc-web",
            head_with("content-type", "application/grpc-web+proto"),
            415,
        ),
        (
            "longer word",
            head_with("content-type", "application/grpcx"),
            415,
        ),
        (
            "other encoding",
            head_with("content-type", "application/grpc+json"),
            415,
        ),
    ];

    for (name, head, http) in cases {
        let response = send(&client, head, &[instance("i")]).await.unwrap();

        assert_eq!(response.http, http, "{name}");
        assert!(response.headers.get("grpc-status").is_none(), "{name}");
        assert_eq!(response.headers["content-type"], "text/plain", "{name}");
        let allow = response.headers.get("allow").map(|value| value.as_bytes());
        assert_eq!(allow, (http == 405).then_some(&b"POST"[..]), "{name}");
    }
    assert_eq!(running.ended(7).await, [Code::Unknown; 7]);
    assert_eq!(*running.script.entered.borrow(), 0);
    // The caller's fault, and no call of the task service.
    let faults = "rds_caller_faults_total{cause=\"http\"}";
    let other = "grpc_server_handled_total{grpc_type=\"other\",grpc_service=\"other\",grpc_method=\"other\",grpc_code=\"Unknown\"}";
    assert_eq!((running.metric(faults), running.metric(other)), (7, 7));
}

#[tokio::test]
async fn all_spellings_of_the_grpc_content_type_are_accepted() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    for kind in [
        "application/grpc+proto",
        "application/grpc;charset=utf-8",
        "Application/GRPC",
    ] {
        let response = send(&client, head_with("content-type", kind), &[instance("i")]).await;

        assert_eq!(response.unwrap().code(), Code::Ok, "{kind}");
    }
}

#[tokio::test]
async fn a_malformed_call_gets_a_status_with_details_and_does_not_reach_the_service() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    let good = instance("i");
    let long = framed(0, &vec![0; 64 * 1024 + 1]);
    let huge = Bytes::from_static(&[0, 0, 80, 0, 0, 1]);
    let mut twice = head(GET_TASK_DETAIL);
    twice
        .headers_mut()
        .append("grpc-timeout", "1S".parse().unwrap());
    twice
        .headers_mut()
        .append("grpc-timeout", "2S".parse().unwrap());
    let plain = || head(GET_TASK_DETAIL);
    let timeout = |value: &[u8]| head_with("grpc-timeout", value);
    let cases = [
        (
            "timeout unit",
            timeout(b"200x"),
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "timeout sign",
            timeout(b"+5m"),
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "timeout digits",
            timeout(b"123456789m"),
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "timeout empty",
            timeout(b""),
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "timeout non-ASCII",
            timeout(b"\xff5m"),
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "timeout twice",
            twice,
            vec![good.clone()],
            Code::InvalidArgument,
        ),
        (
            "unknown method",
            head("/huaweicloud.rds.task.v1.TaskService/Nope"),
            vec![good.clone()],
            Code::Unimplemented,
        ),
        (
            "unknown service",
            head("/nope"),
            vec![good.clone()],
            Code::Unimplemented,
        ),
        (
            "message too long",
            plain(),
            vec![long],
            Code::ResourceExhausted,
        ),
        (
            "long message announced",
            plain(),
            vec![huge],
            Code::ResourceExhausted,
        ),
        (
            "compressed without encoding",
            plain(),
            vec![framed(1, b"x")],
            Code::Internal,
        ),
        (
            "unknown flag",
            plain(),
            vec![framed(7, b"")],
            Code::Internal,
        ),
        (
            "unknown encoding",
            head_with("grpc-encoding", "snappy"),
            vec![framed(1, b"x")],
            Code::Unimplemented,
        ),
        ("no body", plain(), vec![], Code::Internal),
        ("empty body", plain(), vec![Bytes::new()], Code::Internal),
        (
            "two messages",
            plain(),
            vec![good.clone(), good.clone()],
            Code::Internal,
        ),
        (
            "two messages in one piece",
            plain(),
            vec![[good.clone(), good].concat().into()],
            Code::Internal,
        ),
        (
            "half a prefix",
            plain(),
            vec![Bytes::from_static(&[0, 0])],
            Code::Internal,
        ),
        (
            "half a message",
            plain(),
            vec![Bytes::from_static(&[0, 0, 0, 0, 9, 1])],
            Code::Internal,
        ),
        (
            "not protobuf",
            plain(),
            vec![framed(0, &[0xff; 4])],
            Code::Internal,
        ),
        (
            "not UTF-8",
            plain(),
            vec![framed(0, &[0x0a, 1, 0xff])],
            Code::Internal,
        ),
    ];
    let count = cases.len();

    for (name, head, pieces, code) in cases {
        let response = send(&client, head, &pieces).await.unwrap();

        response.assert_failed(code, name);
    }
    assert_eq!(running.ended(count).await.len(), count);
    assert_eq!(*running.script.entered.borrow(), 0);
    assert_eq!(running.metric("grpc_server_handled_total{grpc_type=\"other\",grpc_service=\"other\",grpc_method=\"other\",grpc_code=\"Unimplemented\"}"), 2);
}

#[tokio::test]
async fn a_message_of_the_maximum_size_in_many_pieces_is_accepted() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    // An unknown field of bytes fills the message up to the limit: tag and length take 5 bytes.
    let mut message = vec![0xfa, 0x01, 0xfb, 0xff, 0x03];
    message.resize(64 * 1024, 0);
    let whole = framed(0, &message);

    let pieces: Vec<_> = whole.chunks(1000).map(Bytes::copy_from_slice).collect();
    let response = send(&client, head(GET_TASK_DETAIL), &pieces).await.unwrap();

    assert_eq!(response.code(), Code::Ok, "{:?}", response.status());
}

#[tokio::test]
async fn a_valid_request_id_of_the_caller_is_echoed_and_any_other_is_replaced() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    let long = "x".repeat(129);
    let cases = [
        ("aZ0._-", true),
        (&long[..128], true),
        (&long, false),
        ("", false),
        ("a b", false),
        ("a\"b", false),
        ("a\tb", false),
    ];

    for (id, is_echoed) in cases {
        let response = send(&client, head_with("x-request-id", id), &[instance("i")])
            .await
            .unwrap();

        let echoed = response.headers["x-request-id"].to_str().unwrap();
        assert_eq!(echoed == id, is_echoed, "{id:?}");
        assert!(is_echoed || echoed.len() == 32, "{id:?}");
    }
}

#[tokio::test]
async fn the_request_id_is_not_added_to_the_hpack_table() {
    let running = start(options());
    let mut socket = TcpStream::connect(running.address).await.unwrap();
    let mut bytes = opening();
    for stream in [1, 3, 5] {
        bytes.extend(frame(HEADERS, END_HEADERS, stream, &block(GET_TASK_DETAIL)));
        bytes.extend(frame(DATA, END_STREAM, stream, &instance("i")));
    }
    socket.write_all(&bytes).await.unwrap();

    let mut seen = Vec::new();
    let mut headers = Vec::new();
    let ends = |frame: &Frame| frame.flags & END_STREAM != 0;
    while headers.iter().filter(|frame| ends(frame)).count() < 3 {
        let read = within(socket.read_buf(&mut seen)).await.unwrap();
        assert!(read > 0, "closed");
        headers = parse(&seen);
        headers.retain(|frame| frame.kind == HEADERS);
    }

    let additions = headers.iter().map(|frame| table_additions(&frame.payload));
    let type_and_status = 2;
    assert_eq!(additions.sum::<usize>(), type_and_status, "{headers:x?}");
}

#[tokio::test]
async fn compressed_requests_are_accepted_and_a_gzip_bomb_is_rejected() {
    let running = start(options());
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{}", running.address)).unwrap();
    let mut client =
        TaskServiceClient::new(channel.connect_lazy()).send_compressed(CompressionEncoding::Gzip);
    let request = |size: usize| GetTaskDetailRequest {
        workflow_name: Some("a".repeat(size)),
        ..GetTaskDetailRequest::default()
    };

    let fits = within(client.get_task_detail(request(60_000))).await;
    assert!(fits.is_ok());
    let bomb = within(client.get_task_detail(request(16 << 20))).await;
    let bomb = bomb.unwrap_err();

    assert_eq!(bomb.code(), Code::ResourceExhausted, "{bomb:?}");
    assert!(bomb.get_details_error_info().is_some());
}

#[tokio::test]
async fn metadata_over_32_kib_is_rejected_and_the_connection_survives() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    // content-type and te, as HTTP/2 counts them.
    let others = (12 + 16 + 32) + (2 + 8 + 32);
    let longest = (32 << 10) - others - (1 + 32);
    let one = |bytes| head_with("k", "v".repeat(bytes));
    let many = |fields: usize, bytes: usize| {
        let mut head = head(GET_TASK_DETAIL);
        for index in 0..fields {
            let name = http::HeaderName::try_from(format!("k{index:03}")).unwrap();
            head.headers_mut()
                .append(name, "v".repeat(bytes).parse().unwrap());
        }
        head
    };

    for (name, head) in [("longest", one(longest)), ("many", many(400, 40))] {
        let reply = send(&client, head, &[instance("i")]).await.unwrap();

        assert_eq!(reply.code(), Code::Ok, "{name}");
    }
    let too_long = [
        ("one byte", one(longest + 1)),
        ("a field that mostly counts as overhead", many(900, 1)),
        ("close to the limit of the HTTP library", one(63 << 10)),
    ];
    for (name, head) in too_long {
        let reply = send(&client, head, &[instance("i")]).await.unwrap();

        assert_eq!(reply.http, 200, "{name}");
        reply.assert_failed(Code::ResourceExhausted, name);
        let status = reply.status();
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "INVALID_REQUEST", "{name}");
        assert!(status.message().contains("32 KiB"), "{status:?}");
    }
    for (kib, code) in [(31, Code::Ok), (33, Code::ResourceExhausted)] {
        let mut health = head(CHECK);
        let value = "v".repeat(kib << 10).parse().unwrap();
        health.headers_mut().insert("k", value);
        let reply = send(&client, health, &[framed(0, &[])]).await.unwrap();
        assert_eq!(reply.code(), code, "health with {kib} KiB");
    }
    let reply = send(&client, one(70 << 10), &[instance("i")])
        .await
        .unwrap();
    assert_eq!(reply.http, 431);
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
    let ended = running.ended(8).await;
    let rejected = ended
        .iter()
        .filter(|code| **code == Code::ResourceExhausted);
    assert_eq!((rejected.count(), ended.len()), (4, 8));
}

#[tokio::test]
async fn malformed_binary_metadata_is_ignored() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    let response = send(&client, head_with("k-bin", "%%%"), &[instance("i")])
        .await
        .unwrap();

    assert_eq!(response.code(), Code::Ok);
}

#[tokio::test]
async fn a_panic_fails_one_call_with_internal() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    let response = call(&client, "panic").await.unwrap();

    response.assert_failed(Code::Internal, "panic");
    assert!(!response.status().message().contains("on purpose"));
    assert_eq!(running.metric("panics_total"), 1);
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_reply_over_4_mib_is_resource_exhausted() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    let fits = call(&client, "big-4000000").await.unwrap();
    let too_big = call(&client, "big-5000000").await.unwrap();

    assert_eq!((fits.code(), fits.data.len() > 4_000_000), (Code::Ok, true));
    too_big.assert_failed(Code::ResourceExhausted, "5 MB");
    assert_eq!(running.ended(2).await, [Code::Ok, Code::ResourceExhausted]);
}

#[tokio::test]
async fn an_expired_deadline_gets_a_prompt_reply() {
    let running = start(options());
    let (client, _) = connect(running.address).await;
    let (mut late, mut round_trip) = (Vec::new(), Duration::MAX);

    for _ in 0..5 {
        let started = Instant::now();
        let response = send(
            &client,
            head_with("grpc-timeout", "100m"),
            &[instance("hang")],
        )
        .await
        .unwrap();

        response.assert_failed(Code::DeadlineExceeded, "100 ms");
        late.push(
            started
                .elapsed()
                .checked_sub(Duration::from_millis(100))
                .expect("not early"),
        );
        let started = Instant::now();
        call(&client, "i").await.unwrap();
        round_trip = round_trip.min(started.elapsed());
    }
    running.script.left(5).await;
    // The fastest of five, because a busy machine may delay the test itself.
    let most = Duration::from_millis(20) + 4 * round_trip;
    assert!(
        *late.iter().min().unwrap() <= most,
        "{late:?}, round trip {round_trip:?}"
    );
    let ended = running.ended(10).await;
    let deadlines = ended.iter().filter(|code| **code == Code::DeadlineExceeded);
    assert_eq!(deadlines.count(), 5);
}

#[tokio::test]
async fn the_timeout_bounds_calls_without_a_deadline_or_with_a_longer_one() {
    let running = start(Options {
        timeout: Duration::from_millis(50),
        ..options()
    });
    let (client, _) = connect(running.address).await;

    for head in [
        head(GET_TASK_DETAIL),
        head_with("grpc-timeout", "99999999H"),
    ] {
        let response = send(&client, head, &[instance("hang")]).await.unwrap();

        response.assert_failed(Code::DeadlineExceeded, "timeout");
    }
}

#[tokio::test]
async fn a_call_whose_deadline_has_passed_on_arrival_does_not_reach_the_service() {
    let running = start(options());
    let (client, _) = connect(running.address).await;

    for timeout in ["0m", "1n", "0H"] {
        let response = send(
            &client,
            head_with("grpc-timeout", timeout),
            &[instance("i")],
        )
        .await
        .unwrap();

        response.assert_failed(Code::DeadlineExceeded, timeout);
    }
    assert_eq!(*running.script.entered.borrow(), 0);
}

#[tokio::test]
async fn a_body_that_never_ends_is_bounded_by_the_deadline() {
    let running = start(options());
    let (mut client, _) = connect(running.address).await;

    let (response, mut body) = client
        .send_request(head_with("grpc-timeout", "50m"), false)
        .unwrap();
    body.send_data(Bytes::from_static(&[0, 0]), false).unwrap();

    receive(response)
        .await
        .unwrap()
        .assert_failed(Code::DeadlineExceeded, "half a body");
}

#[tokio::test]
async fn a_second_message_is_rejected_before_the_body_ends() {
    let running = start(options());
    let (mut client, _) = connect(running.address).await;

    let (response, mut body) = client.send_request(head(GET_TASK_DETAIL), false).unwrap();
    body.send_data([instance("i"), instance("i")].concat().into(), false)
        .unwrap();
    let response = receive(response).await.unwrap();

    response.assert_failed(Code::Internal, "two messages");
    assert!(response.status().message().ends_with("found more"));
}
