//! Installs lavapipe, Mesa's Vulkan driver for the CPU, with the package manager of the system.

use std::io::IsTerminal;
use std::process::{Command, Stdio};

use crate::{Outcome, run, shown};

/// A package manager: the program to look for and the commands that install driver and loader.
struct Manager {
    program: &'static str,
    commands: &'static [&'static [&'static str]],
}

const MANAGERS: &[Manager] = &[
    Manager {
        program: "apt-get",
        commands: &[
            &["apt-get", "update"],
            &["apt-get", "install", "--yes", "--no-install-recommends", "mesa-vulkan-drivers", "libvulkan1"],
        ],
    },
    Manager { program: "dnf", commands: &[&["dnf", "install", "--assumeyes", "mesa-vulkan-drivers", "vulkan-loader"]] },
    Manager {
        program: "pacman",
        commands: &[&["pacman", "-Sy", "--noconfirm", "--needed", "vulkan-swrast", "vulkan-icd-loader"]],
    },
    Manager {
        program: "zypper",
        commands: &[&["zypper", "--non-interactive", "install", "libvulkan_lvp", "libvulkan1"]],
    },
    Manager { program: "apk", commands: &[&["apk", "add", "mesa-vulkan-swrast", "vulkan-loader"]] },
];

/// How to run commands as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    /// We are root already.
    Already,
    /// With sudo, which may ask for a password if there is a terminal.
    Sudo { may_ask: bool },
    /// There is no way.
    No,
}

/// Installs the driver, printing each command first. Without root, the error has the commands to type.
pub fn software_driver() -> Outcome {
    let manager = MANAGERS.iter().find(|m| found(m.program));
    let root = how_to_be_root();
    for words in plan(manager, root)? {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("DEBIAN_FRONTEND", "noninteractive");
        println!("+ {}", shown(&command));
        run(&mut command)?;
    }
    Ok(())
}

/// The commands to run, or a message for the person who must run them.
fn plan(manager: Option<&Manager>, root: Root) -> Result<Vec<Vec<String>>, String> {
    let Some(manager) = manager else {
        let names: Vec<&str> = MANAGERS.iter().map(|m| m.program).collect();
        return Err(format!(
            "found none of {}; install a Vulkan driver (Mesa's lavapipe will do) and the Vulkan loader manually",
            names.join(", ")
        ));
    };
    let prefix: &[&str] = match root {
        Root::Already => &[],
        Root::Sudo { may_ask: true } => &["sudo"],
        Root::Sudo { may_ask: false } => &["sudo", "-n"],
        Root::No => {
            let lines: Vec<String> = manager.commands.iter().map(|c| c.join(" ")).collect();
            return Err(format!("installing the driver needs root; run as root:\n  {}", lines.join(" && ")));
        }
    };
    let with_prefix = |c: &&[&str]| prefix.iter().chain(c.iter()).map(|w| w.to_string()).collect();
    Ok(manager.commands.iter().map(with_prefix).collect())
}

fn how_to_be_root() -> Root {
    let quiet = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output();
        output.ok().filter(|o| o.status.success()).map(|o| o.stdout)
    };
    if quiet("id", &["-u"]).is_some_and(|id| id.trim_ascii() == b"0") {
        return Root::Already;
    }
    if quiet("sudo", &["-n", "true"]).is_some() {
        return Root::Sudo { may_ask: false };
    }
    match found("sudo") && std::io::stdin().is_terminal() {
        true => Root::Sudo { may_ask: true },
        false => Root::No,
    }
}

fn found(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(program: &str) -> Option<&'static Manager> {
        MANAGERS.iter().find(|m| m.program == program)
    }

    #[test]
    fn root_runs_the_commands_unchanged() {
        let commands = plan(manager("apt-get"), Root::Already).unwrap();
        assert_eq!(commands[0], ["apt-get", "update"]);
        assert_eq!(commands[1][0], "apt-get");
        assert!(commands[1].contains(&"mesa-vulkan-drivers".to_string()));
    }

    #[test]
    fn sudo_asks_only_if_somebody_can_answer() {
        let commands = plan(manager("dnf"), Root::Sudo { may_ask: false }).unwrap();
        assert_eq!(commands[0][..3], ["sudo", "-n", "dnf"]);
        let commands = plan(manager("dnf"), Root::Sudo { may_ask: true }).unwrap();
        assert_eq!(commands[0][..2], ["sudo", "dnf"]);
    }

    #[test]
    fn without_root_the_message_is_the_exact_command() {
        let message = plan(manager("apt-get"), Root::No).unwrap_err();
        assert!(message.contains("apt-get update && apt-get install"), "{message}");
        assert!(message.ends_with("mesa-vulkan-drivers libvulkan1"), "{message}");
    }

    #[test]
    fn the_error_on_an_unknown_system_says_what_it_needs() {
        let message = plan(None, Root::Already).unwrap_err();
        assert!(message.contains("lavapipe") && message.contains("apt-get"), "{message}");
    }

    #[test]
    fn every_manager_installs_a_driver_and_a_loader() {
        for m in MANAGERS {
            let last = m.commands[m.commands.len() - 1];
            assert_eq!(last[0], m.program);
            assert!(last.len() >= 4, "{}", m.program);
        }
    }
}
