//! Converts a task from the wire format of RDS to the message of the proto: its text unchanged, and typed fields next to it.

use jiff::Timestamp;

use crate::{
    pb::{GetTaskDetailResponse, SubTask, TaskState},
    upstream::wire,
};

/// Converts a task to the message of the proto.
pub fn to_message(task: wire::TaskDetail) -> GetTaskDetailResponse {
    GetTaskDetailResponse {
        state: state(task.status.as_deref()).into(),
        progress_percent: percent(task.process.as_deref()),
        create_time: time(task.created_at.as_deref()),
        update_time: time(task.update_at.as_deref()),
        instance_id: task.instance_id,
        instance_name: task.instance_name,
        job_id: task.job_id,
        job_name: task.job_name,
        created_at: task.created_at,
        update_at: task.update_at,
        process: task.process,
        status: task.status,
        sub_task_list: task.sub_task_list.into_iter().map(to_sub_task).collect(),
    }
}

fn to_sub_task(part: wire::SubTask) -> SubTask {
    SubTask {
        state: state(part.status.as_deref()).into(),
        progress_percent: percent(part.percent.as_deref()),
        sub_task_name: part.sub_task_name,
        percent: part.percent,
        executed_time: part.executed_time,
        status: part.status,
        remaining_time: part.remaining_time,
        show_detail: part.show_detail,
    }
}

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// The states that RDS documents for related calls; it documents none for this call.
const STATES: [(&str, TaskState); 8] = [
    ("initing", TaskState::Pending),
    ("pending", TaskState::Pending),
    ("unauthorized", TaskState::Pending),
    ("running", TaskState::Running),
    ("completed", TaskState::Succeeded),
    ("failed", TaskState::Failed),
    ("canceled", TaskState::Canceled),
    ("cancelled", TaskState::Canceled),
];

fn state(status: Option<&str>) -> TaskState {
    let status = status.unwrap_or_default().trim();
    STATES
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(status))
        .map_or(TaskState::Unspecified, |(_, state)| *state)
}

/// Parses a number from 0 to 100, with or without a per cent sign, and rounds it down.
fn percent(text: Option<&str>) -> Option<u32> {
    let text = text?.trim();
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    // `f64` also parses a sign, "inf" and "nan".
    if !number.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let number: f64 = number.parse().ok()?;
    (number <= 100.0).then_some(number as u32)
}

/// Parses a time of RFC 3339, or one whose offset has no colon.
fn time(text: Option<&str>) -> Option<prost_types::Timestamp> {
    let text = text?.trim();
    // The parser also accepts other forms of ISO 8601: without seconds or separators, or with the name of a time zone.
    let separators = text.as_bytes().get(10..17)?;
    let is_rfc3339 =
        b"Tt ".contains(&separators[0]) && separators[3] == b':' && separators[6] == b':';
    if !is_rfc3339 || text.ends_with(']') {
        return None;
    }
    let time: Timestamp = text.parse().ok()?;
    let nanos = time.as_nanosecond();
    Some(prost_types::Timestamp {
        seconds: nanos.div_euclid(NANOS_PER_SECOND) as i64,
        nanos: nanos.rem_euclid(NANOS_PER_SECOND) as i32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_the_fields_of_the_task_and_no_others() {
        let text = |text: &str| Some(text.to_owned());
        let task = wire::TaskDetail {
            instance_id: "1".into(),
            instance_name: "2".into(),
            job_id: "3".into(),
            job_name: "4".into(),
            created_at: text("2025-12-09T08:09:10+0800"),
            update_at: text("6"),
            process: text("7"),
            status: text("Completed"),
            sub_task_list: vec![
                wire::SubTask {
                    sub_task_name: text("9"),
                    percent: text("10"),
                    executed_time: text("11"),
                    status: text("12"),
                    remaining_time: text("13"),
                    show_detail: Some(false),
                },
                wire::SubTask::default(),
            ],
        };
        let expected = GetTaskDetailResponse {
            instance_id: "1".into(),
            instance_name: "2".into(),
            job_id: "3".into(),
            job_name: "4".into(),
            created_at: text("2025-12-09T08:09:10+0800"),
            update_at: text("6"),
            process: text("7"),
            status: text("Completed"),
            state: TaskState::Succeeded.into(),
            progress_percent: Some(7),
            create_time: Some(prost_types::Timestamp {
                seconds: 1_765_238_950,
                nanos: 0,
            }),
            update_time: None,
            sub_task_list: vec![
                SubTask {
                    sub_task_name: text("9"),
                    percent: text("10"),
                    executed_time: text("11"),
                    status: text("12"),
                    remaining_time: text("13"),
                    show_detail: Some(false),
                    state: TaskState::Unspecified.into(),
                    progress_percent: Some(10),
                },
                SubTask::default(),
            ],
        };

        assert_eq!(to_message(task), expected);
        assert_eq!(
            to_message(wire::TaskDetail::default()),
            GetTaskDetailResponse::default()
        );
    }

    #[test]
    fn every_documented_word_has_a_state_and_other_words_have_none() {
        let cases = [
            ("Initing", TaskState::Pending),
            (" Pending ", TaskState::Pending),
            ("UNAUTHORIZED", TaskState::Pending),
            ("Running", TaskState::Running),
            ("completed\n", TaskState::Succeeded),
            ("FAILED", TaskState::Failed),
            ("Canceled", TaskState::Canceled),
            ("cancelled", TaskState::Canceled),
            ("", TaskState::Unspecified),
            ("Complete", TaskState::Unspecified),
            ("Completed successfully", TaskState::Unspecified),
            ("Success", TaskState::Unspecified),
        ];

        for (status, expected) in cases {
            assert_eq!(state(Some(status)), expected, "{status:?}");
        }
        assert_eq!(state(None), TaskState::Unspecified);
    }

    #[test]
    fn a_percentage_is_a_number_from_0_to_100() {
        let cases = [
            ("60", Some(60)),
            ("60%", Some(60)),
            ("60% ", Some(60)),
            (" 60 %", Some(60)),
            ("25.2", Some(25)),
            ("99.99%", Some(99)),
            ("0", Some(0)),
            ("100", Some(100)),
            ("100.0", Some(100)),
            ("100.1", None),
            ("101", None),
            ("-1", None),
            ("+5", None),
            ("1e2", Some(100)),
            ("1e3", None),
            ("inf", None),
            ("NaN", None),
            ("", None),
            ("%", None),
            (".", None),
            ("1.2.3", None),
            ("60%%", None),
            ("\u{0666}", None),
            ("half", None),
        ];

        for (text, expected) in cases {
            assert_eq!(percent(Some(text)), expected, "{text:?}");
        }
    }

    #[test]
    fn a_time_has_an_offset_with_or_without_colon() {
        let cases = [
            ("2025-12-09T08:09:10+0800", Some((1_765_238_950, 0))),
            ("2025-12-09T08:09:10+08:00", Some((1_765_238_950, 0))),
            ("2025-12-09T00:09:10Z", Some((1_765_238_950, 0))),
            (
                "2025-12-09 00:09:10.25Z",
                Some((1_765_238_950, 250_000_000)),
            ),
            ("2025-12-08T19:09:10-05:00", Some((1_765_238_950, 0))),
            ("1969-12-31T23:59:59.5Z", Some((-1, 500_000_000))),
            ("2025-12-09T08:09:10", None),
            ("2025-12-09T08:09+0800", None),
            ("20251209T080910Z", None),
            ("2025-12-09T08:09:10+08:00[Asia/Shanghai]", None),
            ("2025-13-09T08:09:10Z", None),
            ("2025-12-09", None),
            ("1765267750000", None),
            ("", None),
        ];

        for (text, expected) in cases {
            let parsed = time(Some(text)).map(|time| (time.seconds, time.nanos));

            assert_eq!(parsed, expected, "{text:?}");
        }
    }
}
