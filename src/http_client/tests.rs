use tokio::io::AsyncReadExt as _;

use super::*;
use crate::test_support::{
    upstream::{Gate, Received, Step, Upstream, reply},
    wait::{PATIENCE, within},
};

#[tokio::test]
async fn a_client_of_an_https_origin_sends_nothing_in_plain_text() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let client = Client::new(&plain_config(), &url.parse().unwrap(), 0).unwrap();
    let first_byte = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap()
    };

    let request = client.send(Request::new(Full::default()), Reuse::Forbidden);
    let first_byte = within("a byte", async {
        tokio::select! {
            byte = first_byte => byte,
            ended = request => panic!("{ended:?}"),
        }
    });

    const HANDSHAKE_RECORD: u8 = 22;
    assert_eq!(first_byte.await, HANDSHAKE_RECORD);
}

fn plain_config() -> Config {
    Config {
        tls: tls_config(SystemRoots::Ignored, None).unwrap(),
        proxy: None,
        connect_timeout: PATIENCE,
    }
}

fn client(upstream: &Upstream, max_age: Duration) -> Client {
    let url = upstream.url().parse().unwrap();
    Client::with_max_age(&plain_config(), &url, 2048, max_age).unwrap()
}

async fn send(client: &Client, path: &str) -> Response {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = path.parse().unwrap();
    let mut response = within("a response", client.send(request, Reuse::Allowed))
        .await
        .unwrap();
    within("its body", response.body()).await.unwrap();
    response
}

/// Replies with the status that is the request's path.
fn status_in_path(request: &Received) -> Vec<Step> {
    let path = request.line.split(' ').nth(1).unwrap();
    reply(path[1..].parse().unwrap(), &[], "{}")
}

fn connections(upstream: &Upstream) -> Vec<usize> {
    let requests = upstream.requests();
    requests.iter().map(|request| request.connection).collect()
}

#[tokio::test]
async fn a_connection_is_reused_until_its_maximum_age() {
    for (max_age, expected) in [(MAX_AGE, [0, 0, 0]), (Duration::ZERO, [0, 1, 2])] {
        let upstream = Upstream::start(status_in_path).await;
        let client = client(&upstream, max_age);

        for _ in 0..3 {
            send(&client, "/200").await.release();
        }

        assert_eq!(connections(&upstream), expected, "{max_age:?}");
    }
}

#[tokio::test]
async fn a_connection_is_not_reused_after_a_status_of_500_or_above() {
    for (status, reused) in [
        (200, true),
        (404, true),
        (429, true),
        (500, false),
        (502, false),
        (503, false),
        (504, false),
        (599, false),
    ] {
        let upstream = Upstream::start(status_in_path).await;
        let client = client(&upstream, MAX_AGE);

        send(&client, &format!("/{status}")).await.release();
        send(&client, "/200").await.release();

        let expected = if reused { [0, 0] } else { [0, 1] };
        assert_eq!(connections(&upstream), expected, "{status}");
    }
}

#[tokio::test]
async fn a_connection_is_reused_after_a_chunked_reply_and_not_after_one_that_was_dropped() {
    let chunked = b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    let upstream = Upstream::always(vec![Step::Send(chunked.to_vec())]).await;
    let client = client(&upstream, MAX_AGE);

    send(&client, "/").await.release();
    drop(send(&client, "/").await);
    upstream.wait_for_closed(1).await;
    send(&client, "/").await.release();

    assert_eq!(connections(&upstream), [0, 0, 1]);
}

/// A client with ten idle connections to an upstream that replies with the status in the path.
async fn ten_connections() -> (Upstream, Client) {
    let gate = Gate::default();
    let gated = gate.clone();
    let upstream = Upstream::start(move |request: &Received| {
        let wait = vec![Step::WaitFor(gated.clone())];
        [wait, status_in_path(request)].concat()
    })
    .await;
    let client = client(&upstream, MAX_AGE);
    let ten = futures_util::future::join_all((0..10).map(|_| send(&client, "/200")));
    let ((), ten) = tokio::join!(
        async {
            upstream.wait_for_requests(10).await;
            gate.open();
        },
        ten
    );
    ten.into_iter().for_each(Response::release);
    (upstream, client)
}

#[tokio::test]
async fn a_status_of_500_closes_no_other_connection_while_those_deliver_other_replies() {
    let (upstream, client) = ten_connections().await;

    for _ in 0..5 {
        send(&client, "/503").await.release();
        send(&client, "/200").await.release();
    }

    upstream.wait_for_closed(5).await;
    assert_eq!(upstream.connections().opened, 10);
    assert_eq!(upstream.connections().closed, 5);
}

#[tokio::test]
async fn idle_connections_are_closed_when_no_other_reply_has_arrived_for_a_second() {
    let (upstream, client) = ten_connections().await;

    send(&client, "/503").await.release();
    tokio::time::sleep(Duration::from_secs(1)).await;
    send(&client, "/200").await.release();

    upstream.wait_for_closed(10).await;
    assert_eq!(upstream.connections().opened, 11);
}

#[tokio::test]
async fn idle_connections_are_closed_when_a_new_one_succeeds_where_they_failed_but_not_again_soon()
{
    let (upstream, client) = ten_connections().await;
    let send_new = async |path: &str| {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().unwrap();
        let sent = client.send(request, Reuse::Forbidden);
        let mut response = within("a response", sent).await.unwrap();
        response.body().await.unwrap();
        response.release();
    };

    send(&client, "/503").await.release();
    send_new("/200").await;
    upstream.wait_for_closed(10).await;

    send_new("/200").await;
    send(&client, "/503").await.release();
    send_new("/200").await;
    upstream.wait_for_closed(11).await;
    send(&client, "/200").await.release();
    send(&client, "/200").await.release();
    assert_eq!(upstream.connections().opened, 13);
    assert_eq!(upstream.connections().closed, 11);
}

#[tokio::test]
async fn a_request_moves_to_another_connection_if_the_peer_has_closed_an_idle_one() {
    let gate = Gate::default();
    let closing = gate.clone();
    let upstream = Upstream::start(move |request: &Received| match request.connection {
        0 => {
            let end = vec![Step::WaitFor(closing.clone()), Step::Close];
            [status_in_path(request), end].concat()
        }
        _ => status_in_path(request),
    })
    .await;
    let client = client(&upstream, MAX_AGE);

    send(&client, "/200").await.release();
    gate.open();
    upstream.wait_for_closed(1).await;
    send(&client, "/200").await.release();

    assert_eq!(connections(&upstream), [0, 1]);
}

#[tokio::test]
async fn a_proxy_forwards_plain_requests_with_its_credential_and_the_full_target() {
    let proxy = Upstream::start(|_| reply(200, &[], "{}")).await;
    for (user, credential) in [
        // "user:p@ss" in base 64.
        ("user:p%40ss@", Some("Basic dXNlcjpwQHNz")),
        ("", None),
    ] {
        let config = Config {
            proxy: Some(Proxy::parse(&format!("http://{user}{}", proxy.address)).unwrap()),
            ..plain_config()
        };
        let url = "http://rds.invalid:8080".parse().unwrap();
        let client = Client::new(&config, &url, 2048).unwrap();

        send(&client, "/v3/path").await.release();

        let request = proxy.requests().pop().unwrap();
        assert_eq!(request.line, "GET http://rds.invalid:8080/v3/path HTTP/1.1");
        assert_eq!(request.header("host"), Some("rds.invalid:8080"));
        assert_eq!(request.header("proxy-authorization"), credential);
    }
}
