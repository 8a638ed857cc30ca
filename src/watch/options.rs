//! The options of the polls.

use std::time::Duration;

use crate::{
    options::{self, duration},
    upstream::{RateConfig, rate},
};

/// The options of the polls.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Watches")]
pub struct Options {
    /// Shortest time between two polls of a watched task; grows to three times that while nothing changes
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub watch_interval: Duration,
    // The full path keeps clap from reading the type as an optional flag.
    /// Maximum rate of polls per credential, for all watched tasks together; off for no limit
    #[arg(long, value_name = "POLLS/TIME", default_value = "30/1m", value_parser = rate)]
    pub watch_rate: std::option::Option<RateConfig>,
}

impl Default for Options {
    fn default() -> Self {
        options::defaults()
    }
}
