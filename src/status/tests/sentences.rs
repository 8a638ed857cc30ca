use super::*;

fn message(error: &Error) -> String {
    status_of(error).message().to_owned()
}

#[test]
fn each_error_has_a_distinct_sentence_with_the_next_step() {
    let errors = [
        Error::ProjectNotAllowed,
        Error::Credentials(credentials::Error::Missing),
        Error::Credentials(credentials::Error::Malformed),
        Error::DeadlineExceeded,
        Error::Overloaded,
        Error::ShuttingDown { retry_after: None },
        Error::WatchExpired {
            retry_after: Duration::ZERO,
        },
        Error::Internal,
    ];

    let mut sentences: Vec<_> = errors.iter().map(message).collect();

    for sentence in &sentences {
        let (problem, next_step) = sentence.split_once(": ").expect(sentence);
        assert!(problem.len() > 10 && next_step.len() > 10, "{sentence}");
    }
    sentences.sort();
    sentences.dedup();
    assert_eq!(sentences.len(), errors.len());
}

#[test]
fn a_protocol_error_keeps_its_message() {
    let error = Error::Protocol(Code::Internal, "te is missing: send te: trailers");

    assert_eq!(message(&error), "te is missing: send te: trailers");
}

#[test]
fn the_message_for_a_malformed_token_says_malformed() {
    let malformed = message(&Error::Credentials(credentials::Error::Malformed));

    assert!(malformed.contains("malformed"), "{malformed}");
}

#[test]
fn the_next_step_for_a_rejected_credential_depends_on_its_owner() {
    let cases = [
        (401, Owner::Caller, "the token in x-auth-token was rejected"),
        (401, Owner::Server, "the server's credential was rejected"),
        (
            403,
            Owner::Caller,
            "ask an administrator for the permission",
        ),
        (403, Owner::Server, "the operator has to grant"),
    ];

    for (http_status, owner, expected) in cases {
        let error = rejection_for(owner, http_status, &HeaderMap::new(), b"");

        let message = message(&error);

        assert!(
            message.contains(expected),
            "{http_status} {owner:?}: {message}"
        );
    }
}

#[test]
fn every_error_reply_names_the_owner_of_the_credential() {
    for (owner, expected) in [(Owner::Caller, "caller"), (Owner::Server, "server")] {
        for http_status in [400, 401, 403, 404, 429, 500, 503] {
            let error = rejection_for(owner, http_status, &HeaderMap::new(), b"");

            let status = status_of(&error);

            let named = metadata(&status, "credentialOwner");
            assert_eq!(named.as_deref(), Some(expected), "{http_status}");
        }
    }
}
