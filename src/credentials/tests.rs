use std::{fs, io, pin::Pin, sync::Mutex};

use tempfile::TempDir;
use tracing_subscriber::fmt::MakeWriter;

use super::{
    fake_issuer::{FakeIssuer, response},
    *,
};
use crate::options::url::Proxy;

fn start(source: Source) -> Credentials {
    let proxy = "http://user:canary-proxy@127.0.0.1:1";
    start_with(source, Some(Proxy::parse(proxy).unwrap()))
}

fn start_directly(source: Source) -> Credentials {
    start_with(source, None)
}

fn start_with(source: Source, proxy: Option<Proxy>) -> Credentials {
    let http = http_client::Config {
        tls: http_client::tls_config(http_client::SystemRoots::Ignored, None).unwrap(),
        proxy,
        connect_timeout: Duration::from_secs(3),
    };
    // A log or a panic may print the configuration.
    tracing::trace!(?source, ?http);
    Credentials::start(source, None, &http, Metrics::new()).unwrap()
}

/// Resolves a credential as the server does.
async fn resolve(credentials: &Credentials, metadata: &HeaderMap) -> Result<Auth, Error> {
    let caller = match credentials.token_hash(metadata) {
        Some(hash) => Caller::Token(hash),
        None => Caller::Connection(1),
    };
    credentials.resolve(metadata, caller, soon()).await
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn with_tokens(tokens: &[&[u8]]) -> HeaderMap {
    tokens
        .iter()
        .map(|token| {
            let name = http::HeaderName::from_static("x-auth-token");
            (name, HeaderValue::from_bytes(token).unwrap())
        })
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        })
}

fn key(secret: &str) -> Arc<AccessKey> {
    Arc::new(AccessKey::parse("AK", secret, Some("canary-st")).unwrap())
}

async fn token_of(credentials: &Credentials) -> Token {
    match resolve(credentials, &HeaderMap::new()).await.unwrap() {
        Auth::Token(token) => token,
        Auth::Key(_) => panic!("a token is expected"),
    }
}

#[tokio::test]
async fn callers_bring_exactly_one_well_formed_token() {
    let credentials = start(Source::Caller);
    let long = [b'a'; 31 * 1024 + 1];
    type Case<'a> = (&'a str, &'a [&'a [u8]], Result<(), Error>);
    let cases: [Case<'_>; 8] = [
        ("one", &[b"token"], Ok(())),
        ("longest", &[&long[1..]], Ok(())),
        ("none", &[], Err(Error::Missing)),
        ("repeated", &[b"token", b"token"], Err(Error::Malformed)),
        ("empty", &[b""], Err(Error::Malformed)),
        ("a blank inside", &[b"to ken"], Err(Error::Malformed)),
        ("beyond ASCII", &[b"tok\xc3\xa4n"], Err(Error::Malformed)),
        ("too long", &[&long], Err(Error::Malformed)),
    ];

    assert!(*credentials.ready().borrow());
    assert_eq!(credentials.owner(), Owner::Caller);
    for (name, tokens, expected) in cases {
        let resolved = resolve(&credentials, &with_tokens(tokens)).await;

        assert_eq!(
            resolved.as_ref().map(drop),
            expected.as_ref().map(drop),
            "{name}"
        );
        if let Ok(auth) = resolved {
            assert_eq!(auth.owner(), Owner::Caller);
            assert!(
                credentials
                    .refresh(&auth, TokenEvidence::Rejected, soon())
                    .await
                    .unwrap()
                    .is_none()
            );
        }
    }
}

#[tokio::test]
async fn each_token_of_a_caller_is_an_identity_apart_from_the_facades() {
    let (credentials, other_process) = (start(Source::Caller), start(Source::Caller));
    let identity = async |credentials: &Credentials, token: &[u8]| {
        let metadata = with_tokens(&[token]);
        let auth = resolve(credentials, &metadata).await.unwrap();
        auth.identity()
    };

    let first = identity(&credentials, b"one").await;

    assert_eq!(first, identity(&credentials, b"one").await);
    assert_ne!(first, identity(&credentials, b"two").await);
    assert_ne!(first, identity(&other_process, b"one").await);
    let fixed = start(Source::Token(secret::parse_token("one").unwrap()));
    assert_eq!(token_of(&fixed).await.identity, Identity::Server);
}

#[tokio::test]
async fn the_token_of_the_facade_is_used_even_if_the_caller_brings_another() {
    let credentials = start(Source::Token(secret::parse_token("ours").unwrap()));

    let auth = resolve(&credentials, &with_tokens(&[b"theirs", b"theirs"]))
        .await
        .unwrap();

    assert!(matches!(&auth, Auth::Token(token) if token.value == "ours"));
    assert_eq!(auth.owner(), Owner::Server);
    assert!(
        credentials
            .refresh(&auth, TokenEvidence::Rejected, soon())
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn the_chain_takes_environment_then_profile_then_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("credentials");
    fs::write(&profile, "[basic]\nak = FROM-PROFILE\nsk = s\n").unwrap();
    let issuer = metadata_issuer().await;
    let chain = |environment, profile| {
        Source::Chain(chain::ChainConfig {
            environment,
            missing: Vec::new(),
            profile,
            metadata_endpoint: issuer.endpoint.parse().unwrap(),
        })
    };
    let cases = [
        ("AK", chain(Some(key("s")), Some(profile.clone()))),
        ("FROM-PROFILE", chain(None, Some(profile))),
        ("FROM-METADATA", chain(None, Some("/nonexistent".into()))),
    ];

    for (expected, source) in cases {
        let resolved = resolve(&start(source), &HeaderMap::new()).await;

        let Ok(Auth::Key(key)) = resolved else {
            panic!("{expected}: a key is expected");
        };
        assert_eq!(key.access_key_id, expected);
    }
}

#[tokio::test]
async fn a_thousand_cold_calls_cause_one_token_request_and_a_revoked_token_another() {
    let folder = tempfile::tempdir().unwrap();
    let issuer = identity_issuer(|nth| format!("token-{nth}")).await;
    let credentials = start_directly(iam_source(&issuer, &folder));
    assert!(!*credentials.ready().borrow());
    let all = async |call: fn(Credentials) -> Pin<Box<dyn Future<Output = Token> + Send>>| {
        let calls: Vec<_> = (0..1000)
            .map(|_| tokio::spawn(call(credentials.clone())))
            .collect();
        let mut tokens = Vec::new();
        for call in calls {
            tokens.push(call.await.unwrap());
        }
        tokens
    };

    let cold = all(|credentials| Box::pin(async move { token_of(&credentials).await })).await;
    assert!(cold.iter().all(|token| token.value == "token-1"));
    assert_eq!(issuer.requests().len(), 1);
    assert!(*credentials.ready().borrow());

    let revoked = all(|credentials| {
        Box::pin(async move {
            let used = Auth::Token(Token {
                generation: 1,
                ..Token::for_server(HeaderValue::from_static("token-1"), None)
            });
            match credentials
                .refresh(&used, TokenEvidence::Rejected, soon())
                .await
            {
                Ok(Some(Auth::Token(token))) => token,
                other => panic!("{other:?}"),
            }
        })
    })
    .await;
    assert!(revoked.iter().all(|token| token.value == "token-2"));
    assert_eq!(issuer.requests().len(), 2);
}

async fn identity_issuer(token: fn(usize) -> String) -> FakeIssuer {
    FakeIssuer::start(move |nth, _| {
        let header = format!("X-Subject-Token: {}\r\n", token(nth));
        response("201 Created", &header, "{}")
    })
    .await
}

async fn metadata_issuer() -> FakeIssuer {
    FakeIssuer::start(|_, request| {
        if request.starts_with("PUT") {
            response("200 OK", "", "canary-metadata-token")
        } else {
            let body = r#"{"credential":{"access":"FROM-METADATA","secret":"canary-sk","securitytoken":"canary-st"}}"#;
            response("200 OK", "", body)
        }
    })
    .await
}

fn iam_source(issuer: &FakeIssuer, folder: &TempDir) -> Source {
    let password_file = folder.path().join("password");
    fs::write(&password_file, "canary-password").unwrap();
    Source::Iam(iam::IamConfig {
        endpoint: issuer.endpoint.parse().unwrap(),
        user: "user".to_owned(),
        domain: "domain".to_owned(),
        password_file,
        project: "cn-north-4".to_owned(),
    })
}

/// Collects the log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Runs each source with good and bad replies, and searches the log at TRACE, `Debug` output and errors for its secrets.
#[tokio::test]
async fn no_source_shows_a_secret_in_log_debug_or_error() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .finish();
    let _capturing = tracing::subscriber::set_default(subscriber);
    // With a single subscriber, tracing caches for all threads whether the first thread that reaches a log line has it enabled. A
    // thread of another test has no subscriber and would disable the line here.
    let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let echoing = FakeIssuer::start(|_, request| response("400 Bad Request", "", request)).await;
    let (tokens, keys) = (
        identity_issuer(|_| "canary-token".to_owned()).await,
        metadata_issuer().await,
    );
    let malformed_token = identity_issuer(|_| "canary token".to_owned()).await;
    let cases = [
        ("caller", Source::Caller),
        (
            "token",
            Source::Token(secret::parse_token("canary-token").unwrap()),
        ),
        (
            "token file",
            Source::TokenFile(write("token", "canary-token\n")),
        ),
        (
            "bad token file",
            Source::TokenFile(write("bad", "canary\ntoken")),
        ),
        ("key", Source::Key(key("canary-sk"))),
        (
            "profile",
            Source::Profile(write(
                "p1",
                "[basic]\nak=canary-ak\nsk=canary-sk\nsecurity_token=canary-st",
            )),
        ),
        (
            "bad profile",
            Source::Profile(write("p2", "[basic]\nak=canary ak\nsk=canary-sk")),
        ),
        ("iam", iam_source(&tokens, &folder)),
        ("iam that echoes", iam_source(&echoing, &folder)),
        (
            "iam with a bad token",
            iam_source(&malformed_token, &folder),
        ),
        ("metadata", Source::Metadata(keys.endpoint.parse().unwrap())),
        (
            "metadata that echoes",
            Source::Metadata(echoing.endpoint.parse().unwrap()),
        ),
        (
            "chain",
            Source::Chain(chain::ChainConfig {
                environment: None,
                missing: Vec::new(),
                profile: Some(folder.path().join("p2")),
                metadata_endpoint: echoing.endpoint.parse().unwrap(),
            }),
        ),
    ];

    for (name, source) in cases {
        for start in [start, start_directly] {
            let credentials = start(source.clone());
            let metadata = with_tokens(&[b"canary-caller"]);
            let resolved = resolve(&credentials, &metadata).await;
            if let Ok(auth) = &resolved {
                let newer = credentials
                    .refresh(auth, TokenEvidence::Rejected, soon())
                    .await;
                tracing::trace!(?newer);
            }
            tracing::trace!(?resolved, ?credentials, name);
        }
    }

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("metadata that echoes") && log.contains("HTTP status 400"));
    assert!(log.contains("environment: no key; profile "));
    for line in log.lines() {
        // "canary" in base64, at each of the three alignments.
        for secret in ["canary", "Y2FuYXJ5", "NhbmFye", "jYW5hcn"] {
            assert!(!line.contains(secret), "{line}");
        }
    }
}
