//! Finds error code, message and request id in an error reply, in any of the shapes that the vendor's services use.
//!
//! RDS, the API gateway and IAM use different names for the same fields, and sometimes a nested object or a `details` array of objects. The
//! search goes from the outermost object inwards; the first error code of a service wins, with or without a message. The search is bounded
//! in objects and depth, and skips other values without allocation.

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{known_codes, list_items::ListItems};

/// Names of the error code, the most specific first.
const CODE_KEYS: [&str; 4] = ["error_code", "errorCode", "errCode", "code"];
/// Names of the message, in the order of the codes.
const MESSAGE_KEYS: [&str; 5] = [
    "error_msg",
    "errorMsg",
    "errorMessage",
    "externalMessage",
    "message",
];
const REQUEST_ID_KEYS: [&str; 2] = ["request_id", "requestId"];
const AUTHORIZATION_KEY: &str = "encoded_authorization_message";
/// The only array that is searched.
const DETAILS_KEY: &str = "details";

/// Limit on searched objects; real replies have one to three.
const MAX_OBJECTS: usize = 64;
/// Limit on the JSON of nested objects, in bytes: each level is parsed again.
const MAX_NESTED_BYTES: usize = 1 << 20;
/// Limit on levels of nesting; real replies have two.
const MAX_DEPTH: usize = 8;
/// Limit on items of `details`, of which the objects are searched.
const MAX_DETAILS: usize = 1000;
const MAX_CODE_CHARS: usize = 64;
const MAX_REQUEST_ID_CHARS: usize = 128;

/// The kind of a body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BodyKind {
    /// A JSON object, as in replies of the API.
    JsonObject,
    /// Empty, or only white space.
    Empty,
    /// HTML, text, JSON other than an object, or binary data.
    #[default]
    Other,
}

/// The contents of an error reply. Empty by default, as for a body that is not a JSON object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Envelope {
    /// The kind of the body.
    pub body: BodyKind,
    /// Whether the body has an error code, even if only a number that repeats the HTTP status.
    pub has_code: bool,
    /// The service's error code: at most 64 printable ASCII characters, and a plain number only if the vendor documents it.
    pub error_code: Option<String>,
    /// The message, not sanitized; empty if the body has none.
    pub message: String,
    /// The request id in the body, at most 128 printable ASCII characters. The one in the header takes precedence.
    pub request_id: Option<String>,
    /// The `encoded_authorization_message` of a policy denial, not sanitized; ignored if it has control characters.
    pub encoded_authorization_message: Option<String>,
}

/// Parses an error reply. Never fails: unreadable parts count as absent.
pub fn read(body: &[u8]) -> Envelope {
    if body.trim_ascii().is_empty() {
        return Envelope {
            body: BodyKind::Empty,
            ..Envelope::default()
        };
    }
    let Some(top) = std::str::from_utf8(body).ok().and_then(Members::read) else {
        return Envelope::default();
    };
    let mut envelope = Envelope {
        body: BodyKind::JsonObject,
        ..Envelope::default()
    };
    let mut waiting = VecDeque::from([(top, 1)]);
    let mut nested_bytes = 0;
    for _ in 0..MAX_OBJECTS {
        let Some((object, depth)) = waiting.pop_front() else {
            break;
        };
        envelope.take(&object);
        if depth < MAX_DEPTH {
            let nested = object.nested().into_iter().filter(|json| {
                nested_bytes += json.len();
                nested_bytes <= MAX_NESTED_BYTES
            });
            let members = nested.filter_map(Members::read);
            waiting.extend(members.map(|inner| (inner, depth + 1)));
        }
    }
    envelope
}

impl Envelope {
    /// Adds the fields of one object that earlier ones did not have.
    fn take(&mut self, object: &Members<'_>) {
        let code = object.first_of(&CODE_KEYS, scalar);
        let message = object.first_of(&MESSAGE_KEYS, string).unwrap_or_default();
        self.has_code |= code.is_some();
        match code.filter(|text| is_service_code(text)) {
            Some(code) if self.error_code.is_none() => {
                self.error_code = Some(code);
                if !message.is_empty() {
                    self.message = message;
                }
            }
            _ if self.message.is_empty() => self.message = message,
            _ => {}
        }
        if self.request_id.is_none() {
            self.request_id = object
                .first_of(&REQUEST_ID_KEYS, string)
                .filter(|id| is_printable(id, MAX_REQUEST_ID_CHARS));
        }
        if self.encoded_authorization_message.is_none() {
            self.encoded_authorization_message = object
                .first_of(&[AUTHORIZATION_KEY], string)
                .filter(|text| !text.contains(char::is_control));
        }
    }
}

/// Whether `text` has 1 to `max` characters, all of them printable ASCII.
pub(super) fn is_printable(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// IAM's Keystone style repeats the HTTP status as `code`; such a number is not an error code.
fn is_service_code(text: &str) -> bool {
    let number = text.bytes().all(|byte| b"0123456789+-.".contains(&byte));
    is_printable(text, MAX_CODE_CHARS)
        && (!number || known_codes::documented_status(text).is_some())
}

/// The trimmed text of a JSON string; `None` if it is empty.
fn string(value: &RawValue) -> Option<String> {
    let text: String = serde_json::from_str(value.get()).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// As [`string`], and the text of a number.
pub(super) fn scalar(value: &RawValue) -> Option<String> {
    match value.get().as_bytes().first()? {
        b'"' => string(value),
        b'-' | b'0'..=b'9' => Some(value.get().to_owned()),
        _ => None,
    }
}

/// The relevant members of one JSON object in their order. All others are skipped.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Members<'a> {
    /// `None` when `json` is not exactly one JSON object.
    fn read(json: &'a str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    fn first_of(&self, keys: &[&str], read: fn(&RawValue) -> Option<String>) -> Option<String> {
        let values = keys
            .iter()
            .flat_map(|key| self.0.iter().filter(move |(name, _)| name == key));
        values.filter_map(|(_, value)| read(value)).next()
    }

    /// The texts of the objects directly below this one.
    fn nested(&self) -> Vec<&'a str> {
        let mut found = Vec::new();
        for (key, value) in &self.0 {
            if is_object(value.get()) {
                found.push(value.get());
            } else if key == DETAILS_KEY {
                let items = ListItems::new(value.get()).take(MAX_DETAILS);
                found.extend(items.filter(|item| is_object(item)).take(MAX_OBJECTS));
            }
        }
        found
    }
}

fn is_object(json: &str) -> bool {
    json.starts_with('{')
}

fn is_named(key: &str) -> bool {
    CODE_KEYS.contains(&key)
        || MESSAGE_KEYS.contains(&key)
        || REQUEST_ID_KEYS.contains(&key)
        || key == AUTHORIZATION_KEY
        || key == DETAILS_KEY
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keep;

        impl<'de> Visitor<'de> for Keep {
            type Value = Members<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut named: Vec<(String, &RawValue)> = Vec::new();
                let mut objects = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
                    if is_named(&key) {
                        // Only the first value of a repeated key counts, which bounds their number.
                        if named.iter().all(|(name, _)| *name != key) {
                            named.push((key, value));
                        }
                    } else if is_object(value.get()) && objects.len() < MAX_OBJECTS {
                        objects.push((key, value));
                    }
                }
                named.append(&mut objects);
                Ok(Members(named))
            }
        }

        deserializer.deserialize_map(Keep)
    }
}
