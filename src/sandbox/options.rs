//! The options of the subcommand `sandbox`.

use std::net::SocketAddr;

use crate::options::{Parsed, address, not};

/// The options of the subcommand `sandbox`.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct Options {
    /// Address to listen on, loopback only
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = loopback)]
    pub listen: SocketAddr,
}

fn loopback(text: &str) -> Parsed<SocketAddr> {
    let address = address(text)?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err(not(
            text,
            "a loopback address; the sandbox's credentials are public",
        )),
    }
}
