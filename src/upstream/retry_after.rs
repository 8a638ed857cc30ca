//! How long an answer asks to wait: the `Retry-After` header, and the text of a throttling message.

use std::time::{Duration, SystemTime};

use http::HeaderValue;

/// No wait that upstream names is longer for us: throttling windows of the gateway are at most this long.
pub const LONGEST: Duration = Duration::from_secs(5 * 60);

/// The wait that `Retry-After` names, in seconds or as an HTTP date, at most [`LONGEST`]; a date in the past is zero.
///
/// `None` when no value can be read. Of several values the longest counts, being the safe one.
pub fn parse<'a>(
    values: impl IntoIterator<Item = &'a HeaderValue>,
    now: SystemTime,
) -> Option<Duration> {
    let waits = values.into_iter().filter_map(|value| {
        let text = value.to_str().ok()?.trim();
        match seconds(text) {
            Some(wait) => Some(wait),
            None => httpdate::parse_http_date(text)
                .ok()
                .map(|date| date.duration_since(now).unwrap_or_default()),
        }
    });
    waits.max().map(|wait| wait.min(LONGEST))
}

/// What a throttling message says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Throttling {
    /// The length of the window in which calls are counted, at most [`LONGEST`]. Where in the window we are is unknown,
    /// so the whole of it is the wait that is safe.
    pub window: Option<Duration>,
    /// Whose calls are counted: `user` or `ip`.
    pub subject: Option<&'static str>,
}

/// Reads the gateway's `policy user over ratelimit,limit:200,time:5 minute` and IAM's `... times per 60 seconds`.
pub fn throttling(message: &str) -> Throttling {
    let text = message.to_ascii_lowercase();
    let window = after(&text, "time:").and_then(window);
    Throttling {
        window: window.or_else(|| text.split(" per ").skip(1).find_map(self::window)),
        subject: ["user", "ip"]
            .into_iter()
            .find(|subject| text.contains(&format!("policy {subject} over"))),
    }
}

fn after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_once(key).map(|(_, rest)| rest)
}

/// A number and a unit, such as `5 minute` or `60 seconds`; a window of no length is none.
fn window(text: &str) -> Option<Duration> {
    let text = text.trim_start();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (count, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let unit = [
        ("second", 1),
        ("minute", 60),
        ("hour", 3600),
        ("day", 86_400),
    ]
    .into_iter()
    .find_map(|(name, length)| unit.starts_with(name).then_some(length))?;
    let window = seconds(count)?.saturating_mul(unit).min(LONGEST);
    (!window.is_zero()).then_some(window)
}

/// Digits and nothing else; more of them than a number can hold are a very long time.
fn seconds(text: &str) -> Option<Duration> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| Duration::from_secs(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-05T12:00:00Z.
    fn noon() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_614_400)
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_date_and_never_exceeds_five_minutes() {
        let cases = [
            ("seconds", "7", Some(7)),
            ("zero", "0", Some(0)),
            ("blanks around", " 7 ", Some(7)),
            ("longest", "300", Some(300)),
            ("over the longest", "301", Some(300)),
            ("a billion", "1000000000", Some(300)),
            (
                "more than a number holds",
                "99999999999999999999999",
                Some(300),
            ),
            ("date ahead", "Mon, 05 Jan 2026 12:00:30 GMT", Some(30)),
            ("date far ahead", "Mon, 05 Jan 2026 13:00:00 GMT", Some(300)),
            ("date in the past", "Mon, 05 Jan 2026 11:00:00 GMT", Some(0)),
            (
                "date of the old kind",
                "Monday, 05-Jan-26 12:00:30 GMT",
                Some(30),
            ),
            ("negative", "-1", None),
            ("signed", "+7", None),
            ("fraction", "1.5", None),
            ("exponent", "1e9", None),
            ("with a unit", "7s", None),
            ("garbage", "soon", None),
            ("empty", "", None),
            ("digits of another script", "\u{0667}", None),
        ];

        for (name, text, expected) in cases {
            let value = HeaderValue::from_bytes(text.as_bytes()).unwrap();

            assert_eq!(
                parse([&value], noon()),
                expected.map(Duration::from_secs),
                "{name}"
            );
        }
    }

    #[test]
    fn the_longest_of_several_readable_values_counts() {
        let values = ["3", "garbage", "9", "5"].map(HeaderValue::from_static);

        assert_eq!(parse(&values, noon()), Some(Duration::from_secs(9)));
        assert_eq!(parse([], noon()), None);
    }

    #[test]
    fn throttling_text_tells_window_and_subject() {
        let reached = "The throttling threshold has been reached: ";
        let cases = [
            (
                "policy user over ratelimit,limit:200,time:5 minute",
                Some(300),
                Some("user"),
            ),
            (
                "policy ip over ratelimit,limit:60,time:1 minute",
                Some(60),
                Some("ip"),
            ),
            (
                "policy user over ratelimit,limit:10,time:30 second",
                Some(30),
                Some("user"),
            ),
            (
                "policy app over ratelimit,limit:10,time:2 seconds",
                Some(2),
                None,
            ),
            (
                "policy user over ratelimit,limit:9,time:1 hour",
                Some(300),
                Some("user"),
            ),
            (
                "policy user over ratelimit,limit:9,time:1 day",
                Some(300),
                Some("user"),
            ),
            (
                "POLICY USER OVER RATELIMIT,LIMIT:9,TIME:2 MINUTE",
                Some(120),
                Some("user"),
            ),
            ("30 times per 60 seconds", Some(60), None),
            ("rate per user is 30 times per 10 seconds", Some(10), None),
            (
                "policy user over ratelimit,limit:9,time:0 minute",
                None,
                Some("user"),
            ),
            (
                "policy user over ratelimit,limit:9,time:minute",
                None,
                Some("user"),
            ),
            (
                "policy user over ratelimit,limit:9,time:-5 minute",
                None,
                Some("user"),
            ),
            (
                "policy user over ratelimit,time:5 fortnight",
                None,
                Some("user"),
            ),
            ("time:99999999999999999999999 hour", Some(300), None),
            ("time:", None, None),
            ("slow down", None, None),
            ("", None, None),
        ];

        for (text, window, subject) in cases {
            let expected = Throttling {
                window: window.map(Duration::from_secs),
                subject,
            };

            assert_eq!(throttling(&format!("{reached}{text}")), expected, "{text}");
        }
    }
}
