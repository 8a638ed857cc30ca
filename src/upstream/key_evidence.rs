//! Evidence in a 401 about the key or token of the attempt. All callers share it, and the gateway also replies with 401 to calls for
//! projects and endpoints that its owner may not use: such replies must not count against it.

use std::time::SystemTime;

use jiff::Timestamp;

use crate::credentials::TokenEvidence;

/// The gateway's code for a failed authentication. Only the text shows the cause.
const AUTHENTICATION_FAILED: &str = "APIGW.0301";

/// Parts of the gateway's texts for a wrong signature or key. Sources: API request signing guide, FAQ; API gateway user guide,
/// "Common Errors Related to IAM Authentication Information".
const WRONG_KEY: [&str; 5] = [
    "signature fail",
    "verify signature",
    "signature does not match",
    "get secretkey failed",
    "ak not exist",
];

/// Evidence about a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KeyEvidence {
    /// The reply is about something else.
    #[default]
    None,
    /// The signature or the key is wrong, or the reply cannot be read and might have reported that.
    Rejected,
    /// The time of the signature is too far from the gateway's. No evidence about the key.
    Expired {
        /// The gateway's time, if the text contains it.
        server_time: Option<SystemTime>,
    },
    /// The gateway has locked the key.
    Locked,
}

/// Parses a 401. `error_code` and `message` are those of its error object, if it has one.
pub fn read(is_object: bool, error_code: Option<&str>, message: &str) -> KeyEvidence {
    if !is_object {
        return KeyEvidence::Rejected;
    }
    if error_code != Some(AUTHENTICATION_FAILED) {
        return KeyEvidence::None;
    }
    let text = message.to_ascii_lowercase();
    if text.contains("ak access failed to reach the limit") {
        KeyEvidence::Locked
    } else if text.contains("signature expired") {
        KeyEvidence::Expired {
            server_time: server_time(&text),
        }
    } else if WRONG_KEY.iter().any(|part| text.contains(part)) {
        KeyEvidence::Rejected
    } else {
        KeyEvidence::None
    }
}

/// Reads the rejection of an attempt with a token.
pub fn about_token(error_code: Option<&str>, message: &str) -> TokenEvidence {
    let is_rejected = match error_code {
        Some("APIGW.0307" | "IAM.0066" | "IAM.0067" | "DBS.280056") => true,
        Some(AUTHENTICATION_FAILED) => message.to_ascii_lowercase().contains("decrypt token fail"),
        _ => false,
    };
    match is_rejected {
        true => TokenEvidence::Rejected,
        false => TokenEvidence::Unclear,
    }
}

/// The time in `signature time:20230527T000431Z,server time:20230527T020608Z`.
fn server_time(text: &str) -> Option<SystemTime> {
    let (_, rest) = text.split_once("server time:")?;
    let at: Timestamp = rest.trim_start().get(..16)?.parse().ok()?;
    SystemTime::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_texts_about_signature_or_key_count_against_the_key() {
        let prefix = "Incorrect IAM authentication information: ";
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_685_153_168);
        let expired = |server_time| KeyEvidence::Expired { server_time };
        let cases = [
            (
                "verify aksk signature fail, canonicalRequest: POST",
                KeyEvidence::Rejected,
            ),
            ("calc ak sk signature fail", KeyEvidence::Rejected),
            (
                "Get secretKey failed,ak:X,err:ak not exist",
                KeyEvidence::Rejected,
            ),
            (
                "AK access failed to reach the limit,forbidden.",
                KeyEvidence::Locked,
            ),
            ("decrypt token fail", KeyEvidence::None),
            ("project id does not match", KeyEvidence::None),
            ("the account is in arrears", KeyEvidence::None),
            ("", KeyEvidence::None),
            (
                "signature expired, signature time:20230527T000431Z,server time:20230527T020608Z",
                expired(Some(at)),
            ),
            ("calc ak sk signature fail:signature expired", expired(None)),
            ("signature expired, server time:yesterday", expired(None)),
            ("signature expired, server time:", expired(None)),
        ];

        for (text, expected) in cases {
            let read = read(true, Some("APIGW.0301"), &format!("{prefix}{text}"));
            assert_eq!(read, expected, "{text}");
        }
    }

    #[test]
    fn only_some_codes_and_texts_reject_the_token_itself() {
        let cases = [
            (Some("APIGW.0307"), "The token must be updated.", true),
            (Some("APIGW.0301"), "...: Decrypt token fail", true),
            (Some("APIGW.0301"), "...: project id does not match", false),
            (Some("IAM.0066"), "", true),
            (Some("IAM.0067"), "", true),
            (Some("DBS.280056"), "Invalid token.", true),
            (Some("IAM.0001"), "decrypt token fail", false),
            (None, "decrypt token fail", false),
        ];

        for (code, message, is_rejected) in cases {
            let expected = match is_rejected {
                true => TokenEvidence::Rejected,
                false => TokenEvidence::Unclear,
            };
            assert_eq!(about_token(code, message), expected, "{code:?} {message}");
        }
    }

    #[test]
    fn another_code_is_about_something_else_and_a_reply_that_cannot_be_read_counts() {
        let text = "verify aksk signature fail";
        for code in [
            None,
            Some("APIGW.0302"),
            Some("IAM.0064"),
            Some("DBS.200001"),
        ] {
            assert_eq!(read(true, code, text), KeyEvidence::None, "{code:?}");
        }
        assert_eq!(read(false, None, ""), KeyEvidence::Rejected);
    }
}
