//! The memory that the reply of RDS takes while it is parsed, and until it is encoded for the caller. A separate program, because it counts
//! all allocations of its process.

use peak_alloc::PeakAlloc;
use rds_task_facade::upstream::wire::parse_task_detail;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The limit on the body of a reply.
const LONGEST: usize = 1 << 20;

/// A task with this part as often as `length` allows, and ten thousand times at most.
fn with_parts(part: &str, length: usize) -> String {
    let count = (length / (part.len() + 1)).clamp(1, 10_000);
    let list = vec![part; count].join(",");
    format!(r#"{{"job_id":"j","sub_task_list":[{list}]}}"#)
}

fn replies(length: usize) -> Vec<(&'static str, String)> {
    let long = "x".repeat(length);
    let status = |text: &str| format!(r#"{{"status":"{text}"}}"#);
    let escapes = r"\u00e9\n".repeat(length / 8);
    let deep = "[".repeat(length / 2) + &"]".repeat(length / 2);
    let unknown: Vec<String> = (0..length / 12)
        .map(|number| format!(r#""{number:07}":1"#))
        .collect();
    vec![
        ("empty parts", with_parts("{}", length)),
        ("a short field", with_parts(r#"{"percent":1}"#, length)),
        (
            "five short fields",
            with_parts(
                r#"{"sub_task_name":"a","percent":1,"executed_time":1,"status":"running","remaining_time":1}"#,
                length,
            ),
        ),
        (
            "fields of 90 bytes",
            with_parts(&status(&long[..90]), length),
        ),
        (
            "fields of a tenth",
            with_parts(&status(&long[..length / 10]), length),
        ),
        ("one field", with_parts(&status(&long), length)),
        (
            "one field with escapes",
            with_parts(&status(&escapes), length),
        ),
        (
            "fields of 90 bytes with escapes",
            with_parts(&status(&escapes[..88]), length),
        ),
        (
            "unknown fields of parts",
            with_parts(r#"{"unknown":[{},{},1,null,"a"]}"#, length),
        ),
        ("other values than parts", with_parts("1", length)),
        (
            "blanks",
            with_parts(&format!("{{{}}}", " ".repeat(100)), length),
        ),
        (
            "the name of the task",
            format!(r#"{{"job_id":"j","job_name":"{long}"}}"#),
        ),
        (
            "the name of the task with escapes",
            format!(r#"{{"job_id":"j","job_name":"{escapes}"}}"#),
        ),
        (
            "unknown fields",
            format!(r#"{{"job_id":"j",{}}}"#, unknown.join(",")),
        ),
        (
            "a deep field",
            format!(r#"{{"job_id":"j","process":{deep}}}"#),
        ),
        (
            "a deep part",
            with_parts(&format!(r#"{{"status":{deep}}}"#), length),
        ),
        ("nested lists", with_parts(&deep, length)),
    ]
}

#[test]
fn a_reply_takes_at_most_four_bytes_of_memory_per_byte() {
    let sizes = [1 << 10, 30 << 10, LONGEST - 100];
    let replies = sizes.into_iter().flat_map(replies).collect::<Vec<_>>();
    let mut over = Vec::new();

    for (shape, body) in replies {
        let length = body.len();
        let body = body.into_boxed_str();
        let before = ALLOCATOR.current_usage() - length;
        ALLOCATOR.reset_peak_usage();
        let task = parse_task_detail(body.as_bytes()).expect("a task");
        drop(body);
        let kept = ALLOCATOR.current_usage() - before;
        let mut encoded = Vec::with_capacity(task.encoded_len());
        task.encode(&mut encoded);
        let peak = ALLOCATOR.peak_usage() - before;

        let [peak, kept] = [peak, kept].map(|bytes| bytes as f64 / length as f64);
        let line = format!("{shape}: {length} bytes, peak {peak:.2} per byte, kept {kept:.2}");
        println!("{line}");
        if peak > 4.0 {
            over.push(line);
        }
    }

    assert!(over.is_empty(), "{over:#?}");
}
