//! The magic instance ids. Each selects one behaviour of the sandbox, like the test cards of a payment provider.

use super::{
    EXAMPLE_INSTANCE_ID, EXAMPLE_WORKFLOW_ID,
    course::{Course, RUNNING_TASK},
    transport::Break,
};

/// What the sandbox does. A number is an HTTP status unless stated otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) enum Act {
    /// The shortest response with this status; an error has a code that RDS does not use.
    Status(u16),
    /// A response without a body.
    Empty(u16),
    /// An HTML page like that of a load balancer.
    Page(u16),
    /// An error in the format of RDS with this code and message.
    Rds(u16, &'static str, &'static str),
    /// An error in the format of the API gateway with this code and message.
    Gateway(u16, &'static str, &'static str),
    /// The gateway's throttling error with this policy, and this `Retry-After` unless it is empty.
    Throttled(&'static str, &'static str),
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

const NO_ERROR_CODE: &str = r#"{"error_code":null,"error_msg":null,"instance_id":<instance>,"instance_name":"rds-mysql-2","job_id":<task>,"job_name":"CreateMysqlSingleHAInstance"}"#;

/// The magic instance ids without a number; [`Act::find`] parses the families with a number. `docs/sandbox.md` documents all of them,
/// with the facade's status for each.
#[rustfmt::skip] // A table: one row, one line.
pub(super) const SCENARIOS: &[(&str, Act)] = &[
    // Successes.
    ("every-field", Act::Json(200, EVERY_FIELD)),
    ("finished", Act::Task(Course::Completes(0))),
    ("null-fields", Act::Json(200, NULLS)),
    ("numbers-for-text", Act::Json(200, NUMBERS)),
    ("unknown-fields", Act::Json(200, UNKNOWN_FIELDS)),
    ("other-instance", Act::Json(200, OTHER_INSTANCE)),
    ("no-error-code", Act::Json(200, NO_ERROR_CODE)),
    ("wrong-content-type", Act::Typed("text/plain")),
    // States of a task.
    ("odd-status", Act::Json(200, ODD_STATUS)),
    ("no-status", Act::Json(200, NO_STATUS)),
    ("completed-early", Act::Task(Course::CompletedEarly)),
    // Bodies of a 404.
    ("status-404-empty", Act::Empty(404)),
    ("status-404-html", Act::Page(404)),
    // Error codes that decide instead of the status.
    ("task-not-found", Act::Rds(400, "DBS.200543", "The task does not exist.")),
    ("instance-not-found", Act::Rds(404, "DBS.200045", "The DB instance does not exist.")),
    ("invalid-parameter", Act::Rds(400, "DBS.280001", "Parameter error.")),
    ("instance-busy", Act::Rds(409, "DBS.200047", "Another operation is being performed on the DB instance or the instance is faulty.")),
    ("instance-busy-500", Act::Rds(500, "DBS.280228", "Another operation is being performed on the DB instance.")),
    ("instance-not-ready", Act::Rds(500, "DBS.280036", "The DB instance is not ready yet.")),
    ("service-timeout", Act::Rds(500, "DBS.111205", "The request timed out.")),
    ("disk-full", Act::Rds(409, "DBS.200316", "The operation is forbidden while the storage is full.")),
    ("name-taken", Act::Rds(409, "DBS.200022", "The DB instance name already exists.")),
    ("instance-quota", Act::Rds(413, "DBS.200046", "The DB instance quota is used up.")),
    ("sold-out", Act::Rds(400, "DBS.200056", "The resources are sold out.")),
    ("arrears", Act::Rds(400, "DBS.280449", "The object is frozen.")),
    ("not-visible", Act::Rds(403, "DBS.200044", "The resource does not exist or you may not see it.")),
    ("policy-denial", Act::Json(403, POLICY_DENIAL)),
    ("token-invalid", Act::Rds(403, "DBS.280056", "Invalid token.")),
    ("token-refused", Act::Gateway(401, "APIGW.0301", "Incorrect IAM authentication information: decrypt token fail")),
    ("token-outdated", Act::Gateway(401, "APIGW.0307", "The token must be updated.")),
    ("token-without-right", Act::Rds(401, "IAM.0064", "The access token lacks the permission.")),
    ("iam-degraded", Act::Rds(410, "IAM.0020", "Authentication has failed over to another region.")),
    ("api-not-found", Act::Gateway(404, "APIGW.0101", "The API does not exist or has not been published in the environment.")),
    ("backend-not-found", Act::Gateway(404, "APIGW.0103", "The backend does not exist.")),
    ("backend-unavailable", Act::Gateway(502, "APIGW.0201", "Backend unavailable.")),
    ("backend-timeout", Act::Gateway(504, "APIGW.0201", "Backend timeout.")),
    ("app-quota", Act::Gateway(405, "APIGW.0501", "The app quota is used up.")),
    ("app-frozen", Act::Gateway(405, "APIGW.0502", "The app is frozen.")),
    ("iam-unreachable", Act::Gateway(503, "APIGW.0613", "IAM is not available.")),
    ("throttled", Act::Throttled("policy user over ratelimit,limit:200,time:5 minute", "")),
    ("throttled-ip", Act::Throttled("policy ip over ratelimit,limit:60,time:1 minute", "")),
    ("throttled-retry-after", Act::Throttled("policy user over ratelimit,limit:60,time:1 minute", "2")),
    // Bodies that are not a task.
    ("error-200", Act::Rds(200, "DBS.200543", "The task does not exist.")),
    ("error-200-unknown", Act::Rds(200, "DBS.999999", "Something unknown.")),
    ("html-200", Act::Page(200)),
    ("html-502", Act::Page(502)),
    ("empty-body", Act::Empty(200)),
    ("malformed-json", Act::Json(200, r#"{"instance_id":<instance>,"#)),
    ("json-array", Act::Json(200, "[]")),
    ("json-null", Act::Json(200, "null")),
    ("json-empty-object", Act::Json(200, "{}")),
    ("json-all-null", Act::Json(200, ALL_NULL)),
    ("huge", Act::Huge),
    ("huge-chunked", Act::Broken(Break::HugeChunked)),
    ("gzip", Act::Gzip),
    // The connection.
    ("reset", Act::Broken(Break::Reset)),
    ("close", Act::Broken(Break::Close)),
    ("cut-body", Act::Broken(Break::CutBody)),
    ("cut-chunked", Act::Broken(Break::CutChunked)),
    ("reset-body", Act::Broken(Break::ResetBody)),
    ("bad-chunk", Act::Broken(Break::BadChunk)),
    ("garbage", Act::Broken(Break::Garbage)),
    ("two-lengths", Act::Broken(Break::TwoLengths)),
    ("early-hints", Act::Broken(Break::EarlyHints)),
    ("status-101", Act::Broken(Break::SwitchingProtocols)),
    ("dribble-head", Act::Broken(Break::DribbleHead)),
    ("dribble-body", Act::Broken(Break::DribbleBody)),
];

impl Act {
    /// The behaviour of an instance id.
    pub(super) fn find(instance_id: &str) -> Option<Self> {
        let listed = SCENARIOS.iter().find(|(listed, _)| *listed == instance_id);
        if let Some((_, act)) = listed {
            return Some(*act);
        }
        let (family, number) = instance_id.rsplit_once('-')?;
        let number: u32 = number.parse().ok()?;
        Some(match family {
            "status" if (200..=999).contains(&number) => Self::Status(number as u16),
            "slow" if number <= MAX_DELAY => Self::Slow(number),
            "flaky" => Self::Flaky(number),
            "lifecycle" => Self::Task(Course::Completes(number)),
            "fails" => Self::Task(Course::Stops(number, "Failed")),
            "canceled" => Self::Task(Course::Stops(number, "Canceled")),
            "late" => Self::Task(Course::Late(number)),
            "vanishes" => Self::Task(Course::Vanishes(number)),
            _ => return None,
        })
    }

    /// The behaviour of a workflow id of the example's instance.
    pub(super) fn find_example(instance_id: &str, workflow_id: &str) -> Option<Self> {
        if instance_id != EXAMPLE_INSTANCE_ID {
            return None;
        }
        match workflow_id {
            EXAMPLE_WORKFLOW_ID => Some(Self::Json(200, NORMAL)),
            "running-task" => Some(Self::Task(RUNNING_TASK)),
            _ => Self::find(workflow_id).filter(|act| matches!(act, Self::Task(_))),
        }
    }
}
