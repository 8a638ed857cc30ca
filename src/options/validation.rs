//! Reads environment variables, and collects problems with variables and options.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fmt,
};

/// The prefix of the variables of `serve`'s flags.
pub const PREFIX: &str = "RDS_TASK_FACADE_";

/// Environment variables, passed in so that tests can replace them.
pub type Environment = BTreeMap<OsString, OsString>;

/// The environment, and the problems found so far.
#[derive(Debug)]
pub struct Validation<'a> {
    environment: &'a Environment,
    from_variables: BTreeSet<String>,
    rejected: BTreeSet<String>,
    problems: Vec<String>,
}

impl<'a> Validation<'a> {
    /// A validation without problems.
    pub fn new(environment: &'a Environment) -> Self {
        Self {
            environment,
            from_variables: BTreeSet::new(),
            rejected: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    /// The whole environment.
    pub fn environment(&self) -> &'a Environment {
        self.environment
    }

    /// The value of a variable; an empty variable is unset.
    pub fn raw_variable(&self, name: &str) -> Option<&'a OsStr> {
        let value = self.environment.get(OsStr::new(name))?;
        (!value.is_empty()).then_some(value)
    }

    /// The value of a variable as text. Adds a problem if it is not UTF-8.
    pub fn variable(&mut self, name: &str) -> Option<String> {
        let text = self.raw_variable(name)?.to_str().map(str::to_owned);
        self.accept(name, text.ok_or("is not UTF-8"))
    }

    /// The parsed value of a variable. Adds a problem if it is invalid.
    pub fn parsed_variable<T, E: fmt::Display>(
        &mut self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.variable(name)?;
        self.accept(name, parse(&text))
    }

    /// The value of a flag's variable, which then sets the flag. `flag` has no leading dashes.
    pub fn take_flag_variable(&mut self, flag: &str) -> Option<&'a OsStr> {
        let value = self.raw_variable(&variable_name(flag))?;
        self.from_variables.insert(flag.to_owned());
        Some(value)
    }

    /// The name of a flag in problems: its variable if that set the value, else `--flag`.
    pub fn name_of(&self, flag: &str) -> String {
        match self.from_variables.contains(flag) {
            true => variable_name(flag),
            false => format!("--{flag}"),
        }
    }

    /// Adds a problem, unless it was added before. `subject` is the flag, variable or file with the problem.
    pub fn problem(&mut self, subject: &str, sentence: impl fmt::Display) {
        let problem = format!("{subject}: {sentence}");
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Adds a problem with the value of a flag. Rules for several flags then skip it, see [`Self::is_rejected`].
    pub fn reject(&mut self, flag: &str, sentence: impl fmt::Display) {
        self.problem(&self.name_of(flag), sentence);
        self.rejected.insert(flag.to_owned());
    }

    /// Whether one of these flags has an invalid value.
    pub fn is_rejected(&self, flags: &[&str]) -> bool {
        flags.iter().any(|flag| self.rejected.contains(*flag))
    }

    /// The value, or `None` after adding its problem.
    pub fn accept<T>(&mut self, subject: &str, parsed: Result<T, impl fmt::Display>) -> Option<T> {
        parsed.map_err(|error| self.problem(subject, error)).ok()
    }

    /// All problems, in the order in which they were found.
    pub fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

/// The name of a flag's variable.
pub fn variable_name(flag: &str) -> String {
    PREFIX.to_owned() + &flag.replace('-', "_").to_ascii_uppercase()
}
