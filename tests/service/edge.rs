use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::support::{
    Connection, Failure, Program, Step, Upstream, eventually, example, example_request, numbered,
    program::run,
    raw::{framed, headers},
    reply,
};

const SAMPLES: usize = 60;

/// Asserts that the first quartile of the samples is within `limit` plus four round trips of the same run. The other samples do not
/// count, because a busy machine can pause this process or the program for longer than any limit.
#[track_caller]
fn assert_prompt(what: &str, samples: Vec<Duration>, limit: Duration, round_trips: Vec<Duration>) {
    let round_trip = quarter("round trip", round_trips);
    let took = quarter(what, samples);
    assert!(
        took <= limit + 4 * round_trip,
        "{what}: {took:?}, round trip {round_trip:?}"
    );
}

/// The duration of a call without upstream work: its deadline has passed on arrival.
async fn round_trip(connection: &Connection) -> Duration {
    let started = Instant::now();
    let ended = connection.call_within("0m", &example_request()).await;
    let took = started.elapsed();
    let status = ended.expect("a reply").status().expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    took
}

/// The first quartile of the samples; also prints median, 90 % and maximum.
fn quarter(what: &str, mut samples: Vec<Duration>) -> Duration {
    samples.sort();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100];
    eprintln!(
        "{what}: 25 % {:?}, median {:?}, 90 % {:?}, longest of {} {:?}",
        at(25),
        at(50),
        at(90),
        samples.len(),
        at(100)
    );
    at(25)
}

#[tokio::test]
async fn an_expired_deadline_gets_a_prompt_reply() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::over(&upstream.url(), &[]);
    let connection = Connection::open(program.grpc).await;
    let deadline = Duration::from_millis(100);
    let (mut late, mut round_trips) = (Vec::new(), Vec::new());

    for number in 0..SAMPLES {
        let started = Instant::now();
        let ended = connection.call_within("100m", &numbered(number)).await;
        let took = started.elapsed();

        let status = ended.expect("a reply").status().expect("a status");
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(took >= deadline, "{took:?}");
        late.push(took - deadline);
        round_trips.push(round_trip(&connection).await);
    }

    assert_prompt("deadline", late, Duration::from_millis(20), round_trips);
    // On a busy machine a deadline may pass before the request reaches upstream.
    let requests = upstream.requests().len();
    assert!(requests >= SAMPLES / 4, "{requests}");
    upstream.wait_for_closed(requests).await;
}

#[tokio::test]
async fn a_cancelled_call_ends_its_upstream_request_promptly() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &[]);
    let client = program.client().await;
    let connection = Connection::open(program.grpc).await;
    let (mut waited, mut round_trips) = (Vec::new(), Vec::new());

    for number in 0..SAMPLES {
        let mut client = client.clone();
        let call = tokio::spawn(async move { client.get_task_detail(numbered(number)).await });
        upstream.wait_for_requests(number + 1).await;
        let cancelled = Instant::now();
        call.abort();
        upstream.wait_for_closed(number + 1).await;
        waited.push(cancelled.elapsed());
        round_trips.push(round_trip(&connection).await);
    }

    let limit = Duration::from_millis(100);
    assert_prompt("cancellation", waited, limit, round_trips);
    eventually("each is counted", async || {
        program.handled("Canceled").await >= SAMPLES as f64
    })
    .await;
    assert_eq!(program.handled("Canceled").await, SAMPLES as f64);
}

#[tokio::test]
async fn beyond_the_limit_calls_fail_promptly_and_health_checks_succeed() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::patient(&upstream.url(), &["--max-in-flight", "10"]);
    let client = program.client().await;
    let mut calls = JoinSet::new();
    for number in 0..10 {
        let mut client = client.clone();
        calls.spawn(async move { client.get_task_detail(numbered(number)).await });
    }
    upstream.wait_for_requests(10).await;
    let connection = Connection::open(program.grpc).await;
    let mut health = program.health().await;
    let (mut rejected, mut checked) = (Vec::new(), Vec::new());

    for number in 0..SAMPLES {
        let started = Instant::now();
        let ended = connection.call_within("60S", &numbered(number)).await;
        rejected.push(started.elapsed());
        let failure = Failure::from_status(&ended.expect("a reply").status().expect("a status"));
        assert_eq!(
            failure.code_and_reason(),
            (Code::ResourceExhausted, "OVERLOADED")
        );
        let started = Instant::now();
        let response = health.check(HealthCheckRequest::default()).await;
        checked.push(started.elapsed());
        let status = response.expect("a health reply").into_inner().status();
        assert_eq!(status, ServingStatus::Serving);
    }

    let most = quarter("health during overload", checked.clone());
    assert!(most <= Duration::from_millis(100), "{most:?}");
    assert_prompt("rejection", rejected, Duration::from_millis(10), checked);
    assert_eq!(upstream.requests().len(), 10, "no call was queued");
    calls.abort_all();
}

#[tokio::test]
async fn overload_keeps_at_least_80_percent_of_the_goodput() {
    // A reply takes 200 ms, so 5 permits allow 25 calls per second; 20 callers make about 100. Both loads alternate, so that
    // disturbances of the machine affect them equally.
    let slow = [vec![Step::Wait(Duration::from_millis(200))], example()].concat();
    let upstream = Upstream::always(slow).await;
    let program = Program::over(&upstream.url(), &["--max-in-flight", "5"]);
    let (at_the_limit, beyond) = (5, 20);
    let mut goodput = std::collections::BTreeMap::new();

    for (turn, callers) in [at_the_limit, beyond].repeat(4).into_iter().enumerate() {
        let until = Instant::now() + Duration::from_secs(1);
        let client = program.client().await;
        let mut set = JoinSet::new();
        for caller in 0..callers {
            let mut client = client.clone();
            set.spawn(async move {
                let mut good = 0;
                for round in 0.. {
                    if Instant::now() >= until {
                        break;
                    }
                    let request = numbered((turn * 20 + caller) * 10_000 + round);
                    match client.get_task_detail(request).await {
                        Ok(_) => good += 1,
                        Err(status) => {
                            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                            tokio::time::sleep(Duration::from_millis(200)).await;
                        }
                    }
                }
                good
            });
        }
        *goodput.entry(callers).or_insert(0) += set.join_all().await.into_iter().sum::<usize>();
    }

    println!("calls that succeeded in 4 s by number of callers: {goodput:?}");
    assert!(
        goodput[&beyond] * 10 >= goodput[&at_the_limit] * 8,
        "{goodput:?}"
    );
}

#[tokio::test]
async fn a_slow_upstream_blocks_no_more_calls_than_there_are_permits() {
    let upstream = Upstream::always(vec![Step::Hold]).await;
    let program = Program::over(
        &upstream.url(),
        &["--max-in-flight", "20", "--timeout", "5s"],
    );
    let client = program.client().await;
    let mut calls = JoinSet::new();

    for number in 0..200 {
        let mut client = client.clone();
        calls.spawn(async move { client.get_task_detail(numbered(number)).await });
    }
    let mut codes = Vec::new();
    let ready = program.admin("/readyz").await.0;
    while let Some(ended) = calls.join_next().await {
        let status = ended
            .expect("no panic")
            .expect_err("upstream never replies");
        codes.push(status.code());
    }

    assert_eq!(ready, 200);
    assert_eq!(codes[..180], [Code::ResourceExhausted; 180]);
    assert_eq!(codes[180..], [Code::DeadlineExceeded; 20]);
    assert_eq!(upstream.requests().len(), 20);
    assert_eq!(program.metric("rds_upstream_in_flight").await, 0.0);
}

#[tokio::test]
async fn the_breaker_limits_requests_to_a_failing_upstream_and_closes_after_it_recovers() {
    let healthy = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = Arc::clone(&healthy);
    let upstream = Upstream::start(move |_| {
        if seen.load(std::sync::atomic::Ordering::Relaxed) {
            example()
        } else {
            reply(503, &[], "")
        }
    })
    .await;
    let program = Program::over(&upstream.url(), &[]);
    let mut client = program.client().await;
    let calls = 300;
    let connection = Connection::open(program.grpc).await;
    let (mut rejected, mut round_trips) = (Vec::new(), Vec::new());

    for number in 0..calls {
        let started = Instant::now();
        let status = client
            .get_task_detail(numbered(number))
            .await
            .expect_err("503");
        let failure = Failure::from_status(&status);
        assert_eq!(failure.code, Code::Unavailable);
        if failure.reason == "CIRCUIT_OPEN" {
            rejected.push(started.elapsed());
            round_trips.push(round_trip(&connection).await);
            assert!(failure.retry_delay.is_some());
        }
    }
    let requests = upstream.requests().len();
    healthy.store(true, std::sync::atomic::Ordering::Relaxed);
    let recovering = Instant::now();
    eventually("calls succeed again", async || {
        client.get_task_detail(numbered(0)).await.is_ok()
    })
    .await;

    println!(
        "{calls} calls, {requests} upstream requests, back after {:?}",
        recovering.elapsed()
    );
    assert!(
        requests * 5 <= calls * 6,
        "{requests} requests for {calls} calls"
    );
    assert!(rejected.len() > calls / 2, "{}", rejected.len());
    // A release build takes less than 5 ms.
    assert_prompt(
        "open breaker",
        rejected,
        Duration::from_millis(20),
        round_trips,
    );
}

#[tokio::test]
async fn a_flood_on_one_connection_does_not_fail_calls_on_others() {
    let upstream = Upstream::start(|request| match request.line.contains("noisy") {
        true => vec![Step::Hold],
        false => example(),
    })
    .await;
    let program = Program::over(&upstream.url(), &["--max-in-flight", "150"]);
    let noisy = program.client().await;
    let mut noise = JoinSet::new();
    for number in 0..500 {
        let mut client = noisy.clone();
        let mut request = numbered(number);
        request.instance_id = "noisy".to_owned();
        noise.spawn(async move { client.get_task_detail(request).await });
    }
    // The maximum number of concurrent streams per connection.
    upstream.wait_for_requests(100).await;

    let mut client = program.client().await;
    for number in 0..100 {
        let result = client.get_task_detail(numbered(number)).await;
        assert!(result.is_ok(), "{number}: {result:?}");
    }

    assert_eq!(noise.len(), 500);
    noise.abort_all();
}

#[tokio::test]
async fn oversized_metadata_gets_431_and_no_metadata_of_the_caller_reaches_upstream() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let connection = Connection::open(program.grpc).await;
    let mut many = headers();
    // Over 64 KiB, as HTTP/2 counts it.
    for number in 0..2000 {
        many = many.header(format!("k-{number}"), "v");
    }
    let some = headers()
        .header("authorization", "Bearer of-a-mesh")
        .header("cookie", "a=b")
        .header("x-forwarded-for", "192.0.2.1")
        .header("x-auth-token", "of-the-caller")
        .header("baggage", "a=b")
        .header("k-1", "v");

    let rejected = connection.exchange(many, framed(&example_request())).await;
    let result = connection.exchange(some, framed(&example_request())).await;

    assert_eq!(rejected.expect("a reply").http_status, 431);
    let result = result.expect("the connection survives");
    assert_eq!(result.reply().job_name, "CreateMysqlSingleHAInstance");
    let [request] = &upstream.requests()[..] else {
        panic!("one request: {:?}", upstream.requests());
    };
    for name in [
        "authorization",
        "cookie",
        "x-forwarded-for",
        "baggage",
        "k-1",
    ] {
        assert_eq!(request.header(name), None, "{name}");
    }
    assert_ne!(request.header("x-auth-token"), Some("of-the-caller"));
}

#[tokio::test]
async fn hostile_ids_and_trace_headers_neither_fail_the_call_nor_forge_a_log_line() {
    let program = Program::sandboxed(&[]);
    let long = "x".repeat(3_000);
    let hostile = [
        r#"a","grpc_code":"OK"#,
        r"a\nb\u000a{}",
        "\u{1b}[31mred",
        long.as_str(),
    ];

    for value in hostile {
        let mut request = Request::new(example_request());
        for name in ["x-request-id", "traceparent", "tracestate", "user-agent"] {
            if let Ok(value) = value.parse() {
                request.metadata_mut().insert(name, value);
            }
        }
        let result = program.client().await.get_task_detail(request).await;
        let result = result.expect("the call works");
        let id = result.metadata().get("x-request-id").expect("an id");
        let id = id.to_str().expect("ASCII");

        assert_ne!(id, value);
        assert!(id.len() <= 128, "{id}");
        program.access_line(id);
    }
    for line in program.logs() {
        assert!(
            serde_json::from_str::<serde_json::Value>(&line).is_ok(),
            "{line}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_31_kib_reaches_upstream_from_every_client() {
    let upstream = Upstream::always(example()).await;
    let url = upstream.url();
    let program = Program::start(&["--endpoint", &url], &[]);
    let token = "t".repeat(31 << 10);
    // What a mesh adds.
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let metadata = [("x-auth-token", &*token), ("traceparent", traceparent)];
    let repeated = [("x-auth-token", &token[..10 << 10])].repeat(2);

    let called = program.call_with(example_request(), &metadata).await;
    let target = format!("http://{}", program.grpc);
    let args = ["call", "--target", &target];
    let environment = [("RDS_TASK_FACADE_TOKEN", &*token)];
    let printed = run(&args, &environment);

    let rejected = program.call_with(example_request(), &repeated).await;

    called.expect("a reply");
    let rejected = Failure::from_status(&rejected.expect_err("two tokens"));
    assert_eq!(rejected.reason, "CREDENTIAL_REJECTED");
    assert_eq!(printed.0, 0, "{}", printed.2);
    for request in upstream.requests() {
        assert_eq!(request.header("x-auth-token"), Some(&*token));
    }
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn metadata_over_32_kib_is_logged_and_counted_with_its_reason() {
    let upstream = Upstream::always(example()).await;
    let program = Program::over(&upstream.url(), &[]);
    let long = "v".repeat(33 << 10);
    let metadata = [("x-request-id", "long"), ("x-long", &*long)];

    let status = program.call_with(example_request(), &metadata).await;

    let failure = Failure::from_status(&status.expect_err("over the limit"));
    assert_eq!(
        failure.code_and_reason(),
        (Code::ResourceExhausted, "INVALID_REQUEST")
    );
    let line = program.access_line("long");
    assert_eq!(line["reason"], "INVALID_REQUEST", "{line}");
    assert_eq!(program.handled("ResourceExhausted").await, 1.0);
    assert!(upstream.requests().is_empty());
}
