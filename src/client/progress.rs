//! The progress of a watch on standard error: a bar on a terminal, else lines for logs.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::{Timestamp, Unit};
use tokio::time::Instant;

use super::Error;
use crate::{
    pb::{GetTaskDetailResponse, SubTask, TaskState},
    telemetry::Escaped,
};

/// The silence after which the line is written again, so that a log is never silent for a minute: systems for continuous integration end jobs that write nothing.
const MAX_SILENCE: Duration = Duration::from_secs(55);

/// Shown before the first message.
const WAITING: &str = "waiting for the first reply";

pub(super) struct Progress {
    /// `None` without a terminal.
    bar: Option<ProgressBar>,
    /// The latest line, without the time of the check.
    line: String,
    /// The part of the line whose changes are worth a line in a log.
    significant: String,
    written_at: Instant,
}

impl Progress {
    pub(super) fn on_stderr() -> Self {
        Self::new(io::stderr().is_terminal() && may_move_cursor())
    }

    fn new(is_terminal: bool) -> Self {
        Self {
            bar: is_terminal.then(bar),
            line: WAITING.to_owned(),
            significant: String::new(),
            written_at: Instant::now(),
        }
    }

    /// Shows the state that the server has just confirmed; `None` for a task that RDS does not know yet.
    pub(super) fn observe(
        &mut self,
        task: Option<&GetTaskDetailResponse>,
        check_time: Option<prost_types::Timestamp>,
    ) {
        let (state, left, part) = match task {
            Some(task) => (state_and_percent(task), time_left(task), part_name(task)),
            None => (
                "RDS does not know the task yet".to_owned(),
                String::new(),
                String::new(),
            ),
        };
        let significant = format!("{state}{part}");
        let line = match task {
            Some(task) => format!("{}: {state}{left}{part}", name(task)),
            None => state.clone(),
        };
        match &self.bar {
            Some(bar) => {
                let percent = task.and_then(|task| task.progress_percent);
                bar.set_position(percent.unwrap_or(0).into());
                bar.set_prefix(task.map_or_else(String::new, name));
                let checked = check_time.map(|time| format!(", as of {}", clock(time)));
                let checked = checked.unwrap_or_default();
                // The name comes last, because a narrow terminal cuts the line.
                bar.set_message(format!("{state}{left}{checked}{part}"));
                bar.tick();
            }
            None if significant != self.significant => {
                write_line(&line);
                self.written_at = Instant::now();
            }
            None => {}
        }
        self.line = line;
        self.significant = significant;
    }

    /// Shows that the stream has ended and when it is continued.
    pub(super) fn interrupted(&mut self, error: &Error, pause: Duration) {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let seconds = pause.as_secs_f64();
        let line = format!("{first}; continuing in {seconds:.1} s");
        self.suspended(|| write_line(&line));
        self.written_at = Instant::now();
    }

    /// Called every second: redraws the bar, or repeats the latest line after a minute of silence.
    pub(super) fn tick(&mut self) {
        match &self.bar {
            Some(bar) => bar.tick(),
            None if self.written_at.elapsed() >= MAX_SILENCE => {
                write_line(&self.line);
                self.written_at = Instant::now();
            }
            None => {}
        }
    }

    /// Writes to the terminal without the bar in the way.
    pub(super) fn suspended<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whether the terminal may be drawn on (<https://no-color.org>, and terminals that cannot move the cursor).
fn may_move_cursor() -> bool {
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|value| value == "dumb");
    !no_color && !dumb
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:6} {wide_msg}")
        .expect("the template is valid")
        .progress_chars("=>-");
    ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(WAITING)
}

/// The name of the task, or its id.
fn name(task: &GetTaskDetailResponse) -> String {
    let name = match task.job_name.as_str() {
        "" => &task.job_id,
        name => name,
    };
    Escaped(name).to_string()
}

/// State, percentage, and the number of the part that is running.
fn state_and_percent(task: &GetTaskDetailResponse) -> String {
    let mut line = state(task);
    if let Some(percent) = task.progress_percent {
        line += &format!(" {percent} %");
    }
    if let Some((index, _)) = running_part(task) {
        line += &format!(", part {} of {}", index + 1, task.sub_task_list.len());
    }
    line
}

/// The name of the part that is running, if any.
fn part_name(task: &GetTaskDetailResponse) -> String {
    let name = running_part(task).and_then(|(_, part)| part.sub_task_name.as_deref());
    match name {
        Some(name) if !name.is_empty() => format!(" ({})", Escaped(name)),
        _ => String::new(),
    }
}

/// The time that the running part will take, if RDS estimates it.
fn time_left(task: &GetTaskDetailResponse) -> String {
    let left = running_part(task).and_then(|(_, part)| part.remaining_time.as_deref());
    match left {
        None | Some("") => String::new(),
        // RDS documents no unit; related calls use seconds.
        Some(left) if left.bytes().all(|b| b.is_ascii_digit()) => format!(", {left} s left"),
        Some(left) => format!(", {} left", Escaped(left)),
    }
}

fn running_part(task: &GetTaskDetailResponse) -> Option<(usize, &SubTask)> {
    let mut parts = task.sub_task_list.iter().enumerate();
    parts.find(|(_, part)| part.state() == TaskState::Running)
}

fn state(task: &GetTaskDetailResponse) -> String {
    match (task.state(), task.status.as_deref()) {
        (TaskState::Unspecified, None | Some("")) => "no state".to_owned(),
        (TaskState::Unspecified, Some(word)) => Escaped(word).to_string(),
        (state, _) => {
            let name = state.as_str_name().trim_start_matches("TASK_STATE_");
            name.to_ascii_lowercase()
        }
    }
}

fn clock(time: prost_types::Timestamp) -> String {
    let time = Timestamp::new(time.seconds, time.nanos).and_then(|time| time.round(Unit::Second));
    time.map(|time| time.strftime("%H:%M:%SZ").to_string())
        .unwrap_or_default()
}

fn write_line(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
