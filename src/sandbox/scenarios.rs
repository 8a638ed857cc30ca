//! The magic instance ids. Each selects one behaviour of the sandbox, like the test cards of a payment provider.

use super::{
    EXAMPLE_INSTANCE_ID, EXAMPLE_WORKFLOW_ID,
    course::{Course, RUNNING_TASK},
    transport::Break,
};

/// A magic instance id and its effect.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// The `instance_id` in the request.
    pub instance_id: &'static str,
    /// What the sandbox does. The part after the first colon is the message of the error.
    pub description: &'static str,
    /// The facade's status with default limits: `OK`, or `CODE / REASON`.
    pub grpc: &'static str,
    pub(super) act: Act,
}

/// What the sandbox does. A number is an HTTP status unless stated otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) enum Act {
    /// The shortest response with this status; an error has a code that RDS does not use.
    Status(u16),
    /// A response without a body.
    Empty(u16),
    /// An HTML page like that of a load balancer.
    Page(u16),
    /// An error in the format of RDS, with the message from the description.
    Rds(u16, &'static str),
    /// An error in the format of the API gateway, with the message from the description.
    Gateway(u16, &'static str),
    /// The gateway's throttling error, with this `Retry-After` unless it is empty.
    Throttled(&'static str),
    /// This JSON body, with the ids for `<instance>` and `<task>`.
    Json(u16, &'static str),
    /// The normal response with this content type.
    Typed(&'static str),
    /// The normal response after this number of milliseconds.
    Slow(u32),
    /// 503 for this number of looks, then the normal response.
    Flaky(u32),
    /// A task that changes with time.
    Task(Course),
    /// A task with a field over 1 MiB.
    Huge,
    /// The normal response in gzip, which the request did not accept.
    Gzip,
    /// A response that is not valid HTTP. Requires no credential.
    Broken(Break),
}

/// Longest delay, in milliseconds.
const MAX_DELAY: u32 = 60_000;

/// The response in the documentation of RDS.
pub(super) const NORMAL: &str = r#"{"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"CreateMysqlSingleHAInstance"}"#;

const POLICY_DENIAL: &str = r#"{"error_code":"DBS.201003","error_msg":"Policy does not allow rds:task:listAll to be performed.","encoded_authorization_message":"AQAASANDBOXencodedauthorizationmessage"}"#;

const EVERY_FIELD: &str = r#"{"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"RestoreMysqlTables","created_at":"2025-12-09T08:09:10+0800","update_at":"2025-12-09T08:19:10+0800","process":"60%","status":"Running","sub_task_list":[{"sub_task_name":"Restore tables","percent":"60","executed_time":"600","status":"Running","remaining_time":"400","show_detail":true}]}"#;

const ODD_STATUS: &str = r#"{"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"RestoreMysqlTables","process":"60","status":"Hibernating"}"#;

const NO_STATUS: &str = r#"{"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"RestoreMysqlTables","process":"60"}"#;

const NULLS: &str = r#"{"instance_id":<instance>,"instance_name":null,"job_id":<task>,"job_name":null,"created_at":null,"process":null,"sub_task_list":null}"#;

const NUMBERS: &str = r#"{"instance_id":<instance>,"instance_name":17,"job_id":<task>,"job_name":true,"process":60,"sub_task_list":[{"percent":12.5,"show_detail":"false"}]}"#;

const UNKNOWN_FIELDS: &str = r#"{"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"CreateMysqlSingleHAInstance","colour":"blue","parts":[{"a":[1,2,{"b":null}]}]}"#;

const OTHER_INSTANCE: &str = r#"{"instance_id":"2ffc4167903840cb93a3da56d28c14fdin01","instance_name":"rds-mysql-3","job_id":"202772a9-31fa-4129-b9f8-7638e2792f3b","job_name":"CreateMysqlSingleHAInstance"}"#;

const ALL_NULL: &str = r#"{"instance_id":null,"instance_name":null,"job_id":null,"job_name":null}"#;

const NO_SUCH_TASK: &str = r#"{"error_code":"DBS.200543","error_msg":"The task does not exist."}"#;

const NO_ERROR_CODE: &str = r#"{"error_code":null,"error_msg":null,"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"CreateMysqlSingleHAInstance"}"#;

/// The documented magic instance ids. The families that `Act::find` parses work for any number.
#[rustfmt::skip] // A table: one row, one line.
pub const SCENARIOS: &[Scenario] = &[
    // Successes.
    row("every-field", "a task with every known field", "OK", Act::Json(200, EVERY_FIELD)),
    row("finished", "a finished task, whose `process` is empty", "OK", Act::Task(Course::Completes(0))),
    row("null-fields", "fields that are null", "OK", Act::Json(200, NULLS)),
    row("numbers-for-text", "numbers and bools in place of text, text in place of a bool", "OK", Act::Json(200, NUMBERS)),
    row("unknown-fields", "unknown fields", "OK", Act::Json(200, UNKNOWN_FIELDS)),
    row("other-instance", "a task of another instance than requested", "OK", Act::Json(200, OTHER_INSTANCE)),
    row("no-error-code", "a task whose `error_code` is null", "OK", Act::Json(200, NO_ERROR_CODE)),
    row("wrong-content-type", "JSON with Content-Type text/plain", "OK", Act::Typed("text/plain")),
    row("slow-1000", "replies after 1 s", "OK", Act::Slow(1000)),
    row("slow-60000", "replies after 60 s; the attempts or the call's deadline run out first", "DEADLINE_EXCEEDED / DEADLINE_EXCEEDED", Act::Slow(60_000)),
    row("flaky-1", "the first request for a workflow id gets 503, the next ones a task", "OK", Act::Flaky(1)),
    row("flaky-2", "the first two requests for a workflow id get 503, the next ones a task", "OK", Act::Flaky(2)),
    // Courses of a task. The outcome is that of the first look.
    row("lifecycle-20", "a task with three parts, Pending for 2 s, then Running with rising progress, and Completed after 20 s", "OK", Act::Task(Course::Completes(20))),
    row("fails-20", "the same, but Failed after 20 s, in its second part", "OK", Act::Task(Course::Stops(20, "Failed"))),
    row("canceled-20", "the same, but Canceled after 20 s, in its second part", "OK", Act::Task(Course::Stops(20, "Canceled"))),
    row("late-100", "the first 100 requests for a workflow id get DBS.200543, the next ones a running task", "NOT_FOUND / TASK_NOT_FOUND", Act::Task(Course::Late(100))),
    row("vanishes-3600", "a running task, which is unknown (DBS.200543) after 3600 s", "OK", Act::Task(Course::Vanishes(3600))),
    row("odd-status", "a task with a `status` that RDS does not use", "OK", Act::Json(200, ODD_STATUS)),
    row("no-status", "a task without `status`", "OK", Act::Json(200, NO_STATUS)),
    row("completed-early", "a Completed task; in the first reply for a workflow id, one of its parts is still Running", "OK", Act::Task(Course::CompletedEarly)),
    // Every HTTP status with its own mapping, with an error code that has none.
    row("status-201", "HTTP 201", "INTERNAL / UPSTREAM_UNEXPECTED_STATUS", Act::Status(201)),
    row("status-202", "HTTP 202", "INTERNAL / UPSTREAM_UNEXPECTED_STATUS", Act::Status(202)),
    row("status-204", "HTTP 204", "INTERNAL / UPSTREAM_UNEXPECTED_STATUS", Act::Status(204)),
    row("status-206", "HTTP 206", "INTERNAL / UPSTREAM_UNEXPECTED_STATUS", Act::Status(206)),
    row("status-301", "HTTP 301 to the example task's instance", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(301)),
    row("status-302", "HTTP 302 to the example task's instance", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(302)),
    row("status-303", "HTTP 303 to the example task's instance", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(303)),
    row("status-304", "HTTP 304", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(304)),
    row("status-307", "HTTP 307 to the example task's instance", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(307)),
    row("status-308", "HTTP 308 to the example task's instance", "INTERNAL / UPSTREAM_REDIRECT", Act::Status(308)),
    row("status-400", "HTTP 400", "INVALID_ARGUMENT / UPSTREAM_INVALID_ARGUMENT", Act::Status(400)),
    row("status-401", "HTTP 401", "UNAUTHENTICATED / CREDENTIAL_REJECTED", Act::Status(401)),
    row("status-402", "HTTP 402", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Status(402)),
    row("status-403", "HTTP 403", "PERMISSION_DENIED / PERMISSION_DENIED", Act::Status(403)),
    row("status-404", "HTTP 404 with a JSON object", "NOT_FOUND / RESOURCE_NOT_FOUND", Act::Status(404)),
    row("status-404-empty", "HTTP 404 with an empty body", "NOT_FOUND / RESOURCE_NOT_FOUND", Act::Empty(404)),
    row("status-404-html", "HTTP 404 with an HTML page", "UNIMPLEMENTED / UPSTREAM_API_NOT_FOUND", Act::Page(404)),
    row("status-405", "HTTP 405", "UNIMPLEMENTED / UPSTREAM_API_NOT_FOUND", Act::Status(405)),
    row("status-406", "HTTP 406", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(406)),
    row("status-407", "HTTP 407", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(407)),
    row("status-408", "HTTP 408", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Status(408)),
    row("status-409", "HTTP 409", "ABORTED / INSTANCE_BUSY", Act::Status(409)),
    row("status-410", "HTTP 410", "NOT_FOUND / RESOURCE_NOT_FOUND", Act::Status(410)),
    row("status-411", "HTTP 411", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(411)),
    row("status-412", "HTTP 412", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Status(412)),
    row("status-413", "HTTP 413", "RESOURCE_EXHAUSTED / QUOTA_EXHAUSTED", Act::Status(413)),
    row("status-414", "HTTP 414", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(414)),
    row("status-415", "HTTP 415", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(415)),
    row("status-417", "HTTP 417", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(417)),
    row("status-418", "HTTP 418", "UNKNOWN / UPSTREAM_UNKNOWN", Act::Status(418)),
    row("status-422", "HTTP 422", "INVALID_ARGUMENT / UPSTREAM_INVALID_ARGUMENT", Act::Status(422)),
    row("status-423", "HTTP 423", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Status(423)),
    row("status-425", "HTTP 425", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Status(425)),
    row("status-428", "HTTP 428", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Status(428)),
    row("status-429", "HTTP 429", "RESOURCE_EXHAUSTED / THROTTLED", Act::Status(429)),
    row("status-431", "HTTP 431", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(431)),
    row("status-451", "HTTP 451", "PERMISSION_DENIED / PERMISSION_DENIED", Act::Status(451)),
    row("status-494", "HTTP 494", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(494)),
    row("status-500", "HTTP 500", "INTERNAL / UPSTREAM_INTERNAL", Act::Status(500)),
    row("status-501", "HTTP 501", "UNIMPLEMENTED / UPSTREAM_API_NOT_FOUND", Act::Status(501)),
    row("status-502", "HTTP 502", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Status(502)),
    row("status-503", "HTTP 503", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Status(503)),
    row("status-504", "HTTP 504", "DEADLINE_EXCEEDED / UPSTREAM_TIMEOUT", Act::Status(504)),
    row("status-505", "HTTP 505", "INTERNAL / UPSTREAM_REJECTED_REQUEST", Act::Status(505)),
    row("status-520", "HTTP 520", "UNKNOWN / UPSTREAM_UNKNOWN", Act::Status(520)),
    row("status-999", "HTTP 999", "UNKNOWN / UPSTREAM_UNKNOWN", Act::Status(999)),
    // Error codes that decide instead of the status.
    row("task-not-found", "HTTP 400, DBS.200543: The task does not exist.", "NOT_FOUND / TASK_NOT_FOUND", Act::Rds(400, "DBS.200543")),
    row("instance-not-found", "HTTP 404, DBS.200045: The DB instance does not exist.", "NOT_FOUND / INSTANCE_NOT_FOUND", Act::Rds(404, "DBS.200045")),
    row("invalid-parameter", "HTTP 400, DBS.280001: Parameter error.", "INVALID_ARGUMENT / UPSTREAM_INVALID_ARGUMENT", Act::Rds(400, "DBS.280001")),
    row("instance-busy", "HTTP 409, DBS.200047: Another operation is being performed on the DB instance or the instance is faulty.", "ABORTED / INSTANCE_BUSY", Act::Rds(409, "DBS.200047")),
    row("instance-busy-500", "HTTP 500, DBS.280228: Another operation is being performed on the DB instance.", "ABORTED / INSTANCE_BUSY", Act::Rds(500, "DBS.280228")),
    row("instance-not-ready", "HTTP 500, DBS.280036: The DB instance is not ready yet.", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Rds(500, "DBS.280036")),
    row("service-timeout", "HTTP 500, DBS.111205: The request timed out.", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Rds(500, "DBS.111205")),
    row("disk-full", "HTTP 409, DBS.200316: The operation is forbidden while the storage is full.", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Rds(409, "DBS.200316")),
    row("name-taken", "HTTP 409, DBS.200022: The DB instance name already exists.", "ALREADY_EXISTS / ALREADY_EXISTS", Act::Rds(409, "DBS.200022")),
    row("instance-quota", "HTTP 413, DBS.200046: The DB instance quota is used up.", "RESOURCE_EXHAUSTED / QUOTA_EXHAUSTED", Act::Rds(413, "DBS.200046")),
    row("sold-out", "HTTP 400, DBS.200056: The resources are sold out.", "RESOURCE_EXHAUSTED / QUOTA_EXHAUSTED", Act::Rds(400, "DBS.200056")),
    row("arrears", "HTTP 400, DBS.280449: The object is frozen.", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Rds(400, "DBS.280449")),
    row("not-visible", "HTTP 403, DBS.200044: The resource does not exist or you may not see it.", "PERMISSION_DENIED / PERMISSION_DENIED", Act::Rds(403, "DBS.200044")),
    row("policy-denial", "HTTP 403 with an `encoded_authorization_message`", "PERMISSION_DENIED / PERMISSION_DENIED", Act::Json(403, POLICY_DENIAL)),
    row("token-invalid", "HTTP 403, DBS.280056: Invalid token.", "UNAUTHENTICATED / CREDENTIAL_REJECTED", Act::Rds(403, "DBS.280056")),
    row("token-refused", "HTTP 401, APIGW.0301: Incorrect IAM authentication information: decrypt token fail", "UNAUTHENTICATED / CREDENTIAL_REJECTED", Act::Gateway(401, "APIGW.0301")),
    row("token-outdated", "HTTP 401, APIGW.0307: The token must be updated.", "UNAUTHENTICATED / CREDENTIAL_REJECTED", Act::Gateway(401, "APIGW.0307")),
    row("token-without-right", "HTTP 401, IAM.0064: The access token lacks the permission.", "PERMISSION_DENIED / PERMISSION_DENIED", Act::Rds(401, "IAM.0064")),
    row("iam-degraded", "HTTP 410, IAM.0020: Authentication has failed over to another region.", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Rds(410, "IAM.0020")),
    row("api-not-found", "HTTP 404, APIGW.0101: The API does not exist or has not been published in the environment.", "UNIMPLEMENTED / UPSTREAM_API_NOT_FOUND", Act::Gateway(404, "APIGW.0101")),
    row("backend-not-found", "HTTP 404, APIGW.0103: The backend does not exist.", "INTERNAL / UPSTREAM_INTERNAL", Act::Gateway(404, "APIGW.0103")),
    row("backend-unavailable", "HTTP 502, APIGW.0201: Backend unavailable.", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Gateway(502, "APIGW.0201")),
    row("backend-timeout", "HTTP 504, APIGW.0201: Backend timeout.", "DEADLINE_EXCEEDED / UPSTREAM_TIMEOUT", Act::Gateway(504, "APIGW.0201")),
    row("app-quota", "HTTP 405, APIGW.0501: The app quota is used up.", "RESOURCE_EXHAUSTED / QUOTA_EXHAUSTED", Act::Gateway(405, "APIGW.0501")),
    row("app-frozen", "HTTP 405, APIGW.0502: The app is frozen.", "FAILED_PRECONDITION / PRECONDITION_FAILED", Act::Gateway(405, "APIGW.0502")),
    row("iam-unreachable", "HTTP 503, APIGW.0613: IAM is not available.", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Gateway(503, "APIGW.0613")),
    row("throttled", "HTTP 429, APIGW.0308: The throttling threshold has been reached: policy user over ratelimit,limit:200,time:5 minute", "RESOURCE_EXHAUSTED / THROTTLED", Act::Throttled("")),
    row("throttled-ip", "HTTP 429, APIGW.0308: The throttling threshold has been reached: policy ip over ratelimit,limit:60,time:1 minute", "RESOURCE_EXHAUSTED / THROTTLED", Act::Throttled("")),
    row("throttled-retry-after", "HTTP 429 with Retry-After of 2 s, APIGW.0308: The throttling threshold has been reached: policy user over ratelimit,limit:60,time:1 minute", "RESOURCE_EXHAUSTED / THROTTLED", Act::Throttled("2")),
    // Bodies that are not a task.
    row("error-200", "HTTP 200 with the error object of DBS.200543", "NOT_FOUND / TASK_NOT_FOUND", Act::Json(200, NO_SUCH_TASK)),
    row("error-200-unknown", "HTTP 200, DBS.999999: Something unknown.", "UNKNOWN / UPSTREAM_UNKNOWN", Act::Rds(200, "DBS.999999")),
    row("html-200", "HTTP 200 with an HTML page", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Page(200)),
    row("html-502", "HTTP 502 with an HTML page", "UNAVAILABLE / UPSTREAM_UNAVAILABLE", Act::Page(502)),
    row("empty-body", "HTTP 200 with an empty body", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Empty(200)),
    row("malformed-json", "truncated JSON, with a matching Content-Length", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Json(200, r#"{"instance_id":<instance>,"#)),
    row("json-array", "a JSON array", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Json(200, "[]")),
    row("json-null", "the JSON text null", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Json(200, "null")),
    row("json-empty-object", "a JSON object without fields", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Json(200, "{}")),
    row("json-all-null", "the four documented fields, all null", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Json(200, ALL_NULL)),
    row("huge", "a body over 1 MiB with Content-Length", "INTERNAL / UPSTREAM_RESPONSE_TOO_LARGE", Act::Huge),
    row("huge-chunked", "a body over 1 MiB in chunks", "INTERNAL / UPSTREAM_RESPONSE_TOO_LARGE", Act::Broken(Break::HugeChunked)),
    row("gzip", "a body in gzip, which the request does not accept", "INTERNAL / UPSTREAM_MALFORMED_RESPONSE", Act::Gzip),
    // The connection.
    row("reset", "resets the connection without a response", "UNAVAILABLE / UPSTREAM_RESET", Act::Broken(Break::Reset)),
    row("close", "closes the connection without a response", "UNAVAILABLE / UPSTREAM_RESET", Act::Broken(Break::Close)),
    row("cut-body", "closes the connection before the body's end", "UNAVAILABLE / UPSTREAM_TRUNCATED", Act::Broken(Break::CutBody)),
    row("cut-chunked", "closes the connection before the last chunk", "UNAVAILABLE / UPSTREAM_TRUNCATED", Act::Broken(Break::CutChunked)),
    row("reset-body", "resets the connection before the body's end", "UNAVAILABLE / UPSTREAM_TRUNCATED", Act::Broken(Break::ResetBody)),
    row("bad-chunk", "a chunk with an invalid size", "UNAVAILABLE / UPSTREAM_PROTOCOL", Act::Broken(Break::BadChunk)),
    row("garbage", "bytes that are not HTTP", "UNAVAILABLE / UPSTREAM_PROTOCOL", Act::Broken(Break::Garbage)),
    row("two-lengths", "two different Content-Length headers", "UNAVAILABLE / UPSTREAM_PROTOCOL", Act::Broken(Break::TwoLengths)),
    row("early-hints", "HTTP 103, then a task", "OK", Act::Broken(Break::EarlyHints)),
    row("status-101", "HTTP 101 as the final response", "INTERNAL / UPSTREAM_UNEXPECTED_STATUS", Act::Broken(Break::SwitchingProtocols)),
    row("dribble-head", "the response head, one byte every 250 ms", "DEADLINE_EXCEEDED / DEADLINE_EXCEEDED", Act::Broken(Break::DribbleHead)),
    row("dribble-body", "the response body, one byte every 250 ms", "DEADLINE_EXCEEDED / UPSTREAM_TIMEOUT", Act::Broken(Break::DribbleBody)),
];

const fn row(
    instance_id: &'static str,
    description: &'static str,
    grpc: &'static str,
    act: Act,
) -> Scenario {
    Scenario {
        instance_id,
        description,
        grpc,
        act,
    }
}

impl Act {
    /// The behaviour of an instance id, and its error message.
    pub(super) fn find(instance_id: &str) -> Option<(Self, &'static str)> {
        let listed = SCENARIOS.iter().find(|row| row.instance_id == instance_id);
        if let Some(row) = listed {
            let message = row
                .description
                .split_once(": ")
                .map_or("", |(_, text)| text);
            return Some((row.act, message));
        }
        let (family, number) = instance_id.rsplit_once('-')?;
        let number: u32 = number.parse().ok()?;
        let act = match family {
            "status" if (200..=999).contains(&number) => Self::Status(number as u16),
            "slow" if number <= MAX_DELAY => Self::Slow(number),
            "flaky" => Self::Flaky(number),
            "lifecycle" => Self::Task(Course::Completes(number)),
            "fails" => Self::Task(Course::Stops(number, "Failed")),
            "canceled" => Self::Task(Course::Stops(number, "Canceled")),
            "late" => Self::Task(Course::Late(number)),
            "vanishes" => Self::Task(Course::Vanishes(number)),
            _ => return None,
        };
        Some((act, ""))
    }

    /// The same for a workflow id of the example's instance.
    pub(super) fn find_example(
        instance_id: &str,
        workflow_id: &str,
    ) -> Option<(Self, &'static str)> {
        if instance_id != EXAMPLE_INSTANCE_ID {
            return None;
        }
        match workflow_id {
            EXAMPLE_WORKFLOW_ID => Some((Self::Json(200, NORMAL), "")),
            "running-task" => Some((Self::Task(RUNNING_TASK), "")),
            _ => Self::find(workflow_id).filter(|(act, _)| matches!(act, Self::Task(_))),
        }
    }
}
