use std::{future::Future, net::SocketAddr, pin::Pin, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use prost::Message as _;
use rds_task_facade::pb::GetTaskDetailResponse;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::support::{Program, program::run};

type Stream = h2::server::SendResponse<Bytes>;
type Served = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A server that passes each connection to `serve`.
async fn server(serve: impl Fn(TcpStream) -> Served + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(serve(socket));
        }
    });
    address
}

/// A server that passes each stream to `serve`.
async fn http2(serve: impl Fn(Stream) -> Served + Copy + Send + 'static) -> SocketAddr {
    server(move |socket| {
        Box::pin(async move {
            let Ok(mut connection) = h2::server::handshake(socket).await else {
                return;
            };
            while let Some(Ok((_, stream))) = connection.accept().await {
                tokio::spawn(serve(stream));
            }
        })
    })
    .await
}

/// A server that replies with these headers, these bytes and these trailers.
async fn replies(headers: HeaderMap, body: Bytes, trailers: Option<HeaderMap>) -> SocketAddr {
    server(move |socket| {
        let (headers, body, trailers) = (headers.clone(), body.clone(), trailers.clone());
        Box::pin(async move {
            let mut connection = h2::server::handshake(socket).await.expect("HTTP/2");
            while let Some(Ok((_, mut stream))) = connection.accept().await {
                let mut response = Response::new(());
                *response.headers_mut() = headers.clone();
                let is_end = trailers.is_none();
                let Ok(mut stream) = stream.send_response(response, is_end) else {
                    return;
                };
                if let Some(trailers) = trailers.clone() {
                    let _ = stream.send_data(body.clone(), false);
                    let _ = stream.send_trailers(trailers);
                }
            }
        })
    })
    .await
}

fn header_map(pairs: &[(&'static str, &[u8])]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        let value = HeaderValue::from_bytes(value).expect("a header value");
        map.append(HeaderName::from_static(name), value);
    }
    map
}

fn framed(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0][..], &length.to_be_bytes(), message].concat().into()
}

/// Runs `call` or `health` against the server: exit code, standard output, standard error.
async fn client(
    command: &'static str,
    target: String,
    more: &[&'static str],
) -> (i32, String, String) {
    let more = more.to_vec();
    let ended = tokio::task::spawn_blocking(move || {
        run(&[&[command, "--target", &target], &more[..]].concat(), &[])
    });
    ended.await.expect("no panic")
}

/// The head of a gRPC response, and the stream for its body.
fn head(mut stream: Stream) -> Option<h2::SendStream<Bytes>> {
    let response = Response::builder().header("content-type", "application/grpc");
    let response = response.body(()).expect("a response");
    stream.send_response(response, false).ok()
}

/// Sends the bytes again and again until the peer disconnects, with pauses in between.
async fn repeat(mut socket: TcpStream, first: &'static [u8], then: &'static [u8], pause: Duration) {
    let (mut read, mut write) = socket.split();
    let writing = async {
        let mut sent = write.write_all(first).await;
        while sent.is_ok() {
            tokio::time::sleep(pause).await;
            sent = write.write_all(then).await;
        }
    };
    let reading = async { while read.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {} };
    tokio::select! {
        () = writing => {}
        () = reading => {}
    }
}

const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

#[tokio::test]
async fn the_timeout_bounds_call_and_health_with_any_server() {
    let never = Duration::from_secs(3600);
    let (moment, at_once) = (Duration::from_millis(20), Duration::ZERO);
    let silent = server(move |socket| Box::pin(repeat(socket, b"", b"", never))).await;
    let settings = server(move |socket| Box::pin(repeat(socket, SETTINGS, b"", never))).await;
    let pings = server(move |socket| Box::pin(repeat(socket, SETTINGS, PING, at_once))).await;
    let slow_pings = server(move |socket| Box::pin(repeat(socket, SETTINGS, PING, moment))).await;
    let slow_frame = server(move |socket| Box::pin(repeat(socket, b"", b"\0", moment))).await;
    let no_body = http2(|stream| {
        Box::pin(async {
            let _open = head(stream);
            std::future::pending::<()>().await;
        })
    })
    .await;
    let dribble = http2(|stream| {
        Box::pin(async {
            let Some(mut body) = head(stream) else { return };
            // The prefix of a message of 255 bytes, which never ends.
            let _ = body.send_data(Bytes::from_static(&[0, 0, 0, 0, 255]), false);
            while body.send_data(Bytes::from_static(&[0]), false).is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    })
    .await;
    let no_trailers = http2(|stream| {
        Box::pin(async {
            let Some(mut body) = head(stream) else { return };
            let _ = body.send_data(framed(b""), false);
            std::future::pending::<()>().await;
        })
    })
    .await;
    let empty_frames = http2(|stream| {
        Box::pin(async {
            let Some(mut body) = head(stream) else { return };
            while body.send_data(Bytes::new(), false).is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    })
    .await;
    let flood = http2(|stream| {
        Box::pin(async {
            let Some(mut body) = head(stream) else { return };
            let messages = Bytes::from(framed(b"").repeat(1000));
            loop {
                body.reserve_capacity(messages.len());
                let capacity = std::future::poll_fn(|context| body.poll_capacity(context)).await;
                if !matches!(capacity, Some(Ok(_)))
                    || body.send_data(messages.clone(), false).is_err()
                {
                    return;
                }
            }
        })
    })
    .await;
    let cases = [
        ("a flood of messages", flood),
        ("silence", silent),
        ("settings only", settings),
        ("a flood of pings", pings),
        ("slow pings", slow_pings),
        ("a frame byte by byte", slow_frame),
        ("no body", no_body),
        ("a body byte by byte", dribble),
        ("no trailers", no_trailers),
        ("empty frames", empty_frames),
    ];

    for (case, address) in cases {
        for command in ["call", "health"] {
            let target = format!("http://{address}");
            let (code, out, err) = client(command, target, &["--timeout", "300ms"]).await;

            assert_eq!((code, out.as_str()), (1, ""), "{case}: {command}: {err}");
            assert_eq!(err.lines().count(), 1, "{case}: {command}: {err}");
        }
    }
    let (code, _, err) = client("call", format!("https://{silent}"), &["--timeout", "300ms"]).await;
    assert_eq!(code, 1, "a silent TLS server: {err}");
    assert!(err.contains("within 300ms"), "a silent TLS server: {err}");
}

#[tokio::test]
async fn malformed_metadata_is_one_line_and_exit_code_1() {
    let long = vec![b'a'; 8000];
    let cases: [&[(&'static str, &[u8])]; 17] = [
        &[("grpc-status", b"5"), ("grpc-status-details-bin", b"!!!")],
        &[("grpc-status", b"5"), ("grpc-status-details-bin", b"AAAAA")],
        &[
            ("grpc-status", b"5"),
            ("grpc-status-details-bin", b"\xff\xfe"),
        ],
        &[
            ("grpc-status", b"5"),
            ("grpc-status-details-bin", b"AA==AA"),
        ],
        &[("grpc-status", b"5"), ("grpc-status-details-bin", b"/w")],
        &[
            ("grpc-status", b"5"),
            ("grpc-status-details-bin", b"%%"),
            ("grpc-status-details-bin", b"AA"),
        ],
        &[("grpc-status", b"0"), ("grpc-status-details-bin", b"!")],
        &[("grpc-status", b"5"), ("grpc-message", b"%")],
        &[("grpc-status", b"5"), ("grpc-message", b"%ZZ%F")],
        &[("grpc-status", b"5"), ("grpc-message", b"%FF%FE%00")],
        &[("grpc-status", b"5"), ("grpc-message", b"a\x80\xffb")],
        &[
            ("grpc-status", b"5"),
            ("grpc-message", b"%0A%1B[2J%C2%9B%E2%80%AE%E2%80%8B"),
        ],
        &[("grpc-status", b"5"), ("grpc-message", &long)],
        &[("grpc-status", b"99")],
        &[("grpc-status", b"-1")],
        &[("grpc-status", b"\xff")],
        &[("grpc-status", b"")],
    ];

    for pairs in cases {
        let head = header_map(&[("content-type", b"application/grpc")]);
        let mut only = head.clone();
        only.extend(header_map(pairs));
        let servers = [
            replies(only, Bytes::new(), None).await,
            replies(head, Bytes::new(), Some(header_map(pairs))).await,
        ];
        for address in servers {
            for command in ["call", "health"] {
                let (code, out, err) = client(command, format!("http://{address}"), &[]).await;

                assert_eq!((code, out.as_str()), (1, ""), "{pairs:?}: {err}");
                assert_eq!(err.lines().count(), 1, "{pairs:?}: {err}");
                assert!(!err.contains("panicked"), "{pairs:?}: {err}");
                let is_unsafe =
                    |c: char| c != '\n' && (c.is_control() || "\u{202e}\u{200b}".contains(c));
                assert!(!err.contains(is_unsafe), "{pairs:?}: {err:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_malformed_message_is_one_line_and_exit_code_1() {
    let head = header_map(&[("content-type", b"application/grpc")]);
    let trailers = header_map(&[("grpc-status", b"0")]);
    let bodies: [&[u8]; 6] = [
        b"",
        b"\0",
        &[0, 255, 255, 255, 255],
        &[0, 0, 0, 0, 2, 0x0a, 0xff],
        &[1, 0, 0, 0, 1, 0],
        &[9, 0, 0, 0, 0],
    ];

    for body in bodies {
        let body = Bytes::from_static(body);
        let address = replies(head.clone(), body.clone(), Some(trailers.clone())).await;
        for command in ["call", "health"] {
            let (code, out, err) = client(command, format!("http://{address}"), &[]).await;

            assert_eq!((code, out.as_str()), (1, ""), "{body:?}: {err}");
            assert_eq!(err.lines().count(), 1, "{body:?}: {err}");
            assert!(!err.contains("panicked"), "{body:?}: {err}");
        }
    }
}

#[tokio::test]
async fn metadata_over_the_limit_of_the_client_is_one_line_and_exit_code_1() {
    let huge = vec![b'a'; 200_000];
    let pairs: [(&'static str, &[u8]); 2] = [("grpc-status", b"5"), ("grpc-message", &huge)];
    let address = replies(header_map(&pairs), Bytes::new(), None).await;

    for command in ["call", "health"] {
        let (code, out, err) = client(command, format!("http://{address}"), &[]).await;

        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(err.len() < 1000, "{} bytes", err.len());
    }
}

#[tokio::test]
async fn a_good_reply_is_json_that_is_safe_on_a_terminal() {
    let text = "a\u{1b}[31m\u{9b}31m\u{7f}\n\0\u{202e}\u{2066}\u{200b}\u{feff}\u{61c}\u{e0041}\u{2028}\"\\é中😀";
    let reply = GetTaskDetailResponse {
        instance_id: text.to_owned(),
        status: Some(text.to_owned()),
        ..GetTaskDetailResponse::default()
    };
    let head = header_map(&[("content-type", b"application/grpc")]);
    let trailers = header_map(&[("grpc-status", b"0")]);
    let address = replies(head, framed(&reply.encode_to_vec()), Some(trailers)).await;

    let (code, out, err) = client("call", format!("http://{address}"), &[]).await;

    assert_eq!((code, err.as_str()), (0, ""));
    let unsafe_text = "\u{202e}\u{2066}\u{200b}\u{feff}\u{61c}\u{e0041}\u{2028}";
    let is_unsafe = |c: char| c != '\n' && (c.is_control() || unsafe_text.contains(c));
    assert!(!out.contains(is_unsafe), "{out:?}");
    assert!(out.contains("é中😀"), "{out}");
    let object: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(object["instance_id"], text);
    assert_eq!(object["status"], text);
}

#[tokio::test]
async fn a_token_over_plain_http_beyond_loopback_causes_a_warning() {
    let program = Program::sandboxed(&[]);
    let port = program.grpc.port();
    let token = [("RDS_TASK_FACADE_TOKEN", "canary-token")];
    let warned = |target: &str, env: &[(&str, &str)]| {
        let (_, _, err) = run(&["call", "--target", target, "--timeout", "1s"], env);
        assert!(!err.contains("canary"), "{err}");
        err.lines()
            .any(|line| line.starts_with("rds-task-facade: WARN: the token is sent unencrypted"))
    };

    let cases = [
        // The any-address reaches the same host, but is not loopback.
        (format!("http://0.0.0.0:{port}"), &token[..], true),
        ("http://rds-facade.invalid:50051".to_owned(), &token, true),
        ("http://192.0.2.1:50051".to_owned(), &token, true),
        ("http://[2001:db8::1]:50051".to_owned(), &token, true),
        (format!("http://127.0.0.1:{port}"), &token, false),
        (format!("http://localhost:{port}"), &token, false),
        ("http://[::1]:50051".to_owned(), &token, false),
        ("https://rds-facade.invalid".to_owned(), &token, false),
        (format!("http://0.0.0.0:{port}"), &[], false),
    ];
    for (target, env, expected) in cases {
        assert_eq!(warned(&target, env), expected, "{target}");
    }
}
