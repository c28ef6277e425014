//! Looks for accesses out of range and for races in kernels, with the Khronos validation layer in the newest Mesa.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use xtask::mesa::Mesa;
use xtask::{Outcome, cargo, root, run, shown};

/// The layer's settings. Its checks of how Vulkan is called are wgpu's business.
const SETTINGS: [(&str, &str); 4] = [
    ("VK_INSTANCE_LAYERS", "VK_LAYER_KHRONOS_validation"),
    ("VK_KHRONOS_VALIDATION_VALIDATE_CORE", "0"),
    ("VK_KHRONOS_VALIDATION_VALIDATE_SYNC", "1"),
    ("VK_KHRONOS_VALIDATION_GPUAV_ENABLE", "1"),
];

/// `cargo xtask validate`: `[--mesa DIR] [ROW...]`. Runs rows of the op table, all by default.
pub fn validate(args: &[String]) -> Outcome {
    let (folder, rows) = match args {
        [flag, folder, rows @ ..] if flag == "--mesa" => (Some(Path::new(folder)), rows),
        [flag, ..] if flag.starts_with('-') => return Err("validate: the only flag is --mesa DIR".into()),
        rows => (None, rows),
    };
    let mesa = Mesa::get(folder)?;
    run(&mut cargo(&["build", "--quiet", "--package", "validate"]))?;
    let program = root().join("target/debug/validate");
    let logs = root().join("target/validate");
    fs::create_dir_all(&logs).map_err(|e| format!("{}: {e}", logs.display()))?;
    let messages = |args: [&str; 2]| run_with_layer(&mesa, &program, &logs, args);
    for wrong in lines(Command::new(&program).arg("wrongs"))? {
        if messages(["wrong", &wrong])?.is_empty() {
            return Err(format!("the layer did not notice a kernel that is wrong: `{wrong}`"));
        }
    }
    let rows = if rows.is_empty() { lines(Command::new(&program).arg("list"))? } else { rows.to_vec() };
    let mut found = 0;
    for row in &rows {
        let start = Instant::now();
        let messages = messages(["row", row])?;
        println!("{row}: {} messages ({:.0} s)", messages.len(), start.elapsed().as_secs_f64());
        messages.iter().for_each(|message| println!("{message}"));
        found += messages.len();
    }
    if found == 0 { Ok(()) } else { Err(format!("the layer has {found} messages; see {}", logs.display())) }
}

/// What the layer says of a command of the program. It writes to stdout, as the program does.
fn run_with_layer(mesa: &Mesa, program: &Path, logs: &Path, args: [&str; 2]) -> Result<Vec<String>, String> {
    let mut command = mesa.command(None, OsStr::new(program))?;
    command.args(args).envs(SETTINGS);
    let output = command.output().map_err(|e| format!("{}: {e}", shown(&command)))?;
    let (said, log) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    let file = logs.join(format!("{}.log", args.join("-")));
    fs::write(&file, &*log).map_err(|e| format!("{}: {e}", file.display()))?;
    if !output.status.success() {
        return Err(format!(
            "`validate {}` failed ({}); see {}\n{said}",
            args.join(" "),
            output.status,
            file.display()
        ));
    }
    if !EXPECTED[..2].iter().all(|note| log.contains(note)) {
        return Err(format!("the layer does not say how it changed the device; see {}\n{said}", file.display()));
    }
    Ok(messages(&log))
}

/// Notes on what the layer had to change, on how the program opens its device, and on kernels that compile slowly.
const EXPECTED: [&str; 3] =
    ["WARNING-Setting-Limit-Adjusted", "VUID-VkDeviceCreateInfo-pNext-00373", "GPUAV-Compile-time"];

/// The errors and warnings of a log but for those, each with the program's line before it, which says what runs.
fn messages(log: &str) -> Vec<String> {
    let (mut found, mut case, mut within) = (vec![], "", false);
    for line in log.lines() {
        if line.starts_with("case: ") {
            (case, within) = (line, false);
        } else if line.starts_with("Validation ") {
            let serious = ["Validation Error", "Validation Warning"].iter().any(|kind| line.starts_with(kind));
            within = serious && !EXPECTED.iter().any(|note| line.contains(note));
            if within {
                found.push(format!("{case}\n{line}"));
            }
        } else if let Some(message) = found.last_mut().filter(|_| within && !line.is_empty()) {
            *message += "\n";
            *message += line;
        }
    }
    found
}

fn lines(command: &mut Command) -> Result<Vec<String>, String> {
    let output = command.output().map_err(|e| format!("{}: {e}", shown(command)))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).lines().map(String::from).collect()),
        false => Err(format!("`{}` failed ({})", shown(command), output.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_from_notes_on_settings() {
        let log = "Validation Warning: [ WARNING-Setting-Limit-Adjusted ] | MessageID = 0x1\nForcing a to VK_TRUE\n\n\n\
                   case: 1x2\n\
                   Validation Error: [ VUID-vkCmdDispatch-storageBuffers-06936 ] | MessageID = 0x2\nout of bounds\n\n\
                   case: 3x4\n\
                   Validation Warning: [ WARNING-something-else ]\nmore\n1 plans\n";
        let found = messages(log);
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("case: 1x2\nV") && found[0].ends_with("out of bounds"), "{found:?}");
        assert!(found[1].starts_with("case: 3x4\nV") && found[1].contains("more"), "{found:?}");
        assert!(messages("").is_empty());
    }
}
