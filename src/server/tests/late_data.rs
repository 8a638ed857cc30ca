//! Clients whose DATA arrives after the reply, because the call failed before its message was read.

use tokio::{io::AsyncWriteExt as _, net::tcp::OwnedReadHalf};

use super::{
    frames::{
        ACK, DATA, END_STREAM, Frame, GOAWAY, HEADERS, PING, RST_STREAM, block, block_with, frame,
        headers, opening, parse,
    },
    *,
};

const HONEST: u32 = 10;
const REJECTED: usize = 2000;

/// Calls that fail before their message is read.
fn rejected(number: usize) -> Vec<u8> {
    let unknown = "/no/such";
    match number % 6 {
        0 => block_with(unknown, &[]),
        1 => block_with(GET_TASK_DETAIL, &[]), // Over the limit of calls in flight.
        2 => block_with(GET_TASK_DETAIL, &[("grpc-timeout", "soon")]),
        3 => block_with(GET_TASK_DETAIL, &[("content-type", "text/html")]),
        4 => block_with(GET_TASK_DETAIL, &[("x-large", &"v".repeat(33 << 10))]),
        _ => block_with(CHECK, &[("grpc-timeout", "0m")]),
    }
}

/// The frames that the server sends on one connection.
struct Frames(OwnedReadHalf);

impl Frames {
    async fn next(&mut self) -> Frame {
        within(async {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.expect("a frame");
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.expect("its payload");
            Frame {
                kind: head[3],
                flags: head[4],
                stream: u32::from_be_bytes(head[5..].try_into().unwrap()),
                payload,
            }
        })
        .await
    }

    /// The number of the next stream that ends.
    async fn next_end(&mut self) -> u32 {
        loop {
            let frame = self.next().await;
            match frame.kind {
                GOAWAY => panic!("GOAWAY with error {}", frame.error()),
                RST_STREAM => panic!("stream {} reset, error {}", frame.stream, frame.error()),
                HEADERS | DATA if frame.flags & END_STREAM != 0 => return frame.stream,
                _ => {}
            }
        }
    }
}

/// Makes calls that the server rejects, and sends the message of each after the reply to it and to the next `lag` calls, so that `lag`
/// rejected calls are incomplete at any time. Meanwhile, other calls are in flight on the same connection.
async fn rejected_calls_with_late_data(lag: usize) {
    let running = start(Options {
        max_in_flight: HONEST as usize,
        ..options()
    });
    let socket = TcpStream::connect(running.address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let (from, mut to) = socket.into_split();
    let mut received = Frames(from);
    to.write_all(&opening()).await.unwrap();
    for stream in (1..).step_by(2).take(HONEST as usize) {
        let mut call = headers(stream, &block(GET_TASK_DETAIL));
        call.extend(frame(DATA, END_STREAM, stream, &instance("hang")));
        to.write_all(&call).await.unwrap();
    }
    running.script.entered(HONEST as usize).await;

    let first = 2 * HONEST + 1;
    let streams: Vec<u32> = (first..).step_by(2).take(REJECTED).collect();
    for (number, stream) in streams.iter().enumerate() {
        to.write_all(&headers(*stream, &rejected(number)))
            .await
            .unwrap();
        assert_eq!(received.next_end().await, *stream);
        if let Some(late) = number.checked_sub(lag) {
            let message = frame(DATA, END_STREAM, streams[late], &instance("i"));
            to.write_all(&message).await.unwrap();
        }
    }
    running.script.released.send_replace(true);
    let mut honest = Vec::new();
    while honest.len() < HONEST as usize {
        honest.push(received.next_end().await);
    }

    honest.sort_unstable();
    let expected: Vec<u32> = (1..first).step_by(2).collect();
    assert_eq!(honest, expected);
    let ended = running.ended(REJECTED + HONEST as usize).await;
    let succeeded = ended.iter().filter(|code| **code == Code::Ok).count();
    assert_eq!(succeeded, HONEST as usize);
}

#[tokio::test]
async fn late_data_of_one_rejected_call_at_a_time_does_not_end_the_connection() {
    rejected_calls_with_late_data(1).await;
}

#[tokio::test]
async fn late_data_of_many_rejected_calls_at_a_time_does_not_end_the_connection() {
    rejected_calls_with_late_data(80).await;
}

/// Makes a call that the server rejects, and returns when its reply is there. Its message is never sent.
async fn incomplete(running: &Running) -> (TcpStream, Vec<u8>) {
    let mut socket = TcpStream::connect(running.address).await.unwrap();
    let mut bytes = opening();
    bytes.extend(headers(1, &block("/no/such")));
    socket.write_all(&bytes).await.unwrap();
    let mut seen = Vec::new();
    while !parse(&seen).iter().any(|frame| frame.kind == HEADERS) {
        assert!(within(socket.read_buf(&mut seen)).await.unwrap() > 0);
    }
    (socket, seen)
}

#[tokio::test]
async fn a_drain_does_not_wait_for_late_data() {
    let running = start(with_timings(|timings| {
        timings.late_data_timeout = LONGER_THAN_PATIENCE
    }));
    let (mut socket, _) = incomplete(&running).await;

    let stopping = tokio::spawn(running.stop());
    // The drain waits for the acknowledgement of its PING.
    let mut seen = Vec::new();
    let ping = loop {
        assert!(within(socket.read_buf(&mut seen)).await.unwrap() > 0);
        if let Some(ping) = parse(&seen).into_iter().find(|frame| frame.kind == PING) {
            break ping;
        }
    };
    socket
        .write_all(&frame(PING, ACK, 0, &ping.payload))
        .await
        .unwrap();

    within(stopping).await.unwrap();
}

#[tokio::test]
async fn a_stream_whose_data_never_arrives_is_reset() {
    let running = start(with_timings(|timings| {
        timings.late_data_timeout = Duration::from_millis(50)
    }));
    let (mut socket, mut seen) = incomplete(&running).await;

    while !parse(&seen).iter().any(|frame| frame.kind == RST_STREAM) {
        assert!(within(socket.read_buf(&mut seen)).await.unwrap() > 0);
    }

    let reset = parse(&seen)
        .into_iter()
        .find(|frame| frame.kind == RST_STREAM);
    assert_eq!(reset.unwrap().error(), 0);
}

#[tokio::test]
async fn a_request_that_is_too_long_to_be_discarded_is_reset() {
    let running = start(with_timings(|timings| {
        timings.late_data_timeout = LONGER_THAN_PATIENCE
    }));
    let (client, _) = connect(running.address).await;
    let mut client = within(client.ready()).await.unwrap();
    let html = head_with("content-type", "text/html");

    let (response, mut body) = client.send_request(html, false).unwrap();
    let reply = receive(response).await.unwrap();
    // Stops at the reset.
    let piece = Bytes::from_static(&[b'a'; 16 << 10]);
    let mut sent = 0;
    let reset = loop {
        body.reserve_capacity(piece.len());
        match within(std::future::poll_fn(|context| body.poll_capacity(context))).await {
            Some(Ok(_)) if body.send_data(piece.clone(), false).is_ok() => sent += piece.len(),
            _ => break within(std::future::poll_fn(|context| body.poll_reset(context))).await,
        }
    };

    assert_eq!(reply.http, 415);
    assert_eq!(reset.unwrap(), h2::Reason::NO_ERROR);
    assert!((1 << 20..2 << 20).contains(&sent), "{sent}");
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}
