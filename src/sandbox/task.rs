//! RDS itself: RDS API reference, "Obtaining Task Information".

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::sleep;

use super::{
    EXAMPLE_INSTANCE_ID, EXAMPLE_WORKFLOW_ID, RUNNING_TASK, RUNNING_TASK_SECONDS, Shared,
    answer::{Answer, answer, gateway_error, json, quoted, rds_error},
    auth,
    scenarios::{Act, NORMAL},
    state::State,
    transport::Script,
};

/// `{"instance_id":"gzip","instance_name":"rds-mysql-2","job_id":"gzip","job_name":"gzip"}`, compressed.
const GZIP: &[u8] = &[
    31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 171, 86, 202, 204, 43, 46, 73, 204, 75, 78, 141, 207, 76, 81,
    178, 82, 74, 175, 202, 44, 80, 210, 65, 8, 230, 37, 230, 166, 2, 133, 139, 82, 138, 117, 115,
    43, 139, 11, 115, 116, 141, 128, 178, 89, 249, 73, 40, 170, 65, 124, 168, 66, 176, 72, 45, 0,
    92, 109, 137, 206, 86, 0, 0, 0,
];

/// The project and the instance that a path names; `None` when it is another path.
pub(super) fn parse_path(path: &str) -> Option<(&str, &str)> {
    let (project_id, rest) = path.strip_prefix("/v3/")?.split_once("/instances/")?;
    let instance_id = rest.strip_suffix("/task-center-detail")?;
    let valid = |id: &str| !id.is_empty() && !id.contains('/');
    (valid(project_id) && valid(instance_id)).then_some((project_id, instance_id))
}

/// Counts a task request as in flight as long as it lives, also when the client hangs up.
struct InFlight<'a>(&'a Shared);

impl<'a> InFlight<'a> {
    fn begin(shared: &'a Shared, request: &Request<Bytes>) -> Self {
        let mut state = shared.state();
        state.record(request);
        state.counts.task_requests_in_flight += 1;
        Self(shared)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.state().counts.task_requests_in_flight -= 1;
    }
}

/// Answers a request for a task, or takes over the connection.
pub(super) async fn show_task(
    shared: &Shared,
    request: &Request<Bytes>,
    (project_id, instance_id): (&str, &str),
    request_id: &str,
) -> Result<Answer, Script> {
    let _in_flight = InFlight::begin(shared, request);
    let scenario = Act::find(instance_id);
    let asked = read(request);
    if let Some((Act::Broken(kind), _)) = scenario {
        let workflow_id = asked.as_deref().unwrap_or_default();
        return Err(kind.script(&fill(NORMAL, instance_id, workflow_id)));
    }
    let answer = {
        let state = &mut *shared.state();
        match (auth::authenticate(request, state), asked, scenario) {
            (Err(refusal), ..) => gateway_error(
                StatusCode::UNAUTHORIZED,
                refusal.code,
                &refusal.message,
                request_id,
            ),
            (_, Err(refusal), _) => rds_error(refusal.status, refusal.code, refusal.message),
            (_, Ok(task), None) => known_task(state, instance_id, &task),
            (_, Ok(workflow_id), Some((act, message))) => {
                let scene = Scene {
                    project_id,
                    instance_id,
                    workflow_id: &workflow_id,
                    message,
                    request_id,
                };
                scene.answer(act, state)
            }
        }
    };
    // The credential is judged when the request comes, also where the answer comes late.
    if let Some((Act::Slow(milliseconds), _)) = scenario {
        sleep(Duration::from_millis(milliseconds)).await;
    }
    Ok(answer)
}

/// Why RDS refuses a request that carries a good credential.
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: &'static str,
}

/// The workflow id that a request names.
fn read(request: &Request<Bytes>) -> Result<String, Refusal> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let is_json = content_type
        .and_then(|value| value.to_str().ok()?.split(';').next())
        .is_some_and(|value| value.trim() == "application/json");
    if !is_json {
        return Err(Refusal {
            status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            code: "DBS.000415",
            message: "Content-Type must be application/json.",
        });
    }
    let wrong = |message| Refusal {
        status: StatusCode::BAD_REQUEST,
        code: "DBS.200001",
        message,
    };
    let body = serde_json::from_slice(request.body());
    let Ok(Value::Object(body)) = body else {
        return Err(wrong("Parameter error: the body is no JSON object."));
    };
    match body.get("workflow_name") {
        None | Some(Value::String(_) | Value::Number(_)) => {}
        Some(_) => return Err(wrong("Parameter error: workflow_name is no text.")),
    }
    match body.get("workflow_id").and_then(Value::as_str) {
        Some(id) if !id.is_empty() => Ok(id.to_owned()),
        _ => Err(wrong("Parameter error: workflow_id is missing or empty.")),
    }
}

/// The two tasks that exist; any other is the task centre's normal "no such task".
fn known_task(state: &State, instance_id: &str, workflow_id: &str) -> Answer {
    match (instance_id, workflow_id) {
        (EXAMPLE_INSTANCE_ID, EXAMPLE_WORKFLOW_ID) => {
            json(StatusCode::OK, fill(NORMAL, instance_id, workflow_id))
        }
        (EXAMPLE_INSTANCE_ID, RUNNING_TASK) => {
            json(StatusCode::OK, running_task(state.started_at, state.now()))
        }
        _ => rds_error(
            StatusCode::BAD_REQUEST,
            "DBS.200543",
            "The task does not exist.",
        ),
    }
}

/// The task in progress: three parts, one after the other, from `started_at` on.
fn running_task(started_at: Timestamp, now: Timestamp) -> String {
    const PARTS: [&str; 3] = ["Prepare resources", "Restore data", "Verify instance"];
    const PART_SECONDS: i64 = RUNNING_TASK_SECONDS / PARTS.len() as i64;
    let elapsed = now.duration_since(started_at).as_secs();
    let elapsed = elapsed.clamp(0, RUNNING_TASK_SECONDS);
    let state_of = |elapsed, whole| match elapsed {
        0 => "Pending",
        _ if elapsed < whole => "Running",
        _ => "Completed",
    };
    let parts: Vec<_> = (0..)
        .zip(PARTS)
        .map(|(index, name)| {
            let executed = (elapsed - index * PART_SECONDS).clamp(0, PART_SECONDS);
            format!(
                r#"{{"sub_task_name":"{name}","percent":"{}","executed_time":"{executed}","status":"{}","remaining_time":"{}","show_detail":{}}}"#,
                executed * 100 / PART_SECONDS,
                state_of(executed, PART_SECONDS),
                PART_SECONDS - executed,
                index == 1,
            )
        })
        .collect();
    // The offset without a colon is how the neighbouring calls of the task centre write a time.
    let time = |at: Timestamp| at.strftime("%Y-%m-%dT%H:%M:%S+0000").to_string();
    let status = if elapsed < RUNNING_TASK_SECONDS {
        "Running"
    } else {
        "Completed"
    };
    format!(
        r#"{{"instance_id":"{EXAMPLE_INSTANCE_ID}","instance_name":"rds-mysql-2","job_id":"{RUNNING_TASK}","job_name":"RestoreMysqlInstance","created_at":"{}","update_at":"{}","process":"{}","status":"{status}","sub_task_list":[{}]}}"#,
        time(started_at),
        time(now),
        elapsed * 100 / RUNNING_TASK_SECONDS,
        parts.join(","),
    )
}

/// What a scenario's answer may mention.
struct Scene<'a> {
    project_id: &'a str,
    instance_id: &'a str,
    workflow_id: &'a str,
    message: &'a str,
    request_id: &'a str,
}

impl Scene<'_> {
    fn answer(&self, act: Act, state: &mut State) -> Answer {
        let status = |number| StatusCode::from_u16(number).expect("scenarios name real statuses");
        let normal = || json(StatusCode::OK, self.fill(NORMAL));
        match act {
            Act::Status(number) => self.plainest(status(number)),
            Act::Empty(number) => json(status(number), ""),
            Act::Page(number) => page(status(number)),
            Act::Rds(number, code) => rds_error(status(number), code, self.message),
            Act::Gateway(number, code) => {
                gateway_error(status(number), code, self.message, self.request_id)
            }
            Act::Throttled(retry_after) => {
                let mut answer = gateway_error(
                    StatusCode::TOO_MANY_REQUESTS,
                    "APIGW.0308",
                    self.message,
                    self.request_id,
                );
                if !retry_after.is_empty() {
                    let value = HeaderValue::from_static(retry_after);
                    answer.headers_mut().insert(header::RETRY_AFTER, value);
                }
                answer
            }
            Act::Json(number, body) => json(status(number), self.fill(body)),
            Act::Typed(content_type) => answer(StatusCode::OK, content_type, self.fill(NORMAL)),
            Act::Flaky(failures) if state.flakes(self.instance_id, self.workflow_id, failures) => {
                self.plainest(StatusCode::SERVICE_UNAVAILABLE)
            }
            Act::Slow(_) | Act::Flaky(_) => normal(),
            Act::Huge => json(
                StatusCode::OK,
                format!(r#"{{"instance_name":"{}"}}"#, "x".repeat(1024 * 1024)),
            ),
            Act::Gzip => {
                let mut answer = json(StatusCode::OK, GZIP);
                answer
                    .headers_mut()
                    .insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                answer
            }
            Act::Broken(_) => unreachable!("broken answers never get here"),
        }
    }

    /// The plainest answer with a status. The codes `DBS.000<status>` are none of RDS's, so that the status decides.
    fn plainest(&self, status: StatusCode) -> Answer {
        match status.as_u16() {
            204 | 304 => json(status, ""),
            200..=299 => json(status, self.fill(NORMAL)),
            300..=399 => {
                let location = format!(
                    "/v3/{}/instances/{EXAMPLE_INSTANCE_ID}/task-center-detail",
                    self.project_id
                );
                let mut answer = json(status, "");
                answer.headers_mut().insert(
                    header::LOCATION,
                    HeaderValue::try_from(location).expect("a path makes a header value"),
                );
                answer
            }
            number => rds_error(
                status,
                &format!("DBS.{number:06}"),
                &format!("The sandbox answers with HTTP {number}."),
            ),
        }
    }

    fn fill(&self, body: &str) -> String {
        fill(body, self.instance_id, self.workflow_id)
    }
}

fn fill(body: &str, instance_id: &str, workflow_id: &str) -> String {
    body.replace("<instance>", &quoted(instance_id))
        .replace("<task>", &quoted(workflow_id))
}

/// A page as load balancers write it.
fn page(status: StatusCode) -> Answer {
    let number = status.as_u16();
    let title = status.canonical_reason().unwrap_or("Error");
    answer(
        status,
        "text/html",
        format!(
            "<html>\r\n<head><title>{number} {title}</title></head>\r\n<body>\r\n<center><h1>{number} {title}</h1></center>\r\n</body>\r\n</html>\r\n"
        ),
    )
}
