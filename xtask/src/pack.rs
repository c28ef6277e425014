//! Packs the programs that test and measure an adapter, for a machine without a toolchain.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xtask::programs::{ALL, BIN, LIB, LOADER, Programs, system_loader};
use xtask::{MANIFEST, Outcome, cargo, report, revision, root, run};

/// What the archive unpacks to.
const NAME: &str = "throughline-kit";
/// What programs read, by its path in the repository.
const DATA: [&str; 3] = ["tests/data", "examples/data", "docs/gpus/README.md"];
/// The program that runs the others.
const RUNNER: &str = "kit";

/// `cargo xtask kit`: `[--model]`. Writes target/kit/throughline-kit.tar.gz.
pub fn kit(args: &[String]) -> Outcome {
    let model = match args {
        [] => false,
        [flag] if flag == "--model" => true,
        _ => return Err("kit: the only flag is --model, which adds SmolLM2 to the kit".into()),
    };
    let mut data = DATA.to_vec();
    if model {
        if !root().join(report::SMOLLM2).exists() {
            return Err("kit: --model needs the model; `cargo xtask fetch smollm2` downloads it".into());
        }
        data.push(report::SMOLLM2);
    }
    println!("Building {} programs in release mode", ALL.len() + 1);
    let programs = Programs::build(&ALL)?;
    run(&mut cargo(&["build", "--quiet", "--release", "--package", "xtask", "--bin", RUNNER]))?;
    let place = root().join("target/kit");
    let folder = place.join(NAME);
    // Files of an older kit would be packed with the new ones.
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("{}: {e}", folder.display())),
        _ => {}
    }
    let suffix = std::env::consts::EXE_SUFFIX;
    for (name, file) in programs.files() {
        program(file, &folder.join(BIN).join(format!("{name}{suffix}")))?;
    }
    program(&root().join(format!("target/release/{RUNNER}{suffix}")), &folder.join(format!("{RUNNER}{suffix}")))?;
    for path in data {
        copy(&root().join(path), &folder.join(path))?;
    }
    match system_loader().filter(|_| cfg!(target_os = "linux")) {
        Some(loader) => copy(&loader, &folder.join(LIB).join(LOADER))?,
        None if cfg!(target_os = "linux") => println!("This machine has no {LOADER}, so the other one must have it"),
        None => {}
    }
    let facts = serde_json::json!({ "revision": revision() });
    fs::write(folder.join(MANIFEST), format!("{facts}\n")).map_err(|e| format!("{MANIFEST}: {e}"))?;
    let archive = archive(&place)?;
    fs::remove_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let bytes = fs::metadata(&archive).map_err(|e| format!("{}: {e}", archive.display()))?.len();
    println!("{}, {} MB; docs/gpus/README.md says how to use it", archive.display(), bytes.div_ceil(1_000_000));
    Ok(())
}

/// Packs the folder; paths are relative, since some programs named `tar` take the drive of a Windows path for a host.
fn archive(place: &Path) -> Result<PathBuf, String> {
    let file = format!("{NAME}.tar.gz");
    run(Command::new("tar").current_dir(place).args(["-czf", &file, NAME]))?;
    Ok(place.join(file))
}

/// Copies a program, without its symbols where there is a tool to remove them: they are a fifth of it.
fn program(from: &Path, to: &Path) -> Outcome {
    copy(from, to)?;
    if cfg!(unix) {
        let _ = Command::new("strip").arg(to).stderr(Stdio::null()).status();
    }
    Ok(())
}

/// Copies a file, or a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> Outcome {
    let failed = |e: io::Error| format!("{}: {e}", from.display());
    if from.is_dir() {
        for entry in fs::read_dir(from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    fs::copy(from, to).map(|_| ()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_copied_with_all_that_is_in_them() {
        let place = std::env::temp_dir().join(format!("throughline-pack-{}", std::process::id()));
        fs::create_dir_all(place.join("from/deep/er")).unwrap();
        fs::write(place.join("from/a"), "a").unwrap();
        fs::write(place.join("from/deep/er/b"), "b").unwrap();
        copy(&place.join("from"), &place.join("new/to")).unwrap();
        assert_eq!(fs::read_to_string(place.join("new/to/a")).unwrap(), "a");
        assert_eq!(fs::read_to_string(place.join("new/to/deep/er/b")).unwrap(), "b");
        let message = copy(&place.join("absent"), &place.join("to")).unwrap_err();
        assert!(message.contains("absent"), "{message}");
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn what_is_packed_exists() {
        for path in DATA {
            assert!(root().join(path).exists(), "{path}");
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert!(kit(&["--fast".into()]).unwrap_err().contains("--model"));
    }
}
