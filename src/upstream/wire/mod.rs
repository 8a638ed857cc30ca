//! Parses the reply of `ShowTaskDetail` with status 200.
//!
//! Accepts what the vendor's client accepts (numbers for text, a single object for a list, unknown fields), but rejects bodies that it would
//! turn into an empty success. Fields are raw JSON first and then parsed one by one: unknown fields are skipped without allocation at any
//! depth, and numbers keep their exact text.
//! Source: RDS API reference, "Obtaining Task Information", and the response model of the vendor's SDK.

#[cfg(test)]
mod tests;

use std::vec;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::envelope::{self, Envelope, Items, scalar};

/// One task. The four documented fields are empty when RDS leaves them out, all others are `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskDetail {
    /// Id of the instance.
    pub instance_id: String,
    /// Name of the instance.
    pub instance_name: String,
    /// Id of the task.
    pub job_id: String,
    /// Name of the task.
    pub job_name: String,
    /// When the task was created.
    pub created_at: Option<String>,
    /// When the task last changed (really without a d).
    pub update_at: Option<String>,
    /// Progress.
    pub process: Option<String>,
    /// State of the task.
    pub status: Option<String>,
    /// The parts of the task.
    pub sub_task_list: Vec<SubTask>,
}

impl TaskDetail {
    /// Each text that is set.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        let documented = [
            &self.instance_id,
            &self.instance_name,
            &self.job_id,
            &self.job_name,
        ];
        let others = [
            &self.created_at,
            &self.update_at,
            &self.process,
            &self.status,
        ];
        let parts = self.sub_task_list.iter().flat_map(|part| {
            [
                &part.sub_task_name,
                &part.percent,
                &part.executed_time,
                &part.status,
                &part.remaining_time,
            ]
        });
        let optional = others.into_iter().chain(parts).flatten();
        documented.into_iter().chain(optional).map(String::as_str)
    }

    /// Removes the texts that match, as if RDS had left them out.
    pub(super) fn remove_texts(&mut self, matches: impl Fn(&str) -> bool) {
        for text in [
            &mut self.instance_id,
            &mut self.instance_name,
            &mut self.job_id,
            &mut self.job_name,
        ] {
            if matches(text) {
                text.clear();
            }
        }
        let others = [
            &mut self.created_at,
            &mut self.update_at,
            &mut self.process,
            &mut self.status,
        ];
        let parts = self.sub_task_list.iter_mut().flat_map(|part| {
            [
                &mut part.sub_task_name,
                &mut part.percent,
                &mut part.executed_time,
                &mut part.status,
                &mut part.remaining_time,
            ]
        });
        for text in others.into_iter().chain(parts) {
            text.take_if(|text| matches(text));
        }
    }

    /// The size of its heap allocations in bytes.
    pub fn heap_bytes(&self) -> usize {
        let texts: usize = self.texts().map(str::len).sum();
        texts + self.sub_task_list.capacity() * size_of::<SubTask>()
    }
}

/// One part of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SubTask {
    /// Name of the part.
    pub sub_task_name: Option<String>,
    /// Progress of the part.
    pub percent: Option<String>,
    /// How long the part has been running.
    pub executed_time: Option<String>,
    /// State of the part.
    pub status: Option<String>,
    /// Estimated time left.
    pub remaining_time: Option<String>,
    /// Whether restored databases and tables are to be shown.
    pub show_detail: Option<bool>,
}

/// Limit on the parts of a task. A reply of 1 MiB could hold 350 000 empty ones, which need a hundred times its size in memory.
const MAX_PARTS: usize = 10_000;

/// A 200 without a task. Contains nothing of the body, which may hold anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotATask {
    /// Not a JSON object in UTF-8, or one with a known field twice or without all four documented fields.
    Malformed,
    /// A task with more than 10 000 parts.
    TooManyParts,
    /// An error object.
    ErrorObject(Envelope),
}

/// JSON parsed between two pauses, in bytes. Several times the size of a common task, and parsed within about a millisecond.
pub(super) const BYTES_PER_STEP: usize = 16 << 10;

/// Parses the body of a 200.
///
/// `null`, and an object or array in place of text, leave a field unset. `sub_task_list` skips values that are not objects.
///
/// # Errors
/// [`NotATask`]: an error code makes an error object, also next to the fields of a task.
pub fn parse_task_detail(body: &[u8]) -> Result<TaskDetail, NotATask> {
    let mut parser = Parser::start(body)?;
    while !parser.step()? {}
    Ok(parser.task)
}

/// As [`parse_task_detail`], with pauses in which the worker serves other calls. A short body is parsed without a pause.
pub(super) async fn parse_with_pauses(body: &[u8]) -> Result<TaskDetail, NotATask> {
    let mut parser = Parser::start(body)?;
    if body.len() > BYTES_PER_STEP {
        tokio::task::yield_now().await;
    }
    while !parser.step()? {
        tokio::task::yield_now().await;
    }
    Ok(parser.task)
}

/// Parses a task in steps.
struct Parser<'a> {
    task: TaskDetail,
    /// The JSON of the parts, until they are split.
    list: Option<&'a RawValue>,
    /// The JSON of the parts that are not parsed yet.
    parts: vec::IntoIter<&'a RawValue>,
}

impl<'a> Parser<'a> {
    /// Parses all fields except the parts.
    fn start(body: &'a [u8]) -> Result<Self, NotATask> {
        let text = std::str::from_utf8(body).map_err(|_| NotATask::Malformed)?;
        let fields: TaskFields<'_> = object(text)?;
        if fields.has_error_code() {
            return Err(NotATask::ErrorObject(envelope::read(body)));
        }

        let documented = [
            self::text(fields.instance_id)?,
            self::text(fields.instance_name)?,
            self::text(fields.job_id)?,
            self::text(fields.job_name)?,
        ];
        if documented.iter().all(Option::is_none) {
            let envelope = envelope::read(body);
            return Err(if envelope.has_code {
                NotATask::ErrorObject(envelope)
            } else {
                NotATask::Malformed
            });
        }
        let [instance_id, instance_name, job_id, job_name] =
            documented.map(Option::unwrap_or_default);

        Ok(Self {
            task: TaskDetail {
                instance_id,
                instance_name,
                job_id,
                job_name,
                created_at: self::text(fields.created_at)?,
                update_at: self::text(fields.update_at)?,
                process: self::text(fields.process)?,
                status: self::text(fields.status)?,
                sub_task_list: Vec::new(),
            },
            list: fields.sub_task_list,
            parts: Vec::new().into_iter(),
        })
    }

    /// Parses about [`BYTES_PER_STEP`] of the parts. Returns whether that was the last step.
    fn step(&mut self) -> Result<bool, NotATask> {
        let mut parsed = 0;
        if let Some(list) = self.list.take() {
            let parts = split(list)?;
            // Growing in steps would take up to twice the memory.
            self.task.sub_task_list.reserve_exact(parts.len());
            self.parts = parts.into_iter();
            parsed += list.get().len();
        }
        while parsed < BYTES_PER_STEP {
            let Some(part) = self.parts.next().map(RawValue::get) else {
                return Ok(true);
            };
            self.task.sub_task_list.push(sub_task(part)?);
            parsed += part.len();
        }
        Ok(false)
    }
}

#[derive(Deserialize)]
struct TaskFields<'a> {
    #[serde(borrow)]
    instance_id: Option<&'a RawValue>,
    #[serde(borrow)]
    instance_name: Option<&'a RawValue>,
    #[serde(borrow)]
    job_id: Option<&'a RawValue>,
    #[serde(borrow)]
    job_name: Option<&'a RawValue>,
    #[serde(borrow)]
    created_at: Option<&'a RawValue>,
    #[serde(borrow)]
    update_at: Option<&'a RawValue>,
    #[serde(borrow)]
    process: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    sub_task_list: Option<&'a RawValue>,
    #[serde(borrow)]
    error_code: Option<&'a RawValue>,
    #[serde(borrow, rename = "errorCode")]
    error_code_camel: Option<&'a RawValue>,
    #[serde(borrow, rename = "errCode")]
    err_code: Option<&'a RawValue>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct SubTaskFields<'a> {
    #[serde(borrow)]
    sub_task_name: Option<&'a RawValue>,
    #[serde(borrow)]
    percent: Option<&'a RawValue>,
    #[serde(borrow)]
    executed_time: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    remaining_time: Option<&'a RawValue>,
    #[serde(borrow)]
    show_detail: Option<&'a RawValue>,
}

impl TaskFields<'_> {
    /// `code` is a common name that a task might use in future, so it counts only together with `message`.
    fn has_error_code(&self) -> bool {
        let code = self.message.and(self.code);
        [self.error_code, self.error_code_camel, self.err_code, code]
            .into_iter()
            .flatten()
            .any(|value| scalar(value).is_some())
    }
}

/// Parses one JSON object; derived deserializers would also accept an array.
fn object<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, NotATask> {
    if !json.trim_ascii_start().starts_with('{') {
        return Err(NotATask::Malformed);
    }
    // Drops the library's error text, because it quotes values.
    serde_json::from_str(json).map_err(|_| NotATask::Malformed)
}

/// The text of a string, or the JSON text of a number or bool.
fn text(value: Option<&RawValue>) -> Result<Option<String>, NotATask> {
    let Some(json) = value.map(RawValue::get) else {
        return Ok(None);
    };
    match json.as_bytes().first() {
        Some(b'"') => serde_json::from_str(json).map_err(|_| NotATask::Malformed),
        Some(b'{' | b'[') | None => Ok(None),
        Some(_) => Ok(Some(json.to_owned())),
    }
}

/// The objects in a list, or a single object; any other value counts as an empty list.
fn split(list: &RawValue) -> Result<Vec<&RawValue>, NotATask> {
    let mut items = match list.get().as_bytes().first() {
        Some(b'[') => {
            // One more than allowed.
            let Items::<{ MAX_PARTS + 1 }>(items) =
                serde_json::from_str(list.get()).map_err(|_| NotATask::Malformed)?;
            items
        }
        _ => vec![list],
    };
    if items.len() > MAX_PARTS {
        return Err(NotATask::TooManyParts);
    }
    items.retain(|item| item.get().starts_with('{'));
    Ok(items)
}

fn sub_task(json: &str) -> Result<SubTask, NotATask> {
    let fields: SubTaskFields<'_> = object(json)?;
    Ok(SubTask {
        sub_task_name: text(fields.sub_task_name)?,
        percent: text(fields.percent)?,
        executed_time: text(fields.executed_time)?,
        status: text(fields.status)?,
        remaining_time: text(fields.remaining_time)?,
        show_detail: match text(fields.show_detail)?.as_deref() {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => None,
        },
    })
}
