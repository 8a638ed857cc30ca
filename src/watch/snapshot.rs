//! One state of a watched task, encoded once for all its watchers.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use aws_lc_rs::digest;
use bytes::Bytes;
use prost::{
    Message as _,
    encoding::{self, WireType},
};

use crate::{
    pb::{GetTaskDetailResponse, SubTask, TaskState, WatchTaskDetailResponse},
    task::Task,
};

/// The longest state of a watched task, in bytes of its encoded message: each watcher may hold one.
const MAX_BYTES: usize = 64 * 1024;

/// The number of the field `task` in the message of a watch.
const TASK_FIELD: u32 = 1;

/// One state of a task.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// The encoded message with task and etag. Protobuf merges messages that follow each other, so a watcher appends the check time.
    pub(super) message: Bytes,
    /// Identifies the text of RDS: a hash of the fields 1 to 9, equal in all processes.
    pub(super) etag: String,
    /// The task is over.
    pub(super) is_over: bool,
    /// RDS calls the task completed and one of its parts pending or running.
    pub(super) is_contradictory: bool,
    /// A hash of the states and percentages.
    significant: u64,
}

impl Snapshot {
    /// Encodes a task; `None` if it is longer than [`MAX_BYTES`].
    pub(super) fn new(task: &Task) -> Option<Self> {
        if task.encoded_len() > MAX_BYTES {
            return None;
        }
        let is_unfinished = |state| matches!(state, TaskState::Pending | TaskState::Running);
        let state = task.message().state();
        let etag = etag(task);
        let mut message = Vec::with_capacity(task.encoded_len() + 64);
        encoding::encode_key(TASK_FIELD, WireType::LengthDelimited, &mut message);
        encoding::encode_varint(task.encoded_len() as u64, &mut message);
        task.encode(&mut message);
        WatchTaskDetailResponse {
            etag: etag.clone(),
            ..WatchTaskDetailResponse::default()
        }
        .encode_raw(&mut message);
        Some(Self {
            is_over: matches!(
                state,
                TaskState::Succeeded | TaskState::Failed | TaskState::Canceled
            ),
            is_contradictory: state == TaskState::Succeeded
                && task.parts().any(|part| is_unfinished(part.state())),
            significant: significant(task),
            message: message.into(),
            etag,
        })
    }

    /// Whether the states or percentages differ, and not only texts such as times.
    pub(super) fn differs_significantly(&self, other: &Self) -> bool {
        self.significant != other.significant
    }
}

/// The etag of a task.
pub fn etag(task: &Task) -> String {
    let mut hash = digest::Context::new(&digest::SHA256);
    let mut text = GetTaskDetailResponse {
        state: TaskState::Unspecified.into(),
        progress_percent: None,
        create_time: None,
        update_time: None,
        ..task.message().clone()
    };
    hash.update(&text.encode_to_vec());
    for part in task.parts() {
        text = GetTaskDetailResponse {
            sub_task_list: vec![SubTask {
                state: TaskState::Unspecified.into(),
                progress_percent: None,
                ..part
            }],
            ..GetTaskDetailResponse::default()
        };
        hash.update(&text.encode_to_vec());
    }
    let digest = hash.finish();
    let start = digest.as_ref().first_chunk();
    let start = u128::from_be_bytes(*start.expect("SHA-256 has 32 bytes"));
    format!("{start:032x}")
}

fn significant(task: &Task) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&task.message().status, &task.message().process).hash(&mut hasher);
    for part in task.parts() {
        (&part.status, &part.percent).hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::wire::parse_task_detail;

    fn snapshot(body: &str) -> Snapshot {
        let task = parse_task_detail(body.as_bytes()).expect("a task");
        Snapshot::new(&task).expect("a short task")
    }

    #[test]
    fn the_etag_is_a_stable_hash_of_the_text() {
        let pinned = snapshot(r#"{"job_id":"j","status":"Running","process":"40"}"#);
        let cases = [
            r#"{"status":"Running","job_id":"j","process":40,"unknown":1}"#,
            r#"{"job_id":"j","status":"running","process":"40"}"#,
            r#"{"job_id":"j","status":"Running","process":"40","update_at":""}"#,
            r#"{"job_id":"j","status":"Running","process":"40","sub_task_list":[{}]}"#,
        ];

        let same: Vec<bool> = cases
            .into_iter()
            .map(|body| snapshot(body).etag == pinned.etag)
            .collect();

        assert_eq!(pinned.etag, "3c4ba16559c055bd29179cefe053a9e7");
        assert_eq!(same, [true, false, false, false]);
    }

    #[test]
    fn states_and_percentages_are_significant_and_times_are_not() {
        let first = snapshot(
            r#"{"job_id":"j","status":"Running","process":"40","sub_task_list":[{"status":"Running","percent":"1"}]}"#,
        );
        let cases = [
            (
                r#"{"job_id":"j","status":"Running","process":"40","update_at":"1","sub_task_list":[{"status":"Running","percent":"1","executed_time":"9"}]}"#,
                false,
            ),
            (
                r#"{"job_id":"j","status":"Failed","process":"40","sub_task_list":[{"status":"Running","percent":"1"}]}"#,
                true,
            ),
            (
                r#"{"job_id":"j","status":"Running","process":"41","sub_task_list":[{"status":"Running","percent":"1"}]}"#,
                true,
            ),
            (
                r#"{"job_id":"j","status":"Running","process":"40","sub_task_list":[{"status":"Running","percent":"2"}]}"#,
                true,
            ),
            (
                r#"{"job_id":"j","status":"Running","process":"40","sub_task_list":[{"status":"Failed","percent":"1"}]}"#,
                true,
            ),
        ];

        for (body, expected) in cases {
            assert_eq!(
                snapshot(body).differs_significantly(&first),
                expected,
                "{body}"
            );
        }
    }

    #[test]
    fn a_task_is_over_by_its_state_and_contradictory_if_a_part_is_not() {
        let cases = [
            (r#"{"job_id":"j"}"#, false, false),
            (r#"{"job_id":"j","status":"Odd"}"#, false, false),
            (r#"{"job_id":"j","status":"Running"}"#, false, false),
            (r#"{"job_id":"j","status":"Completed"}"#, true, false),
            (r#"{"job_id":"j","status":"Failed"}"#, true, false),
            (r#"{"job_id":"j","status":"Cancelled"}"#, true, false),
            (
                r#"{"job_id":"j","status":"Completed","sub_task_list":[{"status":"Pending"}]}"#,
                true,
                true,
            ),
            (
                r#"{"job_id":"j","status":"Completed","sub_task_list":[{"status":"Completed"},{"status":"running"}]}"#,
                true,
                true,
            ),
            (
                r#"{"job_id":"j","status":"Completed","sub_task_list":[{},{"status":"Odd"}]}"#,
                true,
                false,
            ),
            (
                r#"{"job_id":"j","status":"Failed","sub_task_list":[{"status":"Running"}]}"#,
                true,
                false,
            ),
        ];

        for (body, is_over, is_contradictory) in cases {
            let snapshot = snapshot(body);

            assert_eq!(
                (snapshot.is_over, snapshot.is_contradictory),
                (is_over, is_contradictory),
                "{body}"
            );
        }
    }

    #[test]
    fn a_task_over_the_limit_has_no_snapshot() {
        for (length, expected) in [(MAX_BYTES - 100, true), (MAX_BYTES, false)] {
            let task = Task::new(GetTaskDetailResponse {
                job_name: "n".repeat(length),
                ..GetTaskDetailResponse::default()
            });

            assert_eq!(Snapshot::new(&task).is_some(), expected, "{length}");
        }
    }
}
