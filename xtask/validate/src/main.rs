//! Runs kernels for a validation layer to look at: `cargo xtask validate` starts this with the layer, and reads what that
//! writes.
//!
//! Every case of a row of the op table runs with every kind of kernels, in bindings of just the size of its tensors. The
//! tests of the op table cannot show an access past a tensor that changes nothing, since they give kernels more than
//! that. And a layer reports nothing that a driver promises to catch, so the device is opened without that promise.

mod device;
mod wrong;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use throughline::Gpu;
use throughline::check::Harness;
use throughline::ops::{Case, Row, TABLE};

const HELP: &str = "\
Usage: validate <command>

  list         Print the rows of the op table
  row NAME     Run all cases of a row
  wrong NAME   Run a kernel that is wrong on purpose, which the layer must notice
  wrongs       Print their names";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["list"] => {
            TABLE.iter().for_each(|row| println!("{}", row.name));
            Ok(())
        }
        ["wrongs"] => {
            wrong::KERNELS.iter().for_each(|(name, _)| println!("{name}"));
            Ok(())
        }
        ["row", name] => run_row(name),
        ["wrong", name] => device::open().and_then(|gpu| wrong::run(&gpu, name)),
        _ => {
            eprintln!("{HELP}");
            return ExitCode::FAILURE;
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_row(name: &str) -> Result<()> {
    let row: &Row = TABLE.iter().find(|row| row.name == name).with_context(|| format!("no row `{name}`"))?;
    let gpu = device::open()?;
    let mut steps = 0;
    for (index, case) in (row.cases)().iter().enumerate() {
        steps += run_case(&gpu, case, index).with_context(|| case.name.clone())?;
    }
    if steps == 0 {
        bail!("no case ran");
    }
    println!("{steps} plans");
    Ok(())
}

/// Runs a case forward and backward with each kind of kernels; as in the tests of the op table, the first variant of
/// each, and of the others a quarter. Returns how many plans ran.
fn run_case(gpu: &Gpu, case: &Case, index: usize) -> Result<usize> {
    let harness = Harness::new(case, 1)?;
    let mut plans = 0;
    for target in harness.targets(gpu)? {
        if target.variant > 0 && !(index + target.variant).is_multiple_of(4) {
            continue;
        }
        let exec = harness.executable_blocking(gpu, harness.plan(&target.profile)?)?;
        exec.submit()?;
        gpu.wait_blocking()?;
        plans += 1;
    }
    Ok(plans)
}
