use http::{HeaderValue, header::RETRY_AFTER};
use proptest::prelude::*;

use super::*;
use crate::status::sound::CODES_OF_ANSWERS;

fn error_object() -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![
        Just("DBS.200543".to_owned()),
        Just("APIGW.0301".to_owned()),
        Just("APIGW.0308".to_owned()),
        any::<String>(),
    ];
    (code, any::<String>(), "[a-z]{0,20}", ".{0,3000}").prop_map(|(code, text, key, long)| {
        let object = serde_json::json!({
            "error_code": code, "error_msg": text, key: {"message": text},
            "encoded_authorization_message": long, "request_id": text,
        });
        object.to_string().into_bytes()
    })
}

proptest! {
    #[test]
    fn any_status_and_any_bytes_become_a_complete_status(
        http_status: u16,
        body in prop_oneof![any::<Vec<u8>>(), error_object()],
        retry_after in "[ -~]{0,20}",
        request_id in "[ -~]{0,200}",
    ) {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(&retry_after).unwrap());
        headers.insert("x-request-id", HeaderValue::from_str(&request_id).unwrap());

        let status = status_of(&answered_to(Owner::Caller, http_status, &headers, &body));

        check(&status);
        prop_assert!(CODES_OF_ANSWERS.contains(&status.code()));
    }

    #[test]
    fn a_body_that_is_not_json_is_never_repeated(http_status: u16, tail in "[a-z]{8,40}") {
        let body = format!("<p>{tail} {tail}");

        let status = answered(http_status, &body);

        prop_assert!(!status.message().contains(&tail));
        prop_assert!(!String::from_utf8_lossy(status.details()).contains(&tail));
    }

    #[test]
    fn the_wait_never_exceeds_five_minutes(http_status: u16, retry_after in "[0-9]{1,30}") {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(&retry_after).unwrap());

        let status = status_of(&answered_to(Owner::Caller, http_status, &headers, b""));

        let wait = status.get_details_retry_info().and_then(|info| info.retry_delay);
        prop_assert!(wait.unwrap_or_default() <= Duration::from_secs(300));
    }
}
