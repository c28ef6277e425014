//! Runs the programs of an unpacked kit: what `cargo xtask report` does, on a machine without a toolchain.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use xtask::MANIFEST;
use xtask::programs::Programs;
use xtask::report::{PARTS, Part, Session, problems};

const HELP: &str = "\
Usage: kit [FLAGS] <command>

  correct           Test kernels, gradients, training and decoding on this machine's adapter
  fast              Measure training, decoding and each kernel
  all               Both
  run NAME [ARGS]   Run one program, such as examples/adapters, from the folder of the kit
  list              List the programs

`correct` and `fast` each add their parts to out/report.json and out/report.md, and end with what is wrong, if
anything is. What the programs print is beside the report. Flags:

  --out DIR         Write to DIR instead
  --limit SECONDS   Stop a program that runs longer [600]
  --quick           Measure few ops, briefly";

/// What `correct` runs.
const CORRECT: [&str; 2] = ["adapter", "tests"];

fn main() -> ExitCode {
    let outcome = Options::parse(std::env::args().skip(1).collect()).and_then(|options| kit(&options));
    outcome.unwrap_or_else(|message| {
        eprintln!("kit: {message}");
        ExitCode::FAILURE
    })
}

fn kit(options: &Options) -> Result<ExitCode, String> {
    let this = std::env::current_exe().map_err(|e| format!("this program: {e}"))?;
    let folder = this.parent().unwrap_or(Path::new("."));
    let keys: Vec<&Part> = match &options.command {
        Command::Help => {
            println!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        Command::List => {
            Programs::unpacked(folder)?.files().for_each(|(name, _)| println!("{name}"));
            return Ok(ExitCode::SUCCESS);
        }
        Command::Run(name, args) => {
            let mut command = Programs::unpacked(folder)?.command(name)?;
            let status = command.args(args).status().map_err(|e| format!("{name}: {e}"))?;
            return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Parts(parts) => parts.clone(),
    };
    let session = Session {
        programs: &Programs::unpacked(folder)?,
        revision: revision(folder)?,
        folder: std::path::absolute(options.out.clone().unwrap_or_else(|| folder.join("out")))
            .map_err(|e| format!("--out: {e}"))?,
        limit: Some(options.limit),
        quick: options.quick,
    };
    let report = session.report(&keys, &session.before())?;
    let problems = problems(&report);
    problems.iter().for_each(|problem| println!("{problem}"));
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The revision that the kit was built from.
fn revision(folder: &Path) -> Result<Option<String>, String> {
    let file = folder.join(MANIFEST);
    let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let facts: Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(facts["revision"].as_str().map(String::from))
}

enum Command {
    Help,
    List,
    Run(String, Vec<String>),
    Parts(Vec<&'static Part>),
}

struct Options {
    command: Command,
    out: Option<PathBuf>,
    limit: Duration,
    quick: bool,
}

impl Options {
    fn parse(args: Vec<String>) -> Result<Self, String> {
        let mut options = Options { command: Command::Help, out: None, limit: Duration::from_secs(600), quick: false };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = |what: &str| args.next().ok_or_else(|| format!("{arg} needs {what}"));
            let parts = |chosen: fn(&Part) -> bool| Command::Parts(PARTS.iter().filter(|part| chosen(part)).collect());
            options.command = match arg.as_str() {
                "--quick" => {
                    options.quick = true;
                    continue;
                }
                "--out" => {
                    options.out = Some(value("a folder")?.into());
                    continue;
                }
                "--limit" => {
                    let seconds = value("a number of seconds")?;
                    let limit = seconds.parse().map_err(|_| format!("--limit needs whole seconds, got `{seconds}`"))?;
                    options.limit = Duration::from_secs(limit);
                    continue;
                }
                "help" | "-h" | "--help" => Command::Help,
                "list" => Command::List,
                "correct" => parts(|part| CORRECT.contains(&part.key)),
                // The facts are in every report.
                "fast" => parts(|part| part.key == "adapter" || !CORRECT.contains(&part.key)),
                "all" => parts(|_| true),
                "run" => {
                    let name = value("the name of a program; `list` prints them")?;
                    Command::Run(name, args.collect())
                }
                other => return Err(format!("no command `{other}`; `help` prints them")),
            };
            break;
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Options, String> {
        Options::parse(args.split_whitespace().map(String::from).collect())
    }

    fn keys(args: &str) -> Vec<&'static str> {
        match parse(args).unwrap().command {
            Command::Parts(parts) => parts.iter().map(|part| part.key).collect(),
            _ => panic!("{args} runs no parts"),
        }
    }

    #[test]
    fn commands_choose_parts() {
        assert_eq!(keys("correct"), ["adapter", "tests"]);
        assert_eq!(keys("fast"), ["adapter", "training", "steps", "decoding", "roofline"]);
        assert_eq!(keys("all").len(), PARTS.len());
    }

    #[test]
    fn flags_come_before_the_command_and_arguments_after_it() {
        let options = parse("--limit 60 --quick --out there run examples/plan --quick").unwrap();
        assert_eq!((options.limit, options.quick), (Duration::from_secs(60), true));
        assert_eq!(options.out, Some(PathBuf::from("there")));
        assert!(
            matches!(&options.command, Command::Run(name, args) if name == "examples/plan" && args == &["--quick"])
        );
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let error = |args: &str| parse(args).err().unwrap();
        assert!(error("swift").contains("`swift`"));
        assert!(error("--limit x correct").contains("`x`"));
        assert!(error("--out").contains("a folder"));
        assert!(error("run").contains("list"));
    }
}
