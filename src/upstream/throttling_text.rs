//! Reads from the text of a throttling message whose calls are counted, and over which time.

use std::time::Duration;

use crate::wait::MAX_RETRY_AFTER;

/// What a throttling message says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Throttling {
    /// The length of the window in which calls are counted, at most [`MAX_RETRY_AFTER`]. Where in the window we are is unknown,
    /// so the whole of it is the wait that is safe.
    pub window: Option<Duration>,
    /// Whose calls are counted: `user` or `ip`.
    pub subject: Option<&'static str>,
}

/// Reads the gateway's `policy user over ratelimit,limit:200,time:5 minute` and IAM's `... times per 60 seconds`.
pub fn read(message: &str) -> Throttling {
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
    // More digits than a number can hold are a very long time.
    let count = (digits > 0).then(|| count.parse().unwrap_or(u64::MAX))?;
    let window = Duration::from_secs(count.saturating_mul(unit)).min(MAX_RETRY_AFTER);
    (!window.is_zero()).then_some(window)
}

#[cfg(test)]
mod tests {
    use super::*;

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

            assert_eq!(read(&format!("{reached}{text}")), expected, "{text}");
        }
    }
}
