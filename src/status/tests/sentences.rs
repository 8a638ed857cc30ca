use super::*;

fn message(error: &Error) -> String {
    status_of(error).message().to_owned()
}

#[test]
fn each_failure_of_our_own_has_a_sentence_of_its_own_with_the_next_step() {
    let errors = [
        Error::ProjectNotAllowed,
        Error::Credentials(credentials::Error::Missing),
        Error::Credentials(credentials::Error::Malformed),
        Error::DeadlineExceeded,
        Error::Overloaded,
        Error::ShuttingDown,
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
fn a_broken_rule_of_grpc_is_told_in_its_own_words() {
    let error = Error::Protocol(Code::Internal, "te is missing: send te: trailers");

    assert_eq!(message(&error), "te is missing: send te: trailers");
}

#[test]
fn a_malformed_token_is_told_as_that_and_not_as_a_refused_one() {
    let malformed = message(&Error::Credentials(credentials::Error::Malformed));

    assert!(malformed.contains("malformed"), "{malformed}");
}

#[test]
fn who_has_to_act_on_a_refusal_depends_on_whose_credential_it_was() {
    let cases = [
        (401, Owner::Caller, "the token in x-auth-token was refused"),
        (
            401,
            Owner::Server,
            "the server's own credential was refused",
        ),
        (
            403,
            Owner::Caller,
            "ask an administrator for the permission",
        ),
        (403, Owner::Server, "its operator has to grant"),
    ];

    for (http_status, owner, expected) in cases {
        let error = answered_to(owner, http_status, &HeaderMap::new(), b"");

        let told = message(&error);

        assert!(told.contains(expected), "{http_status} {owner:?}: {told}");
    }
}

#[test]
fn every_answer_of_the_vendor_tells_whose_credential_asked() {
    for (owner, expected) in [(Owner::Caller, "caller"), (Owner::Server, "server")] {
        for http_status in [400, 401, 403, 404, 429, 500, 503] {
            let error = answered_to(owner, http_status, &HeaderMap::new(), b"");

            let status = status_of(&error);

            let told = metadata(&status, "credentialOwner");
            assert_eq!(told.as_deref(), Some(expected), "{http_status}");
        }
    }
}
