//! Process metrics, read from `/proc` on each scrape. Absent on systems other than Linux.
//!
//! Written by hand because prometheus-client has no process collector, and the crate procfs parses far more than these five values.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// Clock ticks per second in `/proc/*/stat`: 100 on every architecture that Linux runs this program on.
const TICKS_PER_SECOND: f64 = 100.0;

/// The `process_*` metrics, named as in the Prometheus client libraries.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stat = read("/proc/self/stat");
        if let Some(seconds) = cpu_seconds(&stat) {
            let (name, kind) = ("process_cpu_seconds", MetricType::Counter);
            let metric = encoder.encode_descriptor(name, "CPU time used", None, kind)?;
            ConstCounter::new(seconds).encode(metric)?;
        }
        let gauges = [
            (
                "process_start_time_seconds",
                "When the process started",
                start_time(&stat, &read("/proc/stat")),
            ),
            (
                "process_resident_memory_bytes",
                "Memory in use",
                number(&read("/proc/self/status"), "VmRSS:").map(|kilobytes| kilobytes * 1024.0),
            ),
            ("process_open_fds", "Open files and sockets", open_files()),
            (
                "process_max_fds",
                "Open files and sockets allowed",
                number(&read("/proc/self/limits"), "Max open files"),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
                ConstGauge::new(value).encode(metric)?;
            }
        }
        Ok(())
    }
}

/// The content of a file; empty if it cannot be read.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// User and system time, fields 14 and 15 of `/proc/self/stat`.
fn cpu_seconds(stat: &str) -> Option<f64> {
    Some(seconds(stat, 14)? + seconds(stat, 15)?)
}

/// Seconds since 1970: the boot time in `/proc/stat`, and field 22 of `/proc/self/stat`, the time from boot to start.
fn start_time(self_stat: &str, stat: &str) -> Option<f64> {
    Some(number(stat, "btime ")? + seconds(self_stat, 22)?)
}

/// A field in ticks, counted from 1 as in `proc_pid_stat(5)`. Field 2, the name, may contain blanks and parentheses.
fn seconds(stat: &str, field: usize) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let ticks: f64 = after_name.split_whitespace().nth(field - 3)?.parse().ok()?;
    Some(ticks / TICKS_PER_SECOND)
}

fn open_files() -> Option<f64> {
    let descriptors = fs::read_dir("/proc/self/fd").ok()?;
    // The directory is open while it is counted.
    Some(descriptors.count().saturating_sub(1) as f64)
}

/// The first number after `name` at the start of a line.
fn number(text: &str, name: &str) -> Option<f64> {
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    values.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed_after_a_process_name_with_blanks_and_parentheses() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 12345 1000 200";

        assert_eq!(cpu_seconds(stat), Some(3.0));
        let boot = "cpu 1 2\nbtime 1700000000\n";
        assert_eq!(start_time(stat, boot), Some(1_700_000_123.45));
        for unreadable in ["", "42", "42 (a) S 1"] {
            assert_eq!(cpu_seconds(unreadable), None);
            assert_eq!(start_time(unreadable, boot), None);
        }
    }

    #[test]
    fn numbers_are_found_by_the_start_of_the_line() {
        let limits = "Max open files            1024                 4096                 files\n";

        assert_eq!(number(limits, "Max open files"), Some(1024.0));
        assert_eq!(
            number("VmPeak:\t9 kB\nVmRSS:\t  2048 kB\n", "VmRSS:"),
            Some(2048.0)
        );
        assert_eq!(
            number("Max open files            unlimited", "Max open files"),
            None
        );
        assert_eq!(number("", "VmRSS:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn every_metric_is_present_on_linux() {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(Process));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();

        for name in [
            "process_cpu_seconds_total",
            "process_start_time_seconds",
            "process_resident_memory_bytes",
            "process_open_fds",
        ] {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let value: f64 = line.expect(name).trim().parse().unwrap();
            assert!(value >= 0.0, "{name}");
        }
    }
}
