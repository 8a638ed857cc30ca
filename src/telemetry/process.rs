//! What the operating system says about this process, read when somebody asks for metrics. Linux only: elsewhere there
//! is no `/proc`, and the metrics are left out.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// Clock ticks per second in `/proc/*/stat`; 100 on every architecture Linux runs this program on.
const TICKS_PER_SECOND: f64 = 100.0;

/// The `process_*` metrics under the names that Prometheus client libraries share.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        if let Some(times) = fs::read_to_string("/proc/self/stat")
            .ok()
            .as_deref()
            .and_then(times)
        {
            let name = "process_cpu_seconds";
            let metric =
                encoder.encode_descriptor(name, "CPU time used", None, MetricType::Counter)?;
            ConstCounter::new(times.cpu_seconds).encode(metric)?;
            if let Some(boot) = fs::read_to_string("/proc/stat")
                .ok()
                .as_deref()
                .and_then(boot_time)
            {
                let name = "process_start_time_seconds";
                gauge(
                    &mut encoder,
                    name,
                    "When the process started",
                    boot + times.started_seconds,
                )?;
            }
        }
        let resident = fs::read_to_string("/proc/self/status")
            .ok()
            .as_deref()
            .and_then(resident_bytes);
        if let Some(bytes) = resident {
            gauge(
                &mut encoder,
                "process_resident_memory_bytes",
                "Memory in use",
                bytes,
            )?;
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            // The folder itself is open while it is counted.
            let open = files.count().saturating_sub(1) as f64;
            gauge(
                &mut encoder,
                "process_open_fds",
                "Open files and sockets",
                open,
            )?;
        }
        let limit = fs::read_to_string("/proc/self/limits")
            .ok()
            .as_deref()
            .and_then(max_files);
        if let Some(limit) = limit {
            gauge(
                &mut encoder,
                "process_max_fds",
                "Open files and sockets allowed",
                limit,
            )?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(metric)
}

/// Times out of `/proc/self/stat`.
#[derive(Debug, PartialEq)]
struct Times {
    cpu_seconds: f64,
    /// Since the machine booted.
    started_seconds: f64,
}

/// See `proc_pid_stat(5)`: utime, stime and starttime are fields 14, 15 and 22; the name in field 2 may hold blanks.
fn times(stat: &str) -> Option<Times> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some(Times {
        cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS_PER_SECOND,
        started_seconds: ticks(22)? / TICKS_PER_SECOND,
    })
}

/// The line `btime` of `/proc/stat`, in seconds since 1970.
fn boot_time(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

/// The line `VmRSS` of `/proc/self/status`, which is in kB.
fn resident_bytes(status: &str) -> Option<f64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024.0)
}

/// The soft limit in the line `Max open files` of `/proc/self/limits`.
fn max_files(limits: &str) -> Option<f64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_past_a_name_with_blanks_and_brackets() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 12345 1000 200";

        assert_eq!(
            times(stat),
            Some(Times {
                cpu_seconds: 3.0,
                started_seconds: 123.45
            })
        );
        assert_eq!(times("42"), None);
        assert_eq!(times("42 (a) S 1"), None);
    }

    #[test]
    fn sizes_and_limits_are_found_by_their_lines() {
        assert_eq!(
            resident_bytes("VmPeak:\t9 kB\nVmRSS:\t  2048 kB\n"),
            Some(2_097_152.0)
        );
        assert_eq!(
            max_files(
                "Max open files            1024                 4096                 files\n"
            ),
            Some(1024.0)
        );
        assert_eq!(
            boot_time("cpu 1 2\nbtime 1700000000\n"),
            Some(1_700_000_000.0)
        );
        assert_eq!(max_files("Max open files            unlimited"), None);
    }
}
