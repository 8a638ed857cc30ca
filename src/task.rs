//! A task as the message of the proto: the text of RDS unchanged, and typed fields next to it.

use std::time::SystemTime;

use bytes::BufMut;
use jiff::Timestamp;
use prost::{DecodeError, Message as _, encoding};

use crate::pb::{GetTaskDetailResponse, SubTask, TaskState};

/// The number of the field `sub_task_list`.
const PARTS_FIELD: u32 = 9;

/// A task. Its parts stay encoded: an empty part takes two bytes, and decoded a hundred times as much.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Task {
    /// The message without its parts.
    message: GetTaskDetailResponse,
    /// The encoded field `sub_task_list`.
    parts: Vec<u8>,
}

impl Task {
    /// A task with the text in `message`, which has no parts.
    pub fn new(message: GetTaskDetailResponse) -> Self {
        Self {
            message: GetTaskDetailResponse {
                state: state(message.status.as_deref()).into(),
                progress_percent: percent(message.process.as_deref()),
                create_time: time(message.created_at.as_deref()),
                update_time: time(message.update_at.as_deref()),
                ..message
            },
            parts: Vec::new(),
        }
    }

    /// Allocates memory for the parts that `json` describes: encoded, they are not longer.
    pub fn reserve_parts(&mut self, json: &str) {
        self.parts.reserve_exact(json.len());
    }

    /// Adds a part with the text in `part`.
    pub fn push(&mut self, part: SubTask) {
        let part = SubTask {
            state: state(part.status.as_deref()).into(),
            progress_percent: percent(part.percent.as_deref()),
            ..part
        };
        encoding::message::encode(PARTS_FIELD, &part, &mut self.parts);
    }

    /// Frees the memory that the parts do not use.
    pub fn shrink(&mut self) {
        self.parts.shrink_to_fit();
    }

    /// The task without its parts.
    pub fn message(&self) -> &GetTaskDetailResponse {
        &self.message
    }

    /// Decodes the parts one by one.
    pub fn parts(&self) -> impl Iterator<Item = SubTask> {
        let mut rest = &self.parts[..];
        std::iter::from_fn(move || {
            encoding::decode_key(&mut rest).ok()?;
            SubTask::decode_length_delimited(&mut rest).ok()
        })
    }

    /// The length of the encoded message in bytes.
    pub fn encoded_len(&self) -> usize {
        self.message.encoded_len() + self.parts.len()
    }

    /// The encoded message.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len());
        self.encode(&mut bytes);
        bytes
    }

    /// The task in an encoded message.
    ///
    /// # Errors
    /// [`DecodeError`] for other bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut message = GetTaskDetailResponse::decode(bytes)?;
        let parts = std::mem::take(&mut message.sub_task_list);
        let mut task = Self::new(message);
        for part in parts {
            task.push(part);
        }
        Ok(task)
    }

    /// Encodes the message.
    pub fn encode(&self, buffer: &mut impl BufMut) {
        self.message.encode_raw(buffer);
        buffer.put_slice(&self.parts);
    }
}

/// 0001-01-01T00:00:00Z, the first time of `google.protobuf.Timestamp`; many clients fail on an earlier one.
const FIRST_SECOND: i64 = -62_135_596_800;

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
    let time = prost_types::Timestamp::from(SystemTime::try_from(time).ok()?);
    (time.seconds >= FIRST_SECOND).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_the_fields_of_the_task_and_no_others() {
        let text = |text: &str| Some(text.to_owned());
        let without_parts = GetTaskDetailResponse {
            instance_id: "1".into(),
            instance_name: "2".into(),
            job_id: "3".into(),
            job_name: "4".into(),
            created_at: text("2025-12-09T08:09:10+0800"),
            update_at: text("6"),
            process: text("7"),
            status: text("Completed"),
            ..GetTaskDetailResponse::default()
        };
        let part = SubTask {
            sub_task_name: text("9"),
            percent: text("10"),
            executed_time: text("11"),
            status: text("12"),
            remaining_time: text("13"),
            show_detail: Some(false),
            ..SubTask::default()
        };
        let parts = vec![
            SubTask {
                progress_percent: Some(10),
                ..part.clone()
            },
            SubTask::default(),
        ];
        let expected = GetTaskDetailResponse {
            state: TaskState::Succeeded.into(),
            progress_percent: Some(7),
            create_time: Some(prost_types::Timestamp {
                seconds: 1_765_238_950,
                nanos: 0,
            }),
            sub_task_list: parts.clone(),
            ..without_parts.clone()
        };

        let mut task = Task::new(without_parts);
        task.push(part);
        task.push(SubTask::default());
        let mut encoded = Vec::new();
        task.encode(&mut encoded);

        assert_eq!(GetTaskDetailResponse::decode(&*encoded).unwrap(), expected);
        assert_eq!(task.encoded_len(), encoded.len());
        assert_eq!(task.parts().collect::<Vec<_>>(), parts);
        assert_eq!(Task::new(GetTaskDetailResponse::default()), Task::default());
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
            ("0001-01-01T00:00:00Z", Some((-62_135_596_800, 0))),
            // The year 0 in UTC.
            ("0001-01-01T00:00:00+0800", None),
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
