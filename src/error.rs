//! The error type of the crate.

/// Everything that can go wrong. Each message names the node, file or field, what was expected
/// and what came.
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
        /// Shapes and types that came.
        inputs: String,
    },
    /// The graph as a whole is not usable as asked.
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
    /// A kernel's WGSL does not have what the launch asks for, or does not compile.
    #[error("kernel `{kernel}`: {message}")]
    Kernel {
        /// Label of the kernel.
        kernel: String,
        /// What is wrong.
        message: String,
    },
    /// There is no adapter to run on, or the one found does not open.
    #[error("no usable GPU adapter: {0}")]
    NoAdapter(String),
    /// The device's limits, or those that the app has set, are too small for the plan.
    #[error("over the limits: {0}")]
    Limit(String),
    /// There is no memory for a buffer. Everything that was there before works on.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The driver refused or lost something.
    #[error("device: {0}")]
    Device(String),
    /// The device is gone: destroyed, reset or removed. Nothing on it works any more; open another one, and go on
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
    /// A setting has a value that makes no sense.
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
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file's content is not what it should be.
    #[error("{path}: {message}")]
    Format {
        /// The file.
        path: String,
        /// Which field or tensor, what was expected and what came.
        message: String,
    },
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

pub(crate) fn bad(path: &str, message: impl Into<String>) -> Error {
    Error::Format { path: path.into(), message: message.into() }
}
