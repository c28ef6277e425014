//! Runs this program again as a child for each card: a driver shows one card per process.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use xtask::mesa::{CARDS, Card, Mesa};

use crate::spirv::Shader;
use crate::vulkan::{Compiled, Device};

/// The argument that makes this program a child.
pub const CHILD: &str = "--compile-stdin";

/// A child's answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Device and driver.
    pub device: String,
    /// For each shader what came, or what went wrong.
    pub compiled: Vec<Result<Compiled, String>>,
}

/// Whose drivers compile.
pub enum Driver {
    /// Those of an unpacked Mesa, for all cards.
    Unpacked(Mesa),
    /// The system's driver for AMD cards, which can compile without help for cards that are not there.
    System(PathBuf),
}

impl Driver {
    /// The system's, where that is asked for, or an unpacked one.
    pub fn find(system: bool, folder: Option<&Path>) -> Result<Driver> {
        match system {
            true => Ok(Driver::System(system_radv()?)),
            false => Ok(Driver::Unpacked(Mesa::get(folder).map_err(|e| anyhow!(e))?)),
        }
    }

    /// The cards that it compiles for, if no others are asked for: of AMD's, those that older versions know.
    pub fn cards(&self) -> Vec<&'static Card> {
        let known = |card: &&Card| matches!(self, Driver::Unpacked(_)) || ["rdna2", "rdna3"].contains(&card.name);
        CARDS.iter().filter(known).collect()
    }

    /// Compiles shaders for a card, in a child process: the driver reads which card to play from the environment, and
    /// may end the process where it knows no such card.
    pub fn compile(&self, card: &Card, shaders: &[Shader]) -> Result<Answer> {
        let mut problems = vec![];
        for mut command in self.commands(card)? {
            match answer(&mut command, shaders) {
                Ok(answer) => return Ok(answer),
                Err(e) => problems.push(format!("{e:#}")),
            }
        }
        bail!("compiling for {}: {}", card.name, problems.join("; "))
    }

    /// The ways to start a child. Later versions of RADV name chips, earlier ones were less consistent.
    fn commands(&self, card: &Card) -> Result<Vec<Command>> {
        let program = std::env::current_exe().context("the path of this program")?;
        let mut commands = match self {
            Driver::Unpacked(mesa) => {
                vec![mesa.command(Some(card), program.as_os_str()).map_err(|e| anyhow!(e))?]
            }
            Driver::System(icd) => {
                let names: &[&str] = match card.name {
                    "rdna2" => &["navi21"],
                    "rdna3" => &["navi31", "gfx1100"],
                    "rdna4" => &["gfx1201"],
                    other => bail!("--system knows rdna2, rdna3 and rdna4; it cannot compile for {other}"),
                };
                let command = |name: &&str| {
                    let mut command = Command::new(&program);
                    command.env("VK_DRIVER_FILES", icd).env("VK_ICD_FILENAMES", icd).env("RADV_FORCE_FAMILY", name);
                    command.env("VK_LOADER_LAYERS_DISABLE", "*");
                    command
                };
                names.iter().map(command).collect()
            }
        };
        for command in &mut commands {
            command.arg(CHILD).env("MESA_SHADER_CACHE_DISABLE", "true");
        }
        Ok(commands)
    }
}

fn answer(child: &mut Command, shaders: &[Shader]) -> Result<Answer> {
    let child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().context("running this program again")?;
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

/// Where Vulkan loaders look for drivers' descriptions.
const FOLDERS: &[&str] = &["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];

/// The description of the system's Radeon driver: of the one that `VK_DRIVER_FILES` names or that lies beside it, else
/// the installed one.
fn system_radv() -> Result<PathBuf> {
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
