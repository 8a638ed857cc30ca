//! The program: reads what it is asked to do, and does it.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use rds_task_facade::{
    client,
    config::{self, Command},
    serve, telemetry,
};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The exit code for mistakes on the command line or in the environment.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("no other crypto provider was installed before");
    match config::of_process() {
        Ok(command) => run(command),
        Err(refused) => {
            telemetry::print_refused(&refused);
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn run(command: Command) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the runtime starts");
    let code = match command {
        Command::Print(text) => {
            // A reader that went away is no failure.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Command::Call(call) => runtime.block_on(client::call(*call)),
        Command::Health(health) => runtime.block_on(client::health(*health)),
        Command::Serve(config) => runtime.block_on(serve::serve(*config)),
        Command::Sandbox(listen) => runtime.block_on(serve::sandbox(listen)),
    };
    // Without waiting for a name lookup or a file read that hangs in a helper thread.
    runtime.shutdown_background();
    code
}
