//! The options of the gRPC listener.

use std::{net::SocketAddr, time::Duration};

use clap::ArgAction;

use super::tls;
use crate::options::{BOOL, address, boolean, duration, duration_or_zero, limit};

/// The options of the gRPC listener.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "gRPC listener")]
pub struct Options {
    /// Address of the gRPC listener
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051", value_parser = address)]
    pub listen: SocketAddr,
    /// Upper bound of one unary call and of one poll, also if the caller sets no deadline or a longer one
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// Limit of concurrent unary calls; further calls fail at once with RESOURCE_EXHAUSTED
    #[arg(long, value_name = "NUMBER", default_value = "2048", value_parser = limit)]
    pub max_in_flight: usize,
    /// Limit of concurrent watches; further watches fail at once with RESOURCE_EXHAUSTED
    #[arg(long, value_name = "NUMBER", default_value = "1000", value_parser = limit)]
    pub max_watches: usize,
    /// Upper bound of one watch, less up to 20 % at random
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub max_watch_duration: Duration,
    /// Limit of concurrent gRPC connections; further connections are closed at once
    #[arg(long, value_name = "NUMBER", default_value = "1000", value_parser = limit)]
    pub max_connections: usize,
    /// Time between NOT_SERVING and GOAWAY on shutdown
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration_or_zero)]
    pub drain_delay: Duration,
    /// Time for calls in flight on shutdown, from GOAWAY on
    #[arg(long, value_name = "DURATION", default_value = "20s", value_parser = duration_or_zero)]
    pub shutdown_grace: Duration,
    /// Serve gRPC reflection
    #[arg(long, value_name = BOOL, default_value = "true", value_parser = boolean, action = ArgAction::Set)]
    pub reflection: bool,
    /// The time limits of one connection.
    #[command(flatten)]
    pub timings: Timings,
    /// TLS; `None` for plaintext.
    #[command(flatten)]
    pub tls: Option<tls::Files>,
}

/// The time limits of one connection. All but the age are fixed outside of tests.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Timings {
    /// From accept to the end of the TLS handshake.
    #[arg(skip = Duration::from_secs(5))]
    pub handshake_timeout: Duration,
    /// From the end of the handshake to the end of the HTTP/2 preface.
    #[arg(skip = Duration::from_secs(10))]
    pub preface_timeout: Duration,
    /// From the reply to a call to the end of its request.
    #[arg(skip = Duration::from_secs(30))]
    pub late_data_timeout: Duration,
    /// The interval between PINGs on a silent connection.
    #[arg(skip = Duration::from_secs(30))]
    pub keepalive_interval: Duration,
    /// The time for the acknowledgement of a PING.
    #[arg(skip = Duration::from_secs(10))]
    pub keepalive_timeout: Duration,
    /// Age at which a connection gets GOAWAY, plus or minus 10 %; 0s for no limit
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = duration_or_zero)]
    pub max_connection_age: Duration,
    /// The time for calls in flight after that GOAWAY.
    #[arg(skip = Duration::from_secs(30))]
    pub max_connection_age_grace: Duration,
}
