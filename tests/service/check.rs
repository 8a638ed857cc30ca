use std::{fs, net::TcpListener, process::Command};

use serde_json::Value;

use crate::support::{
    Sandbox, Step, Store, Upstream,
    canary::assert_no_canary,
    certificates::{Authority, Pair},
    example, free_address,
    program::{PROGRAM, run},
    reply,
};

type Variables<'a> = &'a [(&'a str, &'a str)];

const PROJECT: &str = "0483b6b16e954cb88930a360d2c4e663";

/// A key that the sandbox accepts.
const KEY: [(&str, &str); 2] = [
    ("HUAWEICLOUD_SDK_AK", "SANDBOXACCESSKEY"),
    ("HUAWEICLOUD_SDK_SK", "sandbox-secret-key"),
];

/// A token of the facade's own that no output may show.
const TOKEN: [(&str, &str); 1] = [("RDS_TASK_FACADE_TOKEN", "canary-token")];

/// The results of one run of `check`.
#[derive(Debug)]
struct Checked {
    code: i32,
    /// Name, outcome and message of each check.
    lines: Vec<(String, String, String)>,
}

impl Checked {
    /// Runs `check` on free ports, with nothing of this process's environment but `env`.
    async fn run(args: &[&str], env: Variables<'_>) -> Self {
        let fixed = ["check", "--output", "json", "--metrics-listen", "off"];
        let mut args = [&fixed[..], args].concat();
        if !args.contains(&"--listen") {
            args.extend(["--listen", "127.0.0.1:0"]);
        }
        let (code, out, err) = finished(&args, env).await;
        assert_eq!(err, "", "{args:?}: {out}");
        Self::parse(code, &out)
    }

    fn parse(code: i32, out: &str) -> Self {
        assert_no_canary("check", out);
        let lines: Vec<_> = out
            .lines()
            .map(|line| {
                let line: Value = serde_json::from_str(line).expect("a JSON object per line");
                let text = |name: &str| line[name].as_str().expect("a text").to_owned();
                (text("check"), text("outcome"), text("message"))
            })
            .collect();
        let has_failed = lines.iter().any(|(_, outcome, _)| outcome == "fail");
        assert_eq!(code, i32::from(has_failed), "{lines:#?}");
        Self { code, lines }
    }

    /// Asserts the outcome of a check, and a part of its message.
    #[track_caller]
    fn assert(&self, case: &str, check: &str, outcome: &str, part: &str) {
        let found = self.lines.iter().find(|(name, ..)| name == check);
        let (_, found, message) = found.unwrap_or_else(|| panic!("{case}: no {check}: {self:#?}"));
        assert_eq!(found, outcome, "{case}: {check}: {self:#?}");
        assert!(message.contains(part), "{case}: {part:?} in {message:?}");
    }

    /// Asserts that every check is `ok`.
    #[track_caller]
    fn assert_ok(&self, case: &str) {
        let are_ok = self.lines.iter().all(|(_, outcome, _)| outcome == "ok");
        assert!(are_ok && self.code == 0, "{case}: {self:#?}");
    }
}

/// Runs the program to its end, while this test serves its upstreams.
async fn finished(args: &[&str], env: Variables<'_>) -> (i32, String, String) {
    let owned = |text: &&str| (*text).to_owned();
    let args: Vec<String> = args.iter().map(owned).collect();
    let env: Vec<(String, String)> = env
        .iter()
        .map(|(name, value)| (owned(name), owned(value)))
        .collect();
    let ended = tokio::task::spawn_blocking(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        run(&args, &env)
    });
    ended.await.expect("no panic")
}

fn file(folder: &tempfile::TempDir, name: &str, content: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, content).expect("a file");
    path.display().to_string()
}

/// An error object of the vendor.
fn error(status: u16, code: &str, message: &str) -> Vec<Step> {
    let body = format!(r#"{{"error_code":"{code}","error_msg":"{message}"}}"#);
    reply(status, &[("content-type", "application/json")], body)
}

#[tokio::test]
async fn every_credential_source_passes_with_the_sandbox() {
    let folder = tempfile::tempdir().expect("a folder");
    let password = file(&folder, "password", "sandbox-password");
    let iam = [
        "--credentials",
        "iam",
        "--iam-user",
        "sandbox-user",
        "--iam-domain",
        "sandbox-domain",
        "--iam-password-file",
        &password,
    ];
    let caller = [("RDS_TASK_FACADE_TOKEN", "sandbox-token")];
    let token = file(&folder, "token", "sandbox-token\n");
    let profile = "[basic]\nak = SANDBOXACCESSKEY\nsk = sandbox-secret-key\n";
    let profile = file(&folder, "profile", profile);
    let of_profile = [("HUAWEICLOUD_SDK_CREDENTIALS_FILE", profile.as_str())];
    let cases: [(&str, &[&str], Variables<'_>); 9] = [
        ("token", &[], &[]),
        ("token", &["--token-file", &token], &[]),
        ("profile", &["--credentials", "profile"], &of_profile),
        ("caller", &["--credentials", "caller"], &caller),
        ("env", &["--credentials", "env"], &KEY),
        ("iam", &iam, &[]),
        ("metadata", &["--credentials", "metadata"], &[]),
        ("chain: environment", &["--credentials", "chain"], &KEY),
        ("chain: metadata service", &["--credentials", "chain"], &[]),
    ];

    for (case, args, env) in cases {
        let checked = Checked::run(&[&["--sandbox"], args].concat(), env).await;

        checked.assert_ok(case);
        checked.assert(case, "credential", "ok", &format!("--credentials {case}"));
        checked.assert(case, "call", "ok", "DBS.200543");
    }
}

#[tokio::test]
async fn the_text_has_one_line_per_check_that_begins_with_its_outcome() {
    let args = ["check", "--sandbox", "--listen", "127.0.0.1:0"];

    let (code, out, err) = finished(&args, &[("RDS_TASK_FACADE_METRICS_LISTEN", "off")]).await;

    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let first = out.lines().map(|line| line.split(' ').next());
    assert!(first.into_iter().all(|word| word == Some("ok")), "{out}");
    for check in [
        "settings",
        "roots",
        "name",
        "connection",
        "clock",
        "credential",
        "call",
    ] {
        let about = |line: &&str| line.contains(&format!(" {check}: "));
        assert_eq!(out.lines().filter(about).count(), 1, "{check} in {out}");
    }
}

#[tokio::test]
async fn a_call_for_callers_without_a_token_is_skipped() {
    let args = ["--sandbox", "--credentials", "caller"];

    let checked = Checked::run(&args, &[]).await;

    checked.assert("caller", "call", "warn", "skipped");
    assert_eq!(checked.code, 0);
}

#[tokio::test]
async fn wrong_credentials_fail_with_their_cure() {
    let folder = tempfile::tempdir().expect("a folder");
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let password = file(&folder, "password", "canary-password");
    let iam = [
        "--credentials",
        "iam",
        "--iam-endpoint",
        &url,
        "--iam-user",
        "sandbox-user",
        "--iam-domain",
        "sandbox-domain",
        "--iam-project",
        PROJECT,
        "--iam-password-file",
        &password,
    ];
    let wrong_key = [KEY[0], ("HUAWEICLOUD_SDK_SK", "canary-secret-key")];
    let cases: [(&str, &[&str], Variables<'_>, &str, &str); 3] = [
        (
            "token",
            &["--credentials", "token"],
            &TOKEN,
            "call",
            "replace it",
        ),
        (
            "key",
            &["--credentials", "env"],
            &wrong_key,
            "call",
            "correct AK and SK",
        ),
        ("password", &iam, &[], "credential", "--iam-user"),
    ];

    for (case, args, env, check, cure) in cases {
        let checked = Checked::run(&[&["--endpoint", &url], args].concat(), env).await;

        checked.assert(case, check, "fail", cure);
        if check == "credential" {
            checked.assert(case, "call", "warn", "skipped");
        }
    }
    assert_eq!(sandbox.count("task_requests").await, 2, "one for each call");
}

#[tokio::test]
async fn an_issuer_that_fails_is_named_with_its_status() {
    let folder = tempfile::tempdir().expect("a folder");
    let sandbox = Sandbox::start();
    let url = sandbox.url();
    let password = file(&folder, "password", "canary-password");
    let iam = [
        "--iam-user=u",
        "--iam-domain=d",
        "--iam-project=p",
        "--iam-endpoint",
        &url,
        "--iam-password-file",
        &password,
    ];
    for (source, flags) in [
        ("iam", &iam[..]),
        ("metadata", &["--metadata-endpoint", &url]),
    ] {
        sandbox
            .set(&format!("fail-{source}?status=503&times=9"))
            .await;
        let args = [&["--endpoint", &url, "--credentials", source], flags].concat();

        let checked = Checked::run(&args, &[]).await;

        checked.assert(source, "credential", "fail", "HTTP status 503");
        checked.assert(
            source,
            "credential",
            "fail",
            &format!("check --{source}-endpoint"),
        );
        checked.assert(source, "call", "warn", "skipped");
    }
}

#[tokio::test]
async fn obstacles_on_the_way_to_rds_fail_once_with_their_cause() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let good = Pair::for_server(&authority, "localhost").server();
    let good = Upstream::always_over_tls(good, example()).await;
    let expired = Pair::expired_of_server(&authority, "localhost").server();
    let expired = Upstream::always_over_tls(expired, example()).await;
    let plain = Upstream::always(example()).await;
    let proxy = Upstream::always(reply(407, &[], "")).await;
    let proxy_url = format!("http://canary:canary@{}", proxy.address);
    let silent = Upstream::always(vec![Step::Hold]).await;
    let reset = Upstream::always(vec![Step::Reset]).await;
    let not_http = Upstream::always(vec![Step::Send(b"+OK ready\r\n".to_vec()), Step::Close]).await;
    let closed = format!("http://{}", free_address());
    let not_tls = format!("https://localhost:{}", plain.address.port());
    let through = |url: &str| {
        [
            url.to_owned(),
            "--upstream-proxy".to_owned(),
            proxy_url.clone(),
        ]
        .to_vec()
    };
    let direct = |url: &str| vec![url.to_owned()];
    let cases = [
        (
            "no such name",
            direct("https://nowhere.invalid"),
            "name",
            "nowhere.invalid",
        ),
        ("closed port", direct(&closed), "connection", "refused"),
        ("unknown CA", direct(&good.url()), "tls", "--upstream-ca"),
        (
            "expired",
            [
                &direct(&expired.url())[..],
                &["--upstream-ca".to_owned(), ca.clone()],
            ]
            .concat(),
            "tls",
            "expired",
        ),
        ("no TLS", direct(&not_tls), "tls", "does not speak TLS"),
        ("proxy login", through(&good.url()), "connection", "407"),
        (
            "login of a forwarding proxy",
            through(&plain.url()),
            "connection",
            "407",
        ),
        (
            "reset",
            direct(&reset.url()),
            "connection",
            "closed before a reply",
        ),
        (
            "not HTTP",
            direct(&not_http.url()),
            "connection",
            "violates HTTP",
        ),
        (
            "silence",
            [
                &direct(&silent.url())[..],
                &["--attempt-timeout=300ms".to_owned()],
            ]
            .concat(),
            "connection",
            "did not reply in time",
        ),
    ];

    for (case, args, check, part) in cases {
        let args = [
            vec![
                "--credentials".to_owned(),
                "token".to_owned(),
                "--endpoint".to_owned(),
            ],
            args,
        ]
        .concat();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let checked = Checked::run(&args, &TOKEN).await;

        checked.assert(case, check, "fail", part);
        checked.assert(case, "call", "warn", "skipped");
        let failed = checked
            .lines
            .iter()
            .filter(|(_, outcome, _)| outcome == "fail");
        assert_eq!(failed.count(), 1, "{case}: {checked:#?}");
    }
    for upstream in [&good, &expired] {
        assert_eq!(upstream.requests().len(), 0);
    }

    let args = [
        "--credentials",
        "token",
        "--endpoint",
        &good.url(),
        "--upstream-ca",
        &ca,
    ];
    let checked = Checked::run(&args, &TOKEN).await;
    checked.assert("known CA", "tls", "ok", "trusted");
}

#[tokio::test]
async fn each_kind_of_reply_has_an_outcome_and_a_cure_and_takes_three_requests_at_most() {
    let page = |status| {
        reply(
            status,
            &[("content-type", "text/html")],
            "<html>canary</html>",
        )
    };
    let denied = "Policy does not allow rds:task:listAll";
    let cases = [
        (
            "no such task",
            error(404, "DBS.200543", "no"),
            "ok",
            "accepts credential, project and permission",
        ),
        (
            "no such instance",
            error(404, "DBS.200011", "no"),
            "ok",
            "accepts",
        ),
        ("a task", example(), "warn", "--endpoint"),
        (
            "throttled",
            error(429, "APIGW.0308", "slow down"),
            "warn",
            "quota",
        ),
        ("denied", error(403, "DBS.200010", denied), "fail", "grant"),
        (
            "unusable project",
            error(403, "APIGW.0310", "no"),
            "fail",
            "check that the project exists",
        ),
        (
            "unknown project",
            error(400, "IAM.1109", "no"),
            "fail",
            "check that the project exists",
        ),
        ("nothing", reply(404, &[], ""), "fail", "--endpoint is RDS"),
        (
            "no such API",
            error(404, "APIGW.0101", "no"),
            "fail",
            "--region and --endpoint",
        ),
        ("page", page(200), "fail", "--region and --endpoint"),
        ("page for 404", page(404), "fail", "--region and --endpoint"),
        (
            "login page",
            reply(302, &[("location", "/login")], ""),
            "fail",
            "--endpoint",
        ),
        ("outage", page(503), "fail", "unavailable"),
        (
            "token rejected",
            error(401, "APIGW.0307", "canary"),
            "fail",
            "replace it",
        ),
    ];

    for (case, steps, outcome, part) in cases {
        let upstream = Upstream::always(steps).await;
        let url = upstream.url();
        let args = [
            "--endpoint",
            &url,
            "--credentials",
            "token",
            "--allow-project",
            PROJECT,
        ];
        let checked = Checked::run(&args, &TOKEN).await;

        checked.assert(case, "clock", "warn", "Date");
        checked.assert(case, "call", outcome, part);
        checked.assert(case, "call", outcome, PROJECT);
        let requests = upstream.requests();
        assert!((2..=3).contains(&requests.len()), "{case}: {requests:#?}");
        assert!(requests[1].line.contains(PROJECT), "{case}: {requests:#?}");
    }
}

#[tokio::test]
async fn a_locked_key_is_named_and_used_once() {
    let locked = "Incorrect IAM authentication information: AK access failed to reach the limit";
    let upstream = Upstream::always(error(401, "APIGW.0301", locked)).await;
    let args = ["--endpoint", &upstream.url(), "--credentials", "env"];

    let checked = Checked::run(&args, &KEY).await;

    checked.assert("locked", "call", "fail", "wait five minutes");
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn the_call_uses_the_first_project_that_the_configuration_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let password = file(&folder, "password", "sandbox-password");
    let sandbox = Sandbox::start();
    let (url, name) = (sandbox.url(), "cn-north-4");
    let from_sdk = "11111111111111111111111111111111";
    let iam = |project| {
        let user = [
            "--iam-user",
            "sandbox-user",
            "--iam-domain",
            "sandbox-domain",
        ];
        let rest = [
            "--credentials",
            "iam",
            "--iam-endpoint",
            &url,
            "--iam-project",
            project,
        ];
        [&user[..], &rest, &["--iam-password-file", &password]].concat()
    };
    let allowed = ["--allow-project", "first,second"];
    let cases = [
        (
            "--allow-project",
            [&iam(PROJECT)[..], &allowed].concat(),
            "project first",
        ),
        ("--iam-project", iam(PROJECT), PROJECT),
        ("variable", iam(name), from_sdk),
    ];

    for (case, args, project) in cases {
        let args = [&["--endpoint", &url], &args[..]].concat();
        let env = [("HUAWEICLOUD_SDK_PROJECT_ID", from_sdk)];
        let checked = Checked::run(&args, &env).await;
        checked.assert(case, "call", "ok", project);
    }
    let args = [&["--endpoint", &url], &iam(name)[..]].concat();
    let checked = Checked::run(&args, &[]).await;
    checked.assert("none", "call", "ok", "made-up project");
}

#[tokio::test]
async fn a_clock_that_is_an_hour_off_fails_although_the_call_succeeds() {
    let sandbox = Sandbox::start();
    sandbox.set("clock?offset-seconds=3600").await;
    let args = ["--endpoint", &sandbox.url(), "--credentials", "env"];

    let checked = Checked::run(&args, &KEY).await;

    checked.assert(
        "slow clock",
        "clock",
        "fail",
        "behind the Date of RDS: set it",
    );
    checked.assert("slow clock", "call", "ok", "DBS.200543");
}

#[tokio::test]
async fn listeners_and_certificates_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let in_use = taken.local_addr().expect("an address").to_string();
    let (cert, key) = Pair::for_server(&authority, "localhost").write(folder.path(), "good");
    let (old, old_key) =
        Pair::expired_of_server(&authority, "localhost").write(folder.path(), "old");
    let cases: [(&str, &[&str], &str, &str, &str); 4] = [
        ("in use", &["--listen", &in_use], "listen", "warn", "in use"),
        (
            "another machine's",
            &["--listen", "192.0.2.1:50051"],
            "listen",
            "fail",
            "--listen",
        ),
        (
            "valid",
            &["--tls-cert", &cert, "--tls-key", &key],
            "certificate",
            "ok",
            "2061",
        ),
        (
            "expired",
            &["--tls-cert", &old, "--tls-key", &old_key],
            "certificate",
            "fail",
            "2001",
        ),
    ];

    for (case, args, check, outcome, part) in cases {
        let checked = Checked::run(&[&["--sandbox"], args].concat(), &[]).await;
        checked.assert(case, check, outcome, part);
    }

    drop(taken);
    let both = [
        "check",
        "--sandbox",
        "--output=json",
        "--listen",
        &in_use,
        "--metrics-listen",
        &in_use,
    ];
    let (code, out, _) = finished(&both, &[]).await;
    Checked::parse(code, &out).assert("same address", "metrics-listen", "fail", "another port");
}

#[test]
fn a_low_limit_of_descriptors_is_a_warning() {
    let output = Command::new("timeout")
        .args([
            "30",
            "sh",
            "-c",
            "ulimit -n 500 && exec \"$@\"",
            "sh",
            PROGRAM,
            "check",
        ])
        .args([
            "--sandbox",
            "--output=json",
            "--listen=127.0.0.1:0",
            "--metrics-listen=off",
        ])
        .output()
        .expect("a shell");

    let out = String::from_utf8(output.stdout).expect("text");
    let checked = Checked::parse(output.status.code().expect("an exit code"), &out);

    checked.assert("500", "descriptors", "warn", "ulimit -n");
}

#[tokio::test]
async fn invalid_settings_exit_with_code_2_as_with_serve() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let (cert, _) = Pair::for_server(&authority, "localhost").write(folder.path(), "one");
    let (_, other_key) = Pair::for_server(&authority, "localhost").write(folder.path(), "two");
    let cases: [(&[&str], &str); 4] = [
        (
            &[
                "--token-file",
                "/nonexistent/canary",
                "--credentials",
                "token",
            ],
            "--token-file",
        ),
        (
            &["--tls-cert", &cert, "--tls-key", &other_key],
            "two-key.pem",
        ),
        (&["--output", "xml"], "--output"),
        (&["--timeout", "soon"], "--timeout"),
    ];

    for (args, part) in cases {
        let args = [&["check", "--sandbox"], args].concat();
        let (code, out, err) = finished(&args, &[]).await;

        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(part), "{part} in {err}");
        assert_no_canary("check", &err);
    }
    let (_, _, err) = finished(&["check", "--output", "json"], &[]).await;
    let line: Value = serde_json::from_str(&err).expect("one JSON object");
    assert!(
        line["msg"]
            .as_str()
            .is_some_and(|text| text.contains("--region")),
        "{err}"
    );
}

#[tokio::test]
async fn a_quota_store_that_cannot_be_used_is_a_warning_and_a_cluster_a_failure() {
    let cases = [
        (&[][..], "ok", "can use it"),
        (&["--requirepass", "other"], "warn", "user or password"),
        (&["--replicaof", "127.0.0.1", "1"], "warn", "read-only"),
        (&["--cluster-enabled", "yes"], "fail", "cluster"),
    ];

    for (settings, outcome, part) in cases {
        let Some(mut store) = Store::start_with(settings).await else {
            return;
        };
        let flags = store.flags();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let args = [&["--sandbox"], &flags[..]].concat();

        let checked = Checked::run(&args, &[]).await;

        checked.assert("a store that runs", "quota-store", outcome, part);
        if outcome == "ok" {
            assert!(store.names("replicas").is_empty(), "`check` is no replica");
        }
        store.kill();
        let checked = Checked::run(&args, &[]).await;
        checked.assert(
            "a store that is gone",
            "quota-store",
            "warn",
            "no connection",
        );
    }
}
