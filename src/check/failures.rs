//! What checks find.

use std::fmt;

use crate::error::Error;
use crate::ops::Case;

/// Something that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// Name of the op.
    pub op: &'static str,
    /// Name of the case.
    pub case: String,
    /// The profile and variants that it ran with; empty if it did not run on a device.
    pub target: String,
    /// The tensor and what is wrong with it, or the error.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, case `{}`", self.op, self.case)?;
        if !self.target.is_empty() {
            write!(f, " ({})", self.target)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Everything that a check found, never empty as an error. Printed, also by an `unwrap`, it is a line for each; what
/// several targets have in common is in one line.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Failures(pub(super) Vec<Failure>);

impl Failures {
    /// The failures, in the order of the cases.
    pub fn iter(&self) -> std::slice::Iter<'_, Failure> {
        self.0.iter()
    }

    /// Adds an error that kept a case from running.
    pub(super) fn push_error(&mut self, case: &Case, error: Error) {
        let advice = match error {
            Error::NoGradient { .. } => "; `Case::forward_only` or `Case::no_grad` checks an op without it",
            _ => "",
        };
        self.push(case, "", format_args!("{error}{advice}"));
    }

    pub(super) fn push(&mut self, case: &Case, target: impl fmt::Display, message: impl fmt::Display) {
        let (case, op, target) = (case.name.clone(), case.op.name(), target.to_string());
        self.0.push(Failure { op, case, target, message: message.to_string() });
    }

    /// What is wrong with a check of nothing.
    pub(super) fn no_cases() -> Self {
        let (case, target, message) = ("none".into(), String::new(), "there are no cases to check".into());
        Failures(vec![Failure { op: "no op", case, target, message }])
    }

    pub(super) fn into_result(self) -> Result<(), Failures> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alike = |a: &Failure, b: &Failure| (a.op, &a.case, &a.message) == (b.op, &b.case, &b.message);
        let mut lines = vec![];
        for (at, failure) in self.0.iter().enumerate() {
            if self.0[..at].iter().any(|earlier| alike(earlier, failure)) {
                continue;
            }
            let mut line = failure.clone();
            let more = self.0[at + 1..].iter().filter(|later| alike(failure, later)).count();
            if more > 0 && !line.target.is_empty() {
                line.target += &format!(", and {more} more");
            }
            lines.push(line.to_string());
        }
        f.write_str(&lines.join("\n"))
    }
}

impl fmt::Debug for Failures {
    /// Like `Display`, from a new line on: what a test that unwraps the result shows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{self}")
    }
}

impl std::error::Error for Failures {}
