//! The checks on the way to RDS: certificates, name, connection, clock, credential, call.

use std::{
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;
use tokio::time::{Instant, timeout};
use url::Url;

use crate::{
    app,
    caller::Caller,
    cli::Check,
    credentials::{self, Auth, Credentials, Source, chain},
    deadline::{Deadline, SharedDeadline},
    error::{Error, FailedLookup},
    http_client::{self, Obstacle, Reuse},
    options::url::{Proxy, without_slash},
    reason::Reason,
    status::Failure,
    telemetry::{Facts, Progress, metrics::Metrics},
    upstream::{self, LookupContext, TaskQuery, clock},
    wait,
};

use super::{Fail, Fine, Report, Warn};

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

/// Ids of the form that RDS uses, of a project, an instance and a task that do not exist.
const NO_PROJECT: &str = "00000000000000000000000000000000";
const NO_INSTANCE: &str = "00000000000000000000000000000000in01";
const NO_TASK: &str = "00000000-0000-0000-0000-000000000000";

/// All that depends on the way to RDS: certificates, name, connection, clock, credential, call.
pub(super) async fn check(options: &Check, base_url: &Url, source: Source, report: &mut Report) {
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
