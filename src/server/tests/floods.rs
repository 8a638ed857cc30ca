//! Clients that flood the server with HTTP/2 frames.

use tokio::io::AsyncWriteExt as _;

use super::{
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS,
        block, frame, opening, parse,
    },
    *,
};

const CANCEL: [u8; 4] = 8u32.to_be_bytes();
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;
const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];

/// Sends as many of the bytes as the server reads, and returns the frames received until it closes the connection.
async fn flood(running: &Running, bytes: Vec<u8>) -> Vec<frames::Frame> {
    let socket = TcpStream::connect(running.address).await.unwrap();
    let (mut from, mut to) = socket.into_split();
    let sending = tokio::spawn(async move {
        let _ = to.write_all(&bytes).await;
        to
    });
    let mut seen = Vec::new();
    let _ = within(from.read_to_end(&mut seen)).await;
    sending.abort();
    parse(&seen)
}

#[track_caller]
fn assert_calmed(seen: &[frames::Frame]) {
    let goaway = seen.iter().find(|frame| frame.kind == GOAWAY);
    let goaway = goaway.expect("a GOAWAY before the close");
    assert_eq!(goaway.error(), ENHANCE_YOUR_CALM);
}

#[tokio::test]
async fn many_immediately_reset_streams_end_the_connection() {
    let running = start(options());
    let mut bytes = opening();
    for index in 0..2000 {
        let stream = 2 * index + 1;
        bytes.extend(frame(HEADERS, END_HEADERS, stream, &block(GET_TASK_DETAIL)));
        bytes.extend(frame(RST_STREAM, 0, stream, &CANCEL));
    }

    assert_calmed(&flood(&running, bytes).await);
    assert!(*running.script.entered.borrow() == 0);
    let (client, _) = connect(running.address).await;
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn endless_continuation_frames_end_the_connection() {
    let running = start(options());
    let mut bytes = opening();
    bytes.extend(frame(HEADERS, 0, 1, &block(GET_TASK_DETAIL)));
    let field = [0, 1, b'a', 1, b'b'];
    for _ in 0..2000 {
        bytes.extend(frame(CONTINUATION, 0, 1, &field));
    }

    assert_calmed(&flood(&running, bytes).await);
}

#[tokio::test]
async fn endless_empty_data_frames_end_the_connection() {
    let running = start(options());
    let mut bytes = opening();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &block(GET_TASK_DETAIL)));
    for _ in 0..200_000 {
        bytes.extend(frame(DATA, 0, 1, &[]));
    }

    assert_calmed(&flood(&running, bytes).await);
}

#[tokio::test]
async fn streams_beyond_the_advertised_limit_get_refused_stream() {
    // The client does not acknowledge the drain's PING, so its connection ends with the grace period.
    let running = start(Options {
        shutdown_grace: Duration::from_secs(1),
        ..options()
    });
    let mut bytes = opening();
    for index in 0..1044 {
        let stream = 2 * index + 1;
        bytes.extend(frame(HEADERS, END_HEADERS, stream, &block(GET_TASK_DETAIL)));
        bytes.extend(frame(DATA, END_STREAM, stream, &instance("hang")));
    }
    let mut socket = TcpStream::connect(running.address).await.unwrap();
    socket.write_all(&bytes).await.unwrap();

    running.script.entered(1024).await;
    running.script.released.send_replace(true);
    eventually(|| ended(&running.metrics).len() == 1024).await;
    // The drain closes the connection, which ends the read.
    let reading = tokio::spawn(async move { until_closed(&mut socket).await });
    running.stop().await;
    let seen = parse(&reading.await.unwrap());

    let settings = seen.iter().find(|frame| frame.kind == SETTINGS).unwrap();
    let advertised = settings
        .payload
        .chunks(6)
        .find(|setting| setting.starts_with(&MAX_CONCURRENT_STREAMS));
    assert_eq!(advertised.unwrap()[2..], 1024u32.to_be_bytes());
    let refused =
        |frame: &&frames::Frame| frame.kind == RST_STREAM && frame.error() == REFUSED_STREAM;
    assert_eq!(seen.iter().filter(refused).count(), 20);
}

#[tokio::test]
async fn a_flood_of_pings_does_not_fail_other_calls() {
    let running = start(options());
    let mut bytes = opening();
    for _ in 0..100_000 {
        bytes.extend(frame(PING, 0, 0, &[0; 8]));
    }
    let socket = TcpStream::connect(running.address).await.unwrap();
    let (mut from, mut to) = socket.into_split();
    // The replies are not read, so the sender stalls once the sockets are full.
    let sending = tokio::spawn(async move { to.write_all(&bytes).await });

    let (client, _) = connect(running.address).await;
    assert_eq!(call(&client, "i").await.unwrap().code(), Code::Ok);
    sending.abort();
    let mut some = [0; 1024];
    assert!(within(from.read(&mut some)).await.unwrap() > 0);
}
