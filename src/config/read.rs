//! Reads settings one by one, from the flag, else the variable, else the default, and gathers the mistakes on the way.

use std::{collections::BTreeSet, ffi::OsString, path::PathBuf};

use clap::{
    ArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::{
    Environment, LogFormat, Refused,
    flags::{self, Flag, PREFIX},
    values::{self, Parsed},
};

/// A setting that somebody made.
pub(super) struct Given {
    /// What was typed; more than one text only for a list.
    pub(super) texts: Vec<String>,
    /// The flag or variable, for sentences about it.
    pub(super) source: String,
}

/// The settings of one subcommand, and the mistakes found so far.
pub(super) struct Reader<'a> {
    flags: &'static [Flag],
    matches: &'a ArgMatches,
    env: &'a Environment,
    /// Whether variables count; only `serve` reads them.
    variables: bool,
    read: BTreeSet<&'static str>,
    pub(super) mistakes: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        flags: &'static [Flag],
        matches: &'a ArgMatches,
        env: &'a Environment,
        variables: bool,
        mistakes: Vec<String>,
    ) -> Self {
        Self {
            flags,
            matches,
            env,
            variables,
            read: BTreeSet::new(),
            mistakes,
        }
    }

    /// The setting of a flag with a default. A mistake is noted, and the default taken in its place.
    pub(super) fn value<T>(&mut self, name: &str, parse: impl Fn(&str) -> Parsed<T>) -> T {
        let default = self.flag(name).default;
        self.optional(name, &parse).unwrap_or_else(|| {
            parse(default).expect("the table's defaults are valid: a test reads them all")
        })
    }

    /// The setting of a flag, when there is one and it is right. A mistake is noted.
    pub(super) fn optional<T>(
        &mut self,
        name: &str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<T> {
        let given = self.given(name)?;
        self.parsed(&given.source, parse(&given.texts[0]))
    }

    /// The parts of a list, and its source when it was set at all. A mistake is noted.
    pub(super) fn list<T>(&mut self, name: &str, parse: impl Fn(&str) -> Parsed<Vec<T>>) -> Vec<T> {
        let Some(given) = self.given(name) else {
            return Vec::new();
        };
        let parts = given
            .texts
            .iter()
            .filter_map(|text| self.parsed(&given.source, parse(text)));
        parts.collect::<Vec<_>>().into_iter().flatten().collect()
    }

    /// The path of a file that can be read.
    pub(super) fn file(&mut self, name: &str) -> Option<PathBuf> {
        self.optional(name, values::file)
    }

    /// A setting as typed, by flag or else by variable.
    pub(super) fn given(&mut self, name: &str) -> Option<Given> {
        let flag = self.flag(name);
        self.read.insert(flag.name);
        let source = format!("--{name}");
        if let Some(typed) = self.matches.get_many::<OsString>(name) {
            let texts: Vec<Option<String>> =
                typed.map(|text| text.to_str().map(str::to_owned)).collect();
            if texts.len() > 1 && !flag.is_list() {
                return self.mistake(&source, "is given more than once");
            }
            let Some(texts) = texts.into_iter().collect::<Option<Vec<String>>>() else {
                return self.mistake(&source, "is not UTF-8");
            };
            // To a client an empty text is one: the server judges it.
            if self.variables && texts.iter().any(String::is_empty) {
                return self.mistake(&source, "needs a value");
            }
            return Some(Given { texts, source });
        }
        if !self.variables {
            return None;
        }
        let source = flag.variable();
        let texts = vec![self.variable(&source)?];
        Some(Given { texts, source })
    }

    /// A variable of the environment; empty counts as unset.
    pub(super) fn variable(&mut self, name: &str) -> Option<String> {
        let value = self
            .env
            .get(OsString::from(name).as_os_str())
            .filter(|value| !value.is_empty())?;
        match value.to_str() {
            Some(value) => Some(value.to_owned()),
            None => self.mistake(name, "is not UTF-8"),
        }
    }

    /// Notes a mistake, once; `None`, so that it can end an expression.
    pub(super) fn mistake<T>(&mut self, source: &str, problem: &str) -> Option<T> {
        let mistake = format!("{source}: {problem}");
        // A flag that two rules look at is still one mistake.
        if !self.mistakes.contains(&mistake) {
            self.mistakes.push(mistake);
        }
        None
    }

    /// The value, or a mistake noted.
    pub(super) fn parsed<T>(&mut self, source: &str, parsed: Parsed<T>) -> Option<T> {
        match parsed {
            Ok(value) => Some(value),
            Err(problem) => self.mistake(source, &problem),
        }
    }

    /// Whether somebody asked for this setting, so that its text passed validation.
    pub(super) fn was_read(&self, name: &str) -> bool {
        self.read.contains(name)
    }

    /// The result, unless there are mistakes.
    pub(super) fn finish<T>(self, log_format: LogFormat, value: T) -> Result<T, Refused> {
        if self.mistakes.is_empty() {
            return Ok(value);
        }
        Err(Refused {
            mistakes: self.mistakes,
            log_format,
        })
    }

    fn flag(&self, name: &str) -> &'static Flag {
        self.flags
            .iter()
            .find(|flag| flag.name == name)
            .expect("only flags of the table are asked for")
    }
}

/// What the command line says: flags by subcommand, or the text of `--help` or `--version`.
pub(super) enum Typed {
    /// A subcommand with its flags, and the arguments that are none of ours.
    Flags(ArgMatches, Vec<String>),
    /// Print it and be done.
    Print(String),
}

/// Splits the command line. What clap refuses is noted and taken out until the rest is sound, since clap itself stops at
/// the first mistake. A value is never quoted: it may be a secret behind a misspelt flag.
pub(super) fn split(mut args: Vec<OsString>) -> Result<Typed, Refused> {
    let mut mistakes = Vec::new();
    loop {
        let error = match flags::command().try_get_matches_from(&args) {
            Ok(matches) => return Ok(Typed::Flags(matches, mistakes)),
            Err(error) => error,
        };
        if matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
        ) {
            return Ok(Typed::Print(error.render().to_string()));
        }
        let at = culprit(&error).and_then(|culprit| position(&args, &culprit).zip(Some(culprit)));
        let Some((at, culprit)) = at else {
            mistakes.push(subcommand_mistake(error.kind()));
            return Err(Refused {
                mistakes,
                log_format: LogFormat::Text,
            });
        };
        let removed = args.remove(at);
        if error.kind() == ErrorKind::InvalidValue {
            mistakes.push(format!("{culprit}: needs a value"));
        } else if culprit.starts_with('-') {
            mistakes.push(unknown_flag(&args, &culprit));
            // What follows is most likely the value of the misspelt flag; before the subcommand it is the subcommand.
            let value_follows = at > 1 && args.get(at).is_some_and(|next| !is_flag(next));
            if value_follows && !removed.to_string_lossy().contains('=') {
                args.remove(at);
            }
        } else {
            mistakes.push(format!(
                "argument {at}: belongs to no flag; see {} --help",
                env!("CARGO_PKG_NAME")
            ));
        }
    }
}

/// The argument that clap complains about, without the name of its value.
fn culprit(error: &clap::Error) -> Option<String> {
    if !matches!(
        error.kind(),
        ErrorKind::UnknownArgument | ErrorKind::InvalidValue
    ) {
        return None;
    }
    match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(text) => text.split([' ', '=']).next().map(str::to_owned),
        _ => None,
    }
}

fn position(args: &[OsString], culprit: &str) -> Option<usize> {
    let is_culprit = |arg: &OsString| {
        let arg = arg.to_string_lossy();
        let name = arg.split('=').next().unwrap_or_default();
        let short_cluster =
            culprit.starts_with('-') && !culprit.starts_with("--") && arg.starts_with(culprit);
        arg == culprit || name == culprit || short_cluster
    };
    // The program's own name comes first. Of a repeated flag the last is the one without a value.
    args.iter()
        .skip(1)
        .rposition(is_culprit)
        .map(|index| index + 1)
}

fn is_flag(arg: &OsString) -> bool {
    arg.to_string_lossy().starts_with('-')
}

fn unknown_flag(args: &[OsString], culprit: &str) -> String {
    let subcommand = args.get(1).map(|arg| arg.to_string_lossy());
    let known = flags::SUBCOMMANDS
        .iter()
        .find(|(name, ..)| subcommand.as_deref() == Some(name))
        .map_or(&[] as &[Flag], |(_, flags, ..)| flags);
    let suggestion = values::closest(
        culprit.trim_start_matches('-'),
        known.iter().map(|flag| flag.name),
    );
    match suggestion {
        Some(name) => format!("{culprit}: no such flag; did you mean --{name}?"),
        None => format!("{culprit}: no such flag; see --help"),
    }
}

fn subcommand_mistake(kind: ErrorKind) -> String {
    let known = "serve, call, health or sandbox; see --help";
    match kind {
        ErrorKind::InvalidSubcommand => format!("unknown subcommand; it must be {known}"),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            format!("no subcommand; it must be {known}")
        }
        _ => format!("the command line cannot be read; it must begin with {known}"),
    }
}

/// Notes every variable that begins with our prefix and is none of ours.
pub(super) fn unknown_variables(reader: &mut Reader<'_>) {
    let ours: Vec<String> = flags::SERVE
        .iter()
        .map(Flag::variable)
        .chain([format!("{PREFIX}TOKEN")])
        .collect();
    for (name, value) in reader.env {
        let name = name.to_string_lossy();
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        if value.is_empty() || ours.iter().any(|own| *own == name) || is_of_kubernetes(rest) {
            continue;
        }
        let problem = match values::closest(&name, ours.iter().map(String::as_str)) {
            Some(own) => format!("no such variable; did you mean {own}?"),
            None => "no such variable; see serve --help".to_owned(),
        };
        reader.mistakes.push(format!("{name}: {problem}"));
    }
}

/// Whether Kubernetes derives this name from a Service called `rds-task-facade`, for every pod of its namespace.
fn is_of_kubernetes(rest: &str) -> bool {
    rest == "SERVICE_HOST"
        || rest == "PORT"
        || rest.starts_with("SERVICE_PORT")
        || rest.starts_with("PORT_")
}
