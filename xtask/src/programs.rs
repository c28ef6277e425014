//! The programs that test and measure an adapter: built here, or unpacked from a kit.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{cargo, root, shown};

/// All of them, by folder and file of their source. The tests are those of kernels, gradients, training and decoding:
/// what can go wrong on an adapter that is new to us.
pub const ALL: [&str; 18] = [
    "tests/ops",
    "tests/reference_models",
    "tests/training",
    "tests/fine_tuning",
    "tests/decoding",
    "tests/packed",
    "tests/sampling",
    "tests/recording",
    "tests/muon",
    "tests/residual_stream",
    "benches/train_step",
    "benches/decode_step",
    "examples/adapters",
    "examples/generate",
    "examples/plan",
    "examples/profile",
    "examples/roofline",
    "examples/train",
];

/// Where a kit has its programs.
pub const BIN: &str = "bin";
/// Where a kit has the Vulkan loader, for machines without one.
pub const LIB: &str = "lib";
/// The Vulkan loader.
pub const LOADER: &str = "libvulkan.so.1";

/// Where containers of managed clusters have NVIDIA's driver. The loader does not look there.
const MOUNTED_DRIVER: &str = "/usr/local/nvidia";
/// NVIDIA's description of its driver, in the folders that the loader looks into, and in the one above.
const DESCRIPTION: &str = "vulkan/icd.d/nvidia_icd.json";
/// Folders that the loader looks into.
const DESCRIPTIONS: [&str; 4] = ["/etc", "/usr/share", "/usr/local/etc", "/usr/local/share"];

/// Programs that are ready to run.
#[derive(Debug)]
pub struct Programs {
    /// Where they find their data, by its path in the repository.
    root: PathBuf,
    /// By folder and name.
    files: BTreeMap<String, PathBuf>,
    variables: Vec<(&'static str, OsString)>,
}

impl Programs {
    /// Builds these of [`ALL`], in release mode.
    pub fn build(names: &[&str]) -> Result<Self, String> {
        let mut build = cargo(&["build", "--release", "--message-format=json-render-diagnostics"]);
        for name in names {
            let (folder, name) = name.split_once('/').unwrap_or(("examples", name));
            let flag = match folder {
                "tests" => "--test",
                "benches" => "--bench",
                _ => "--example",
            };
            build.args([flag, name]);
        }
        let output = build.stderr(Stdio::inherit()).output().map_err(|e| format!("{}: {e}", shown(&build)))?;
        if !output.status.success() {
            return Err(format!("`{}` failed ({})", shown(&build), output.status));
        }
        let files = executables(&String::from_utf8_lossy(&output.stdout));
        match names.iter().find(|name| !files.contains_key(**name)) {
            Some(name) => Err(format!("cargo did not say where it built {name}")),
            None => Ok(Programs { root: root(), files, variables: vec![] }),
        }
    }

    /// Those of a kit that is unpacked to `folder`.
    pub fn unpacked(folder: &Path) -> Result<Self, String> {
        let in_folder = |path: &Path| {
            let entries = fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
            entries.map_err(|e| format!("{} is no unpacked kit: {}: {e}", folder.display(), path.display()))
        };
        let mut files = BTreeMap::new();
        for kind in in_folder(&folder.join(BIN))? {
            for file in in_folder(&kind.path())? {
                let path = file.path();
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                files.insert(format!("{}/{name}", kind.file_name().to_string_lossy()), path);
            }
        }
        let variables = if cfg!(target_os = "linux") { vulkan(folder) } else { vec![] };
        Ok(Programs { root: folder.into(), files, variables })
    }

    /// Name and file of each.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.files.iter().map(|(name, path)| (name.as_str(), path.as_path()))
    }

    /// Where they find their data, by its path in the repository.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A command that runs one.
    pub fn command(&self, name: &str) -> Result<Command, String> {
        let Some(file) = self.files.get(name) else {
            let names: Vec<&str> = self.files.keys().map(String::as_str).collect();
            return Err(format!("no program `{name}`; the programs are {}", names.join(", ")));
        };
        let mut command = Command::new(file);
        // Like cargo. Tests find their data by this variable, and examples from the folder that they start in.
        command.current_dir(&self.root).env("CARGO_MANIFEST_DIR", &self.root).envs(self.variables.iter().cloned());
        // Mesa warns if it has no folder for its sockets. Any folder will do.
        if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
            command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
        }
        Ok(command)
    }
}

/// Folder, name and path of what cargo built, of the lines of JSON that it prints.
fn executables(printed: &str) -> BTreeMap<String, PathBuf> {
    let messages = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built = messages.filter_map(|message| {
        let folder = match message["target"]["kind"][0].as_str()? {
            "test" => "tests",
            "bench" => "benches",
            "example" => "examples",
            "bin" => "bin",
            _ => return None,
        };
        let name = message["target"]["name"].as_str()?;
        Some((format!("{folder}/{name}"), PathBuf::from(message["executable"].as_str()?)))
    });
    built.collect()
}

/// What Vulkan needs on a machine that has a driver and lacks the rest.
fn vulkan(kit: &Path) -> Vec<(&'static str, OsString)> {
    let mut libraries = vec![];
    if system_loader().is_none() && kit.join(LIB).join(LOADER).exists() {
        libraries.push(kit.join(LIB));
    }
    let mut variables = vec![];
    let chosen = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().any(|name| std::env::var_os(name).is_some());
    if let Some(description) = mounted_driver(chosen, |path| path.exists()) {
        // Loaders before 1.3.207 know the older name only.
        variables.extend(["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].map(|name| (name, description.clone().into())));
        libraries.push(Path::new(MOUNTED_DRIVER).join("lib64"));
    }
    if !libraries.is_empty() {
        let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let before = std::env::split_paths(&before).filter(|path| !path.as_os_str().is_empty());
        // A path with a colon in it, which no variable can hold, leaves things as they are.
        if let Ok(paths) = std::env::join_paths(libraries.into_iter().chain(before)) {
            variables.push(("LD_LIBRARY_PATH", paths));
        }
    }
    variables
}

/// The description of a driver that is mounted where the loader does not look. None if the loader finds one by itself,
/// or if the user chose one.
fn mounted_driver(chosen: bool, exists: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mounted = Path::new(MOUNTED_DRIVER).join("share").join(DESCRIPTION);
    let known = DESCRIPTIONS.iter().any(|folder| exists(&Path::new(folder).join(DESCRIPTION)));
    (!chosen && !known && exists(&mounted)).then_some(mounted)
}

/// The system's Vulkan loader.
pub fn system_loader() -> Option<PathBuf> {
    let listings = ["ldconfig", "/sbin/ldconfig"].into_iter().filter_map(|program| {
        let output = Command::new(program).arg("-p").stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    });
    listings.into_iter().find_map(|listing| library(&listing, LOADER, std::env::consts::ARCH))
}

/// The file of a library for programs of this architecture, of what `ldconfig -p` lists.
fn library(listing: &str, name: &str, arch: &str) -> Option<PathBuf> {
    let tag = match arch {
        "x86_64" => "x86-64",
        "aarch64" => "AArch64",
        other => other,
    };
    let found = listing.lines().find_map(|line| {
        let (what, path) = line.split_once(" => ")?;
        let (library, kinds) = what.trim().split_once(' ')?;
        (library == name && kinds.contains(tag)).then_some(path)
    });
    found.map(|path| path.trim().into())
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Success,
    /// With the status in words.
    Failure(String),
    /// It ran longer than it may.
    Stopped(Duration),
}

/// Runs a command to its end, or until it has run for so long. It prints to these files.
pub fn run_for(command: &mut Command, limit: Option<Duration>, out: &Path, err: &Path) -> Result<End, String> {
    let file = |path: &Path| File::create(path).map_err(|e| format!("{}: {e}", path.display()));
    command.stdin(Stdio::null()).stdout(file(out)?).stderr(file(err)?);
    let begin = Instant::now();
    let child = command.spawn();
    let failed = |e: io::Error| format!("{}: {e}", command.get_program().display());
    let mut child = child.map_err(failed)?;
    loop {
        match (child.try_wait().map_err(failed)?, limit) {
            (Some(status), _) if status.success() => return Ok(End::Success),
            (Some(status), _) => return Ok(End::Failure(status.to_string())),
            (None, Some(limit)) if begin.elapsed() >= limit => {
                // It may end at this moment.
                let _ = child.kill();
                child.wait().map_err(failed)?;
                return Ok(End::Stopped(limit));
            }
            (None, _) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_what_cargo_prints() {
        let printed = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"throughline"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"ops"},"executable":"/t/deps/ops-1f"}
{"reason":"compiler-artifact","target":{"kind":["bench"],"name":"train_step"},"executable":"/t/deps/train_step-2e"}
{"reason":"compiler-artifact","target":{"kind":["example"],"name":"plan"},"executable":"/t/examples/plan"}
{"reason":"build-finished","success":true}
"#;
        let pairs = [
            ("benches/train_step", "/t/deps/train_step-2e"),
            ("examples/plan", "/t/examples/plan"),
            ("tests/ops", "/t/deps/ops-1f"),
        ];
        let want = pairs.map(|(name, path)| (name.to_string(), PathBuf::from(path)));
        assert_eq!(executables(printed), BTreeMap::from(want));
    }

    #[test]
    fn every_program_has_a_source() {
        for name in ALL {
            let (file, folder) = (root().join(format!("{name}.rs")), root().join(name).join("main.rs"));
            assert!(file.exists() || folder.exists(), "{name}");
        }
    }

    /// A kit runs where the folder of the build is not.
    #[test]
    fn tests_do_not_look_where_they_were_built() {
        for name in ALL.iter().filter(|name| name.starts_with("tests/")) {
            let text = fs::read_to_string(root().join(format!("{name}.rs"))).unwrap();
            assert!(!text.contains("env!(\"CARGO_MANIFEST_DIR\")"), "{name}: use common::repository");
        }
    }

    #[test]
    fn the_loader_must_be_of_the_same_architecture() {
        let listing = "2 libs found in cache `/etc/ld.so.cache'\n\
                       \tlibvulkan.so.1 (libc6) => /lib/i386-linux-gnu/libvulkan.so.1\n\
                       \tlibvulkan.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libvulkan.so.1\n\
                       \tlibz.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libz.so.1\n";
        let x86 = Some("/lib/x86_64-linux-gnu/libvulkan.so.1".into());
        assert_eq!(library(listing, LOADER, "x86_64"), x86);
        assert_eq!(library(listing, LOADER, "aarch64"), None);
        assert_eq!(library("", LOADER, "x86_64"), None);
    }

    #[test]
    fn a_mounted_driver_is_named_only_if_nothing_else_is() {
        let mounted = Path::new("/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json");
        assert_eq!(mounted_driver(false, |path| path == mounted), Some(mounted.into()));
        assert_eq!(mounted_driver(true, |path| path == mounted), None);
        assert_eq!(mounted_driver(false, |_| true), None);
        assert_eq!(mounted_driver(false, |_| false), None);
    }

    #[test]
    fn unknown_programs_are_refused_with_the_known_ones() {
        let files = BTreeMap::from([("examples/plan".to_string(), PathBuf::from("/t/plan"))]);
        let programs = Programs { root: PathBuf::from("/kit"), files, variables: vec![] };
        let message = programs.command("plan").unwrap_err();
        assert!(message.contains("`plan`") && message.contains("examples/plan"), "{message}");
        let command = programs.command("examples/plan").unwrap();
        assert_eq!(command.get_current_dir(), Some(Path::new("/kit")));
    }

    #[cfg(unix)]
    #[test]
    fn programs_are_stopped_at_their_limit() {
        let folder = std::env::temp_dir().join(format!("throughline-programs-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let run = |script: &str, limit: u64| {
            let limit = Some(Duration::from_millis(limit));
            let end = run_for(Command::new("sh").args(["-c", script]), limit, &folder.join("out"), &folder.join("err"));
            (end.unwrap(), fs::read_to_string(folder.join("out")).unwrap())
        };
        assert_eq!(run("echo all", 60_000), (End::Success, "all\n".into()));
        assert_eq!(run("exit 3", 60_000), (End::Failure("exit status: 3".into()), String::new()));
        let (end, out) = run("echo part; exec sleep 60", 500);
        assert_eq!((end, out.as_str()), (End::Stopped(Duration::from_millis(500)), "part\n"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
