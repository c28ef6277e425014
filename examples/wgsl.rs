//! Prints the final WGSL of any kernel of the op table. Needs no GPU.
//!
//! `cargo run --example wgsl -- matmul` lists the test cases of matmul; `cargo run --example wgsl -- matmul bias`
//! prints the kernels of the first case whose name contains "bias".

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use anyhow::{Context, Result};
use clap::Parser;
use throughline::ops::{Row, TABLE};
use throughline::plan::variants;
use throughline::{AdapterClass, Plan, Profile};

#[derive(Parser)]
#[command(about = "Print the final WGSL of an op's kernels")]
struct Flags {
    /// Name of the op, as in docs/ops.md
    op: String,
    /// Part of the name of a test case [default: list all cases]
    case: Option<String>,
    /// Print the kernels for software adapters instead of those for GPUs
    #[arg(long)]
    cpu: bool,
    /// Subgroup sizes of the device, as in 32,64 [default: no subgroup operations]
    #[arg(long, value_parser = sizes, value_name = "MIN,MAX")]
    subgroups: Option<[u32; 2]>,
    /// Variant to print, counted from 0, of those that a tuner can choose from
    #[arg(long, default_value_t = 0)]
    variant: usize,
}

fn sizes(text: &str) -> Result<[u32; 2], String> {
    let sizes = text.split_once(',').and_then(|(min, max)| Some([min.parse().ok()?, max.parse().ok()?]));
    let sizes = sizes.filter(|[min, max]: &[u32; 2]| min <= max && min.is_power_of_two() && max.is_power_of_two());
    sizes.ok_or_else(|| "expected two powers of two, the smaller first, as in 32,64".into())
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    let names = || TABLE.iter().map(|r| r.name).collect::<Vec<_>>().join(", ");
    let row: &Row = TABLE
        .iter()
        .find(|r| r.name == flags.op)
        .with_context(|| format!("no op `{}`; the ops are {}", flags.op, names()))?;
    let cases = (row.cases)();
    let Some(part) = flags.case else {
        cases.iter().for_each(|c| println!("{}", c.name));
        return Ok(());
    };
    let case = cases
        .iter()
        .find(|c| c.name.contains(&part))
        .context("no case has that name; leave it out to list all cases")?;
    let (graph, _, outputs) = case.graph()?;
    let class = if flags.cpu { AdapterClass::Cpu } else { AdapterClass::Gpu };
    let mut profile = Profile::portable(class);
    profile.subgroups = flags.subgroups;
    let mut plan = Plan::new(&graph, &outputs, &profile)?;
    for t in variants::tunables(&plan, &profile) {
        println!("// variants: {}", t.variants.join(", "));
        let name = t.variants.get(flags.variant).with_context(|| format!("no variant {}", flags.variant))?;
        profile.choices.set(t.key, name.clone());
        plan = Plan::new(&graph, &outputs, &profile)?;
    }
    for d in plan.steps().iter().flat_map(|s| s.dispatches()) {
        println!("// {} x {:?} workgroups\n{}", d.kernel().describe(), d.workgroups(), d.kernel().wgsl()?);
    }
    Ok(())
}
