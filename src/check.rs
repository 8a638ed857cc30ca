//! The subcommand `check`: whether `serve` can work with a configuration, before anyone depends on it.
//!
//! Each check prints one line as soon as it has ended. All of them together take less than a minute, even if every peer hangs, and send RDS at
//! most three requests: one without a credential, and a call for a task that does not exist, with its one repetition. The checks use the
//! clients, credentials and messages of `serve`.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;
use jiff::Timestamp;
use serde_json::json;
use tokio::time::{Instant, timeout};
use url::Url;

use crate::{
    accept, app,
    caller::Caller,
    cli::{Check, Serve},
    credentials::{self, Auth, Credentials, Source, chain},
    deadline::{Deadline, SharedDeadline},
    descriptors,
    error::{Error, FailedLookup},
    http_client::{self, Obstacle, Reuse},
    options::url::{Proxy, without_slash},
    quota_store::QuotaStore,
    reason::Reason,
    server::tls,
    status::Failure,
    telemetry::{Facts, LogFormat, Progress, escape_utf16, is_invisible, metrics::Metrics},
    upstream::{self, LookupContext, TaskQuery, clock},
    wait,
};

/// Longest time for one name lookup, and for one connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for one reply of RDS.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for the first credential. Its fetch has a limit of ten seconds of its own, which leads to a better message.
const CREDENTIAL_TIMEOUT: Duration = Duration::from_secs(12);
/// Longest time for the call, whose credential may be refreshed once.
const CALL_TIMEOUT: Duration = Duration::from_secs(22);

/// A larger difference of the clocks is a warning.
const NOTABLE_SKEW: Duration = Duration::from_secs(60);
/// A certificate that expires sooner is a warning.
const NEAR_EXPIRY: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// Ids of the form that RDS uses, of a project, an instance and a task that do not exist.
const NO_PROJECT: &str = "00000000000000000000000000000000";
const NO_INSTANCE: &str = "00000000000000000000000000000000in01";
const NO_TASK: &str = "00000000-0000-0000-0000-000000000000";

/// The result of one check.
enum Outcome {
    Ok,
    /// `serve` can work, but the operator should look at it.
    Warn,
    /// `serve` cannot work.
    Fail,
}

use Outcome::{Fail, Ok as Fine, Warn};

/// Prints the results.
struct Report {
    format: LogFormat,
    has_failed: bool,
}

impl Report {
    /// Prints one result. `message` is one sentence without secrets, which ends with the cure.
    fn add(&mut self, check: &str, outcome: Outcome, message: &str) {
        self.has_failed |= matches!(outcome, Fail);
        let outcome = match outcome {
            Fine => "ok",
            Warn => "warn",
            Fail => "fail",
        };
        // Parts of it can come from a peer.
        let mut safe = String::with_capacity(message.len());
        for c in message.chars() {
            match is_invisible(c) {
                true => escape_utf16(c, &mut safe),
                false => safe.push(c),
            }
        }
        let line = match self.format {
            LogFormat::Text => format!("{outcome:<4} {check}: {safe}\n"),
            LogFormat::Json => {
                let object = json!({ "check": check, "outcome": outcome, "message": safe });
                format!("{object}\n")
            }
        };
        // A closed standard output does not change the result.
        let _ = io::stdout().write_all(line.as_bytes());
    }
}

/// Makes all checks. The exit code is 1 if one of them has failed.
pub async fn check(options: Check) -> ExitCode {
    let mut report = Report {
        format: options.output,
        has_failed: false,
    };
    let descriptors = descriptors::raise_limit();
    let serve = &options.serve;
    let (base_url, source, _) = match app::resolve_upstream(serve).await {
        Ok(found) => found,
        Err(error) => {
            report.add("sandbox", Fail, &error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let (target, from) = (without_slash(&base_url), source.name());
    let settings = format!("RDS at {target} with --credentials {from}");
    report.add("settings", Fine, &settings);
    certificate(serve, &mut report);
    upstream(&options, &base_url, source, &mut report).await;
    listeners(serve, &mut report);
    descriptor_limit(descriptors, serve, &mut report);
    quota_store(serve, &base_url, &mut report).await;
    match report.has_failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Certificate, key and client CA of the listener, which the validation of the settings has read once.
fn certificate(serve: &Serve, report: &mut Report) {
    let Some(files) = &serve.server.tls else {
        return;
    };
    let (outcome, message) = match tls::check(files) {
        Err(error) => (Fail, error.to_string()),
        Ok(None) => (Warn, "its expiry date cannot be read".to_owned()),
        Ok(Some(expires)) => {
            let date = Timestamp::try_from(expires).map_or_else(
                |_| "in a distant year".to_owned(),
                |at| at.strftime("%Y-%m-%d %H:%M UTC").to_string(),
            );
            match expires.duration_since(system_time()) {
                Err(_) => (Fail, format!("has expired on {date}: replace it")),
                Ok(left) if left < NEAR_EXPIRY => {
                    (Warn, format!("expires on {date}: replace it soon"))
                }
                Ok(_) => (Fine, format!("matches its key and expires on {date}")),
            }
        }
    };
    report.add("certificate", outcome, &message);
}

/// All that depends on the way to RDS: certificates, name, connection, clock, credential, call.
async fn upstream(options: &Check, base_url: &Url, source: Source, report: &mut Report) {
    let mut settings = options.serve.upstream.clone();
    settings.connect_timeout = settings.connect_timeout.min(CONNECT_TIMEOUT);
    settings.attempt_timeout = settings.attempt_timeout.min(REPLY_TIMEOUT);
    settings.max_attempts = 1;
    let roots = app::system_roots(base_url, &source);
    let http = match settings.http_config(roots) {
        Ok(http) => http,
        Err(error) => return report.add("roots", Fail, &error.to_string()),
    };
    let trusted = match (roots, &settings.upstream_ca) {
        (http_client::SystemRoots::Ignored, None) => "not needed for plain http".to_owned(),
        (http_client::SystemRoots::Ignored, Some(path)) => format!("those in {}", path.display()),
        (http_client::SystemRoots::Trusted, None) => "the system's".to_owned(),
        (http_client::SystemRoots::Trusted, Some(path)) => {
            format!("the system's and those in {}", path.display())
        }
    };
    report.add("roots", Fine, &trusted);
    let client = match http_client::Client::new(&http, base_url, 1) {
        Ok(client) => client,
        Err(error) => return report.add("connection", Fail, &error.to_string()),
    };
    let is_reached = name(http.proxy.as_ref().map_or(base_url, Proxy::url), report).await
        && connection(&client, base_url, &settings, report).await;

    let metrics = Metrics::new();
    let credentials = match Credentials::start(source.clone(), None, &http, Arc::clone(&metrics)) {
        Ok(credentials) => credentials,
        Err(error) => return report.add("credential", Fail, &error.to_string()),
    };
    let endpoint = upstream::Endpoint::new(base_url.clone(), settings, metrics);
    match first_credential(&credentials, &source, options, report).await {
        _ if !is_reached => report.add("call", Warn, "skipped: there is no connection to RDS"),
        Credential::Failed => report.add("call", Warn, "skipped: there is no credential"),
        Credential::OfCallers => report.add(
            "call",
            Warn,
            "skipped: callers bring their own tokens; set RDS_TASK_FACADE_TOKEN to check with the token of one of them",
        ),
        Credential::Usable(mut auth, caller) => {
            let client = upstream::Client::new(client, endpoint, credentials);
            call(&client, &mut auth, caller, options, source.name(), report).await;
        }
    }
}

/// Whether the name of RDS, or of the proxy, leads to an address.
async fn name(url: &Url, report: &mut Report) -> bool {
    let Some(name) = url.domain() else {
        report.add("name", Fine, "not needed: the host is an address");
        return true;
    };
    let found = timeout(CONNECT_TIMEOUT, http_client::look_up(name)).await;
    let problem = match found {
        Ok(Ok(addresses)) => {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            report.add("name", Fine, &format!("{name} is {}", addresses.join(", ")));
            return true;
        }
        Ok(Err(error)) => error,
        Err(_) => format!("the name server does not reply within {CONNECT_TIMEOUT:?}"),
    };
    let cure = "check the name (--region, --endpoint, --upstream-proxy), and DNS and port 53 on this machine";
    report.add("name", Fail, &format!("{name}: {problem}; {cure}"));
    false
}

/// Whether RDS replies to a request without a credential; and whether the clocks agree.
async fn connection(
    client: &http_client::Client,
    base_url: &Url,
    settings: &upstream::Options,
    report: &mut Report,
) -> bool {
    let request = Request::get("/").body(Full::<Bytes>::default());
    let request = request.expect("a valid request");
    let started = Instant::now();
    let sent = timeout(
        settings.attempt_timeout,
        client.send(request, Reuse::Forbidden),
    )
    .await;
    let way = match settings.upstream_proxy {
        Some(_) => " through the proxy",
        None => "",
    };
    let took = started.elapsed().as_millis();
    let connected = format!("{}{way}, {took} ms", without_slash(base_url));
    let error = match sent {
        Ok(Ok(reply)) if reply.status() == 407 => failed_attempt(upstream::Error::Transport(
            Reason::UpstreamConnect,
            Some(Obstacle::ProxyLogin),
        )),
        Ok(Ok(reply)) => {
            report.add("connection", Fine, &connected);
            if base_url.scheme() == "https" {
                report.add("tls", Fine, "the certificate of the endpoint is trusted");
            }
            clocks(wait::date(reply.headers()), report);
            return true;
        }
        Ok(Err(error)) => {
            let check = match error.reason {
                Reason::UpstreamTls => "tls",
                Reason::UpstreamDns => "name",
                _ => "connection",
            };
            let failed = failed_attempt(upstream::Error::Transport(error.reason, error.obstacle));
            let message = for_operator(&Failure::from_error(&failed));
            let message = format!("{}: {message} ({})", without_slash(base_url), error.cause);
            report.add(check, Fail, &message);
            return false;
        }
        Err(_) => failed_attempt(upstream::Error::AttemptTimeout),
    };
    let message = for_operator(&Failure::from_error(&error));
    report.add("connection", Fail, &format!("{connected}: {message}"));
    false
}

/// The message of a failure. It is written for callers, but here the operator reads it.
fn for_operator(failure: &Failure<'_>) -> String {
    failure.message().replace("the operator has to ", "")
}

/// An error of an attempt that no call made.
fn failed_attempt(error: upstream::Error) -> Error {
    Error::Upstream(Box::new(FailedLookup {
        error,
        facts: Facts::default(),
        owner: credentials::Owner::Server,
        query: query(None),
    }))
}

fn query(project: Option<&str>) -> TaskQuery {
    TaskQuery {
        project_id: project.unwrap_or(NO_PROJECT).to_owned(),
        instance_id: NO_INSTANCE.to_owned(),
        workflow_id: NO_TASK.to_owned(),
        workflow_name: None,
    }
}

/// The clock of this machine against the `Date` of a reply.
fn clocks(date: Option<SystemTime>, report: &mut Report) {
    let Some(date) = date else {
        let message = "not compared: the reply has no usable Date, which RDS always sends; a proxy may have removed it";
        return report.add("clock", Warn, message);
    };
    let behind = clock::seconds_behind(date);
    let difference = Duration::from_secs(behind.unsigned_abs());
    let direction = if behind > 0 { "behind" } else { "ahead of" };
    let message = format!("{difference:?} {direction} the Date of RDS");
    let (outcome, message) = match difference {
        skew if skew >= clock::SKEW => (
            Fail,
            message
                + ": set it, for example with NTP; RDS rejects signatures that are 15 minutes off",
        ),
        skew if skew > NOTABLE_SKEW => (Warn, message + ": set it, for example with NTP"),
        _ => (Fine, "agrees with the Date of RDS".to_owned()),
    };
    report.add("clock", outcome, &message);
}

/// The credential for the call.
enum Credential {
    Usable(Auth, Caller),
    /// Callers send their own tokens, and `check` has not been given a token.
    OfCallers,
    Failed,
}

async fn first_credential(
    credentials: &Credentials,
    source: &Source,
    options: &Check,
    report: &mut Report,
) -> Credential {
    let mut metadata = HeaderMap::new();
    if let Some(token) = &options.caller_token {
        metadata.insert("x-auth-token", token.clone());
    }
    let caller = match credentials.token_hash(&metadata) {
        Some(hash) => Caller::Token(hash),
        None => Caller::Connection(0),
    };
    let deadline = Deadline::after(CREDENTIAL_TIMEOUT);
    let error = match credentials.resolve(&metadata, caller, deadline).await {
        Ok(auth) => {
            let kind = match (&auth, source) {
                (_, Source::Caller) => "the token in RDS_TASK_FACADE_TOKEN, as a caller's",
                (Auth::Token(_), _) => "a token",
                (Auth::Key(key), _) if key.security_token.is_some() => "a temporary key",
                (Auth::Key(_), _) => "a key",
            };
            let place = match source {
                Source::Chain(chain) => format!(": {}", chain::chosen(chain)),
                _ => String::new(),
            };
            let message = format!("{kind}, from --credentials {}{place}", source.name());
            report.add("credential", Fine, &message);
            return Credential::Usable(auth, caller);
        }
        Err(credentials::Error::Missing) => {
            report.add("credential", Fine, "each caller brings its own token");
            return Credential::OfCallers;
        }
        Err(error) => error,
    };
    let cause = credentials.failure().unwrap_or_else(|| error.to_string());
    let cure = match source {
        Source::Caller | Source::Token(_) | Source::Key(_) => "check the variable",
        Source::TokenFile(_) | Source::Profile(_) => "check the file",
        Source::Iam(_) => {
            "check --iam-endpoint, --iam-user, --iam-domain (name of the account), --iam-project and the password"
        }
        Source::Metadata(_) | Source::Chain(_) => {
            "check --metadata-endpoint, and that the machine has an agency with rds:task:listAll"
        }
    };
    report.add("credential", Fail, &format!("{cause}; {cure}"));
    Credential::Failed
}

/// A call for a task that does not exist: the reply shows whether RDS accepts signature or token, project and permission.
async fn call(
    client: &upstream::Client,
    auth: &mut Auth,
    caller: Caller,
    options: &Check,
    source: &str,
    report: &mut Report,
) {
    let query = query(options.project.as_deref());
    let project = match &options.project {
        Some(project) => format!("project {project}"),
        None => "a made-up project".to_owned(),
    };
    let deadline = Deadline::after(CALL_TIMEOUT);
    let progress = Progress::default();
    let shared = SharedDeadline::new(deadline);
    let context = LookupContext {
        query: &query,
        caller,
        deadline: &shared,
        progress: &progress,
        span: None,
        store: None,
    };
    let owner = auth.owner();
    let found = deadline.bound(client.show_task_detail(auth, context)).await;
    let error = match found {
        Ok(Ok(_)) => {
            let message = format!(
                "for {project}: the reply is a task, although no task has these ids: check --endpoint"
            );
            return report.add("call", Warn, &message);
        }
        Ok(Err(error)) => error,
        Err(_) => upstream::Error::AttemptTimeout,
    };
    let facts = progress.facts();
    let is_of_rds = facts
        .upstream_code
        .as_deref()
        .is_some_and(|code| code.starts_with("DBS."));
    let mut reply = String::new();
    if let Some(status) = facts.http_status {
        let code = facts
            .upstream_code
            .as_deref()
            .unwrap_or("without an error code");
        let _ = write!(reply, " (HTTP {status}, {code})");
    }
    let error = Error::Upstream(Box::new(FailedLookup {
        error,
        facts,
        owner,
        query: query.clone(),
    }));
    let failure = Failure::from_error(&error);
    let message = for_operator(&failure);
    let (outcome, text) = match failure.reason {
        Reason::TaskNotFound | Reason::InstanceNotFound | Reason::ResourceNotFound if is_of_rds => {
            let text = match options.project {
                Some(_) => "RDS accepts credential, project and permission",
                None => {
                    "RDS accepts the credential; to check the permission too, set --allow-project or HUAWEICLOUD_SDK_PROJECT_ID"
                }
            };
            (Fine, text.to_owned())
        }
        Reason::UpstreamInvalidArgument if is_of_rds => (
            Warn,
            format!("RDS accepts the credential, but not the made-up ids: {message}"),
        ),
        Reason::Throttled => {
            let wait = failure.retry_after.unwrap_or_default();
            (
                Warn,
                format!("the quota of the credential is used up: check again in {wait:?}"),
            )
        }
        reason => {
            let text = match (cure(reason, source), reason) {
                // The message is the text of RDS, which names the permission, the policy or the project.
                (
                    Some(cure),
                    Reason::PermissionDenied
                    | Reason::PreconditionFailed
                    | Reason::ResourceNotFound,
                ) => format!("{message}; {cure}"),
                (Some(cure), _) => cure.to_owned(),
                (None, _) => message,
            };
            (Fail, text)
        }
    };
    let hint = match (&outcome, failure.reason) {
        (Fail, Reason::CredentialRejected | Reason::PermissionDenied)
            if options.project.is_none() =>
        {
            "; to check with a project of yours, set --allow-project or HUAWEICLOUD_SDK_PROJECT_ID"
        }
        _ => "",
    };
    report.add(
        "call",
        outcome,
        &format!("for {project}{reply}: {text}{hint}"),
    );
}

/// The next step of the operator, if the message for callers does not name it.
fn cure(reason: Reason, source: &str) -> Option<&'static str> {
    Some(match (reason, source) {
        (Reason::CredentialRejected, "caller" | "token") => {
            "RDS rejects the token: replace it by a new one for this project and region"
        }
        (Reason::CredentialRejected, "iam") => {
            "RDS rejects the token of IAM: check that --iam-project is the project of the call and belongs to the region"
        }
        (Reason::CredentialRejected, _) => {
            "RDS rejects the signature: correct AK and SK, and check that they belong to this account; after five rejected signatures RDS locks the key"
        }
        (Reason::CredentialLocked, _) => {
            "RDS has locked the key after rejected signatures: correct AK and SK wherever they are used, and wait five minutes"
        }
        (Reason::PermissionDenied, _) => {
            "grant the identity rds:task:listAll on the project, and check that the project is its own"
        }
        (Reason::ResourceNotFound | Reason::PreconditionFailed, _) => {
            "check that the project exists, is active and belongs to this region, and that --endpoint is RDS"
        }
        (Reason::ClockSkew, _) => {
            "RDS rejects the time of the signature: set the clock of this machine, for example with NTP"
        }
        (
            Reason::UpstreamApiNotFound
            | Reason::UpstreamMalformedResponse
            | Reason::UpstreamRedirect
            | Reason::UpstreamUnexpectedStatus,
            _,
        ) => {
            "the reply is not one of this API: check --region and --endpoint; a proxy or a login page may have replied instead of RDS"
        }
        _ => return None,
    })
}

/// Whether the addresses of the listeners can be used.
fn listeners(serve: &Serve, report: &mut Report) {
    let addresses = [
        ("listen", Some(serve.server.listen)),
        ("metrics-listen", serve.admin.metrics_listen),
    ];
    // Held until the end, so that two listeners with one address are noticed.
    let mut open = Vec::new();
    for (flag, address) in addresses {
        let Some(address) = address else {
            continue;
        };
        let (outcome, message) = match accept::listen(address) {
            Ok(listener) => {
                open.push(listener);
                (Fine, format!("{address} is free"))
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => in_use(address, &mut open),
            Err(error) => (Fail, format!("{address}: {error}; check --{flag}")),
        };
        report.add(flag, outcome, &message);
    }
}

/// The result for an address in use: by another process, or by the other listener of this configuration.
fn in_use(address: SocketAddr, open: &mut Vec<std::net::TcpListener>) -> (Outcome, String) {
    let is_own = !open.is_empty() && {
        open.clear();
        accept::listen(address).is_ok()
    };
    match is_own {
        true => (
            Fail,
            format!("{address} is the address of --listen: use another port"),
        ),
        false => (
            Warn,
            format!(
                "{address} is in use: by this service, if it runs already; otherwise stop the other process or use another port"
            ),
        ),
    }
}

/// Whether the limit of open descriptors is high enough for the configured limits.
fn descriptor_limit(limit: usize, serve: &Serve, report: &mut Report) {
    let server = &serve.server;
    let (outcome, message) = match descriptors::fit(
        limit,
        server.max_connections,
        server.max_in_flight,
    ) {
        None => (
            Fine,
            "enough for --max-connections and --max-in-flight".to_owned(),
        ),
        Some(fitted) => (
            Warn,
            format!(
                "the limit is {limit}, but --max-connections and --max-in-flight need {}: raise it (ulimit -n), otherwise they are reduced to {} and {}",
                fitted.needed, fitted.connections, fitted.calls
            ),
        ),
    };
    report.add("descriptors", outcome, &message);
}

/// Whether the quota store, if any is configured, can be used. `serve` works without it, so only a store that ends the start is a failure.
async fn quota_store(serve: &Serve, base_url: &Url, report: &mut Report) {
    let metrics = Metrics::new();
    let opened = QuotaStore::open(
        &serve.quota_store,
        base_url,
        serve.upstream.attempt_timeout,
        serve.result_lifetime(),
        &metrics,
    );
    let (outcome, message) = match opened.await {
        Ok(None) => return,
        Ok(Some((store, opened))) => {
            let result = match opened.problem() {
                None => (Fine, "this replica can use it".to_owned()),
                Some(problem) => (
                    Warn,
                    format!(
                        "{problem}; without it, each replica paces itself and shares no results: see docs/fleet.md"
                    ),
                ),
            };
            opened.close(&store).await;
            result
        }
        Err(error) => (Fail, error.to_string()),
    };
    report.add("quota-store", outcome, &message);
}

#[expect(
    clippy::disallowed_methods,
    reason = "an expiry date is compared with the system's clock"
)]
fn system_time() -> SystemTime {
    SystemTime::now()
}
