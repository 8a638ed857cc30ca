//! The variables of the environment, and the problems with them and with the options.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fmt,
};

/// What the variable of every flag of `serve` begins with.
pub const PREFIX: &str = "RDS_TASK_FACADE_";

/// The environment, passed in so that tests can replace it.
pub type Environment = BTreeMap<OsString, OsString>;

/// The variables of the environment, and every problem found so far.
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

    /// A variable of the environment as it is; empty counts as unset.
    pub fn raw_variable(&self, name: &str) -> Option<&'a OsStr> {
        let value = self.environment.get(OsStr::new(name))?;
        (!value.is_empty()).then_some(value)
    }

    /// A variable of the environment as text; empty counts as unset.
    pub fn variable(&mut self, name: &str) -> Option<String> {
        let text = self.raw_variable(name)?.to_str().map(str::to_owned);
        self.accept(name, text.ok_or("is not UTF-8"))
    }

    /// A variable, parsed.
    pub fn parsed_variable<T, E: fmt::Display>(
        &mut self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.variable(name)?;
        self.accept(name, parse(&text))
    }

    /// The variable of a flag, which is written without dashes in front. Its value is the flag's from now on.
    pub fn take_variable_of(&mut self, flag: &str) -> Option<&'a OsStr> {
        let value = self.raw_variable(&variable_of(flag))?;
        self.from_variables.insert(flag.to_owned());
        Some(value)
    }

    /// The name to use in problems with a flag: that of its variable if the value came from there.
    pub fn name_of(&self, flag: &str) -> String {
        match self.from_variables.contains(flag) {
            true => variable_of(flag),
            false => format!("--{flag}"),
        }
    }

    /// Adds a problem, once. `subject` is the flag, variable or file that it is about.
    pub fn problem(&mut self, subject: &str, sentence: impl fmt::Display) {
        let problem = format!("{subject}: {sentence}");
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Adds a problem with the value of a flag. Rules that span several flags skip it, see [`Self::is_rejected`].
    pub fn reject(&mut self, flag: &str, sentence: impl fmt::Display) {
        self.problem(&self.name_of(flag), sentence);
        self.rejected.insert(flag.to_owned());
    }

    /// Whether the value of one of these flags has a problem already.
    pub fn is_rejected(&self, flags: &[&str]) -> bool {
        flags.iter().any(|flag| self.rejected.contains(*flag))
    }

    /// The value; or its problem is added.
    pub fn accept<T>(&mut self, subject: &str, parsed: Result<T, impl fmt::Display>) -> Option<T> {
        parsed.map_err(|error| self.problem(subject, error)).ok()
    }

    /// All problems.
    pub fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

/// The variable that sets the same option as a flag.
pub fn variable_of(flag: &str) -> String {
    PREFIX.to_owned() + &flag.replace('-', "_").to_ascii_uppercase()
}
