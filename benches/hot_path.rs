//! Costs of the steps of a call: `cargo bench`. Times vary with the machine, so CI limits the instructions of a whole call instead
//! (`tests/tools/instructions.py`).

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use divan::{Bencher, black_box};
use http::{HeaderMap, HeaderValue};
use rds_task_facade::{
    coalescer::Coalescer,
    credentials::{
        AccessKey, Credentials, Identity, Owner, Source,
        signer::{self, SigningRequest},
    },
    error::{Error, FailedLookup},
    http_client,
    lookup::Lookups,
    options::defaults,
    pb::{GetTaskDetailRequest, task_service_client::TaskServiceClient},
    rpc::Facade,
    sandbox::Sandbox,
    server::Server,
    status::Failure,
    task::Task,
    telemetry::{Access, Sinks, metrics::Metrics},
    upstream::{self, TaskQuery, rejection, wire},
    watch::Hub,
};
use tokio::{runtime, sync::watch};
use tonic::transport::Channel;

/// The allocator of the shipped program.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const PROJECT: &str = "0483b6b16e954cb88930a360d2c4e663";
const INSTANCE: &str = "1ffc4167903840cb93a3da56d28c14fdin01";
const WORKFLOW: &str = "102772a9-31fa-4129-b9f8-7638e2792f3b";

fn main() {
    divan::main();
}

fn query() -> TaskQuery {
    TaskQuery {
        project_id: PROJECT.to_owned(),
        instance_id: INSTANCE.to_owned(),
        workflow_id: WORKFLOW.to_owned(),
        workflow_name: Some("CreateMysqlSingleHAInstance".to_owned()),
    }
}

/// Decides whether each attempt can be signed, instead of caching a signature for a second.
#[divan::bench]
fn sign_one_attempt(bencher: Bencher<'_, '_>) {
    let key = AccessKey::parse(
        "QTWAOYTTINDUT2QVKYUC",
        "a-secret-access-key-of-40-characters-xxx",
        None,
    )
    .expect("a key");
    let path = format!("/v3/{PROJECT}/instances/{INSTANCE}/task-center-detail");
    let body = format!(r#"{{"workflow_id":"{WORKFLOW}"}}"#);
    let headers = [
        ("content-type", "application/json"),
        ("host", "rds.eu-west-101.myhuaweicloud.eu"),
        ("x-project-id", PROJECT),
    ];
    let request = SigningRequest {
        method: "POST",
        path: &path,
        query: &[],
        headers: &headers,
        body: body.as_bytes(),
    };

    bencher.bench_local(|| signer::sign(black_box(&request), &key, SystemTime::UNIX_EPOCH));
}

/// Decides whether the lenient parser of replies may stay hand-written.
#[divan::bench]
fn parse_task() -> Task {
    let body = br#"{"instance_id":"1ffc4167903840cb93a3da56d28c14fdin01","instance_name":"rds-mysql-2","job_id":"102772a9-31fa-4129-b9f8-7638e2792f3b","job_name":"CreateMysqlSingleHAInstance"}"#;
    wire::parse_task_detail(black_box(body)).expect("a task")
}

/// Maps an error reply to a status with details. Decides whether failed calls cost more than successful ones.
#[divan::bench]
fn map_error_reply() -> tonic::Status {
    let body = br#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;
    let headers = HeaderMap::new();
    let (rejection, facts) =
        rejection::from_reply(404, &headers, black_box(body), SystemTime::UNIX_EPOCH);
    let error = Error::Upstream(Box::new(FailedLookup {
        error: upstream::Error::Rejected(Box::new(rejection)),
        facts,
        owner: Owner::Server,
        query: query(),
    }));
    Failure::from_error(&error).to_status("0123456789abcdef0123456789abcdef", Duration::MAX)
}

/// The key by which a call finds an identical one in flight. Every call pays for it.
#[divan::bench]
fn create_coalescing_key(bencher: Bencher<'_, '_>) {
    let coalescer = Coalescer::new(&defaults(), Metrics::new());

    bencher
        .with_inputs(query)
        .bench_local_values(|query| coalescer.key(Identity::Server, query));
}

/// Decides how much time the facade adds to a call. Client, facade and sandbox run in one process, over loopback.
#[divan::bench]
fn round_trip(bencher: Bencher<'_, '_>) {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("no other crypto provider was installed before");
    let facade = start_facade(start_sandbox());
    let runtime = current_thread();
    let mut client = runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{facade}")).expect("a URL");
        TaskServiceClient::new(channel.connect().await.expect("the facade listens"))
    });

    bencher.bench_local(|| {
        let request = GetTaskDetailRequest {
            project_id: PROJECT.to_owned(),
            instance_id: INSTANCE.to_owned(),
            workflow_id: WORKFLOW.to_owned(),
            workflow_name: None,
        };
        let reply = runtime.block_on(client.get_task_detail(request));
        reply
            .map(tonic::Response::into_inner)
            .expect("the example task")
    });
}

fn current_thread() -> runtime::Runtime {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the runtime starts")
}

fn start_sandbox() -> SocketAddr {
    let (started, address) = std::sync::mpsc::channel();
    thread::spawn(move || {
        current_thread().block_on(async {
            let sandbox = Sandbox::bind(([127, 0, 0, 1], 0).into()).await;
            let sandbox = sandbox.expect("a free port");
            started.send(sandbox.local_addr()).expect("the bench waits");
            sandbox.serve(std::future::pending()).await;
        });
    });
    address.recv().expect("the sandbox starts")
}

fn start_facade(sandbox: SocketAddr) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    thread::spawn(move || {
        current_thread().block_on(async {
            let metrics = Metrics::new();
            let http = http_client::Config {
                tls: http_client::tls_config(http_client::SystemRoots::Ignored, None)
                    .expect("no file, no error"),
                proxy: None,
                connect_timeout: Duration::from_secs(3),
            };
            let source = Source::Token(HeaderValue::from_static("sandbox-token"));
            let credentials = Credentials::start(source, None, &http, Arc::clone(&metrics));
            let credentials = credentials.expect("a token needs nothing");
            let coalescer = Coalescer::new(&defaults(), Arc::clone(&metrics));
            let url: url::Url = format!("http://{sandbox}").parse().expect("a URL");
            let http = http_client::Client::new(&http, &url, 2048).expect("a client of plain HTTP");
            let endpoint = upstream::Endpoint::new(url, defaults(), Arc::clone(&metrics));
            let client = upstream::Client::new(http, endpoint, credentials.clone());
            let ready = credentials.ready();
            let hub = Hub::new(&defaults(), Duration::from_secs(30), Arc::clone(&metrics));
            let lookups = Lookups {
                credentials,
                coalescer,
                upstream: client,
                store: None,
            };
            let facade = Facade::new(lookups, hub, &defaults());
            let sinks = Arc::new(Sinks {
                metrics,
                access: Access::off(),
                tracer: None,
            });
            let serving = watch::Sender::new(false);
            let server = Server::start(listener, defaults(), vec![facade], serving, sinks).await;
            let server = server.expect("the server starts");
            server.run(ready, std::future::pending()).await;
        });
    });
    address
}
