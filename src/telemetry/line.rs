//! Formats one line of the log, for events and for the access line.
//!
//! Text: `2026-02-03T03:04:05.678Z INFO target: message name=value other="two words"`. JSON: one object with `ts`,
//! `level`, `target`, `msg` and the fields. In both formats no value can end the line, move the cursor or add a field.
//!
//! Written by hand because the formatters of tracing-subscriber only format events, and the access line is not an event (its fields
//! vary from call to call, and every call pays for it). They also neither limit the length of a value nor escape line separators
//! and text direction marks.

use std::fmt::{self, Write as _};

use jiff::Timestamp;
use tracing::Level;

use crate::options::OutputFormat;

/// Longer values are truncated, which bounds the memory of queued lines. The configuration in the first log line is shorter.
const MAX_FIELD_BYTES: usize = 8192;

/// A line under construction.
pub(super) struct Line {
    format: OutputFormat,
    buffer: String,
}

impl Line {
    pub(super) fn new(
        format: OutputFormat,
        now: Timestamp,
        level: Level,
        target: &str,
        message: &str,
    ) -> Self {
        let mut line = Self {
            format,
            buffer: String::with_capacity(512),
        };
        match format {
            OutputFormat::Json => {
                line.write(format_args!(r#"{{"ts":"{now:.3}","level":"{level}""#));
                line.text("target", target);
                line.text("msg", message);
            }
            OutputFormat::Text => {
                line.write(format_args!("{now:.3} {level} {target}: "));
                line.escape(truncate(message), false);
            }
        }
        line
    }

    /// Adds a text field. The value may be untrusted; the name is a constant.
    pub(super) fn text(&mut self, name: &'static str, value: &str) {
        self.name(name);
        let value = truncate(value);
        let bare = self.format != OutputFormat::Json
            && !value.is_empty()
            && value
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'='));
        if bare {
            self.buffer.push_str(value);
        } else {
            self.buffer.push('"');
            self.escape(value, true);
            self.buffer.push('"');
        }
    }

    /// Adds a field whose [`fmt::Display`] is a JSON number or boolean.
    pub(super) fn plain(&mut self, name: &'static str, value: impl fmt::Display) {
        self.name(name);
        self.write(format_args!("{value}"));
    }

    /// The finished line, with its line feed.
    pub(super) fn finish(mut self) -> String {
        self.buffer.push_str(match self.format {
            OutputFormat::Json => "}\n",
            OutputFormat::Text => "\n",
        });
        self.buffer
    }

    fn name(&mut self, name: &'static str) {
        let (before, after) = match self.format {
            OutputFormat::Json => (",\"", "\":"),
            OutputFormat::Text => (" ", "="),
        };
        for part in [before, name, after] {
            self.buffer.push_str(part);
        }
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        let written = self.buffer.write_fmt(text);
        written.expect("writing to a String does not fail");
    }

    fn escape(&mut self, text: &str, escape_quotes: bool) {
        let plain = |b: u8| matches!(b, b' '..=b'~') && !matches!(b, b'"' | b'\\');
        if text.bytes().all(plain) {
            self.buffer.push_str(text);
            return;
        }
        for c in text.chars() {
            if escape_quotes && matches!(c, '"' | '\\') {
                self.buffer.push('\\');
            }
            escape(c, &mut self.buffer).expect("writing to a String does not fail");
        }
    }
}

fn truncate(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_FIELD_BYTES)]
}

/// Whether a character is a control character, a line separator or a direction mark, or has no width: it can hide text from a reader, and
/// goes unnoticed in a secret or name.
pub(crate) fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// Text with each control character and invisible mark written as JSON's escape, so that it stays one line and is safe on a terminal.
/// Backslashes are not doubled.
pub(crate) struct Escaped<'a>(pub(crate) &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| escape(c, f))
    }
}

fn escape(c: char, text: &mut impl fmt::Write) -> fmt::Result {
    match c {
        '\n' => text.write_str("\\n"),
        '\r' => text.write_str("\\r"),
        '\t' => text.write_str("\\t"),
        c if is_invisible(c) => {
            let mut units = [0; 2];
            let mut units = c.encode_utf16(&mut units).iter();
            units.try_for_each(|unit| write!(text, "\\u{unit:04x}"))
        }
        c => text.write_char(c),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> Timestamp {
        "2026-02-03T03:04:05.678Z".parse().unwrap()
    }

    fn line(format: OutputFormat, message: &str, value: &str) -> String {
        let mut line = Line::new(format, now(), Level::INFO, "access", message);
        line.text("user_agent", value);
        line.plain("bytes", 12);
        line.finish()
    }

    #[test]
    fn text_values_are_quoted_only_if_necessary() {
        let cases = [
            ("grpc-go/1.80", "user_agent=grpc-go/1.80"),
            ("two words", "user_agent=\"two words\""),
            ("", "user_agent=\"\""),
            ("a=b", "user_agent=\"a=b\""),
            ("a\"b", "user_agent=\"a\\\"b\""),
            ("a\nb", "user_agent=\"a\\nb\""),
            ("\u{1b}[31m", "user_agent=\"\\u001b[31m\""),
            ("\u{9b}31m", "user_agent=\"\\u009b31m\""),
            ("\u{202e}", "user_agent=\"\\u202e\""),
            ("\u{200b}\u{e0041}", "user_agent=\"\\u200b\\udb40\\udc41\""),
            ("\u{e4}", "user_agent=\"\u{e4}\""),
        ];

        for (value, expected) in cases {
            assert_eq!(
                line(OutputFormat::Text, "rpc \"x\"", value),
                format!("2026-02-03T03:04:05.678Z INFO access: rpc \"x\" {expected} bytes=12\n"),
                "{value:?}"
            );
        }
    }

    #[test]
    fn json_line_is_one_object_with_fixed_fields_first() {
        assert_eq!(
            line(OutputFormat::Json, "rpc", "a\"},{\n"),
            "{\"ts\":\"2026-02-03T03:04:05.678Z\",\"level\":\"INFO\",\"target\":\"access\",\"msg\":\"rpc\",\
             \"user_agent\":\"a\\\"},{\\n\",\"bytes\":12}\n"
        );
    }

    #[test]
    fn long_field_is_truncated_at_a_character_boundary() {
        let text = line(OutputFormat::Text, "rpc", &"\u{20ac}".repeat(5000));

        assert!(text.len() < MAX_FIELD_BYTES + 100);
        assert!(text.ends_with("\u{20ac}\" bytes=12\n"));
    }

    proptest! {
        #[test]
        fn any_text_stays_one_line_and_one_json_object(message: String, value: String) {
            let json = line(OutputFormat::Json, &message, &value);
            let text = line(OutputFormat::Text, &message, &value);

            let object: serde_json::Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(object["msg"].as_str().unwrap(), truncate(&message));
            prop_assert_eq!(object["user_agent"].as_str().unwrap(), truncate(&value));
            for line in [json, text] {
                let line = line.strip_suffix('\n').unwrap();
                prop_assert!(!line.contains(is_invisible));
            }
        }
    }
}
