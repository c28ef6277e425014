//! The error type of the crate.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

/// Everything that can go wrong.
///
/// Print it: each message names the node, file or field, what was expected and what was found. Match on it where a
/// program can react: [`Limit`](Self::Limit) and [`OutOfMemory`](Self::OutOfMemory) call for a smaller batch or
/// context, [`DeviceLost`](Self::DeviceLost) for a new device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A node of a graph was given inputs that it cannot take.
    #[error("node `{node}` ({op}): {message}; inputs: {inputs}")]
    Node {
        /// Full name of the node, scopes included.
        node: String,
        /// Name of the op.
        op: &'static str,
        /// What is wrong, with what was expected.
        message: String,
        /// Shapes and types of the inputs.
        inputs: String,
    },
    /// The graph as a whole cannot be used as requested.
    #[error("graph: {0}")]
    Graph(String),
    /// Differentiation reached an op that has no gradient.
    #[error("node `{node}`: op `{op}` has no gradient ({reason})")]
    NoGradient {
        /// Full name of the node.
        node: String,
        /// Name of the op.
        op: &'static str,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A kernel's WGSL lacks something that the launch refers to, or does not compile.
    #[error("kernel `{kernel}`: {message}")]
    Kernel {
        /// Label of the kernel.
        kernel: String,
        /// What is wrong.
        message: String,
    },
    /// There is no adapter to run on, or opening the one found failed.
    #[error("no usable GPU adapter: {0}")]
    NoAdapter(String),
    /// More is needed than a limit allows: the device's, that of the profile planned for, or one that the app has set.
    #[error("over the limits: {}", over_the_limits(exceeded, advice))]
    Limit {
        /// Every limit that is exceeded: at least one.
        exceeded: Vec<Exceeded>,
        /// What to do about it, such as what would fit.
        advice: Option<String>,
    },
    /// There is no memory for a buffer. Everything that existed before still works.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The driver refused or lost something.
    #[error("device: {0}")]
    Device(String),
    /// The device is lost: destroyed, reset or removed. Nothing on it works any more. Open another one and continue
    /// from the last checkpoint.
    #[error("device lost: {0}")]
    DeviceLost(String),
    /// Host data does not fit the tensor that it is meant for.
    #[error("tensor `{tensor}`: expected {expected}, got {got}")]
    Data {
        /// Name of the tensor.
        tensor: String,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// A setting has an impossible value.
    #[error("setting `{field}`: {message}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// What is wrong, with what was expected.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The content of a file is not what it should be.
    #[error("{path}: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The field or tensor, what was expected and what was found.
        message: String,
    },
}

/// One exceeded limit of an [`Error::Limit`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// What is limited: the name of one of the [`wgpu::Limits`], or for example "bytes of `logits`, f32[2, 8], in one
    /// binding".
    pub what: String,
    /// The amount needed.
    pub needed: u64,
    /// The amount allowed.
    pub allowed: u64,
}

impl Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} needed, {} allowed", self.what, self.needed, self.allowed)
    }
}

fn over_the_limits(exceeded: &[Exceeded], advice: &Option<String>) -> String {
    let advice = advice.as_ref().map_or(String::new(), |advice| format!(". {advice}"));
    listed(exceeded) + &advice
}

/// All of them, as messages show them.
pub(crate) fn listed(exceeded: &[Exceeded]) -> String {
    joined(exceeded, "; ")
}

/// Several things in one message.
pub(crate) fn joined(items: impl IntoIterator<Item = impl Display>, separator: &str) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(separator)
}

impl Error {
    pub(crate) fn node(
        node: &str,
        op: &'static str,
        message: String,
        inputs: impl IntoIterator<Item = impl Display>,
    ) -> Self {
        Error::Node { node: node.into(), op, message, inputs: joined(inputs, ", ") }
    }

    /// For `map_err`: what the system says of this file.
    pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |source| Error::Io { path: path.into(), source }
    }

    pub(crate) fn format(path: impl Into<PathBuf>, message: impl Display) -> Self {
        Error::Format { path: path.into(), message: message.to_string() }
    }

    pub(crate) fn data(tensor: impl Display, expected: impl Display, got: impl Display) -> Self {
        Error::Data { tensor: tensor.to_string(), expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn config(field: &'static str, message: impl Display) -> Self {
        Error::Config { field, message: message.to_string() }
    }

    /// An `Err` that names the setting, unless its value is as wanted.
    pub(crate) fn unless(ok: bool, field: &'static str, wanted: &str, got: impl Display) -> Result<()> {
        if ok { Ok(()) } else { Err(Self::config(field, format!("must be {wanted}, but is {got}"))) }
    }

    pub(crate) fn limit(what: impl Into<String>, needed: u64, allowed: u64) -> Self {
        Error::Limit { exceeded: vec![Exceeded { what: what.into(), needed, allowed }], advice: None }
    }

    /// This error, if it is of a limit, with more to do about it.
    pub(crate) fn advise(mut self, more: impl Display) -> Self {
        if let Error::Limit { advice, .. } = &mut self {
            *advice = Some(advice.take().map_or(more.to_string(), |first| format!("{first}. {more}")));
        }
        self
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names and other text from files, for messages: in backticks, without control characters, and truncated.
pub(crate) fn quoted(text: &str) -> String {
    const SHOWN: usize = 100;
    let mut shown: String = text.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}
