//! Parses the reply of `ShowTaskDetail` with status 200.
//!
//! Accepts what the vendor's client accepts (numbers for text, a single object for a list, unknown fields), but rejects bodies that it would
//! turn into an empty success. Fields are raw JSON first and then parsed one by one: unknown fields are skipped without allocation at any
//! depth, and numbers keep their exact text.
//! Source: RDS API reference, "Obtaining Task Information", and the response model of the vendor's SDK.

#[cfg(test)]
mod tests;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    envelope::{self, Envelope, scalar},
    list_items::ListItems,
};
use crate::{
    pb::{GetTaskDetailResponse, SubTask},
    task::Task,
};

/// Limit on the parts of a task. A reply of 1 MiB could hold 350 000 empty ones, and clients decode each part to a hundred bytes or more.
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
pub fn parse_task_detail(body: &[u8]) -> Result<Task, NotATask> {
    let mut parser = Parser::start(body, &|_| false)?;
    while !parser.step()? {}
    Ok(parser.task)
}

/// As [`parse_task_detail`], with pauses in which the worker serves other calls. A short body is parsed without a pause. Leaves out
/// texts that are secret.
pub(super) async fn parse_with_pauses(
    body: &[u8],
    is_secret: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Task, NotATask> {
    let mut parser = Parser::start(body, is_secret)?;
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
    task: Task,
    /// The parts that are not parsed yet.
    list: ListItems<'a>,
    /// The items of the list so far.
    items: usize,
    is_secret: &'a (dyn Fn(&str) -> bool + Sync),
}

impl<'a> Parser<'a> {
    /// Parses all fields except the parts.
    fn start(
        body: &'a [u8],
        is_secret: &'a (dyn Fn(&str) -> bool + Sync),
    ) -> Result<Self, NotATask> {
        let json = std::str::from_utf8(body).map_err(|_| NotATask::Malformed)?;
        let fields: TaskFields<'_> = object(json)?;
        if fields.has_error_code() {
            return Err(NotATask::ErrorObject(envelope::read(body)));
        }

        let documented = [
            text(fields.instance_id)?,
            text(fields.instance_name)?,
            text(fields.job_id)?,
            text(fields.job_name)?,
        ];
        if documented.iter().all(Option::is_none) {
            let envelope = envelope::read(body);
            return Err(if envelope.has_code {
                NotATask::ErrorObject(envelope)
            } else {
                NotATask::Malformed
            });
        }
        let public = |text: Option<String>| text.filter(|text| !is_secret(text));
        let [instance_id, instance_name, job_id, job_name] =
            documented.map(|text| public(text).unwrap_or_default());
        let mut task = Task::new(GetTaskDetailResponse {
            instance_id,
            instance_name,
            job_id,
            job_name,
            created_at: public(text(fields.created_at)?),
            update_at: public(text(fields.update_at)?),
            process: public(text(fields.process)?),
            status: public(text(fields.status)?),
            ..GetTaskDetailResponse::default()
        });
        let list = fields.sub_task_list.map_or("", RawValue::get);
        task.reserve_parts(list);

        Ok(Self {
            task,
            list: ListItems::new(list),
            items: 0,
            is_secret,
        })
    }

    /// Parses about [`BYTES_PER_STEP`] of the parts. Returns whether that was the last step.
    fn step(&mut self) -> Result<bool, NotATask> {
        let mut parsed = 0;
        while parsed < BYTES_PER_STEP {
            let Some(item) = self.list.next() else {
                self.task.shrink();
                return Ok(true);
            };
            self.items += 1;
            if self.items > MAX_PARTS {
                return Err(NotATask::TooManyParts);
            }
            if item.starts_with('{') {
                self.task.push(sub_task(item, self.is_secret)?);
            }
            parsed += item.len();
        }
        Ok(false)
    }
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct TaskFields<'a> {
    instance_id: Option<&'a RawValue>,
    instance_name: Option<&'a RawValue>,
    job_id: Option<&'a RawValue>,
    job_name: Option<&'a RawValue>,
    created_at: Option<&'a RawValue>,
    update_at: Option<&'a RawValue>,
    process: Option<&'a RawValue>,
    status: Option<&'a RawValue>,
    sub_task_list: Option<&'a RawValue>,
    error_code: Option<&'a RawValue>,
    #[serde(rename = "errorCode")]
    error_code_camel: Option<&'a RawValue>,
    #[serde(rename = "errCode")]
    err_code: Option<&'a RawValue>,
    code: Option<&'a RawValue>,
    message: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct SubTaskFields<'a> {
    sub_task_name: Option<&'a RawValue>,
    percent: Option<&'a RawValue>,
    executed_time: Option<&'a RawValue>,
    status: Option<&'a RawValue>,
    remaining_time: Option<&'a RawValue>,
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

fn sub_task(json: &str, is_secret: &dyn Fn(&str) -> bool) -> Result<SubTask, NotATask> {
    let fields: SubTaskFields<'_> = object(json)?;
    let text = |value| Ok(text(value)?.filter(|text| !is_secret(text)));
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
        ..SubTask::default()
    })
}
