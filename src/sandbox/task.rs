//! The RDS call: RDS API reference, "Obtaining Task Information".

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use serde_json::Value;
use tokio::time::sleep;

use super::{
    EXAMPLE_INSTANCE_ID, SharedState, auth,
    response::{self, ErrorReply, Response, gateway_error, rds_error},
    scenarios::{Act, NORMAL},
    state::{Look, State},
    transport::Script,
};

/// `{"instance_id":"gzip","instance_name":"rds-mysql-2","job_id":"gzip","job_name":"gzip"}`, compressed.
const GZIP: &[u8] = &[
    31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 171, 86, 202, 204, 43, 46, 73, 204, 75, 78, 141, 207, 76, 81,
    178, 82, 74, 175, 202, 44, 80, 210, 65, 8, 230, 37, 230, 166, 2, 133, 139, 82, 138, 117, 115,
    43, 139, 11, 115, 116, 141, 128, 178, 89, 249, 73, 40, 170, 65, 124, 168, 66, 176, 72, 45, 0,
    92, 109, 137, 206, 86, 0, 0, 0,
];

/// Project id and instance id in the path of a task request; `None` for another path.
pub(super) fn parse_path(path: &str) -> Option<(&str, &str)> {
    let (project_id, rest) = path.strip_prefix("/v3/")?.split_once("/instances/")?;
    let instance_id = rest.strip_suffix("/task-center-detail")?;
    let valid = |id: &str| !id.is_empty() && !id.contains('/');
    (valid(project_id) && valid(instance_id)).then_some((project_id, instance_id))
}

/// Counts a task request as in flight until it is dropped, also when the client disconnects.
struct TaskInFlight<'a>(&'a SharedState);

impl<'a> TaskInFlight<'a> {
    fn begin(shared: &'a SharedState, request: &Request<Bytes>) -> Self {
        let mut state = shared.state();
        state.record(request);
        state.counts.task_requests_in_flight += 1;
        Self(shared)
    }
}

impl Drop for TaskInFlight<'_> {
    fn drop(&mut self) {
        self.0.state().counts.task_requests_in_flight -= 1;
    }
}

/// Responds to a task request, or returns the script that takes over the connection.
pub(super) async fn show_task(
    shared: &SharedState,
    request: &Request<Bytes>,
    (project_id, instance_id): (&str, &str),
    request_id: &str,
) -> Result<Response, Script> {
    let _in_flight = TaskInFlight::begin(shared, request);
    let scenario = Act::find(instance_id);
    let workflow_id = parse_workflow_id(request);
    if let Some(Act::Broken(kind)) = scenario {
        let workflow_id = workflow_id.as_deref().unwrap_or_default();
        return Err(kind.script(&fill(NORMAL, instance_id, workflow_id)));
    }
    let response = {
        let state = &mut *shared.state();
        match (auth::authenticate(request, state), workflow_id, scenario) {
            (Err(error), ..) => gateway_error(error.status, error.code, &error.message, request_id),
            (_, Err(error), _) => rds_error(error.status, error.code, &error.message),
            (_, Ok(workflow_id), scenario) => {
                let example = || Act::find_example(instance_id, &workflow_id);
                match scenario.or_else(example) {
                    None => unknown_task(),
                    Some(act) => {
                        let task = ScenarioRequest {
                            project_id,
                            instance_id,
                            workflow_id: &workflow_id,
                            request_id,
                        };
                        task.respond(act, state)
                    }
                }
            }
        }
    };
    // Delayed after authentication, which happens when the request arrives.
    if let Some(Act::Slow(milliseconds)) = scenario {
        sleep(Duration::from_millis(milliseconds.into())).await;
    }
    Ok(response)
}

/// The workflow id in the request.
fn parse_workflow_id(request: &Request<Bytes>) -> Result<String, ErrorReply> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let is_json = content_type
        .and_then(|value| value.to_str().ok()?.split(';').next())
        .is_some_and(|value| value.trim() == "application/json");
    if !is_json {
        return Err(ErrorReply {
            status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            code: "DBS.000415",
            message: "Content-Type must be application/json.".to_owned(),
        });
    }
    let invalid = |problem| {
        Err(ErrorReply {
            status: StatusCode::BAD_REQUEST,
            code: "DBS.200001",
            message: format!("Parameter error: {problem}"),
        })
    };
    let Ok(Value::Object(body)) = serde_json::from_slice(request.body()) else {
        return invalid("the body is not a JSON object.");
    };
    match body.get("workflow_name") {
        None | Some(Value::String(_) | Value::Number(_)) => {}
        Some(_) => return invalid("workflow_name is not text."),
    }
    match body.get("workflow_id").and_then(Value::as_str) {
        Some(id) if !id.is_empty() => Ok(id.to_owned()),
        _ => invalid("workflow_id is missing or empty."),
    }
}

/// The error for a task that RDS does not have.
fn unknown_task() -> Response {
    rds_error(
        StatusCode::BAD_REQUEST,
        "DBS.200543",
        "The task does not exist.",
    )
}

/// A task request with a magic instance id.
struct ScenarioRequest<'a> {
    project_id: &'a str,
    instance_id: &'a str,
    workflow_id: &'a str,
    request_id: &'a str,
}

impl ScenarioRequest<'_> {
    fn respond(&self, act: Act, state: &mut State) -> Response {
        let status = |number| StatusCode::from_u16(number).expect("scenarios have valid statuses");
        let json = |number, body| response::json(status(number), self.fill(body));
        let gateway = |number, code, message: &str| {
            gateway_error(status(number), code, message, self.request_id)
        };
        match act {
            Act::Status(number) => self.plain(status(number)),
            Act::Empty(number) => response::json(status(number), ""),
            Act::Page(number) => page(status(number)),
            Act::Rds(number, code, message) => rds_error(status(number), code, message),
            Act::Gateway(number, code, message) => gateway(number, code, message),
            Act::Throttled(policy, retry_after) => {
                let message = format!("The throttling threshold has been reached: {policy}");
                let mut reply = gateway(429, "APIGW.0308", &message);
                if !retry_after.is_empty() {
                    let retry_after = HeaderValue::from_static(retry_after);
                    reply.headers_mut().insert(header::RETRY_AFTER, retry_after);
                }
                reply
            }
            Act::Json(number, body) => json(number, body),
            Act::Typed(content_type) => {
                response::response(StatusCode::OK, content_type, self.fill(NORMAL))
            }
            Act::Flaky(failures) if self.look(state).number < u64::from(failures) => {
                self.plain(StatusCode::SERVICE_UNAVAILABLE)
            }
            Act::Slow(_) | Act::Flaky(_) => json(200, NORMAL),
            Act::Task(course) => {
                let look = self.look(state);
                let task = course.task(self.instance_id, self.workflow_id, look);
                let response = |task: Value| response::json(StatusCode::OK, task.to_string());
                task.map_or_else(unknown_task, response)
            }
            Act::Huge => response::json(
                StatusCode::OK,
                format!(r#"{{"instance_name":"{}"}}"#, "x".repeat(1024 * 1024)),
            ),
            Act::Gzip => with_header(
                response::json(StatusCode::OK, GZIP),
                header::CONTENT_ENCODING,
                HeaderValue::from_static("gzip"),
            ),
            Act::Broken(_) => unreachable!("show_task handles broken responses"),
        }
    }

    fn look(&self, state: &mut State) -> Look {
        state.look([self.project_id, self.instance_id, self.workflow_id])
    }

    /// The shortest response with a status. Its code `DBS.000<status>` does not exist in RDS, so the status decides.
    fn plain(&self, status: StatusCode) -> Response {
        match status.as_u16() {
            204 | 304 => response::json(status, ""),
            200..=299 => response::json(status, self.fill(NORMAL)),
            300..=399 => {
                let location = format!(
                    "/v3/{}/instances/{EXAMPLE_INSTANCE_ID}/task-center-detail",
                    self.project_id
                );
                let location =
                    HeaderValue::try_from(location).expect("a path is a valid header value");
                with_header(response::json(status, ""), header::LOCATION, location)
            }
            number => rds_error(
                status,
                &format!("DBS.{number:06}"),
                &format!("The sandbox replied with HTTP {number}."),
            ),
        }
    }

    fn fill(&self, body: &str) -> String {
        fill(body, self.instance_id, self.workflow_id)
    }
}

/// The body with both ids as JSON strings.
fn fill(body: &str, instance_id: &str, workflow_id: &str) -> String {
    body.replace("<instance>", &Value::from(instance_id).to_string())
        .replace("<task>", &Value::from(workflow_id).to_string())
}

fn with_header(mut response: Response, name: HeaderName, value: HeaderValue) -> Response {
    response.headers_mut().insert(name, value);
    response
}

/// An HTML page like that of a load balancer.
fn page(status: StatusCode) -> Response {
    let number = status.as_u16();
    let title = status.canonical_reason().unwrap_or("Error");
    response::response(
        status,
        "text/html",
        format!(
            "<html>\r\n<head><title>{number} {title}</title></head>\r\n<body>\r\n<center><h1>{number} {title}</h1></center>\r\n</body>\r\n</html>\r\n"
        ),
    )
}
