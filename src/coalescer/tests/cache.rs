use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::sleep;

use super::*;
use crate::pb::SubTask;

#[tokio::test]
async fn only_tasks_and_not_found_errors_of_at_most_64_kib_are_cached() {
    let missing = r#"{"error_code":"DBS.200543","error_msg":"m"}"#;
    let parts = |count| {
        let mut task = Task::default();
        for _ in 0..count {
            task.push(SubTask::default());
        }
        Arc::new(task)
    };
    let cases: Vec<(_, _, Result<_, Error>)> = vec![
        ("a task", true, Ok(task("t"))),
        ("64 KiB", true, Ok(task("t".repeat((64 << 10) - 4)))),
        ("over 64 KiB", false, Ok(task("t".repeat((64 << 10) - 3)))),
        ("32 768 empty parts", true, Ok(parts(32 << 10))),
        ("32 769 empty parts", false, Ok(parts((32 << 10) + 1))),
        ("no such task", true, Err(rejected(400, missing))),
        ("404", true, Err(rejected(404, ""))),
        ("403", false, Err(rejected(403, ""))),
        ("409", false, Err(rejected(409, ""))),
        ("429", false, Err(rejected(429, ""))),
        ("503", false, Err(rejected(503, ""))),
        ("malformed", false, Err(Error::Malformed)),
        ("timeout", false, Err(Error::AttemptTimeout)),
    ];

    for (case, is_cached, outcome) in cases {
        let coalescer = with_cache();
        let lookups = AtomicUsize::new(0);
        for _ in 0..3 {
            let lookup = look_up(&coalescer, ANN, "w", || {
                lookups.fetch_add(1, Ordering::Relaxed);
                outcome.clone()
            });
            assert_eq!(lookup.await.result.is_ok(), outcome.is_ok(), "{case}");
        }

        let (calls, hits) = if is_cached { (1, 2) } else { (3, 0) };
        assert_eq!(lookups.into_inner(), calls, "{case}");
        assert_eq!(coalescer.metrics.cache_hits.get(), hits, "{case}");
    }
}

#[tokio::test]
async fn an_entry_is_cached_for_one_identity_and_no_longer_than_the_ttl() {
    let cached = with_cache();
    look_up(&cached, ANN, "w", || Ok(task("ann's"))).await;
    let bobs = look_up(&cached, BOB, "w", || Ok(task("bob's"))).await;
    assert_eq!(job_id(&bobs), "bob's");

    let brief = coalescer(Duration::from_millis(1), 100);
    look_up(&brief, ANN, "w", || Ok(task("first"))).await;
    sleep(Duration::from_millis(5)).await;
    let later = look_up(&brief, ANN, "w", || Ok(task("second"))).await;
    assert_eq!(job_id(&later), "second");
}

#[tokio::test]
async fn the_cache_has_no_more_entries_than_configured_and_can_be_off() {
    let coalescer = coalescer(Duration::from_secs(3600), 100);

    for number in 0..1000 {
        look_up(&coalescer, ANN, &number.to_string(), || Ok(task("t"))).await;
    }

    let cache = coalescer.cache.as_ref().expect("the cache is on");
    cache.run_pending_tasks();
    assert!(cache.entry_count() <= 100, "{}", cache.entry_count());
    assert!(without_cache().cache.is_none());
}
