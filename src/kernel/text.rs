//! Texts that are put together.

/// Appends a line to a string, which cannot fail.
macro_rules! line {
    ($to:expr, $($arg:tt)*) => {{
        use std::fmt::Write as _;
        let _ = writeln!($to, $($arg)*);
    }};
}
pub(crate) use line;

/// A skeleton whose lines of this kind, such as `//: body`, are replaced.
pub(crate) fn filled(skeleton: &str, lines: &[(&str, &str)]) -> String {
    lines.iter().fold(skeleton.to_string(), |text, (line, new)| text.replacen(line, new, 1))
}
