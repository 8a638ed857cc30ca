//! What the program is asked to do: one subcommand with its settings.

use std::{ffi::OsString, net::SocketAddr, time::Duration};

use super::{
    Config, Environment, LogFormat, Refused,
    flags::{self, PREFIX},
    read::{self, Reader, Typed},
    serve, urls,
    values::{self, Parsed},
};
use crate::client;

/// What the program is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Run the gRPC server.
    Serve(Box<Config>),
    /// Make one call as a client.
    Call(Box<client::Call>),
    /// Ask a server for its health.
    Health(Box<client::Health>),
    /// Run only the stand-in for the vendor's services, on this address.
    Sandbox(SocketAddr),
    /// Print a text on standard output: `--help`, `--version`, `--print-config`.
    Print(String),
}

impl Command {
    /// Reads the whole command line, the program's name included, and with `serve` the environment.
    ///
    /// # Errors
    /// [`Refused`] with every mistake there is.
    pub fn read(
        args: impl IntoIterator<Item = OsString>,
        env: &Environment,
    ) -> Result<Self, Refused> {
        let args: Vec<OsString> = args.into_iter().collect();
        let json = asks_for_json(&args, env);
        Self::parse(args, env).map_err(|refused| Refused {
            log_format: if json {
                LogFormat::Json
            } else {
                refused.log_format
            },
            ..refused
        })
    }

    fn parse(args: Vec<OsString>, env: &Environment) -> Result<Self, Refused> {
        let (matches, mistakes) = match read::split(args)? {
            Typed::Flags(matches, mistakes) => (matches, mistakes),
            Typed::Print(text) => return Ok(Self::Print(text)),
        };
        let (name, matches) = matches
            .subcommand()
            .expect("the table makes a subcommand mandatory");
        if name == "serve" {
            let (config, print) = serve::of_matches(matches, env, mistakes)?;
            return Ok(match print {
                true => Self::Print(config.print()),
                false => Self::Serve(Box::new(config)),
            });
        }
        let reader = |flags| Reader::new(flags, matches, env, false, mistakes);
        match name {
            "call" => call(reader(flags::CALL)),
            "health" => health(reader(flags::HEALTH)),
            _ => sandbox(reader(flags::SANDBOX)),
        }
    }
}

/// Whether mistakes are to be told as JSON: also when `--log-format` itself is among them.
fn asks_for_json(args: &[OsString], env: &Environment) -> bool {
    let serve = args.get(1).is_some_and(|subcommand| subcommand == "serve");
    let variable = OsString::from(format!("{PREFIX}LOG_FORMAT"));
    let by_flag = args
        .windows(2)
        .any(|pair| pair[0] == "--log-format" && pair[1] == "json")
        || args.iter().any(|arg| arg == "--log-format=json");
    serve && (by_flag || env.get(&variable).is_some_and(|value| value == "json"))
}

fn call(mut reader: Reader<'_>) -> Result<Command, Refused> {
    let r = &mut reader;
    let ids = ["project-id", "instance-id", "workflow-id"].map(|name| r.optional(name, text));
    let workflow_name = r.optional("workflow-name", text);
    let task = match ids {
        [None, None, None] if workflow_name.is_none() => client::Task::example(),
        [Some(project_id), Some(instance_id), Some(workflow_id)] => client::Task {
            project_id,
            instance_id,
            workflow_id,
            workflow_name,
        },
        _ => {
            let problem = "must be set all three, or no id flag at all for the example task";
            r.mistake("--project-id, --instance-id, --workflow-id", problem)
                .unwrap_or_else(client::Task::example)
        }
    };
    let token = match r.file("token-file") {
        Some(path) => Some(client::Token::File(path)),
        None => {
            let variable = format!("{PREFIX}TOKEN");
            r.variable(&variable)
                .and_then(|text| r.parsed(&variable, values::secret(&text)))
                .map(client::Token::Fixed)
        }
    };
    let call = client::Call {
        server: server(r),
        task,
        token,
    };
    reader.finish(LogFormat::Text, Command::Call(Box::new(call)))
}

fn health(mut reader: Reader<'_>) -> Result<Command, Refused> {
    let health = client::Health {
        server: server(&mut reader),
        service: reader.optional("service", text).unwrap_or_default(),
    };
    reader.finish(LogFormat::Text, Command::Health(Box::new(health)))
}

fn sandbox(mut reader: Reader<'_>) -> Result<Command, Refused> {
    let listen = reader.value("listen", values::address);
    if !listen.ip().is_loopback() {
        reader.mistake::<()>(
            "--listen",
            "must be a loopback address: the sandbox's secrets are known to all",
        );
    }
    reader.finish(LogFormat::Text, Command::Sandbox(listen))
}

fn server(r: &mut Reader<'_>) -> client::Server {
    let target = r.value("target", |text| {
        urls::base_url(text, urls::PlainHttp::Anywhere)
    });
    let tls_flags = ["ca", "cert", "key"].map(|name| r.given(name).is_some());
    if tls_flags.contains(&true) && !target.as_str().starts_with("https:") {
        r.mistake::<()>("--ca, --cert, --key", "need an https --target");
    }
    if tls_flags[1] != tls_flags[2] {
        r.mistake::<()>("--cert, --key", "must be set together");
    }
    client::Server {
        target,
        ca: r.file("ca"),
        identity: r.file("cert").zip(r.file("key")),
        timeout: r.value("timeout", positive),
    }
}

fn positive(text: &str) -> Parsed<Duration> {
    values::duration(text, false)
}

/// Any text: the server judges ids and names.
#[expect(
    clippy::unnecessary_wraps,
    reason = "has the shape of a parser, so that it can be passed as one"
)]
fn text(text: &str) -> Parsed<String> {
    Ok(text.to_owned())
}
