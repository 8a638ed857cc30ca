use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::sleep;

use super::*;
use crate::upstream::wire::SubTask;

#[tokio::test]
async fn tasks_and_missing_tasks_of_at_most_64_kib_are_kept_and_nothing_else() {
    let missing = r#"{"error_code":"DBS.200543","error_msg":"m"}"#;
    let parts = |count| TaskDetail {
        sub_task_list: vec![SubTask::default(); count],
        ..task("")
    };
    let cases: Vec<(&str, bool, Result<TaskDetail, Error>)> = vec![
        ("a task", true, Ok(task("t"))),
        ("64 KiB", true, Ok(task("t".repeat(64 << 10)))),
        ("one byte more", false, Ok(task("t".repeat((64 << 10) + 1)))),
        ("ten empty parts", true, Ok(parts(10))),
        ("many empty parts", false, Ok(parts(10_000))),
        ("no such task", true, Err(rejected(400, missing))),
        ("404", true, Err(rejected(404, ""))),
        ("403", false, Err(rejected(403, ""))),
        ("409", false, Err(rejected(409, ""))),
        ("429", false, Err(rejected(429, ""))),
        ("503", false, Err(rejected(503, ""))),
        ("malformed", false, Err(Error::Malformed)),
        ("timeout", false, Err(Error::AttemptTimeout)),
    ];

    for (case, kept, outcome) in cases {
        let coalescer = with_cache();
        let asked = AtomicUsize::new(0);
        for _ in 0..3 {
            let answer = ask(&coalescer, ANN, "w", || {
                asked.fetch_add(1, Ordering::Relaxed);
                outcome.clone()
            });
            assert_eq!(answer.await.result.is_ok(), outcome.is_ok(), "{case}");
        }

        let (calls, hits) = if kept { (1, 2) } else { (3, 0) };
        assert_eq!(asked.into_inner(), calls, "{case}");
        assert_eq!(coalescer.metrics.cache_hits.get(), hits, "{case}");
    }
}

#[tokio::test]
async fn an_answer_is_kept_for_its_credential_only_and_for_no_longer_than_the_ttl() {
    let kept = with_cache();
    ask(&kept, ANN, "w", || Ok(task("ann's"))).await;
    let bobs = ask(&kept, BOB, "w", || Ok(task("bob's"))).await;
    assert_eq!(job_id(&bobs), "bob's");

    let brief = coalescer(Duration::from_millis(1), 100);
    ask(&brief, ANN, "w", || Ok(task("first"))).await;
    sleep(Duration::from_millis(5)).await;
    let later = ask(&brief, ANN, "w", || Ok(task("second"))).await;
    assert_eq!(job_id(&later), "second");
}

#[tokio::test]
async fn no_more_answers_are_kept_than_configured_and_none_when_off() {
    let coalescer = coalescer(Duration::from_secs(3600), 100);

    for number in 0..1000 {
        ask(&coalescer, ANN, &number.to_string(), || Ok(task("t"))).await;
    }

    let cache = coalescer.cache.as_ref().expect("the cache is on");
    cache.run_pending_tasks();
    assert!(cache.entry_count() <= 100, "{}", cache.entry_count());
    assert!(without_cache().cache.is_none());
}
