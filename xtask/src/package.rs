//! The crate as `cargo publish` would upload it, unpacked and tested: a file that the package lacks shows here only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, adapter, cargo, root, run};

/// Packs the crate and runs its unit tests and doctests outside the workspace; `args` go to `cargo test`.
pub fn package(args: &[String]) -> Outcome {
    adapter::ensure(&[])?;
    let target = root().join("target");
    let folder = target.join("package");
    // An older package would be taken for the new one.
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("{}: {e}", folder.display())),
        _ => {}
    }
    // Quiet, since cargo lists each test, example and benchmark that the package leaves out. The tests build
    // everything that `cargo package` would build to verify it.
    let pack = ["package", "--quiet", "--package", "throughline", "--no-verify", "--allow-dirty", "--target-dir"];
    run(cargo(&pack).arg(&target))?;
    let unpacked = unpack(&folder)?;
    println!("Testing {}", unpacked.display());
    // The workspace's target folder, so that dependencies are not compiled again.
    let mut test = cargo(&["test", "--all-features", "--target-dir"]);
    test.arg(&target).arg("--manifest-path").arg(unpacked.join("Cargo.toml")).args(args);
    run(&mut test)
}

/// Unpacks the one `.crate` file of a folder beside it. Paths are relative, since some programs named `tar` take the
/// drive of a Windows path for a host.
fn unpack(folder: &Path) -> Result<PathBuf, String> {
    let shown = |e: io::Error| format!("{}: {e}", folder.display());
    let entries = fs::read_dir(folder).map_err(shown)?.collect::<io::Result<Vec<_>>>().map_err(shown)?;
    let mut packages = entries.iter().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "crate"));
    let (Some(package), None) = (packages.next(), packages.next()) else {
        return Err(format!("{}: expected one .crate file", folder.display()));
    };
    run(Command::new("tar").current_dir(folder).arg("-xzf").args(package.file_name()))?;
    Ok(package.with_extension(""))
}
