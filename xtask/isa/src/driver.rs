//! Finds RADV, and runs this program again as a child with it: RADV provides one card per process.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::spirv::Shader;
use crate::vulkan::{Compiled, Device};

/// The argument that makes this program a child.
pub const CHILD: &str = "--compile-stdin";

/// Where Vulkan loaders look for drivers' descriptions.
const FOLDERS: &[&str] = &["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];

/// A child's answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Device and driver.
    pub device: String,
    /// For each shader what came, or what went wrong.
    pub compiled: Vec<Result<Compiled, String>>,
}

/// The description of the Radeon driver: of the one that `VK_DRIVER_FILES` names or that lies beside
/// it, else the system's.
pub fn find() -> Result<PathBuf> {
    let named = std::env::var_os("VK_DRIVER_FILES").or_else(|| std::env::var_os("VK_ICD_FILENAMES"));
    let mut places: Vec<PathBuf> =
        named.iter().flat_map(std::env::split_paths).filter(|p| p != Path::new("")).collect();
    if places.is_empty() {
        places.extend(FOLDERS.iter().map(PathBuf::from));
    }
    let beside = |place: &PathBuf| match is_radeon(place) {
        true => Some(place.clone()),
        false => in_folder(if place.is_dir() { place } else { place.parent()? }),
    };
    let Some(found) = places.iter().find_map(beside) else {
        let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        bail!(
            "cannot find Mesa's Radeon driver: expected a file radeon_icd*.json in or next to {}. \
             On Debian: apt-get install mesa-vulkan-drivers libvulkan1. No card is needed",
            places.join(", ")
        );
    };
    Ok(found)
}

fn in_folder(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = files.filter(|file| is_radeon(file)).collect();
    // 64 bits before 32, where both are installed: `radeon_icd.x86_64.json`, `radeon_icd.i686.json`.
    found.sort_by_key(|file| file.to_string_lossy().contains("i686"));
    found.into_iter().next()
}

fn is_radeon(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("radeon_icd") && name.ends_with(".json")
}

/// RADV's names of a family. Later versions name chips, earlier ones were less consistent.
fn names(family: &str) -> Vec<&str> {
    match family {
        "gfx1010" => vec!["navi10"],
        "gfx1030" => vec!["navi21"],
        "gfx1100" => vec!["navi31", "gfx1100"],
        "gfx1101" => vec!["navi32", "gfx1101"],
        "gfx1102" => vec!["navi33", "gfx1102"],
        other => vec![other],
    }
}

/// Compiles shaders for a card of this family.
pub fn compile(icd: &Path, family: &str, shaders: &[Shader]) -> Result<Answer> {
    let mut problems = vec![];
    for name in names(family) {
        match compile_as(icd, name, shaders) {
            Ok(answer) => return Ok(answer),
            Err(e) => problems.push(format!("as {name}: {e:#}")),
        }
    }
    bail!("compiling for {family} with {}: {}", icd.display(), problems.join("; "))
}

/// Compiles in a child process: the driver reads which card to play from the environment, and ends the
/// process where it knows no such card.
fn compile_as(icd: &Path, name: &str, shaders: &[Shader]) -> Result<Answer> {
    let mut child = Command::new(std::env::current_exe().context("the path of this program")?)
        .arg(CHILD)
        .env("VK_DRIVER_FILES", icd)
        .env("VK_ICD_FILENAMES", icd)
        .env("VK_LOADER_LAYERS_DISABLE", "*")
        .env("RADV_FORCE_FAMILY", name)
        .env("MESA_SHADER_CACHE_DISABLE", "true")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running this program again")?;
    // The child reads all of its input before it writes. If it ends early, its own message is more useful than the
    // broken pipe.
    let written = child.stdin.take().context("the child's input")?.write_all(&serde_json::to_vec(shaders)?);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{} ({})", String::from_utf8_lossy(&output.stderr).trim(), output.status);
    }
    written.context("writing to the child")?;
    serde_json::from_slice(&output.stdout).context("the child's answer")
}

/// The child's side.
pub fn child() -> Result<()> {
    let shaders: Vec<Shader> = serde_json::from_reader(std::io::stdin().lock()).context("shaders on stdin")?;
    let device = Device::open()?;
    let compiled = shaders.iter().map(|s| device.compile(s).map_err(|e| format!("{e:#}"))).collect();
    serde_json::to_writer(std::io::stdout().lock(), &Answer { device: device.name.clone(), compiled })?;
    Ok(())
}
