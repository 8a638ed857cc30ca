//! The validation of a request, which both methods share.

use crate::{
    error::{Error, Violation},
    pb::GetTaskDetailRequest,
    upstream::TaskQuery,
};

/// The longest project id and instance id, in characters.
pub const MAX_ID: usize = 64;
const MAX_WORKFLOW_ID: usize = 128;
const MAX_WORKFLOW_NAME: usize = 256;

/// Checks every rule of the proto, so that one reply lists all violations, with that of a further field, if any.
///
/// # Errors
/// [`Error::InvalidRequest`].
pub fn validate(
    request: GetTaskDetailRequest,
    further: Option<Violation>,
) -> Result<TaskQuery, Error> {
    let name = request.workflow_name.as_deref();
    let problems = [
        ("project_id", id_problem(&request.project_id, MAX_ID)),
        ("instance_id", id_problem(&request.instance_id, MAX_ID)),
        (
            "workflow_id",
            id_problem(&request.workflow_id, MAX_WORKFLOW_ID),
        ),
        ("workflow_name", name.and_then(name_problem)),
    ];
    let violations: Vec<_> = problems
        .into_iter()
        .filter_map(|(field, problem)| {
            let description = problem?;
            Some(Violation { field, description })
        })
        .chain(further)
        .collect();
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

/// Why `id` is not 1 to `max` letters, digits, `-` and `_`, if so.
pub fn id_problem(id: &str, max: usize) -> Option<String> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if id.is_empty() {
        return Some("is required".to_owned());
    }
    // All characters before the first invalid one are ASCII, so its byte index is its position.
    if let Some((index, invalid)) = id.char_indices().find(|(_, c)| !is_allowed(*c)) {
        let position = index + 1;
        return Some(format!(
            "may contain letters, digits, '-' and '_'; found {invalid:?} at position {position}"
        ));
    }
    (id.len() > max).then(|| format!("may have at most {max} characters; found {}", id.len()))
}

fn name_problem(name: &str) -> Option<String> {
    let length = name.chars().count();
    if length > MAX_WORKFLOW_NAME {
        return Some(format!(
            "may have at most {MAX_WORKFLOW_NAME} characters; found {length}"
        ));
    }
    let position = name.chars().position(char::is_control)? + 1;
    Some(format!(
        "may contain no control characters; found one at position {position}"
    ))
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
        match validate(request, None) {
            Err(Error::InvalidRequest(violations)) => violations
                .into_iter()
                .map(|v| (v.field, v.description))
                .collect(),
            Ok(_) => Vec::new(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn ids_that_could_change_the_path_are_rejected() {
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
    fn values_of_the_maximum_length_are_valid_and_longer_ones_are_not() {
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
    fn an_absent_name_and_an_empty_name_stay_distinct() {
        for name in [None, Some(""), Some("a \"name\" \u{4e2d}")] {
            let named = GetTaskDetailRequest {
                workflow_name: name.map(str::to_owned),
                ..request()
            };

            let query = validate(named, None).expect("a valid request");

            assert_eq!(query.workflow_name.as_deref(), name);
        }
    }

    #[test]
    fn control_characters_in_the_name_are_rejected_with_their_position() {
        for name in ["a\nb", "a\u{7f}b", "a\u{85}b", "a\0b"] {
            let named = GetTaskDetailRequest {
                workflow_name: Some(name.to_owned()),
                ..request()
            };

            assert_eq!(
                violations(named),
                [(
                    "workflow_name",
                    "may contain no control characters; found one at position 2".to_owned()
                )],
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_violation_names_the_character_and_its_position() {
        let slashed = GetTaskDetailRequest {
            instance_id: "ab/c".into(),
            ..request()
        };

        assert_eq!(
            violations(slashed),
            [(
                "instance_id",
                "may contain letters, digits, '-' and '_'; found '/' at position 3".to_owned()
            )]
        );
    }
}
