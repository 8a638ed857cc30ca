//! One line of the log, put together by hand into one buffer: the same look for events and for the access line.
//!
//! Text: `2026-02-03T03:04:05.678Z INFO target: message name=value other="two words"`. JSON: one object with `ts`,
//! `level`, `target`, `msg` and the fields. In both, nothing a peer sends can end the line, move a cursor or open a field.

use std::fmt::{self, Write as _};

use jiff::Timestamp;
use tracing::Level;

use super::LogFormat;

/// A field longer than this is cut, because memory of waiting lines is bounded. The configuration in the start line fits.
const MAX_FIELD_BYTES: usize = 8192;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) format: LogFormat,
    /// Colours the level of a text line; only for a terminal.
    pub(super) colour: bool,
}

/// A line under construction.
pub(super) struct Line {
    format: LogFormat,
    buffer: String,
}

impl Line {
    pub(super) fn new(
        style: Style,
        now: Timestamp,
        level: Level,
        target: &str,
        message: &str,
    ) -> Self {
        let mut line = Self {
            format: style.format,
            buffer: String::with_capacity(512),
        };
        let out = &mut line.buffer;
        let written = match style {
            Style {
                format: LogFormat::Json,
                ..
            } => {
                let written = write!(out, "{{\"ts\":\"{now:.3}\",\"level\":\"{level}\"");
                line.text("target", target);
                line.text("msg", message);
                written
            }
            Style { colour: true, .. } => {
                let colour = colour_of(level);
                write!(out, "{now:.3} \u{1b}[{colour}m{level}\u{1b}[0m {target}: ")
            }
            Style { colour: false, .. } => write!(out, "{now:.3} {level} {target}: "),
        };
        written.expect("writing to a String does not fail");
        if style.format == LogFormat::Text {
            escape(&mut line.buffer, cut(message), Quotes::Kept);
        }
        line
    }

    /// A field with text of any origin. Names are words of the program's own.
    pub(super) fn text(&mut self, name: &'static str, value: &str) {
        self.name(name);
        let value = cut(value);
        let bare = self.format == LogFormat::Text
            && !value.is_empty()
            && value
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'='));
        if bare {
            self.buffer.push_str(value);
        } else {
            self.buffer.push('"');
            escape(&mut self.buffer, value, Quotes::Escaped);
            self.buffer.push('"');
        }
    }

    /// A field whose [`fmt::Display`] is a JSON number or boolean.
    pub(super) fn plain(&mut self, name: &'static str, value: impl fmt::Display) {
        self.name(name);
        write!(self.buffer, "{value}").expect("writing to a String does not fail");
    }

    /// The finished line, with its line feed.
    pub(super) fn finish(mut self) -> String {
        self.buffer.push_str(match self.format {
            LogFormat::Json => "}\n",
            LogFormat::Text => "\n",
        });
        self.buffer
    }

    fn name(&mut self, name: &'static str) {
        match self.format {
            LogFormat::Json => {
                self.buffer.push_str(",\"");
                self.buffer.push_str(name);
                self.buffer.push_str("\":");
            }
            LogFormat::Text => {
                self.buffer.push(' ');
                self.buffer.push_str(name);
                self.buffer.push('=');
            }
        }
    }
}

fn colour_of(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    }
}

fn cut(text: &str) -> &str {
    if text.len() <= MAX_FIELD_BYTES {
        return text;
    }
    let end = (0..=MAX_FIELD_BYTES)
        .rev()
        .find(|end| text.is_char_boundary(*end))
        .unwrap_or(0);
    &text[..end]
}

/// Whether quotes and backslashes have a meaning where the text goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quotes {
    Kept,
    Escaped,
}

fn escape(out: &mut String, text: &str, quotes: Quotes) {
    let harmless = |b: u8| (b' '..=b'~').contains(&b) && !matches!(b, b'"' | b'\\');
    if text.bytes().all(harmless) {
        out.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            '"' | '\\' if quotes == Quotes::Escaped => {
                out.push('\\');
                out.push(c);
            }
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if is_unruly(c) => {
                write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a String does not fail")
            }
            c => out.push(c),
        }
    }
}

/// Control characters, line separators, and marks that turn the direction of the text after them.
fn is_unruly(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const JSON: Style = Style {
        format: LogFormat::Json,
        colour: false,
    };
    const TEXT: Style = Style {
        format: LogFormat::Text,
        colour: false,
    };

    fn now() -> Timestamp {
        "2026-02-03T03:04:05.678Z".parse().unwrap()
    }

    fn line(style: Style, message: &str, value: &str) -> String {
        let mut line = Line::new(style, now(), Level::INFO, "access", message);
        line.text("user_agent", value);
        line.plain("bytes", 12);
        line.finish()
    }

    #[test]
    fn text_quotes_only_what_needs_it() {
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
            ("\u{e4}", "user_agent=\"\u{e4}\""),
        ];

        for (value, expected) in cases {
            assert_eq!(
                line(TEXT, "rpc \"x\"", value),
                format!("2026-02-03T03:04:05.678Z INFO access: rpc \"x\" {expected} bytes=12\n"),
                "{value:?}"
            );
        }
    }

    #[test]
    fn json_is_one_object_with_the_fixed_names_first() {
        assert_eq!(
            line(JSON, "rpc", "a\"},{\n"),
            "{\"ts\":\"2026-02-03T03:04:05.678Z\",\"level\":\"INFO\",\"target\":\"access\",\"msg\":\"rpc\",\
             \"user_agent\":\"a\\\"},{\\n\",\"bytes\":12}\n"
        );
    }

    #[test]
    fn colour_is_on_the_level_alone() {
        let style = Style {
            colour: true,
            ..TEXT
        };

        assert_eq!(
            line(style, "rpc", "x"),
            "2026-02-03T03:04:05.678Z \u{1b}[32mINFO\u{1b}[0m access: rpc user_agent=x bytes=12\n"
        );
    }

    #[test]
    fn a_long_field_is_cut_at_a_character() {
        let text = line(TEXT, "rpc", &"\u{20ac}".repeat(5000));

        assert!(text.len() < MAX_FIELD_BYTES + 100);
        assert!(text.ends_with("\u{20ac}\" bytes=12\n"));
    }

    proptest! {
        #[test]
        fn any_text_stays_one_line_and_one_json_object(message: String, value: String) {
            let json = line(JSON, &message, &value);
            let text = line(TEXT, &message, &value);

            let object: serde_json::Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(object["msg"].as_str().unwrap(), cut(&message));
            prop_assert_eq!(object["user_agent"].as_str().unwrap(), cut(&value));
            for line in [json, text] {
                let line = line.strip_suffix('\n').unwrap();
                prop_assert!(!line.contains(is_unruly));
            }
        }
    }
}
