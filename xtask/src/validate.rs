//! Looks for accesses out of range and for races in kernels, with the Khronos validation layer in the newest Mesa.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
        let messages = messages(["row", row])?;
        println!("{row}: {} messages", messages.len());
        messages.iter().for_each(|message| println!("{message}"));
        found += messages.len();
    }
    if found == 0 { Ok(()) } else { Err(format!("the layer has {found} messages; see {}", logs.display())) }
}

/// What the layer says of a command of the program.
fn run_with_layer(mesa: &Mesa, program: &Path, logs: &Path, args: [&str; 2]) -> Result<Vec<String>, String> {
    let log: PathBuf = logs.join(format!("{}.log", args.join("-")));
    // The layer writes one if it has messages. Warnings of what it cannot check are among them.
    let _ = fs::remove_file(&log);
    let mut command = mesa.command(None, OsStr::new(program))?;
    command.args(args).envs(SETTINGS).env("VK_KHRONOS_VALIDATION_LOG_FILENAME", &log);
    let output = command.output().map_err(|e| format!("{}: {e}", shown(&command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`validate {}` failed ({})\n{said}", args.join(" "), output.status));
    }
    let text = fs::read_to_string(&log).map_err(|e| format!("the layer wrote no log: {}: {e}", log.display()))?;
    Ok(messages(&text))
}

/// Notes on what the layer had to change, and on how the program opens its device.
const EXPECTED: [&str; 2] = ["WARNING-Setting-Limit-Adjusted", "VUID-VkDeviceCreateInfo-pNext-00373"];

/// The errors and warnings of a log, but for those.
fn messages(log: &str) -> Vec<String> {
    let parts = log.split("Validation ").skip(1);
    let serious = parts.filter(|part| part.starts_with("Error") || part.starts_with("Warning"));
    let ours = serious.filter(|part| !EXPECTED.iter().any(|note| part.contains(note)));
    ours.map(|part| part.trim_end().to_string()).collect()
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
                   Validation Error: [ VUID-vkCmdDispatch-storageBuffers-06936 ] | MessageID = 0x2\nout of bounds\n\n\
                   Validation Warning: [ WARNING-something-else ]\nmore\n";
        let found = messages(log);
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("06936") && found[0].ends_with("out of bounds"));
        assert!(messages("").is_empty());
    }
}
