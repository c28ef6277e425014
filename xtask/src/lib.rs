//! What the project's commands share.

pub mod mesa;
pub mod programs;
pub mod report;

use std::path::{Path, PathBuf};
use std::process::Command;

/// The error is a message for the user.
pub type Outcome = Result<(), String>;

/// The root of the repository, which is the parent folder of this crate.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The file in which a kit says what it was built from.
pub const MANIFEST: &str = "kit.json";

/// The revision of the repository, where git knows it.
pub fn revision() -> Option<String> {
    let output = Command::new("git").current_dir(root()).args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// A cargo command, run from the root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    command.current_dir(root()).args(args);
    // Mesa warns if it has no folder for its sockets. Any folder will do.
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        let runtime = root().join("target/xdg-runtime");
        if std::fs::create_dir_all(&runtime).is_ok() {
            command.env("XDG_RUNTIME_DIR", runtime);
        }
    }
    command
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Outcome {
    let status = command.status().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("`{}` failed ({status})", shown(command))),
    }
}

/// A command the way a user would type it.
pub fn shown(command: &Command) -> String {
    let parts = std::iter::once(command.get_program()).chain(command.get_args());
    parts.map(|p| p.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
