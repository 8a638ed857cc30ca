use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rds_task_facade::pb::{WatchTaskDetailRequest, WatchTaskDetailResponse};
use tokio::task::JoinSet;
use tonic::Streaming;

use crate::support::{
    Gate, Program, Step, Store, Upstream, eventually, example_request, reply, within,
};

const INTERVAL: Duration = Duration::from_millis(800);
const FLAGS: [&str; 4] = ["--watch-interval", "800ms", "--watch-rate", "1000/1s"];

fn task(status: &str) -> Vec<Step> {
    reply(200, &[], format!(r#"{{"job_id":"j","status":"{status}"}}"#))
}

async fn watch(replica: &Program) -> Streaming<WatchTaskDetailResponse> {
    let example = example_request();
    let request = WatchTaskDetailRequest {
        project_id: example.project_id,
        instance_id: example.instance_id,
        workflow_id: example.workflow_id,
        workflow_name: example.workflow_name,
        ..WatchTaskDetailRequest::default()
    };
    let mut client = replica.client().await;
    let watch = within("the watch begins", client.watch_task_detail(request)).await;
    watch.expect("a stream").into_inner()
}

/// The status of the next message with a task.
async fn next_status(stream: &mut Streaming<WatchTaskDetailResponse>) -> Option<String> {
    loop {
        let message = within("a message", stream.message()).await;
        match message.expect("no error") {
            Some(message) if message.task.is_none() => {}
            message => return message?.task?.status,
        }
    }
}

#[tokio::test]
async fn a_watched_task_is_polled_once_per_interval_for_all_replicas() {
    let Some(store) = Store::start().await else {
        return;
    };
    let polls = Arc::new(Mutex::new(Vec::new()));
    let is_over = Arc::new(AtomicBool::new(false));
    let (times, over) = (Arc::clone(&polls), Arc::clone(&is_over));
    let upstream = Upstream::start(move |_| {
        times.lock().expect("no panic").push(Instant::now());
        task(if over.load(Ordering::Relaxed) {
            "Completed"
        } else {
            "Running"
        })
    })
    .await;
    let replicas = store.replicas::<3>(&upstream, &FLAGS).await;
    let mut streams = Vec::new();
    for replica in &replicas {
        streams.push(watch(replica).await);
    }
    for stream in &mut streams {
        assert_eq!(next_status(stream).await.as_deref(), Some("Running"));
    }

    upstream.wait_for_requests(6).await;
    is_over.store(true, Ordering::Relaxed);
    for stream in &mut streams {
        assert_eq!(next_status(stream).await.as_deref(), Some("Completed"));
        assert_eq!(next_status(stream).await, None);
    }

    let polls = polls.lock().expect("no panic").clone();
    for pair in polls.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(gap > INTERVAL / 2, "{gap:?} between two polls");
    }
}

#[tokio::test]
async fn a_poll_releases_its_lease() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::always(task("Running")).await;
    let replica = store.replica(&upstream, &FLAGS).await;

    let _stream = watch(&replica).await;

    // The lookup of each poll releases one lease.
    eventually("leases of polls are released, too", async || {
        store.released_leases() > upstream.requests().len()
    })
    .await;
}

#[tokio::test]
async fn another_replica_takes_over_the_polls_of_one_that_dies_during_a_poll() {
    let Some(store) = Store::start().await else {
        return;
    };
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |request| match request.number {
        0 => task("Running"),
        1 => [vec![Step::WaitFor(held.clone())], task("Running")].concat(),
        _ => task("Completed"),
    })
    .await;
    let dies = store.replica(&upstream, &FLAGS).await;
    let mut lost = watch(&dies).await;
    assert_eq!(next_status(&mut lost).await.as_deref(), Some("Running"));
    upstream.wait_for_requests(2).await;
    let leases = store.names("poll");
    let left = store.command(&["PTTL", &leases.concat()]).concat();
    let left: i64 = left.parse().expect("milliseconds");
    assert!(left <= 1600, "{left} ms, more than two intervals");
    let survives = store.replica(&upstream, &FLAGS).await;
    let mut stream = watch(&survives).await;
    drop(dies);

    let mut status = next_status(&mut stream).await;
    if status.as_deref() == Some("Running") {
        status = next_status(&mut stream).await;
    }

    assert_eq!(status.as_deref(), Some("Completed"));
    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn the_rate_of_polls_is_a_limit_of_all_replicas_together() {
    let Some(store) = Store::start().await else {
        return;
    };
    let polls = Arc::new(Mutex::new(Vec::new()));
    let times = Arc::clone(&polls);
    let upstream = Upstream::start(move |_| {
        times.lock().expect("no panic").push(Instant::now());
        task("Running")
    })
    .await;
    let flags = ["--watch-interval", "10ms", "--watch-rate", "3/3s"];
    let replicas = store.replicas::<3>(&upstream, &flags).await;
    let mut streams = Vec::new();
    for (number, replica) in replicas.iter().enumerate() {
        let mut client = replica.client().await;
        let example = example_request();
        let request = WatchTaskDetailRequest {
            project_id: example.project_id,
            instance_id: example.instance_id,
            workflow_id: format!("w-{number}"),
            ..WatchTaskDetailRequest::default()
        };
        let stream = client.watch_task_detail(request).await;
        streams.push(stream.expect("a stream"));
    }

    upstream.wait_for_requests(9).await;

    let polls = polls.lock().expect("no panic").clone();
    for window in polls.windows(5) {
        let length = window[4] - window[0];
        assert!(length >= Duration::from_secs(3), "five polls in {length:?}");
    }
}

#[tokio::test]
async fn a_first_poll_that_waits_does_not_delay_repeated_polls() {
    let Some(store) = Store::start().await else {
        return;
    };
    let upstream = Upstream::start(|_| task("Running")).await;
    let flags = ["--watch-interval", "10ms", "--watch-rate", "40/8s"];
    let replica = store.replica(&upstream, &flags).await;
    let client = replica.client().await;
    let mut opened = JoinSet::new();
    let mut open = |workflow_id: String| {
        let mut client = client.clone();
        let example = example_request();
        let request = WatchTaskDetailRequest {
            project_id: example.project_id,
            instance_id: example.instance_id,
            workflow_id,
            ..WatchTaskDetailRequest::default()
        };
        opened.spawn(async move { client.watch_task_detail(request).await });
    };
    // Enough tasks for a repeated poll to be queued at any time.
    (0..4).for_each(|number| open(format!("w-{number}")));
    upstream.wait_for_requests(6).await;

    // Half of the window is for first polls: after twenty of them, the others wait until the earliest one leaves the window.
    (0..22).for_each(|number| open(format!("new-{number}")));
    upstream.wait_for_requests(46).await;

    let mut known = HashSet::new();
    let requests = upstream.requests().into_iter();
    let is_first: Vec<bool> = requests.map(|request| known.insert(request.body)).collect();
    let firsts = is_first
        .iter()
        .enumerate()
        .filter(|(_, is_first)| **is_first);
    let firsts: Vec<usize> = firsts.map(|(at, _)| at).collect();
    assert!(firsts.len() > 20, "first polls at {firsts:?}");
    let (twentieth, last) = (firsts[19], firsts[firsts.len() - 1]);
    let runs = is_first[twentieth..=last].split(|is_first| *is_first);
    let repeated = runs.map(<[bool]>::len).max();
    assert!(
        repeated >= Some(4),
        "{repeated:?} repeated polls in a row: {is_first:?}"
    );
}
