/// Credentials that upstream echoes.
mod echoes;
/// Signing: wrong keys, locks, clocks, repeated attempts.
mod keys;
/// Tokens from IAM and from files: fetched once, replaced in time, and in use while a fetch fails.
mod refresh;
/// Secrets stay secret, and malformed ones are found at start.
mod secrets;
/// Each source makes calls.
mod sources;

use std::sync::atomic::{AtomicUsize, Ordering};

use rds_task_facade::pb::GetTaskDetailRequest;
use tokio::task::JoinSet;

use crate::support::{
    Failure, Program, Step, Upstream, eventually, example_request, reply, upstream::Received,
};

const FETCHED: &str = "rds_credential_refresh_total{outcome=\"success\"}";

const EXAMPLE_PROJECT: &str = "0483b6b16e954cb88930a360d2c4e663";

/// The sandbox's key, as variables.
const SANDBOX_KEY: [(&str, &str); 2] = [
    ("HUAWEICLOUD_SDK_AK", "SANDBOXACCESSKEY"),
    ("HUAWEICLOUD_SDK_SK", "sandbox-secret-key"),
];

/// A request that differs from all others, so that it is not coalesced. The sandbox has a task for it.
fn distinct_request() -> GetTaskDetailRequest {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    GetTaskDetailRequest {
        instance_id: "every-field".into(),
        workflow_id: format!("task-{}", MADE.fetch_add(1, Ordering::Relaxed)),
        workflow_name: None,
        ..example_request()
    }
}

/// The failures of `count` different calls at once over ten connections.
async fn failures_of(program: &Program, count: usize) -> Vec<Failure> {
    let mut calls = JoinSet::new();
    for connection in 0..10 {
        let client = program.client().await;
        for _ in (connection..count).step_by(10) {
            let mut client = client.clone();
            calls.spawn(async move { client.get_task_detail(distinct_request()).await });
        }
    }
    let ended = calls.join_all().await;
    assert_eq!(ended.len(), count);
    ended
        .iter()
        .filter_map(|ended| ended.as_ref().err().map(Failure::from_status))
        .collect()
}

/// Waits until the program is ready: it has a credential.
async fn ready(program: &Program) {
    eventually("ready", async || program.admin("/readyz").await.0 == 200).await;
}

/// The flags of `--credentials iam` against this sandbox.
fn iam<'a>(url: &'a str, password_file: &'a str) -> Vec<&'a str> {
    vec![
        "--endpoint",
        url,
        "--credentials",
        "iam",
        "--iam-endpoint",
        url,
        "--iam-user",
        "sandbox-user",
        "--iam-domain",
        "sandbox-domain",
        "--iam-password-file",
        password_file,
        "--iam-project",
        EXAMPLE_PROJECT,
    ]
}

/// The flags of `--credentials token` with a file.
fn token_file<'a>(url: &'a str, file: &'a str) -> [&'a str; 6] {
    [
        "--endpoint",
        url,
        "--credentials",
        "token",
        "--token-file",
        file,
    ]
}

/// The flags of a source that uses this metadata service.
fn metadata<'a>(source: &'a str, url: &'a str, metadata_url: &'a str) -> [&'a str; 6] {
    [
        "--endpoint",
        url,
        "--credentials",
        source,
        "--metadata-endpoint",
        metadata_url,
    ]
}

/// A metadata service without the hardened mode, whose keys come from `script`.
async fn metadata_service(
    script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
) -> Upstream {
    Upstream::start(move |request| {
        if request.line.starts_with("PUT") {
            reply(404, &[], "")
        } else {
            script(request)
        }
    })
    .await
}

/// A folder for secrets, as a mounted volume would be.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Writes a file, whole at once as a mounted secret changes, and returns its path.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        let new = path.with_extension("new");
        std::fs::create_dir_all(path.parent().expect("it is in the folder")).expect("a folder");
        std::fs::write(&new, text).expect("a file");
        std::fs::rename(&new, &path).expect("the new file replaces the old one");
        path.to_str().expect("a UTF-8 path").to_owned()
    }
}
