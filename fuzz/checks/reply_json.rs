//! The body of a 200 is parsed to the task in its JSON tree, or to an error. The encoded task is hardly longer than the body.

use std::fmt;

use rds_task_facade::{
    pb::{GetTaskDetailResponse, SubTask},
    task::Task,
    upstream::wire::{NotATask, parse_task_detail},
};
use serde::{
    Deserializer as _,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

const TASK_FIELDS: [&str; 9] = [
    "instance_id",
    "instance_name",
    "job_id",
    "job_name",
    "created_at",
    "update_at",
    "process",
    "status",
    "sub_task_list",
];
const ERROR_FIELDS: [&str; 5] = ["error_code", "errorCode", "errCode", "code", "message"];
const PART_FIELDS: [&str; 6] = [
    "sub_task_name",
    "percent",
    "executed_time",
    "status",
    "remaining_time",
    "show_detail",
];

pub(crate) fn check(input: &[u8]) {
    let read = parse_task_detail(input);
    if let Ok(task) = &read {
        assert_bounded(task, input.len());
    }
    // The tree rejects lone surrogates everywhere; the parser skips them in unknown fields.
    let json = serde_json::from_slice::<&RawValue>(input).ok();
    let Some(tree) = json.and_then(Tree::read) else {
        return;
    };
    match (read, parse_tree(&tree)) {
        (Ok(task), Some(Ok(expected))) => assert_eq!(task, expected),
        (Err(NotATask::ErrorObject(envelope)), Some(Err(ErrorCode))) => assert!(envelope.has_code),
        // An error code in a nested object, in a body without task fields.
        (Err(NotATask::ErrorObject(envelope)), None) => {
            assert!(envelope.has_code && tree.fields().is_some());
        }
        (Err(NotATask::Malformed), None) => {}
        (Err(NotATask::TooManyParts), Some(Ok(task))) => assert!(task.parts().count() > 10_000),
        (read, expected) => panic!("{read:?} but expected {expected:?}"),
    }
}

fn assert_bounded(task: &Task, input_bytes: usize) {
    // The typed fields of the task.
    const TYPED: usize = 40;
    let encoded = task.encoded_len();
    assert!(encoded <= input_bytes + TYPED, "{encoded} of {input_bytes}");
}

#[derive(Debug)]
struct ErrorCode;

/// `None` for a body that is not a task and has no error code at its top level.
fn parse_tree(tree: &Tree) -> Option<Result<Task, ErrorCode>> {
    let known: Vec<_> = [&TASK_FIELDS[..], &ERROR_FIELDS].concat();
    let top = tree.fields().filter(|_| tree.names_once(&known))?;
    let code = |name: &str| match tree.field(name)? {
        Tree::Text(text) => (!text.trim().is_empty()).then_some(()),
        Tree::Number(_) => Some(()),
        _ => None,
    };
    let named = ["error_code", "errorCode", "errCode"]
        .into_iter()
        .any(|name| code(name).is_some());
    let has_message = top
        .iter()
        .any(|(name, value)| name == "message" && !matches!(value, Tree::Null));
    if named || (has_message && code("code").is_some()) {
        return Some(Err(ErrorCode));
    }
    let documented = TASK_FIELDS[..4].iter().map(|name| tree.text(name));
    if documented.into_iter().all(|text| text.is_none()) {
        return None;
    }
    let items = match tree.field("sub_task_list") {
        Some(Tree::List(items)) => items.iter().collect(),
        other => Vec::from_iter(other),
    };
    let parts: Vec<&Tree> = items
        .into_iter()
        .filter(|item| item.fields().is_some())
        .collect();
    if !parts.iter().all(|part| part.names_once(&PART_FIELDS)) {
        return None;
    }
    let mut task = Task::new(GetTaskDetailResponse {
        instance_id: tree.text("instance_id").unwrap_or_default(),
        instance_name: tree.text("instance_name").unwrap_or_default(),
        job_id: tree.text("job_id").unwrap_or_default(),
        job_name: tree.text("job_name").unwrap_or_default(),
        created_at: tree.text("created_at"),
        update_at: tree.text("update_at"),
        process: tree.text("process"),
        status: tree.text("status"),
        ..GetTaskDetailResponse::default()
    });
    for part in parts {
        task.push(sub_task(part));
    }
    Some(Ok(task))
}

fn sub_task(part: &Tree) -> SubTask {
    SubTask {
        sub_task_name: part.text("sub_task_name"),
        percent: part.text("percent"),
        executed_time: part.text("executed_time"),
        status: part.text("status"),
        remaining_time: part.text("remaining_time"),
        show_detail: part.text("show_detail").and_then(|text| text.parse().ok()),
        ..SubTask::default()
    }
}

/// A complete JSON text: members in order, duplicates included; numbers as text.
#[derive(Debug)]
enum Tree {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Tree>),
    Object(Vec<(String, Tree)>),
}

impl Tree {
    fn read(json: &RawValue) -> Option<Self> {
        let text = json.get();
        Some(match text.as_bytes().first()? {
            b'n' => Self::Null,
            b't' | b'f' => Self::Bool(text == "true"),
            b'"' => Self::Text(serde_json::from_str(text).ok()?),
            b'[' => {
                let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
                Self::List(items.into_iter().map(Self::read).collect::<Option<_>>()?)
            }
            b'{' => {
                let members = serde_json::Deserializer::from_str(text).deserialize_map(Members);
                let members = members.ok()?.into_iter();
                let read = |(name, value)| Some((name, Self::read(value)?));
                Self::Object(members.map(read).collect::<Option<_>>()?)
            }
            _ => Self::Number(text.to_owned()),
        })
    }

    fn fields(&self) -> Option<&[(String, Self)]> {
        match self {
            Self::Object(fields) => Some(fields),
            _ => None,
        }
    }

    fn field(&self, name: &str) -> Option<&Self> {
        let (_, value) = self.fields()?.iter().find(|(known, _)| known == name)?;
        Some(value)
    }

    fn names_once(&self, names: &[&str]) -> bool {
        let count = |name: &str| {
            let fields = self.fields().unwrap_or_default();
            fields.iter().filter(|(known, _)| known == name).count()
        };
        names.iter().all(|name| count(name) <= 1)
    }

    /// A text field, converted by the rules of the contract.
    fn text(&self, name: &str) -> Option<String> {
        match self.field(name)? {
            Self::Text(text) | Self::Number(text) => Some(text.clone()),
            Self::Bool(truth) => Some(truth.to_string()),
            Self::Null | Self::List(_) | Self::Object(_) => None,
        }
    }
}

/// Collects all members of an object in order.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}
