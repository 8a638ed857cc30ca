//! The client against a test server on loopback.

use std::{io::Write as _, net::SocketAddr, sync::Mutex};

use tokio::{net::TcpListener, sync::mpsc};
use tonic::{Response, metadata::MetadataMap};

use super::*;
use crate::pb::task_service_server::{TaskService, TaskServiceServer};

/// Records each request, and replies according to the project id.
struct TestServer(Mutex<mpsc::Sender<(MetadataMap, pb::GetTaskDetailRequest)>>);

#[tonic::async_trait]
impl TaskService for TestServer {
    type WatchTaskDetailStream =
        futures_util::stream::Empty<Result<pb::WatchTaskDetailResponse, Status>>;

    async fn watch_task_detail(
        &self,
        _request: Request<pb::WatchTaskDetailRequest>,
    ) -> Result<Response<Self::WatchTaskDetailStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn get_task_detail(
        &self,
        request: Request<pb::GetTaskDetailRequest>,
    ) -> Result<Response<pb::GetTaskDetailResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let project = message.project_id.clone();
        let requests = self.0.lock().unwrap().clone();
        requests.send((metadata, message)).await.unwrap();
        match project.as_str() {
            "silent" => std::future::pending().await,
            "missing" => Err(Status::not_found("no such task")),
            _ => Ok(Response::new(pb::GetTaskDetailResponse {
                instance_id: "i".to_owned(),
                job_id: "w".to_owned(),
                status: Some("Running".to_owned()),
                sub_task_list: vec![pb::SubTask {
                    percent: Some("60".to_owned()),
                    ..pb::SubTask::default()
                }],
                ..pb::GetTaskDetailResponse::default()
            })),
        }
    }
}

type Received = mpsc::Receiver<(MetadataMap, pb::GetTaskDetailRequest)>;

async fn serve() -> (SocketAddr, Received) {
    let (requests, received) = mpsc::channel(8);
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status("draining", tonic_health::ServingStatus::NotServing)
        .await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(TaskServiceServer::new(TestServer(Mutex::new(requests))))
        .add_service(health_service)
        .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener));
    tokio::spawn(server);
    (address, received)
}

fn server(address: SocketAddr) -> Server {
    Server {
        target: format!("http://{address}").parse().unwrap(),
        ca: None,
        pair: None,
        local: None,
    }
}

fn call_options(project: &str, address: SocketAddr, timeout: Duration) -> CallOptions {
    CallOptions {
        server: server(address),
        task: Some(Task {
            project_id: project.to_owned(),
            ..Task::example()
        }),
        timeout,
        token: Token::default(),
    }
}

const LONG_TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn call_sends_ids_token_and_timeout() {
    let (address, mut received) = serve().await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"from-a-file\n").unwrap();
    let mut options = call_options("p", address, LONG_TIMEOUT);
    options.token.token_file = Some(file.path().to_owned());

    get_task_detail(options).await.unwrap();

    let (metadata, message) = received.recv().await.unwrap();
    assert_eq!(metadata.get("x-auth-token").unwrap(), "from-a-file");
    assert!(metadata.contains_key("grpc-timeout"));
    assert_eq!(message.project_id, "p");
    assert_eq!(message.instance_id, "1ffc4167903840cb93a3da56d28c14fdin01");
    assert_eq!(message.workflow_id, "102772a9-31fa-4129-b9f8-7638e2792f3b");
    assert_eq!(
        message.workflow_name.as_deref(),
        Some("CreateMysqlSingleHAInstance")
    );
}

#[test]
fn reply_is_json_with_proto_names_and_without_unset_fields() {
    let text = |value: &str| Some(value.to_owned());
    let full = pb::GetTaskDetailResponse {
        instance_id: "1".to_owned(),
        instance_name: "2".to_owned(),
        job_id: "3".to_owned(),
        job_name: "4".to_owned(),
        created_at: text("5"),
        update_at: text("6"),
        process: text(""),
        status: text("8"),
        state: pb::TaskState::Failed.into(),
        progress_percent: Some(0),
        create_time: Some(prost_types::Timestamp {
            seconds: 1_765_238_950,
            nanos: 0,
        }),
        update_time: None,
        sub_task_list: vec![
            pb::SubTask {
                sub_task_name: text("9"),
                percent: text("10"),
                executed_time: text("11"),
                status: text("12"),
                remaining_time: text("13"),
                show_detail: Some(false),
                state: 99,
                progress_percent: Some(10),
            },
            pb::SubTask::default(),
        ],
    };
    let cases = [
        (
            pb::GetTaskDetailResponse::default(),
            r#"{"instance_id":"","instance_name":"","job_id":"","job_name":""}"#,
        ),
        (
            full,
            concat!(
                r#"{"instance_id":"1","instance_name":"2","job_id":"3","job_name":"4","created_at":"5","update_at":"6","#,
                r#""process":"","status":"8","sub_task_list":[{"sub_task_name":"9","percent":"10","executed_time":"11","#,
                r#""status":"12","remaining_time":"13","show_detail":false,"state":99,"progress_percent":10},{}],"#,
                r#""state":"TASK_STATE_FAILED","progress_percent":0,"create_time":"2025-12-09T00:09:10Z"}"#,
            ),
        ),
    ];

    for (reply, expected) in cases {
        assert_eq!(serde_json::to_string(&reply).unwrap(), expected);
    }
}

#[tokio::test]
async fn errors_start_with_one_clear_line() {
    let (address, _received) = serve().await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed_address = closed.local_addr().unwrap();
    drop(closed);
    let short_timeout = Duration::from_millis(50);
    let cases = [
        (
            "missing",
            address,
            LONG_TIMEOUT,
            "NOT_FOUND: no such task".to_owned(),
        ),
        (
            "silent",
            address,
            short_timeout,
            "DEADLINE_EXCEEDED: no reply within 50ms".to_owned(),
        ),
        (
            "p",
            closed_address,
            LONG_TIMEOUT,
            format!(
                "cannot connect to http://{closed_address}: Connection refused (os error 111); check --target, and that \
                 `rds-task-facade serve` runs there"
            ),
        ),
    ];

    for (project, address, timeout, expected) in cases {
        let options = call_options(project, address, timeout);
        let error = get_task_detail(options).await.unwrap_err();
        assert_eq!(error.to_string(), expected, "{project}");
    }
}

#[tokio::test]
async fn token_that_a_header_cannot_carry_is_rejected_without_echo() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"canary\r\nx-other: 1").unwrap();
    let mut options = call_options("p", "127.0.0.1:1".parse().unwrap(), LONG_TIMEOUT);
    options.token.token_file = Some(file.path().to_owned());

    let error = get_task_detail(options).await.unwrap_err().to_string();

    assert!(error.starts_with("--token-file: "), "{error}");
    assert!(!error.contains("canary"), "{error}");
}

#[tokio::test]
async fn health_distinguishes_serving_not_serving_and_unknown() {
    let (address, _received) = serve().await;
    let check = |service: &str| {
        check_health(HealthOptions {
            server: server(address),
            timeout: LONG_TIMEOUT,
            service: service.to_owned(),
        })
    };

    assert_eq!(check("").await.unwrap(), ServingStatus::Serving);
    assert_eq!(check("draining").await.unwrap(), ServingStatus::NotServing);
    let unknown = check("unknown").await.unwrap_err().to_string();
    assert!(unknown.starts_with("NOT_FOUND: "), "{unknown}");
}
