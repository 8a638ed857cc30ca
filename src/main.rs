//! The program: parses the command line and runs its subcommand.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use rds_task_facade::{
    app, check,
    cli::{self, Command},
    client, telemetry,
};
use rustix::process::{Resource, Rlimit, setrlimit};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // A core dump would contain keys and tokens. Lowering a limit needs no permission.
    let _ = setrlimit(Resource::Core, none);
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("no other crypto provider was installed before");
    match cli::parse_process() {
        Ok(command) => run(command),
        Err(invalid) => {
            telemetry::print_problems(&invalid.problems, invalid.log_format);
            ExitCode::from(app::INVALID_CONFIGURATION)
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
            // A closed standard output is not a failure.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Command::Check(check) => runtime.block_on(check::check(*check)),
        Command::Call(call) => runtime.block_on(client::call(call)),
        Command::Watch(watch) => runtime.block_on(client::watch(watch)),
        Command::Health(health) => runtime.block_on(client::health(health)),
        Command::Serve(options) => runtime.block_on(app::serve(*options)),
        Command::Sandbox(options) => runtime.block_on(app::sandbox(options.listen)),
    };
    // Does not wait for a name lookup or a file read that hangs in a helper thread.
    runtime.shutdown_background();
    code
}
