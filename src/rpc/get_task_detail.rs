//! `GetTaskDetail`: the path of one call, the rules of its request, and its reply.

use std::sync::Arc;

use http::HeaderMap;

use super::Facade;
use crate::{
    call::Call,
    error::{Error, FailedLookup, Violation},
    pb::{GetTaskDetailRequest, GetTaskDetailResponse, SubTask},
    upstream::{LookupContext, TaskQuery, wire},
};

const MAX_ID: usize = 64;
const MAX_WORKFLOW_ID: usize = 128;
const MAX_WORKFLOW_NAME: usize = 256;

/// validate -> allowed project -> credentials -> coalescer -> upstream -> reply.
pub(super) async fn handle(
    facade: &Facade,
    call: &mut Call,
    metadata: &HeaderMap,
    request: GetTaskDetailRequest,
) -> Result<GetTaskDetailResponse, Error> {
    let query = validate(request)?;
    facade.check_allowed(&query.project_id)?;
    let auth = facade
        .credentials
        .resolve(metadata, call.caller, call.deadline)
        .await
        .map_err(Error::Credentials)?;
    let key = facade.coalescer.key(auth.identity(), query);
    let (caller, span) = (call.caller, call.record.span().cloned());
    let lookup = facade.coalescer.look_up(
        &key,
        call.deadline,
        |progress| call.record.follow(Arc::clone(progress)),
        |deadline, progress| {
            // Identical calls share the work, so it owns what it needs. Its attempts belong to the span of the leader, even if
            // followers still wait when that call has ended.
            let (upstream, key) = (facade.upstream.clone(), Arc::clone(&key));
            let (mut auth, span) = (auth.clone(), span.clone());
            async move {
                let lookup = LookupContext {
                    query: &key.query,
                    caller,
                    deadline: &deadline,
                    progress: &progress,
                    span: span.as_ref(),
                };
                upstream.show_task_detail(&mut auth, lookup).await
            }
        },
    );
    let lookup = Arc::unwrap_or_clone(lookup.await);
    lookup.result.map(reply).map_err(|error| {
        Error::Upstream(Box::new(FailedLookup {
            error,
            facts: lookup.progress.facts(),
            owner: auth.owner(),
            query: key.query.clone(),
        }))
    })
}

/// Checks every rule of the proto, so that one answer names all that is wrong.
pub fn validate(request: GetTaskDetailRequest) -> Result<TaskQuery, Error> {
    let mut violations = Vec::new();
    check_id(&mut violations, "project_id", &request.project_id, MAX_ID);
    check_id(&mut violations, "instance_id", &request.instance_id, MAX_ID);
    check_id(
        &mut violations,
        "workflow_id",
        &request.workflow_id,
        MAX_WORKFLOW_ID,
    );
    if let Some(name) = &request.workflow_name {
        check_name(&mut violations, "workflow_name", name);
    }
    if !violations.is_empty() {
        return Err(Error::InvalidRequest(violations));
    }
    Ok(TaskQuery {
        project_id: request.project_id,
        instance_id: request.instance_id,
        workflow_id: request.workflow_id,
        workflow_name: request.workflow_name,
    })
}

fn check_id(violations: &mut Vec<Violation>, field: &'static str, value: &str, max: usize) {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let description = if value.is_empty() {
        "is required".to_owned()
    } else if let Some(at) = value.bytes().position(|byte| !fits(byte)) {
        // What stands before it is ASCII, so this is the place of a character, too.
        let unfit = value[at..].chars().next().unwrap_or_default();
        format!(
            "may hold letters, digits, '-' and '_'; found {unfit:?} at position {}",
            at + 1
        )
    } else if value.len() > max {
        format!("may hold at most {max} characters; found {}", value.len())
    } else {
        return;
    };
    violations.push(Violation { field, description });
}

fn check_name(violations: &mut Vec<Violation>, field: &'static str, value: &str) {
    let length = value.chars().count();
    let description = if length > MAX_WORKFLOW_NAME {
        format!("may hold at most {MAX_WORKFLOW_NAME} characters; found {length}")
    } else if let Some(at) = value.chars().position(char::is_control) {
        format!(
            "may hold no control characters; found one at character {}",
            at + 1
        )
    } else {
        return;
    };
    violations.push(Violation { field, description });
}

/// Upstream's answer in the proto's words. The border between the two vocabularies.
pub(super) fn reply(task: wire::TaskDetail) -> GetTaskDetailResponse {
    GetTaskDetailResponse {
        instance_id: task.instance_id,
        instance_name: task.instance_name,
        job_id: task.job_id,
        job_name: task.job_name,
        created_at: task.created_at,
        update_at: task.update_at,
        process: task.process,
        status: task.status,
        sub_task_list: task.sub_task_list.into_iter().map(part).collect(),
    }
}

fn part(part: wire::SubTask) -> SubTask {
    SubTask {
        sub_task_name: part.sub_task_name,
        percent: part.percent,
        executed_time: part.executed_time,
        status: part.status,
        remaining_time: part.remaining_time,
        show_detail: part.show_detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> GetTaskDetailRequest {
        GetTaskDetailRequest {
            project_id: "p".into(),
            instance_id: "i".into(),
            workflow_id: "w".into(),
            workflow_name: None,
        }
    }

    fn violations(request: GetTaskDetailRequest) -> Vec<(&'static str, String)> {
        match validate(request) {
            Err(Error::InvalidRequest(violations)) => violations
                .into_iter()
                .map(|v| (v.field, v.description))
                .collect(),
            Ok(_) => Vec::new(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn ids_that_could_change_the_path_are_refused() {
        let cases = [
            "", ".", "..", "a/b", "a\\b", "%2e%2e", "a?b", "a#b", "a;b", "a b", "a\r\nb", "a\0",
            "\u{4e2d}", "a.b", "~",
        ];

        for value in cases {
            for field in ["project_id", "instance_id", "workflow_id"] {
                let mut request = request();
                *match field {
                    "project_id" => &mut request.project_id,
                    "instance_id" => &mut request.instance_id,
                    _ => &mut request.workflow_id,
                } = value.to_owned();

                let found = violations(request);

                assert_eq!(
                    found.iter().map(|v| v.0).collect::<Vec<_>>(),
                    [field],
                    "{value:?}"
                );
            }
        }
    }

    #[test]
    fn lengths_are_accepted_to_the_last_character_and_not_beyond() {
        let at_the_limit = GetTaskDetailRequest {
            project_id: "p".repeat(64),
            instance_id: "i".repeat(64),
            workflow_id: "w".repeat(128),
            workflow_name: Some("\u{4e2d}".repeat(256)),
        };
        let beyond = GetTaskDetailRequest {
            project_id: "p".repeat(65),
            instance_id: "i".repeat(65),
            workflow_id: "w".repeat(129),
            workflow_name: Some("n".repeat(257)),
        };

        assert_eq!(violations(at_the_limit), []);
        assert_eq!(
            violations(beyond).iter().map(|v| v.0).collect::<Vec<_>>(),
            ["project_id", "instance_id", "workflow_id", "workflow_name"]
        );
    }

    #[test]
    fn an_absent_name_an_empty_name_and_a_name_stay_three_things() {
        for name in [None, Some(""), Some("a \"name\" \u{4e2d}")] {
            let named = GetTaskDetailRequest {
                workflow_name: name.map(str::to_owned),
                ..request()
            };

            let query = validate(named).expect("a valid request");

            assert_eq!(query.workflow_name.as_deref(), name);
        }
    }

    #[test]
    fn control_characters_in_the_name_are_refused_with_their_place() {
        for name in ["a\nb", "a\u{7f}b", "a\u{85}b", "a\0b"] {
            let named = GetTaskDetailRequest {
                workflow_name: Some(name.to_owned()),
                ..request()
            };

            assert_eq!(
                violations(named),
                [(
                    "workflow_name",
                    "may hold no control characters; found one at character 2".to_owned()
                )],
                "{name:?}"
            );
        }
    }

    #[test]
    fn the_reply_says_what_the_task_says_and_leaves_unset_what_it_leaves_unset() {
        let text = |text: &str| Some(text.to_owned());
        let task = wire::TaskDetail {
            instance_id: "1".into(),
            instance_name: "2".into(),
            job_id: "3".into(),
            job_name: "4".into(),
            created_at: text("5"),
            update_at: text("6"),
            process: text("7"),
            status: text("8"),
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
            created_at: text("5"),
            update_at: text("6"),
            process: text("7"),
            status: text("8"),
            sub_task_list: vec![
                SubTask {
                    sub_task_name: text("9"),
                    percent: text("10"),
                    executed_time: text("11"),
                    status: text("12"),
                    remaining_time: text("13"),
                    show_detail: Some(false),
                },
                SubTask::default(),
            ],
        };

        assert_eq!(reply(task), expected);
        assert_eq!(
            reply(wire::TaskDetail::default()),
            GetTaskDetailResponse::default()
        );
    }

    #[test]
    fn a_violation_names_the_character_and_its_place() {
        let slashed = GetTaskDetailRequest {
            instance_id: "ab/c".into(),
            ..request()
        };

        assert_eq!(
            violations(slashed),
            [(
                "instance_id",
                "may hold letters, digits, '-' and '_'; found '/' at position 3".to_owned()
            )]
        );
    }
}
