use std::collections::BTreeSet;

use jiff::Timestamp;
use rds_task_facade::pb::GetTaskDetailRequest;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::support::{
    Connection, Gate, Program, Step, Upstream,
    certificates::{Authority, Pair},
    eventually, example, example_request, free_address, gated_example,
    program::run,
    raw::{framed, headers},
    reply,
};

const PAGE: &str = include_str!("../../docs/troubleshooting.md");

/// The lines that the programs of this test wrote, in the form of the page: without time and target.
#[derive(Default)]
struct Written(BTreeSet<String>);

impl Written {
    /// Waits until the program has written a line with `last` in it, then takes its lines.
    async fn take(&mut self, program: &Program, last: &str) {
        let is_written = async || program.logs().iter().any(|line| line.contains(last));
        eventually(last, is_written).await;
        let lines = program.logs();
        self.0
            .extend(lines.iter().filter_map(|line| in_text_form(line)));
    }

    /// Makes a call for this instance, then takes the program's lines.
    async fn call(&mut self, program: &Program, instance: &str) {
        let request = GetTaskDetailRequest {
            instance_id: instance.to_owned(),
            ..example_request()
        };
        let id = format!("call-{:x}", fastrand::u64(..));
        let _ = program.call_with(request, &[("x-request-id", &id)]).await;
        self.take(program, &id).await;
    }

    /// Runs the program to its end.
    async fn run(&mut self, args: &[&str], env: &[(&'static str, &'static str)]) {
        let (args, env) = (args.iter().map(|arg| (*arg).to_owned()), env.to_vec());
        let args: Vec<String> = args.collect();
        let ended = tokio::task::spawn_blocking(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            run(&args, &env)
        });
        let (_, out, err) = ended.await.expect("no panic");
        let lines = out.lines().chain(err.lines());
        self.0
            .extend(lines.map(|line| in_text_form(line).unwrap_or_else(|| line.to_owned())));
    }
}

/// A JSON line as the text format shows it, without time and target.
fn in_text_form(json: &str) -> Option<String> {
    let line: serde_json::Map<String, Value> = serde_json::from_str(json).ok()?;
    let mut text = format!("{} {}", line["level"].as_str()?, line["msg"].as_str()?);
    // A parsed object does not keep the order of the fields.
    let mut names: Vec<&String> = line.keys().collect();
    names.sort_by_key(|name| json.find(&format!("\"{name}\":")));
    for name in names {
        let value = match &line[name] {
            _ if ["ts", "level", "target", "msg"].contains(&name.as_str()) => continue,
            Value::String(value) if value.contains([' ', '=', '"']) => format!("{value:?}"),
            Value::String(value) => value.clone(),
            value => value.to_string(),
        };
        text.push_str(&format!(" {name}={value}"));
    }
    Some(text)
}

/// Whether the line is the pattern, with any text for each `…`.
fn is_like(pattern: &str, line: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('…') else {
        return line == pattern;
    };
    let (middle, end) = rest.rsplit_once('…').unwrap_or(("", rest));
    let inner = line
        .strip_prefix(start)
        .and_then(|line| line.strip_suffix(end));
    let found = inner.and_then(|inner| {
        let mut parts = middle.split('…');
        parts.try_fold(inner, |rest, part| Some(rest.split_once(part)?.1))
    });
    found.is_some()
}

/// The second column of each table of the page.
fn quoted_lines() -> Vec<String> {
    let rows = PAGE.lines().filter(|line| line.starts_with("| "));
    let cells = rows.filter_map(|row| row.split(" | ").nth(1));
    let quoted = cells.filter_map(|cell| cell.strip_prefix('`')?.strip_suffix('`'));
    quoted.map(str::to_owned).collect()
}

#[tokio::test]
async fn each_line_on_the_page_is_one_that_the_program_writes() {
    let mut written = Written::default();

    start(&mut written).await;
    connections(&mut written).await;
    tls(&mut written).await;
    replies(&mut written).await;
    credentials(&mut written).await;
    callers(&mut written).await;
    telemetry(&mut written).await;
    commands(&mut written).await;

    let quoted = quoted_lines();
    assert!(quoted.len() > 45, "{quoted:#?}");
    let is_written = |pattern: &&String| written.0.iter().any(|line| is_like(pattern, line));
    let missing: Vec<&String> = quoted
        .iter()
        .filter(|pattern| !is_written(pattern))
        .collect();
    let seen: Vec<&String> = written
        .0
        .iter()
        .filter(|line| !line.starts_with("INFO s"))
        .collect();
    assert!(
        missing.is_empty(),
        "not written: {missing:#?}\nwritten: {seen:#?}"
    );
}

/// The URL of an upstream that has no TLS, for a client that expects TLS.
fn https(upstream: &Upstream) -> String {
    format!("https://localhost:{}", upstream.address.port())
}

async fn start(written: &mut Written) {
    written
        .run(&["serve", "--region", "cn-nowhere-9"], &[])
        .await;
    let variable = [("RDS_TASK_FACADE_TIMEOUTS", "1s")];
    written.run(&["serve", "--sandbox"], &variable).await;
    let absent = [
        "serve",
        "--credentials",
        "token",
        "--token-file",
        "/nonexistent/token",
    ];
    written
        .run(&[&absent[..], &["--region", "cn-north-4"]].concat(), &[])
        .await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let in_use = taken.local_addr().expect("an address").to_string();
    let args = [
        "serve",
        "--sandbox",
        "--listen",
        &in_use,
        "--log-format",
        "json",
    ];
    written.run(&args, &[]).await;
    let sandbox = Program::sandboxed(&[]);
    written.take(&sandbox, "embedded sandbox").await;
    let folder = tempfile::tempdir().expect("a folder");
    let roots = folder.path().join("roots.pem");
    let unfit = "-----BEGIN CERTIFICATE-----\nAAAAAA==\n-----END CERTIFICATE-----\n";
    let good = std::fs::read_to_string(Authority::new().write(folder.path(), "ca"));
    std::fs::write(&roots, [unfit, &good.expect("a file")].concat()).expect("a file");
    let env = [
        ("RDS_TASK_FACADE_TOKEN", "canary"),
        ("SSL_CERT_FILE", roots.to_str().expect("a text")),
    ];
    let own = [
        "--endpoint",
        "https://rds.invalid",
        "--credentials",
        "token",
    ];
    let open = Program::start_under(&[], "0.0.0.0:0", &own, &env);
    written.take(&open, "every client that reaches").await;
    let chain = ["--endpoint", "http://127.0.0.1:9", "--credentials", "chain"];
    let chain = Program::start(&chain, &[]);
    written.take(&chain, "credential chain").await;
}

async fn connections(written: &mut Written) {
    let closed = format!("http://{}", free_address());
    let program = Program::over(&closed, &[]);
    for number in 0..12 {
        written.call(&program, &format!("instance-{number}")).await;
    }
    written
        .call(&Program::over("https://rds.invalid", &[]), "name")
        .await;
    let silent = Upstream::always(vec![Step::Hold]).await;
    let hasty = ["--connect-timeout", "100ms", "--max-attempts", "1"];
    written
        .call(&Program::over(&https(&silent), &hasty), "connect")
        .await;
    let hasty = ["--attempt-timeout", "100ms", "--max-attempts", "1"];
    written
        .call(&Program::over(&silent.url(), &hasty), "attempt")
        .await;
    for status in [407, 403] {
        let proxy = Upstream::always(reply(status, &[], "")).await;
        let program = Program::over("https://rds.invalid", &["--upstream-proxy", &proxy.url()]);
        written.call(&program, "proxy").await;
    }
}

async fn tls(written: &mut Written) {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let serve = async |pair: Pair| Upstream::always_over_tls(pair.server(), example()).await;
    let good = serve(Pair::for_server(&authority, "localhost")).await;
    let expired = serve(Pair::expired_of_server(&authority, "localhost")).await;
    let elsewhere = serve(Pair::for_server(&authority, "elsewhere.test")).await;
    let alert = vec![Step::Send(vec![0x15, 3, 3, 0, 2, 2, 40]), Step::Close];
    let alert = Upstream::always(alert).await;
    let plain = Upstream::always(reply(400, &[], "")).await;

    written
        .call(&Program::over(&https(&good), &[]), "tls")
        .await;
    for upstream in [expired, elsewhere, alert, plain] {
        let program = Program::over(&https(&upstream), &["--upstream-ca", &ca]);
        written.call(&program, "tls").await;
    }
}

async fn replies(written: &mut Written) {
    let denied = json!({"error_code": "DBS.200011", "error_msg": "no permission"}).to_string();
    let script = move |request: &crate::support::upstream::Received| {
        let is = |instance: &str| request.line.contains(&format!("/{instance}/"));
        match () {
            () if is("reset") => vec![Step::Reset],
            () if is("truncated") => {
                let head = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec();
                vec![Step::Send(head), Step::Close]
            }
            () if is("garbage") => vec![Step::Send(b"SSH-2.0\r\n\r\n".to_vec()), Step::Close],
            () if is("page") => reply(404, &[], "<html>"),
            () if is("redirect") => reply(302, &[("location", "/login")], ""),
            () if is("other") => reply(200, &[], "<html>"),
            () if is("denied") => reply(403, &[], &denied),
            () if is("rejected") => reply(401, &[], ""),
            () if is("throttled") => reply(429, &[], ""),
            () => example(),
        }
    };
    let upstream = Upstream::start(script).await;
    let program = Program::over(&upstream.url(), &[]);
    let instances = "reset truncated garbage page redirect other denied rejected throttled";
    for instance in instances.split(' ') {
        written.call(&program, instance).await;
    }
}

/// The gateway rejects the time of a signature; its own time is an hour behind.
fn expired() -> Vec<Step> {
    let time = Timestamp::now() - jiff::SignedDuration::from_hours(1);
    let time = time.strftime("%Y%m%dT%H%M%SZ");
    let text = format!("signature expired, signature time:{time},server time:{time}");
    let body = json!({"error_code": "APIGW.0301", "error_msg": text});
    reply(401, &[], body.to_string())
}

async fn credentials(written: &mut Written) {
    let folder = tempfile::tempdir().expect("a folder");
    let password = folder.path().join("password");
    std::fs::write(&password, "canary").expect("a file");
    let password = password.display().to_string();
    let trace = [("x-iam-trace-id", "trace-1")];
    let wrong = r#"{"error":{"code":401,"message":"The username or password is wrong.","title":"Unauthorized"}}"#;
    let forbidden = r#"{"error":{"code":403,"message":"No access","title":"Forbidden"}}"#;
    let invalid = r#"{"error":{"code":400,"message":"Invalid","title":"Bad Request"}}"#;
    let replies = [(401, wrong), (403, forbidden), (400, invalid)];
    let mut endpoints = vec![format!("http://{}", free_address())];
    let mut issuers = Vec::new();
    for (status, body) in replies {
        let issuer = Upstream::always(reply(status, &trace, body)).await;
        endpoints.push(issuer.url());
        issuers.push(issuer);
    }
    let rds = ["--endpoint", "http://127.0.0.1:9"];
    for endpoint in &endpoints {
        let iam = [
            "--credentials",
            "iam",
            "--iam-endpoint",
            endpoint,
            "--iam-user",
            "u",
            "--iam-domain",
            "d",
            "--iam-project",
            "p",
            "--iam-password-file",
            &password,
        ];
        let program = Program::start(&[&rds[..], &iam].concat(), &[]);
        written.take(&program, "credential cannot be fetched").await;
    }
    let token = folder.path().join("token");
    std::fs::write(&token, "canary").expect("a file");
    let path = token.display().to_string();
    let file = ["--credentials", "token", "--token-file", &path];
    let program = Program::start(&[&rds[..], &file].concat(), &[]);
    written.take(&program, "credential fetched").await;
    std::fs::remove_file(&token).expect("it exists");
    written.take(&program, "credential cannot be fetched").await;
    let no_agency = reply(401, &[], "Please configure Cloud Service Agency first");
    let metadata = Upstream::start(move |request| match request.line.starts_with("PUT") {
        true => reply(404, &[], ""),
        false => no_agency.clone(),
    })
    .await;
    let url = metadata.url();
    let metadata = ["--credentials", "metadata", "--metadata-endpoint", &url];
    let program = Program::start(&[&rds[..], &metadata].concat(), &[]);
    written.take(&program, "credential cannot be fetched").await;

    let key = [
        ("HUAWEICLOUD_SDK_AK", "AKAKAKAKAKAKAKAKAKAK"),
        ("HUAWEICLOUD_SDK_SK", "sksksksksksksk"),
    ];
    let signed = |url: &str| Program::start(&["--endpoint", url, "--credentials", "env"], &key);
    let wrong = json!({"error_code": "APIGW.0301", "error_msg": "Incorrect IAM authentication information: verify aksk signature fail"});
    let gateway = Upstream::always(reply(401, &[], wrong.to_string())).await;
    let program = signed(&gateway.url());
    written.call(&program, "first").await;
    written.call(&program, "second").await;
    written.take(&program, "not ready").await;
    let gateway = Upstream::start(|request| match request.number {
        0 => expired(),
        _ => example(),
    })
    .await;
    written.call(&signed(&gateway.url()), "skewed").await;
    let always = Upstream::always(expired()).await;
    written.call(&signed(&always.url()), "skewed").await;
    let callers = Program::start(
        &[
            "--endpoint",
            "http://127.0.0.1:9",
            "--credentials",
            "caller",
        ],
        &[],
    );
    written.call(&callers, "missing").await;
}

async fn callers(written: &mut Written) {
    let folder = tempfile::tempdir().expect("a folder");
    let (cert, key) = Pair::for_server(&Authority::new(), "localhost").write(folder.path(), "s");
    let program = Program::sandboxed(&["--tls-cert", &cert, "--tls-key", &key]);
    let mut plain = tokio::net::TcpStream::connect(program.grpc)
        .await
        .expect("it listens");
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .expect("it reads");
    std::fs::write(&key, "damaged").expect("a file");
    written.take(&program, "TLS handshake failed").await;
    written.take(&program, "changed certificates").await;

    let gate = Gate::default();
    let upstream = Upstream::always(gated_example(&gate)).await;
    let limits = [
        "--max-in-flight",
        "1",
        "--allow-project",
        &example_request().project_id,
    ];
    let program = Program::over(&upstream.url(), &limits);
    written.call(&program, "invalid instance").await;
    let mut other = example_request();
    other.project_id = "another-project".to_owned();
    let _ = program.call(other).await;
    let connection = Connection::open(program.grpc).await;
    let exchange = |headers, body| connection.exchange(headers, body);
    let short = headers().header("grpc-timeout", "50m");
    let _ = exchange(short, framed(&example_request())).await;
    let mut json = headers();
    json.headers_mut()
        .expect("valid")
        .insert("content-type", "application/json".parse().expect("a value"));
    let _ = exchange(json, framed(&example_request())).await;
    let held = connection.clone();
    let held = tokio::spawn(async move {
        let mut request = example_request();
        request.instance_id = "held".to_owned();
        held.exchange(headers(), framed(&request)).await
    });
    let is_held = async || {
        upstream
            .requests()
            .iter()
            .any(|request| request.line.contains("/held/"))
    };
    eventually("the request of the held call", is_held).await;
    written.call(&program, "overloaded").await;
    gate.open();
    let _ = held.await;

    let silent = Upstream::always(vec![Step::Hold]).await;
    let program = Program::over(&silent.url(), &["--timeout", "100ms"]);
    written.call(&program, "deadline").await;
    let program = Program::over(&silent.url(), &["--shutdown-grace", "1s"]);
    let before = silent.requests().len();
    let mut client = program.client().await;
    let call = tokio::spawn(async move { client.get_task_detail(example_request()).await });
    silent.wait_for_requests(before + 1).await;
    program.signal("TERM");
    written.take(&program, "cut off").await;
    let _ = call.await;
}

async fn telemetry(written: &mut Written) {
    let denied = Upstream::always(reply(401, &[], "")).await;
    let settings = vec![Step::Send(vec![0, 0, 0, 4, 0, 0, 0, 0, 0]), Step::Close];
    let grpc = Upstream::always(settings).await;
    let silent = Upstream::always(vec![Step::Hold]).await;
    let closed = format!("http://{}", free_address());
    for endpoint in [denied.url(), grpc.url(), closed] {
        let env = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ];
        let program = Program::start(&["--sandbox"], &env);
        written.call(&program, "traced").await;
        written.take(&program, "spans cannot be exported").await;
    }
    let url = silent.url();
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str())];
    let program = Program::start(&["--sandbox", "--shutdown-grace", "1s"], &env);
    written.call(&program, "traced").await;
    program.signal("TERM");
    written.take(&program, "the last spans").await;
}

async fn commands(written: &mut Written) {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let ca = authority.write(folder.path(), "ca");
    let (cert, key) = Pair::for_server(&authority, "localhost").write(folder.path(), "server");
    let files = [
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--tls-client-ca",
        &ca,
    ];
    let mutual = Program::sandboxed(&files);
    let target = format!("https://localhost:{}", mutual.grpc.port());
    written
        .run(&["call", "--target", &target, "--ca", &ca], &[])
        .await;
    let closed = format!("http://{}", free_address());
    written.run(&["health", "--target", &closed], &[]).await;
    let silent = Upstream::always(vec![
        Step::Send(vec![0, 0, 0, 4, 0, 0, 0, 0, 0]),
        Step::Hold,
    ])
    .await;
    let target = silent.url();
    written
        .run(&["call", "--target", &target, "--timeout", "2s"], &[])
        .await;
    let token = [("RDS_TASK_FACADE_TOKEN", "canary")];
    let elsewhere = [
        "call",
        "--target",
        "http://rds-facade.invalid:1",
        "--timeout",
        "1s",
    ];
    written.run(&elsewhere, &token).await;
}
