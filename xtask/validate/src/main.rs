//! Runs kernels for a validation layer to look at: `cargo xtask validate` starts this with the layer, and reads what that
//! writes among this program's own lines, which say what runs.
//!
//! Every case of a row of the op table runs with every kind of kernels, in bindings of just the size of its tensors.
//! The tests of the op table cannot show an access past a tensor that changes nothing, since they give kernels more
//! than that. Loops stay loops where plans for GPUs write them out, since the layer adds code to every access in a
//! text, and compiling that is what takes time. And a layer reports nothing that a driver promises to catch, so the
//! device is opened without that promise.

mod device;
mod wrong;

use std::collections::HashSet;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use throughline::Gpu;
use throughline::check::{self, Harness};
use throughline::kernel::Kernel;
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
    let (mut plans, mut kernels) = (0, HashSet::new());
    for (index, case) in (row.cases)().iter().enumerate() {
        plans += run_case(&gpu, case, index, &mut kernels).with_context(|| case.name.clone())?;
    }
    if plans == 0 {
        bail!("no case ran");
    }
    println!("{plans} plans of {} kernels", kernels.len());
    Ok(())
}

/// Runs a case forward and backward with each kind of kernels; as in the tests of the op table, the first variant of
/// each, and of the others a quarter. Returns how many plans ran, and adds their kernels.
fn run_case(gpu: &Gpu, case: &Case, index: usize, kernels: &mut HashSet<Kernel>) -> Result<usize> {
    let harness = Harness::new(case, 1)?;
    let mut plans = 0;
    for target in harness.targets(gpu)? {
        if target.variant > 0 && !(index + target.variant).is_multiple_of(4) {
            continue;
        }
        println!("case: {}, {target}", case.name);
        let plan = check::with_loops(harness.plan(&target.profile)?);
        kernels.extend(plan.steps().iter().flat_map(|step| step.dispatches()).map(|d| d.kernel().clone()));
        let exec = harness.executable_blocking(gpu, plan)?;
        exec.submit()?;
        gpu.wait_blocking()?;
        plans += 1;
    }
    Ok(plans)
}
