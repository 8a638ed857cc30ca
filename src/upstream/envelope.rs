//! Finds the error code and its company in an error answer, in any of the shapes that the vendor's services use.
//!
//! RDS, the API gateway and IAM spell the same four facts differently and sometimes put them into a nested object or into
//! the objects of a `details` array. The search goes from the top downwards; the first code that is a service's code wins,
//! alone or with a message. Its work is bounded: values are skipped without building them, and only so many objects are
//! looked at.

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
    /// The `encoded_authorization_message` of a policy denial, as it came.
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
            self.encoded_authorization_message = object.first_of(&[AUTHORIZATION_KEY], string);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// (code, message, request id, whether there is a code at all)
    fn found(body: &str) -> (Option<String>, String, Option<String>, bool) {
        let envelope = read(body.as_bytes());
        (
            envelope.error_code,
            envelope.message,
            envelope.request_id,
            envelope.has_code,
        )
    }

    #[test]
    fn every_shape_that_the_vendor_uses_is_read() {
        let cases = [
            (
                "rds v3",
                r#"{"error_code":"DBS.200543","error_msg":"m"}"#,
                Some("DBS.200543"),
                "m",
                None,
            ),
            (
                "gateway",
                r#"{"error_msg":"m","error_code":"APIGW.0301","request_id":"r-1"}"#,
                Some("APIGW.0301"),
                "m",
                Some("r-1"),
            ),
            (
                "keystone",
                r#"{"error":{"code":401,"message":"m","title":"Unauthorized"}}"#,
                None,
                "m",
                None,
            ),
            (
                "iam",
                r#"{"error_msg":"m","error_code":"IAM.0006"}"#,
                Some("IAM.0006"),
                "m",
                None,
            ),
            (
                "policy explanation nested",
                r#"{"detail":{"error_code":"IAM.0002","error_msg":"m","encoded_authorization_message":"e"}}"#,
                Some("IAM.0002"),
                "m",
                None,
            ),
            (
                "parts",
                r#"{"details":["x",{"error_code":"DBS.200001","error_msg":"m"},{"error_code":"DBS.2","error_msg":"n"}]}"#,
                Some("DBS.200001"),
                "m",
                None,
            ),
            (
                "camel case",
                r#"{"errorCode":"A.1","errorMsg":"m","requestId":"r"}"#,
                Some("A.1"),
                "m",
                Some("r"),
            ),
            (
                "camel case, long",
                r#"{"errorCode":"A.1","errorMessage":"m"}"#,
                Some("A.1"),
                "m",
                None,
            ),
            (
                "flat",
                r#"{"code":"A.1","message":"m"}"#,
                Some("A.1"),
                "m",
                None,
            ),
            (
                "trove",
                r#"{"itemNotFound":{"code":404,"message":"m"}}"#,
                None,
                "m",
                None,
            ),
            (
                "rds v1",
                r#"{"errCode":"RDS.1102","externalMessage":"m"}"#,
                Some("RDS.1102"),
                "m",
                None,
            ),
        ];

        for (name, body, code, message, request_id) in cases {
            let expected = (
                code.map(str::to_owned),
                message.to_owned(),
                request_id.map(str::to_owned),
                true,
            );

            assert_eq!(found(body), expected, "{name}");
            assert_eq!(read(body.as_bytes()).body, BodyKind::JsonObject, "{name}");
        }
    }

    #[test]
    fn odd_codes_are_taken_for_what_they_are() {
        let cases = [
            (
                "code alone",
                r#"{"error_code":"DBS.1"}"#,
                Some("DBS.1"),
                "",
                true,
            ),
            (
                "message is null",
                r#"{"error_code":"DBS.9","error_msg":null}"#,
                Some("DBS.9"),
                "",
                true,
            ),
            (
                "empty code",
                r#"{"error_code":"","error_msg":"m"}"#,
                None,
                "m",
                false,
            ),
            (
                "blank code",
                r#"{"error_code":"  ","error_msg":"m"}"#,
                None,
                "m",
                false,
            ),
            ("null code", r#"{"error_code":null}"#, None, "", false),
            (
                "object as code",
                r#"{"error_code":{},"error_msg":"m"}"#,
                None,
                "m",
                false,
            ),
            ("bool as code", r#"{"error_code":false}"#, None, "", false),
            (
                "a mere number",
                r#"{"error_code":17,"error_msg":"m"}"#,
                None,
                "m",
                true,
            ),
            (
                "a mere number as text",
                r#"{"code":"404","message":"m"}"#,
                None,
                "m",
                true,
            ),
            (
                "a number that iam documents",
                r#"{"error_code":1101,"error_msg":"m"}"#,
                Some("1101"),
                "m",
                true,
            ),
            (
                "the same as text",
                r#"{"code":"1101","message":"m"}"#,
                Some("1101"),
                "m",
                true,
            ),
            (
                "blanks around",
                r#"{"error_code":" DBS.1 "}"#,
                Some("DBS.1"),
                "",
                true,
            ),
            ("blanks inside", r#"{"error_code":"DBS 1"}"#, None, "", true),
            (
                "line end inside",
                r#"{"error_code":"DBS.1\nx"}"#,
                None,
                "",
                true,
            ),
            (
                "not ASCII",
                r#"{"error_code":"DBS.\u4e00"}"#,
                None,
                "",
                true,
            ),
            (
                "empty spelling before a full one",
                r#"{"error_code":"","code":"A.1"}"#,
                Some("A.1"),
                "",
                true,
            ),
            (
                "number above, code below",
                r#"{"code":400,"message":"m","error":{"error_code":"A.1","error_msg":"n"}}"#,
                Some("A.1"),
                "n",
                true,
            ),
            (
                "above before below",
                r#"{"x":{"error_code":"B.1","error_msg":"n"},"error_code":"A.1","error_msg":"m"}"#,
                Some("A.1"),
                "m",
                true,
            ),
            (
                "the first of two",
                r#"{"x":{"error_code":"A.1"},"y":{"error_code":"B.1"}}"#,
                Some("A.1"),
                "",
                true,
            ),
            (
                "in another array",
                r#"{"list":[{"error_code":"A.1"}]}"#,
                None,
                "",
                false,
            ),
            ("nothing", "{}", None, "", false),
        ];

        for (name, body, code, message, has_code) in cases {
            let expected = (code.map(str::to_owned), message.to_owned(), None, has_code);

            assert_eq!(found(body), expected, "{name}");
        }
    }

    #[test]
    fn a_code_or_request_id_that_is_too_long_is_not_taken() {
        for (length, expected) in [(64, true), (65, false)] {
            let body = format!(r#"{{"error_code":"{}"}}"#, "x".repeat(length));

            assert_eq!(
                read(body.as_bytes()).error_code.is_some(),
                expected,
                "{length}"
            );
        }
        for (length, expected) in [(128, true), (129, false)] {
            let body = format!(r#"{{"request_id":"{}"}}"#, "x".repeat(length));

            assert_eq!(
                read(body.as_bytes()).request_id.is_some(),
                expected,
                "{length}"
            );
        }
    }

    #[test]
    fn the_policy_explanation_is_found_at_the_top_and_below() {
        let bodies = [
            r#"{"error_code":"IAM.0002","encoded_authorization_message":"e"}"#,
            r#"{"error_code":"IAM.0002","x":{"y":{"encoded_authorization_message":"e"}}}"#,
        ];

        for body in bodies {
            let envelope = read(body.as_bytes());

            assert_eq!(
                envelope.encoded_authorization_message.as_deref(),
                Some("e"),
                "{body}"
            );
            assert_eq!(envelope.error_code.as_deref(), Some("IAM.0002"));
        }
    }

    #[test]
    fn what_is_no_json_object_says_nothing() {
        let cases: [(&[u8], BodyKind); 12] = [
            (b"", BodyKind::Empty),
            (b" \r\n\t", BodyKind::Empty),
            (b"<html>502</html>", BodyKind::Other),
            (b"error_code: DBS.1", BodyKind::Other),
            (b"null", BodyKind::Other),
            (b"[]", BodyKind::Other),
            (br#"["error_code"]"#, BodyKind::Other),
            (br#""text""#, BodyKind::Other),
            (br#"{"error_code":"DBS.1""#, BodyKind::Other),
            (br#"{"error_code":"DBS.1"} trailing"#, BodyKind::Other),
            (b"\xef\xbb\xbf{}", BodyKind::Other),
            (b"{\"error_code\":\"DBS.\xff\"}", BodyKind::Other),
        ];

        for (body, kind) in cases {
            let expected = Envelope {
                body: kind,
                ..Envelope::default()
            };

            assert_eq!(read(body), expected, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn hostile_bodies_of_a_mebibyte_are_read_without_overflow() {
        let deep = 250_000;
        let objects = r#"{"a":"#.repeat(deep / 2) + "1" + &"}".repeat(deep / 2);
        let arrays = format!(r#"{{"details":{}{}}}"#, "[".repeat(deep), "]".repeat(deep));
        let wide = format!(
            r#"{{"a":{{}}{},"error_code":"DBS.1"}}"#,
            r#","a":{}"#.repeat(100_000)
        );
        let repeated = format!(r#"{{"code":"A.1"{}}}"#, r#","code":"B.1""#.repeat(70_000));
        let details = format!(r#"{{"details":[{{}}{}]}}"#, ",{}".repeat(300_000));

        assert_eq!(read(objects.as_bytes()).error_code, None);
        assert_eq!(read(arrays.as_bytes()).error_code, None);
        assert_eq!(read(wide.as_bytes()).error_code.as_deref(), Some("DBS.1"));
        assert_eq!(read(repeated.as_bytes()).error_code.as_deref(), Some("A.1"));
        assert_eq!(read(details.as_bytes()).body, BodyKind::JsonObject);
    }
}
