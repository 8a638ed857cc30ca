//! Finds the error code and its company in an error answer, in any of the shapes that the vendor's services use.
//!
//! RDS, the API gateway and IAM spell the same four facts differently and sometimes put them into a nested object or into
//! the objects of a `details` array. The search goes from the top downwards; the first code that is a service's code wins,
//! alone or with a message. Its work is bounded: values are skipped without building them, and only so many objects are
//! looked at.

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::known_codes;

/// Spellings of the error code, the most telling first.
const CODE_KEYS: [&str; 4] = ["error_code", "errorCode", "errCode", "code"];
/// Spellings of its text, in the order of the codes they go with.
const MESSAGE_KEYS: [&str; 5] = [
    "error_msg",
    "errorMsg",
    "errorMessage",
    "externalMessage",
    "message",
];
const REQUEST_ID_KEYS: [&str; 2] = ["request_id", "requestId"];
const AUTHORIZATION_KEY: &str = "encoded_authorization_message";
/// The one array that is entered.
const DETAILS_KEY: &str = "details";

/// Objects looked at in one body; real answers have one to three.
const MAX_OBJECTS: usize = 64;
/// Levels of nesting that are searched; real answers have two.
const MAX_DEPTH: usize = 8;
const MAX_CODE_CHARS: usize = 64;
const MAX_REQUEST_ID_CHARS: usize = 128;

/// What a body is, before anybody looks into it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BodyKind {
    /// A JSON object, as the API answers.
    JsonObject,
    /// Nothing, or only white space.
    Empty,
    /// HTML, text, JSON that is no object, or no text at all.
    #[default]
    Other,
}

/// What an error answer says about itself. The default is that of a body which is no JSON object: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Envelope {
    /// What the body is.
    pub body: BodyKind,
    /// Whether there is an error code at all, be it only a number that repeats the HTTP status.
    pub has_code: bool,
    /// The service's error code: at most 64 printable ASCII characters, and never a mere number unless the vendor
    /// documents it.
    pub error_code: Option<String>,
    /// The text that goes with the code, as it came; empty when there is none.
    pub message: String,
    /// The request id in the body, at most 128 printable ASCII characters. The one in the header goes first.
    pub request_id: Option<String>,
    /// The `encoded_authorization_message` of a policy denial, as it came; one with control characters is none.
    pub encoded_authorization_message: Option<String>,
}

/// Reads an error answer. Never fails: what is not understood is not there.
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
    for _ in 0..MAX_OBJECTS {
        let Some((object, depth)) = waiting.pop_front() else {
            break;
        };
        envelope.take(&object);
        if depth < MAX_DEPTH {
            let nested = object.nested().into_iter().filter_map(Members::read);
            waiting.extend(nested.map(|inner| (inner, depth + 1)));
        }
    }
    envelope
}

impl Envelope {
    /// Adds what one object says and earlier ones did not.
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

/// IAM's Keystone style repeats the HTTP status as `code`; such a number is nobody's error code.
fn is_service_code(text: &str) -> bool {
    let number = text.bytes().all(|byte| b"0123456789+-.".contains(&byte));
    is_printable(text, MAX_CODE_CHARS)
        && (!number || known_codes::documented_status(text).is_some())
}

/// The text of a JSON string without blanks around it, unless nothing is left.
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

/// The members of one JSON object that matter here, in its order; everything else is skipped unread.
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
            if is_object(value) {
                found.push(value.get());
            } else if key == DETAILS_KEY {
                let items: Vec<&RawValue> = serde_json::from_str(value.get()).unwrap_or_default();
                let objects = items.into_iter().filter(|item| is_object(item));
                found.extend(objects.map(RawValue::get).take(MAX_OBJECTS));
            }
        }
        found
    }
}

fn is_object(value: &RawValue) -> bool {
    value.get().starts_with('{')
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
                        // Of a repeated key the first counts, so that their number is bounded.
                        if named.iter().all(|(name, _)| *name != key) {
                            named.push((key, value));
                        }
                    } else if is_object(value) && objects.len() < MAX_OBJECTS {
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
