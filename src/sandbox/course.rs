//! Tasks that change with time. The clock of a task starts at its first look: the first request with a valid credential for its
//! project id, instance id and workflow id.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::state::Look;

/// How a task goes on after its first look. Times are in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Course {
    /// Running, then Completed.
    Runs(u32),
    /// Pending for a tenth of the time, then Running, then Completed.
    Completes(u32),
    /// Pending for a tenth of the time, then Running, then this status in the middle of the work.
    Stops(u32, &'static str),
    /// Unknown in this number of looks, then as [`RUNNING_TASK`].
    Late(u32),
    /// Running, then unknown.
    Vanishes(u32),
    /// Completed; in the first look, a part is still running.
    CompletedEarly,
}

/// The course of the workflow id `running-task`.
pub(super) const RUNNING_TASK: Course = Course::Runs(120);

/// The parts of the work. Each takes a third of it.
const PARTS: [&str; 3] = ["Prepare resources", "Restore data", "Verify instance"];

/// How long a task that is over in its first look has worked before.
const EARLIER_WORK: SignedDuration = SignedDuration::from_mins(10);

impl Course {
    /// The task in this look; `None` if it is unknown.
    pub(super) fn task(self, instance_id: &str, workflow_id: &str, look: Look) -> Option<Value> {
        let (seconds, end, is_whole) = match self {
            Self::Late(looks) if look.number < u64::from(looks) => return None,
            Self::Late(_) => return RUNNING_TASK.task(instance_id, workflow_id, look),
            Self::Runs(seconds) | Self::Completes(seconds) => (seconds, "Completed", true),
            Self::Stops(seconds, status) => (seconds, status, false),
            Self::Vanishes(seconds) => (seconds, "", false),
            Self::CompletedEarly => (0, "Completed", true),
        };
        let earlier = match seconds {
            0 => EARLIER_WORK,
            _ => SignedDuration::ZERO,
        };
        let time = earlier + SignedDuration::from_secs(seconds.into());
        let elapsed = (earlier + look.elapsed).clamp(SignedDuration::ZERO, time);
        let is_over = elapsed == time;
        if is_over && end.is_empty() {
            return None;
        }
        let has_pending = matches!(self, Self::Completes(_) | Self::Stops(..));
        let is_pending = has_pending && elapsed < time / 10;
        let worked = match self {
            _ if is_pending => SignedDuration::ZERO,
            Self::CompletedEarly if look.number == 0 => time * 29 / 30,
            _ => elapsed,
        };
        let work = if is_whole { time } else { time * 2 };
        let status = match (is_over, is_pending) {
            (true, _) => end,
            (false, true) => "Pending",
            (false, false) => "Running",
        };
        let part_work = (work / 3).as_millis();
        let parts = (0..).zip(PARTS).map(|(index, name)| {
            let executed = (worked.as_millis() - index * part_work).clamp(0, part_work);
            let status = match executed {
                0 => "Pending",
                _ if executed == part_work => "Completed",
                _ if is_over && !is_whole => end,
                _ => "Running",
            };
            json!({
                "sub_task_name": name,
                "percent": (executed * 100 / part_work).to_string(),
                "executed_time": (executed / 1000).to_string(),
                "status": status,
                "remaining_time": ((part_work - executed) / 1000).to_string(),
                "show_detail": index == 1,
            })
        });
        let process = match is_over {
            // As related calls of RDS document it.
            true => String::new(),
            false => (worked.as_millis() * 100 / work.as_millis()).to_string(),
        };
        let created_at = look.first_at - earlier;
        Some(json!({
            "instance_id": instance_id,
            "instance_name": "rds-mysql-2",
            "job_id": workflow_id,
            "job_name": "RestoreMysqlInstance",
            "created_at": format_time(created_at),
            "update_at": format_time(created_at + worked),
            "process": process,
            "status": status,
            "sub_task_list": parts.collect::<Vec<_>>(),
        }))
    }
}

/// The format of the task center, whose offsets have no colon.
fn format_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S+0000").to_string()
}
