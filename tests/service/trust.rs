use tempfile::TempDir;
use tonic::Code;

use crate::support::{
    Failure, Program, Step, Upstream,
    certificates::{Authority, Pair},
    example, example_request, reply,
};

/// An authority among the system certificates, one in a separate file, and the paths of both.
struct Authorities {
    systems: Authority,
    named: Authority,
    systems_file: String,
    named_file: String,
    _folder: TempDir,
}

impl Authorities {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (systems, named) = (Authority::new(), Authority::new());
        Self {
            systems_file: systems.write(folder.path(), "systems"),
            named_file: named.write(folder.path(), "named"),
            systems,
            named,
            _folder: folder,
        }
    }
}

/// An upstream over TLS with a certificate of this authority, and its URL.
async fn https(authority: &Authority, steps: Vec<Step>) -> (Upstream, String) {
    let pair = Pair::for_server(authority, "localhost");
    let upstream = Upstream::always_over_tls(pair.server(), steps).await;
    let url = upstream.url();
    (upstream, url)
}

#[tokio::test]
async fn rds_is_verified_with_the_system_certificates_and_those_of_upstream_ca() {
    let known = Authorities::new();
    let file = ["--upstream-ca", known.named_file.as_str()];
    let cases: [(_, &Authority, &[&str], _); 4] = [
        ("system certificate", &known.systems, &[], true),
        ("unknown authority", &known.named, &[], false),
        (
            "system certificate, with a file",
            &known.systems,
            &file,
            true,
        ),
        ("certificate of the file", &known.named, &file, true),
    ];

    for (case, authority, args, good) in cases {
        let (upstream, url) = https(authority, example()).await;
        let args = [&["--endpoint", &url, "--credentials", "token"], args].concat();
        let env = [
            ("RDS_TASK_FACADE_TOKEN", "token"),
            ("SSL_CERT_FILE", known.systems_file.as_str()),
        ];
        let program = Program::start(&args, &env);

        let result = program.call(example_request()).await;

        if good {
            assert!(result.is_ok(), "{case}: {result:?}");
        } else {
            let failure = Failure::from_status(&result.expect_err(case));
            let expected = (Code::Unavailable, "UPSTREAM_TLS");
            assert_eq!(failure.code_and_reason(), expected, "{case}");
        }
        assert_eq!(upstream.requests().len(), usize::from(good), "{case}");
        assert_eq!(upstream.hellos(), ["localhost http/1.1"], "{case}");
    }
}

#[tokio::test]
async fn an_unreadable_system_certificate_causes_only_a_warning() {
    let known = Authorities::new();
    let good = std::fs::read_to_string(&known.systems_file).expect("a file");
    // Base64 of four bytes that are not a certificate.
    let unfit = "-----BEGIN CERTIFICATE-----\nAAAAAA==\n-----END CERTIFICATE-----\n";
    std::fs::write(&known.systems_file, [unfit, &good].concat()).expect("a file");
    let (_upstream, url) = https(&known.systems, example()).await;
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "token"),
        ("SSL_CERT_FILE", known.systems_file.as_str()),
    ];
    let program = Program::start(&["--endpoint", &url, "--credentials", "token"], &env);

    let result = program.call(example_request()).await;

    assert!(result.is_ok(), "{result:?}");
    let warning = program.wait_for_log(|line| line["ignored"] == 1);
    assert_eq!(warning["level"], "WARN");
}

#[tokio::test]
async fn iam_is_verified_with_the_system_certificates_even_if_rds_uses_plain_http() {
    let known = Authorities::new();
    let password = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&password, "password").expect("a file");
    let password = password.path().display().to_string();
    let rds = Upstream::always(example()).await;
    let token = reply(201, &[("x-subject-token", "token-1")], json_token());
    let (_iam, iam_url) = https(&known.systems, token).await;
    let rds_url = rds.url();
    let args = [
        ["--endpoint", &rds_url],
        ["--credentials", "iam"],
        ["--iam-endpoint", &iam_url],
        ["--iam-user", "user"],
        ["--iam-domain", "domain"],
        ["--iam-password-file", &password],
        ["--iam-project", "0483b6b16e954cb88930a360d2c4e663"],
    ];
    let env = [("SSL_CERT_FILE", known.systems_file.as_str())];
    let program = Program::start(args.as_flattened(), &env);

    let result = program.call(example_request()).await;

    assert!(result.is_ok(), "{result:?}");
    assert_eq!(rds.requests()[0].header("x-auth-token"), Some("token-1"));
}

// Several threads, because waiting for a log line blocks one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_collector_is_verified_with_its_certificate_file_or_else_the_system_certificates() {
    let known = Authorities::new();
    let file = [("OTEL_EXPORTER_OTLP_CERTIFICATE", known.named_file.as_str())];
    let cases: [(_, &Authority, &[_], _); 4] = [
        ("system certificate", &known.systems, &[], true),
        ("unknown authority", &known.named, &[], false),
        ("certificate of the file", &known.named, &file, true),
        (
            "system certificate, with a file",
            &known.systems,
            &file,
            false,
        ),
    ];

    for (case, authority, certificate, good) in cases {
        let (collector, url) = https(authority, reply(200, &[], "")).await;
        // A failed export is retried until this timeout.
        let timeout = if good { "10000" } else { "1000" };
        let env = [
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
                ("OTEL_BSP_SCHEDULE_DELAY", "10"),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", timeout),
                ("SSL_CERT_FILE", known.systems_file.as_str()),
            ],
            certificate,
        ]
        .concat();
        let program = Program::start(&["--sandbox"], &env);

        let result = program.call(example_request()).await;

        assert!(result.is_ok(), "{case}: {result:?}");
        if good {
            collector.wait_for_requests(1).await;
        } else {
            program.wait_for_log(|line| line["msg"] == "spans cannot be exported");
            assert!(collector.requests().is_empty(), "{case}");
            assert_eq!(collector.hellos()[0], "localhost http/1.1", "{case}");
        }
    }
}

/// The body of a token reply of IAM.
fn json_token() -> String {
    serde_json::json!({"token": {
        "expires_at": "2061-01-01T00:00:00.000000Z",
        "issued_at": "2026-01-01T00:00:00.000000Z",
        "project": {"id": "0483b6b16e954cb88930a360d2c4e663", "name": "cn-north-4"},
    }})
    .to_string()
}
