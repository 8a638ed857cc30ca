//! Parses the text of a throttling message: the window, and whose calls are counted.

use std::time::Duration;

use strum::{EnumString, IntoStaticStr, VariantArray};

use crate::wait::MAX_RETRY_AFTER;

/// The contents of a throttling message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Throttling {
    /// The length of the window in which calls are counted, at most [`MAX_RETRY_AFTER`]. Its start is unknown, so only the whole length
    /// is a safe wait.
    pub window: Option<Duration>,
    /// Whose requests are counted.
    pub subject: Option<Subject>,
}

/// Whose requests a throttling policy counts, named by the word of the vendor's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, IntoStaticStr, EnumString)]
#[strum(serialize_all = "lowercase")]
pub enum Subject {
    /// The requests of one user, that is of one credential.
    User,
    /// The requests from one address.
    Ip,
    /// The requests of all users of the API.
    Api,
}

impl Subject {
    /// The word of the vendor's text.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Whether the window applies to every credential, not only to the one that was throttled.
    pub fn is_everyone(self) -> bool {
        matches!(self, Self::Ip | Self::Api)
    }
}

/// Parses the gateway's `policy user over ratelimit,limit:200,time:5 minute` and IAM's `... times per 60 seconds`.
pub fn read(message: &str) -> Throttling {
    let text = message.to_ascii_lowercase();
    let window = after(&text, "time:").and_then(window);
    Throttling {
        window: window.or_else(|| text.split(" per ").skip(1).find_map(self::window)),
        subject: Subject::VARIANTS
            .iter()
            .copied()
            .find(|subject| text.contains(&format!("policy {} over", subject.as_str()))),
    }
}

fn after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_once(key).map(|(_, rest)| rest)
}

/// A number and a unit, such as `5 minute` or `60 seconds`; a zero length is not a window.
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
    // A number that overflows is a very long time.
    let count = (digits > 0).then(|| count.parse().unwrap_or(u64::MAX))?;
    let window = Duration::from_secs(count.saturating_mul(unit)).min(MAX_RETRY_AFTER);
    (!window.is_zero()).then_some(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_contains_window_and_subject() {
        let reached = "The throttling threshold has been reached: ";
        let cases = [
            (
                "policy user over ratelimit,limit:200,time:5 minute",
                Some(300),
                Some(Subject::User),
            ),
            (
                "policy ip over ratelimit,limit:60,time:1 minute",
                Some(60),
                Some(Subject::Ip),
            ),
            (
                "policy user over ratelimit,limit:10,time:30 second",
                Some(30),
                Some(Subject::User),
            ),
            (
                "policy api over ratelimit,limit:8000,time:1 minute",
                Some(60),
                Some(Subject::Api),
            ),
            (
                "policy app over ratelimit,limit:10,time:2 seconds",
                Some(2),
                None,
            ),
            (
                "policy user over ratelimit,limit:9,time:1 hour",
                Some(300),
                Some(Subject::User),
            ),
            (
                "policy user over ratelimit,limit:9,time:1 day",
                Some(300),
                Some(Subject::User),
            ),
            (
                "POLICY USER OVER RATELIMIT,LIMIT:9,TIME:2 MINUTE",
                Some(120),
                Some(Subject::User),
            ),
            ("30 times per 60 seconds", Some(60), None),
            ("rate per user is 30 times per 10 seconds", Some(10), None),
            (
                "policy user over ratelimit,limit:9,time:0 minute",
                None,
                Some(Subject::User),
            ),
            (
                "policy user over ratelimit,limit:9,time:minute",
                None,
                Some(Subject::User),
            ),
            (
                "policy user over ratelimit,limit:9,time:-5 minute",
                None,
                Some(Subject::User),
            ),
            (
                "policy user over ratelimit,time:5 fortnight",
                None,
                Some(Subject::User),
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
