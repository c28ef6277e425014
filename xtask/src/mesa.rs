//! The newest Mesa, unpacked under target/ and not installed: its lavapipe, and its compilers for cards that are not
//! there.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, cargo, root, run, shown};

/// A card that a driver of Mesa can be made to see. Shaders compile; dispatches do nothing, so all that is read back
/// is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// What `--card` calls it.
    pub name: &'static str,
    /// What people call it, and the driver.
    pub about: &'static str,
    /// The driver's description, without `_icd.json`.
    icd: &'static str,
    /// The library that answers in the kernel's place, without `lib` and `_noop_drm_shim.so`.
    shim: &'static str,
    /// The variable by which that library learns which card to be, and the value.
    variable: Option<(&'static str, &'static str)>,
}

const fn nvidia(name: &'static str, about: &'static str, chipset: &'static str) -> Card {
    Card { name, about, icd: "nouveau", shim: "nouveau", variable: Some(("NOUVEAU_CHIPSET", chipset)) }
}

const fn amd(name: &'static str, about: &'static str, chip: &'static str) -> Card {
    Card { name, about, icd: "radeon", shim: "amdgpu", variable: Some(("AMDGPU_GPU_ID", chip)) }
}

/// The cards.
pub const CARDS: [Card; 9] = [
    nvidia("turing", "NVIDIA GeForce 20, NVK", "164"),
    nvidia("ampere", "NVIDIA GeForce 30, NVK", "174"),
    nvidia("ada", "NVIDIA GeForce 40, NVK", "194"),
    nvidia("blackwell", "NVIDIA GeForce 50, NVK", "1b2"),
    amd("rdna2", "AMD Radeon 6000, RADV", "navi21"),
    amd("rdna3", "AMD Radeon 7000, RADV", "navi31"),
    amd("rdna4", "AMD Radeon 9000, RADV", "gfx1201"),
    Card { name: "m1", about: "Apple M1, Honeykrisp", icd: "asahi", shim: "asahi", variable: None },
    Card {
        name: "adreno",
        about: "Qualcomm Adreno 740, Turnip",
        icd: "freedreno",
        shim: "freedreno",
        variable: Some(("FD_GPU_ID", "740")),
    },
];

impl Card {
    /// The card of this name.
    pub fn named(name: &str) -> Result<&'static Card, String> {
        CARDS.iter().find(|card| card.name == name).ok_or_else(|| {
            let names: Vec<&str> = CARDS.iter().map(|card| card.name).collect();
            format!("no card `{name}`; the cards are {}", names.join(", "))
        })
    }
}

/// The driver for the CPU.
const LAVAPIPE: &str = "lvp";

/// Where the packages put libraries, from the folder they are unpacked to.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Where they put descriptions of layers.
const LAYERS: &str = "usr/share/vulkan/explicit_layer.d";

/// The suite that has the newest Mesa.
const SUITE: &str = "sid";

const PACKAGES: [&str; 4] = ["mesa-vulkan-drivers", "mesa-drm-shim", "libvulkan1", "vulkan-validationlayers"];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked Mesa.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesa {
    folder: PathBuf,
}

impl Mesa {
    /// Where it is unpacked to.
    pub fn place() -> PathBuf {
        root().join("target/mesa")
    }

    /// The one in `folder`, or the one in [`Mesa::place`], which is downloaded first if it isn't there.
    pub fn get(folder: Option<&Path>) -> Result<Mesa, String> {
        if folder.is_none() && !Mesa::place().exists() {
            unpack(&Mesa::place()).map_err(|e| {
                format!(
                    "{e}\nAlternatively, name a folder that a Debian system unpacked Mesa to: --mesa DIR. With Docker, this \
                     unpacks it to where it is looked for:\n  docker run --rm --volume {}:/repository --workdir /repository \
                     --env CARGO_TARGET_DIR=/tmp/target rust:bookworm cargo xtask mesa true",
                    root().display()
                )
            })?;
        }
        Mesa::at(folder.unwrap_or(&Mesa::place()))
    }

    /// The one in `folder`.
    pub fn at(folder: &Path) -> Result<Mesa, String> {
        let mesa = Mesa { folder: folder.canonicalize().unwrap_or_else(|_| folder.into()) };
        for needed in [mesa.loader(), mesa.driver(LAVAPIPE)] {
            if !needed.exists() {
                let needed = needed.strip_prefix(&mesa.folder).unwrap_or(&needed).display();
                let place = Mesa::place();
                return Err(format!(
                    "{} is no unpacked Mesa: it has no {needed}. Without --mesa, and if there is no {}, Mesa is unpacked \
                     there",
                    folder.display(),
                    place.display()
                ));
            }
        }
        Ok(mesa)
    }

    fn libraries(&self) -> PathBuf {
        self.folder.join(LIBRARIES)
    }

    /// The suite's own loader of programs: its libraries need its libc, which may be newer than the system's.
    fn loader(&self) -> PathBuf {
        self.libraries().join("ld-linux-x86-64.so.2")
    }

    fn driver(&self, icd: &str) -> PathBuf {
        self.folder.join(format!("{icd}_icd.json"))
    }

    /// The words to put before a program.
    fn prefix(&self, card: Option<&Card>) -> Vec<OsString> {
        let mut words = vec![self.loader().into(), "--library-path".into(), self.libraries().into()];
        if let Some(card) = card {
            let shim = self.libraries().join(format!("lib{}_noop_drm_shim.so", card.shim));
            words.extend(["--preload".into(), shim.into()]);
        }
        words
    }

    /// Whether programs of this machine run under it.
    pub fn runs_here() -> bool {
        cfg!(all(target_os = "linux", target_arch = "x86_64"))
    }

    /// A cargo command, run from the root, whose programs run under this Mesa, on the CPU.
    pub fn cargo(&self, args: &[&str]) -> Result<Command, String> {
        self.around(cargo(args), None)
    }

    /// A program under this Mesa: on the CPU, or on a card that isn't there. `program` is a path, or a name to look
    /// for in `PATH`. Cargo itself stays outside, and what it runs is inside.
    pub fn command(&self, card: Option<&Card>, program: &OsStr) -> Result<Command, String> {
        let program = which(program)?;
        if program.file_stem() == Some(OsStr::new("cargo")) {
            return self.around(Command::new(program), card);
        }
        let prefix = self.prefix(card);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        self.describe_to(&mut command, card);
        Ok(command)
    }

    /// Cargo, so that what it runs is inside.
    fn around(&self, mut cargo: Command, card: Option<&Card>) -> Result<Command, String> {
        cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner(&self.prefix(card))?);
        self.describe_to(&mut cargo, card);
        Ok(cargo)
    }

    /// Tells the Vulkan loader where the driver is, and the driver which card to be.
    fn describe_to(&self, command: &mut Command, card: Option<&Card>) {
        command
            .env("VK_DRIVER_FILES", self.driver(card.map_or(LAVAPIPE, |card| card.icd)))
            .env("VK_LAYER_PATH", self.folder.join(LAYERS))
            // The system's own are made for its own libc.
            .env("VK_LOADER_LAYERS_DISABLE", "~implicit~");
        if let Some((name, value)) = card.and_then(|card| card.variable) {
            command.env(name, value);
        }
    }
}

/// Cargo splits this at spaces.
fn runner(prefix: &[OsString]) -> Result<OsString, String> {
    let spaced = prefix.iter().find(|word| word.to_string_lossy().contains(char::is_whitespace));
    match spaced {
        Some(word) => Err(format!("{}: cargo cannot run programs by way of a path with spaces", word.display())),
        None => Ok(prefix.join(OsStr::new(" "))),
    }
}

/// The loader takes paths only.
fn which(program: &OsStr) -> Result<PathBuf, String> {
    let given = Path::new(program);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = match given.components().count() {
        1 => std::env::split_paths(&path).map(|folder| folder.join(given)).find(|file| file.is_file()),
        _ => Some(given.to_path_buf()).filter(|file| file.is_file()),
    };
    found.ok_or_else(|| format!("no program `{}`", given.display()))
}

/// `cargo xtask mesa`: `[--card CARD] [--mesa DIR] [--] PROGRAM ARGS`.
pub fn mesa(args: &[String]) -> Outcome {
    let (mut card, mut folder) = (None, None);
    let mut args = args.iter();
    let program = loop {
        let word = args.next().ok_or("mesa needs a program to run; `cargo xtask help` shows how")?;
        let mut value = |flag: &str| args.next().ok_or_else(|| format!("{flag} needs a value"));
        match word.as_str() {
            "--card" => card = Some(Card::named(value("--card")?)?),
            "--mesa" => folder = Some(PathBuf::from(value("--mesa")?)),
            "--" => {}
            flag if flag.starts_with('-') => return Err(format!("mesa has no flag `{flag}`, only --card and --mesa")),
            program => break program.to_string(),
        }
    };
    let mesa = Mesa::get(folder.as_deref())?;
    run(mesa.command(card, program.as_ref())?.args(args))
}

/// Downloads the packages and unpacks them to `place`, with apt's own lists and caches in a folder beside it.
fn unpack(place: &Path) -> Outcome {
    let (system, sources) = (read("/etc/os-release"), apt_sources());
    let mirror = mirror(&system, &sources)?;
    if !cfg!(target_arch = "x86_64") {
        return Err(format!("unpacking Mesa needs an x86_64, but this is {}", std::env::consts::ARCH));
    }
    for program in ["apt-get", "dpkg-deb"] {
        which(program.as_ref()).map_err(|e| format!("unpacking Mesa needs apt-get and dpkg-deb: {e}"))?;
    }
    if !Path::new(KEYRING).exists() {
        return Err(format!("unpacking Mesa needs {KEYRING} (package debian-archive-keyring)"));
    }
    eprintln!("Unpacking Mesa to {}. Nothing is installed.", place.display());
    let work = place.with_extension("new");
    remove(&work)?;
    let (apt, unpacked) = (work.join("apt"), work.join("unpacked"));
    for folder in ["lists/partial", "debs/partial"].map(|f| apt.join(f)).iter().chain([&unpacked]) {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    write(&apt.join("sources.list"), &format!("deb [signed-by={KEYRING}] {mirror} {SUITE} main\n"))?;
    for words in [&["update"][..], &[&["--yes", "--download-only", "install"], &PACKAGES[..]].concat()] {
        let mut command = apt_get(&apt);
        // The output of what needs this Mesa goes to stdout.
        command.args(words).stdout(std::io::stderr());
        eprintln!("+ {}", shown(&command));
        run(&mut command)?;
    }
    for package in files(&apt.join("debs"), "deb")? {
        run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&unpacked))?;
    }
    describe(&unpacked)?;
    match fs::rename(&unpacked, place) {
        // Somebody else was faster.
        Err(_) if place.exists() => {}
        result => result.map_err(|e| format!("{}: {e}", place.display()))?,
    }
    remove(&work)
}

/// Debian's mirror in the system's apt sources.
fn mirror<'a>(system: &str, sources: &'a str) -> Result<&'a str, String> {
    let value = |key: &str| system.lines().find_map(|line| line.strip_prefix(key)).map(|v| v.trim_matches('"'));
    if value("ID=") != Some("debian") {
        let name = value("PRETTY_NAME=").unwrap_or(std::env::consts::OS);
        return Err(format!("unpacking Mesa needs packages of Debian, but this is {name}"));
    }
    // `deb [options] URI suite component` or `URIs: URI`; the security archive lacks the suite.
    let lines = sources.lines().filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"));
    let mut uris = lines.filter_map(|line| line.split_whitespace().find(|word| word.contains("://")));
    uris.find(|uri| !uri.contains("security")).ok_or_else(|| {
        "unpacking Mesa needs a mirror of Debian, but /etc/apt/sources.list and /etc/apt/sources.list.d name none"
            .into()
    })
}

/// The texts of all files with sources, Debian's first.
fn apt_sources() -> String {
    let mut texts = vec![read("/etc/apt/sources.list.d/debian.sources"), read("/etc/apt/sources.list")];
    for extension in ["sources", "list"] {
        let others = files(Path::new("/etc/apt/sources.list.d"), extension).unwrap_or_default();
        texts.extend(others.iter().map(read));
    }
    texts.join("\n")
}

/// apt with everything in one folder, as if nothing were installed.
fn apt_get(folder: &Path) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet");
    let folder = |name: &str| folder.join(name).display().to_string();
    for option in [
        format!("Dir::Etc::sourcelist={}", folder("sources.list")),
        "Dir::Etc::sourceparts=-".into(),
        format!("Dir::State::lists={}", folder("lists")),
        "Dir::State::status=/dev/null".into(),
        format!("Dir::Cache::archives={}", folder("debs")),
        "Dir::Cache::pkgcache=".into(),
        "Dir::Cache::srcpkgcache=".into(),
        "Debug::NoLocking=1".into(),
        // Its own user could not write here.
        "APT::Sandbox::User=root".into(),
        "APT::Install-Recommends=false".into(),
    ] {
        command.args(["-o", &option]);
    }
    command
}

/// Copies descriptions of drivers, and changes those of layers, so that their libraries are found from where the
/// descriptions are: the loader takes a path with a slash as relative to them.
fn describe(folder: &Path) -> Outcome {
    let drivers = folder.join("usr/share/vulkan/icd.d");
    for file in files(&drivers, "json")? {
        // `radeon_icd.json`, or in other versions `radeon_icd.x86_64.json`.
        let name = file.file_name().unwrap_or_default().to_string_lossy().replace(".x86_64", "");
        write(&folder.join(name), &library_in(&read(&file), LIBRARIES))?;
    }
    for file in files(&folder.join(LAYERS), "json")? {
        write(&file, &library_in(&read(&file), "../../../lib/x86_64-linux-gnu"))?;
    }
    Ok(())
}

/// A description with its `library_path` in that folder.
fn library_in(description: &str, folder: &str) -> String {
    let line = |line: &str| {
        let (key, path) = line.split_once("\"library_path\"")?;
        let path = path.split('"').nth(1)?;
        let file = path.rsplit('/').next()?;
        let end = if line.trim_end().ends_with(',') { "," } else { "" };
        Some(format!("{key}\"library_path\": \"{folder}/{file}\"{end}"))
    };
    description.lines().map(|l| line(l).unwrap_or_else(|| l.into()) + "\n").collect()
}

/// The files of a folder with this extension, in order.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension() == Some(OsStr::new(extension))).collect();
    files.sort();
    Ok(files)
}

/// The text of a file; none if there is no such file.
fn read(file: impl AsRef<Path>) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

fn write(file: &Path, text: &str) -> Outcome {
    fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

fn remove(folder: &Path) -> Outcome {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(format!("{}: {e}", folder.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n";

    #[test]
    fn the_mirror_is_that_of_the_system() {
        let sources = "Types: deb\n# URIs: no://comment\nURIs: http://mirror.example/debian\nSuites: bookworm\n";
        assert_eq!(mirror(DEBIAN, sources).unwrap(), "http://mirror.example/debian");
        let sources = "deb http://security.example/debian-security bookworm-security main\n\
                       deb [arch=amd64 signed-by=/a.gpg] https://mirror.example/debian bookworm main\n";
        assert_eq!(mirror(DEBIAN, sources).unwrap(), "https://mirror.example/debian");
    }

    #[test]
    fn the_error_says_what_is_missing() {
        let message = mirror("NAME=x\nPRETTY_NAME=\"Fedora Linux 43\"\nID=fedora\n", "").unwrap_err();
        assert!(message.contains("Debian") && message.contains("Fedora Linux 43"), "{message}");
        let message = mirror(DEBIAN, "# nothing\n").unwrap_err();
        assert!(message.contains("mirror") && message.contains("sources.list"), "{message}");
    }

    #[test]
    fn libraries_are_found_from_their_descriptions() {
        let text = "{\n  \"ICD\": {\n    \"library_path\": \"/usr/lib/x86_64-linux-gnu/libvulkan_lvp.so\",\n    \"a\": 1\n  }\n}\n";
        let expected = "{\n  \"ICD\": {\n    \"library_path\": \"usr/lib/libvulkan_lvp.so\",\n    \"a\": 1\n  }\n}\n";
        assert_eq!(library_in(text, "usr/lib"), expected);
    }

    #[test]
    fn a_wrong_card_or_flag_is_an_error_that_says_what_there_is() {
        for (args, expected) in [
            (&["--card", "voodoo", "a"][..], "turing, ampere, ada"),
            (&["--card"], "needs a value"),
            (&["--crad", "m1"], "`--crad`"),
            (&["--"], "a program"),
        ] {
            let message = mesa(&args.iter().map(|a| a.to_string()).collect::<Vec<_>>()).unwrap_err();
            assert!(message.contains(expected), "{args:?}: {message}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_program_runs_by_way_of_the_unpacked_loader() {
        let mesa = Mesa { folder: "/m".into() };
        let words = |command: Command| shown(&command);
        let program = std::env::current_exe().unwrap();
        let expected = "/m/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /m/usr/lib/x86_64-linux-gnu \
                        --preload /m/usr/lib/x86_64-linux-gnu/libnouveau_noop_drm_shim.so";
        let card = Card::named("ada").unwrap();
        let command = mesa.command(Some(card), program.as_os_str()).unwrap();
        assert!(command.get_envs().any(|(name, value)| name == "NOUVEAU_CHIPSET" && value == Some("194".as_ref())));
        assert_eq!(words(command), format!("{expected} {}", program.display()));
        assert_eq!(runner(&mesa.prefix(Some(card))).unwrap(), expected);
        assert!(runner(&["/a b/ld.so".into()]).unwrap_err().contains("spaces"));
    }
}
