//! The command line: one subcommand with its options, which are declared in the modules that use them.
//!
//! ```text
//! arguments -> insert variables as arguments -> split into flags and text (clap) -> parse each value
//!   -> typed options -> check rules for several options
//! ```
//!
//! clap stops at the first invalid value, so values are parsed one by one here: all problems with values, files and combinations are
//! reported together. Syntax errors such as an unknown flag are reported by clap, only the first one.

mod serve;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    error::Error as _,
    ffi::{OsStr, OsString},
};

use clap::{
    Arg, ArgMatches, CommandFactory as _, FromArgMatches as _, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
    value_parser,
};
use secrecy::SecretString;

pub use self::serve::{Check, Serve};
use crate::{
    client,
    credentials::secret::visible,
    options::{BOOL, Environment, OutputFormat, PREFIX, Validation, nearest, variable_name},
    sandbox,
};

/// The subcommand to run, with its options.
#[derive(Debug, Parser)]
#[command(name = env!("CARGO_PKG_NAME"), version, arg_required_else_help = false)]
#[command(about = "gRPC facade over the RDS call \"Obtaining Task Information\"")]
pub enum Command {
    /// Run the gRPC server
    #[command(after_help = serve::NOTES)]
    Serve(Box<Serve>),
    /// Check whether serve can work with the same flags and variables, from files to one call of RDS; exit code 1 if not
    #[command(after_help = serve::NOTES)]
    Check(Box<Check>),
    /// Call a server once and print the reply as JSON
    Call(client::CallOptions),
    /// Watch a task until it is over; exit code 0 if it succeeded, 3 if not, 4 if the time is over, 1 if the call failed
    Watch(client::WatchOptions),
    /// Check the health of a server, by default the server that serve starts with the same variables; exit code 0 if it is SERVING
    Health(client::HealthOptions),
    /// Run only the sandbox: a fake of RDS, IAM and the metadata service
    Sandbox(sandbox::Options),
    /// Print this text: `--help`, `--version`, `--print-config`.
    #[command(skip)]
    Print(String),
}

/// An invalid command line or environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// One sentence per problem, starting with the flag or variable. No secrets.
    pub problems: Vec<String>,
    /// The format in which to print them.
    pub log_format: OutputFormat,
}

/// Parses the arguments and the environment of this process.
///
/// # Errors
/// [`Invalid`] with every problem.
pub fn parse_process() -> Result<Command, Invalid> {
    parse(
        std::env::args_os().collect(),
        &std::env::vars_os().collect(),
    )
}

/// Parses the command line, which starts with the program's name, and for `serve` and `check` the variables of their flags.
///
/// # Errors
/// [`Invalid`] with every problem.
pub fn parse(mut args: Vec<OsString>, environment: &Environment) -> Result<Command, Invalid> {
    let mut validation = Validation::new(environment);
    if has_variables(&args) {
        merge_variables(&mut args, &mut validation);
    }
    let log_format = log_format(&args);
    let command = parse_merged(&args, &mut validation);
    let mut problems = validation.into_problems();
    match command {
        Ok(command) if problems.is_empty() => Ok(command),
        Err(error) if !error.use_stderr() => Ok(Command::Print(error.render().to_string())),
        command => {
            problems.extend(command.err().map(|error| one_line(&error)));
            Err(Invalid {
                problems,
                log_format,
            })
        }
    }
}

/// Whether the flags of the subcommand have variables.
fn has_variables(args: &[OsString]) -> bool {
    let subcommand = args.get(1).and_then(|subcommand| subcommand.to_str());
    matches!(subcommand, Some("serve" | "check"))
}

/// Inserts `--flag=value` for every variable of `serve` whose flag is not typed. clap's own `env` would not treat an empty variable
/// as unset.
fn merge_variables(args: &mut Vec<OsString>, validation: &mut Validation<'_>) {
    let command = Command::command();
    let serve = find(&command, "serve");
    let mut known = vec![format!("{PREFIX}TOKEN")];
    for flag in serve.get_arguments().filter_map(Arg::get_long) {
        known.push(variable_name(flag));
        let typed = |arg: &OsString| {
            let arg = arg.to_string_lossy();
            arg.strip_prefix("--")
                .is_some_and(|arg| arg.split('=').next() == Some(flag))
        };
        if args.iter().skip(2).any(typed) {
            continue;
        }
        if let Some(value) = validation.take_flag_variable(flag) {
            args.insert(2, assignment(flag, value));
        }
    }
    for (name, value) in validation.environment() {
        let name = name.to_string_lossy();
        if !name.starts_with(PREFIX)
            || value.is_empty()
            || known.iter().any(|known| *known == name)
            || is_service_variable(&name, &value.to_string_lossy())
        {
            continue;
        }
        let close = nearest(&name, known.iter().map(String::as_str)).expect("there are flags");
        validation.problem(
            &name,
            format!("is not a known variable; did you mean {close}?"),
        );
    }
}

/// Whether Kubernetes derives this variable from a Service of the namespace, whose name may begin with `rds-task-facade`
/// ("Accessing the Service", <https://kubernetes.io/docs/tutorials/services/connect-applications-service/>).
fn is_service_variable(name: &str, value: &str) -> bool {
    let without_suffix = |suffixes: &[&str]| suffixes.iter().find_map(|s| name.strip_suffix(s));
    let port = without_suffix(&["_PROTO", "_PORT", "_ADDR"]).unwrap_or(name);
    let port = ["_TCP", "_UDP", "_SCTP"]
        .iter()
        .find_map(|protocol| port.strip_suffix(protocol)?.rsplit_once("_PORT_"));
    let is_url = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme));
    without_suffix(&["_SERVICE_HOST", "_SERVICE_PORT"]).is_some()
        || name
            .split_once("_SERVICE_PORT_")
            .is_some_and(|(_, port)| !port.is_empty())
        || (name.ends_with("_PORT") && is_url)
        || port.is_some_and(|(_, number)| number.parse::<u16>().is_ok())
}

fn assignment(flag: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(format!("--{flag}="));
    argument.push(value);
    argument
}

/// The format of problems, read before validation: the one of the log, or of the results of `check`.
fn log_format(args: &[OsString]) -> OutputFormat {
    let json = args.windows(2).any(|pair| {
        let name = pair[0].to_str();
        matches!(
            pair[1].to_str(),
            Some("--log-format=json" | "--output=json")
        ) || (matches!(name, Some("--log-format" | "--output")) && pair[1] == "json")
    });
    match has_variables(args) && json {
        true => OutputFormat::Json,
        false => OutputFormat::Text,
    }
}

/// The declaration of a subcommand.
fn find<'a>(command: &'a clap::Command, name: &str) -> &'a clap::Command {
    let subcommand = command.find_subcommand(name);
    subcommand.expect("the subcommand is declared")
}

/// The declared command line without required flags. For an `Option` of a struct, clap's derive always requires the flags; here
/// [`accepted_arguments`] requires them only together.
fn command_line(change: impl Fn(Arg) -> Arg) -> clap::Command {
    Command::command()
        .mut_subcommands(|subcommand| subcommand.mut_args(|arg| change(arg.required(false))))
}

/// Parses the merged arguments. The result is only valid if no problem was added.
fn parse_merged(
    args: &[OsString],
    validation: &mut Validation<'_>,
) -> Result<Command, clap::Error> {
    let as_text = command_line(|arg| {
        let is_boolean = arg.get_value_names().is_some_and(|names| names == [BOOL]);
        let arg = arg.value_parser(value_parser!(OsString));
        match is_boolean {
            true => arg.num_args(0..=1).default_missing_value("true"),
            false => arg,
        }
    });
    let split = as_text.try_get_matches_from(args)?;
    let (name, matches) = split.subcommand().expect("clap requires a subcommand");
    let declared = Command::command();
    let subcommand = find(&declared, name);
    let accepted = accepted_arguments(subcommand, matches, validation);
    let start = [env!("CARGO_PKG_NAME"), name].map(OsString::from);
    let typed = command_line(|arg| arg).try_get_matches_from(start.into_iter().chain(accepted))?;
    match Command::from_arg_matches(&typed)? {
        Command::Serve(mut options) => {
            options.validate(subcommand, matches, validation);
            Ok(match options.print_config {
                true => Command::Print(options.printed()),
                false => Command::Serve(options),
            })
        }
        Command::Check(mut check) => {
            let serve = find(&declared, "serve");
            check.serve.validate(serve, matches, validation);
            check.read_variables(validation);
            Ok(match check.serve.print_config {
                true => Command::Print(check.serve.printed()),
                false => Command::Check(check),
            })
        }
        Command::Call(mut call) => {
            call.server.validate(validation);
            read_token(&mut call.token, validation);
            Ok(Command::Call(call))
        }
        Command::Watch(mut watch) => {
            watch.server.validate(validation);
            read_token(&mut watch.token, validation);
            Ok(Command::Watch(watch))
        }
        Command::Health(mut health) => {
            if matches.value_source("target") != Some(ValueSource::CommandLine) {
                health.use_local_server(validation);
            }
            health.server.validate(validation);
            Ok(Command::Health(health))
        }
        command => Ok(command),
    }
}

/// Reads the token of a client from its variable.
fn read_token(token: &mut client::Token, validation: &mut Validation<'_>) {
    if token.token_file.is_none() {
        let parse = |text: &str| visible(text).map(SecretString::from);
        token.from_variable = validation.parsed_variable(&format!("{PREFIX}TOKEN"), parse);
    }
}

/// The given arguments without the invalid ones, whose problems are added: invalid values, and incomplete groups of flags such as a
/// certificate without its key.
fn accepted_arguments(
    subcommand: &clap::Command,
    matches: &ArgMatches,
    validation: &mut Validation<'_>,
) -> Vec<OsString> {
    let mut accepted = BTreeMap::new();
    let mut given = Vec::new();
    for arg in subcommand.get_arguments() {
        let flag = arg.get_long().expect("every argument is a flag");
        let id = arg.get_id().as_str();
        if matches.value_source(id) != Some(ValueSource::CommandLine) {
            continue;
        }
        given.push(flag);
        let values = matches.get_raw(id).into_iter().flatten();
        let arguments: Vec<OsString> = values.map(|value| assignment(flag, value)).collect();
        for argument in &arguments {
            if let Err(sentence) = parse_alone(arg, argument) {
                validation.reject(flag, sentence);
            }
        }
        accepted.insert(flag, arguments);
    }
    for group in subcommand.get_groups() {
        let is_member = |arg: &&Arg| group.get_args().any(|id| id == arg.get_id());
        let members = || subcommand.get_arguments().filter(is_member);
        let flags: Vec<&str> = members().filter_map(Arg::get_long).collect();
        let Some(first) = flags.iter().find(|flag| given.contains(flag)) else {
            continue;
        };
        let missing: Vec<String> = members()
            .filter(|arg| arg.is_required_set())
            .filter_map(Arg::get_long)
            .filter(|flag| !given.contains(flag))
            .map(|flag| format!("--{flag}"))
            .collect();
        if !missing.is_empty() {
            validation.reject(first, format!("requires {}", missing.join(" and ")));
        }
        if validation.is_rejected(&flags) {
            accepted.retain(|flag, _| !flags.contains(flag));
        }
    }
    accepted.retain(|flag, _| !validation.is_rejected(&[flag]));
    accepted.into_values().flatten().collect()
}

/// Parses the value of one argument, as a command line with only that option.
fn parse_alone(arg: &Arg, argument: &OsStr) -> Result<(), String> {
    let alone = clap::Command::new("").no_binary_name(true).arg(arg.clone());
    match alone.try_get_matches_from([argument]) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => Err("is not UTF-8".to_owned()),
        Err(error) => Err(match error.source() {
            Some(sentence) => sentence.to_string(),
            None => "needs a value".to_owned(),
        }),
    }
}

/// clap's error message in one line, without the usage. A stray argument is not echoed, because it may be a secret.
fn one_line(error: &clap::Error) -> String {
    let stray = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(text)) => !text.starts_with('-'),
        _ => false,
    };
    if error.kind() == ErrorKind::UnknownArgument && stray {
        return "unexpected argument without a flag; see --help".to_owned();
    }
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .collect();
    lines.join("; ").trim_start_matches("error: ").to_owned()
}
