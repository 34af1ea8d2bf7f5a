//! Exit status, and failures as a person reads them.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | whole and durable |
//! | 1 | failed; the source serves on, a retry is safe |
//! | 2 | wrong usage |
//! | 3 | undecided: disks are held until `vmferry resolve`, or a guest may run, or waits, elsewhere |
//! | 4 | refused before anything was sent |
//! | 130 | cancelled |
//!
//! For commands that look at something (`inspect`, `diff`, `schema diff`, `check`): 0 whole or equal,
//! 1 broken or different, 2 unreadable.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is whole and durable.
    Whole,
    /// It failed; the source serves on.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// Two things are not the same.
    Different,
    /// What shall be looked at cannot be read.
    Unreadable,
    /// Nobody knows which side has the disks: they are held.
    Undecided,
    /// Refused before a byte was sent.
    Refused,
    /// Somebody wanted it to end.
    Cancelled,
}

impl Exit {
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Whole => 0,
            Self::Failed | Self::Different => 1,
            Self::Usage | Self::Unreadable => 2,
            Self::Undecided => 3,
            Self::Refused => 4,
            Self::Cancelled => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.status().into()
    }
}

/// A command failed: one clear line, and hints on what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    message: String,
    hints: Vec<String>,
    /// Its object was printed already, for who reads JSON.
    told: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
            hints: Vec::new(),
            told: false,
        }
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn refused(message: impl fmt::Display) -> Self {
        Self::new(Exit::Refused, message)
    }

    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hints.push(hint.to_string());
        self
    }

    /// What ends here was told as a JSON object already.
    pub(crate) fn told(mut self) -> Self {
        self.told = true;
        self
    }

    /// The object of `--json`, unless one was printed already.
    pub(crate) fn object(&self) -> Option<Value> {
        let event = match self.exit {
            Exit::Whole | Exit::Failed | Exit::Usage | Exit::Unreadable => "failed",
            Exit::Different => "different",
            Exit::Undecided => "undecided",
            Exit::Refused => "refused",
            Exit::Cancelled => "cancelled",
        };
        let object = json!({"event": event, "error": self.message});
        (!self.told).then_some(object)
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Print the failure. What cannot be printed changes nothing.
    pub(crate) fn report(&self, out: &mut impl Write) {
        let _ = write!(out, "{self}");
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vmferry: error: {}", one_line(&self.message))?;
        for hint in &self.hints {
            writeln!(f, "hint: {hint}")?;
        }
        Ok(())
    }
}

/// Anything else that goes wrong is a plain failure.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Failed, format!("{error:#}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Exit::Failed, error)
    }
}

/// A message of a peer may hold anything; a terminal gets one line without control characters.
pub(crate) fn one_line(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    vmferry_stream::Shown(&text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_status() {
        let ends = [
            (Exit::Whole, 0),
            (Exit::Failed, 1),
            (Exit::Usage, 2),
            (Exit::Undecided, 3),
            (Exit::Refused, 4),
            (Exit::Cancelled, 130),
        ];
        for (exit, status) in ends {
            assert_eq!(exit.status(), status, "{exit:?}");
        }
    }

    #[test]
    fn a_failure_is_one_line_and_its_hints() {
        let failure = Failure::refused("disk \"a\" holds data\n\u{1b}[2J").hint("say overwrite=on");
        let mut out = Vec::new();
        failure.report(&mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "vmferry: error: disk \"a\" holds data  [2J\nhint: say overwrite=on\n"
        );
    }

    #[test]
    fn a_failure_is_one_object_once() {
        let object = |failure: Failure| failure.object();
        assert_eq!(
            object(Failure::refused("no\nway").hint("try")),
            Some(json!({"event": "refused", "error": "no\nway"}))
        );
        assert_eq!(
            object(Failure::new(Exit::Undecided, "who knows")),
            Some(json!({"event": "undecided", "error": "who knows"}))
        );
        assert_eq!(object(Failure::usage("what")).unwrap()["event"], "failed");
        assert_eq!(object(Failure::refused("no").told()), None);
    }

    #[test]
    fn causes_are_told_in_the_same_line() {
        let cause = anyhow::anyhow!("no such file").context("disk \"a\"");
        let failure = Failure::from(cause);
        assert_eq!(failure.exit, Exit::Failed);
        assert_eq!(
            failure.to_string(),
            "vmferry: error: disk \"a\": no such file\n"
        );
    }
}
