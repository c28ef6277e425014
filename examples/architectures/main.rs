//! Compares three custom blocks with the standard one: same text, same steps, same number of parameters, several seeds.
//!
//! `cargo run --release --example architectures -- --seeds 3 --json`
//!
//! Each block is one short file. Training, probes and views need no changes for them.

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
#[path = "../shared/lab.rs"]
mod lab;
mod parallel;
mod sandwich;
mod value_residuals;
mod variants;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lab::{Lab, LabFlags, Run};
use serde::Serialize;
use variants::Variant;

#[derive(Parser)]
#[command(about = "Compare custom blocks with the standard one, at equal parameters, steps and data")]
struct Flags {
    #[command(flatten)]
    lab: LabFlags,
    /// Number of runs per block, with seeds counted up from --seed
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Print a JSON summary as the last line
    #[arg(long)]
    json: bool,
}

/// The results of one block.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    d_ff: usize,
    parameters: usize,
    /// One for each seed.
    val_losses: Vec<f32>,
    mean_val_loss: f64,
    /// Mean over seeds of the loss minus the baseline's loss with the same seed.
    difference: f64,
    /// Standard error of that mean; none with a single seed.
    standard_error: Option<f64>,
    /// What each layer adds relative to the stream, in the last step of the first seed.
    contribution: Vec<f64>,
    seconds: f64,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    ensure!(flags.seeds > 0, "--seeds must be at least 1");
    let end = flags.lab.seed.checked_add(flags.seeds).context("--seed plus --seeds is too large a number")?;
    let lab = Lab::new(&flags.lab)?;
    let mut rows: Vec<Row> = vec![];
    println!("{}; {} steps, {} seeds", lab.gpu.describe(), flags.lab.steps, flags.seeds);
    println!(
        "{:16} {:>5} {:>10}  {:>8}  {:>18}  by layer: added / stream",
        "", "d_ff", "parameters", "val loss", "- baseline's"
    );
    for variant in variants::variants(&lab.model())? {
        let seeds = flags.lab.seed..end;
        let run = |seed| lab.run(variant.name, &variant.model, variant.block, seed, None);
        let runs = seeds.map(run).collect::<Result<Vec<Run>>>()?;
        let baseline = rows.first().map_or(runs.iter().map(|r| r.val_loss).collect(), |r| r.val_losses.clone());
        let row = row(&variant, &runs, &baseline);
        println!("{row}");
        rows.push(row);
    }
    if flags.json {
        let adapter = lab.gpu.describe();
        let (steps, seeds) = (flags.lab.steps, flags.seeds);
        println!("{}", serde_json::json!({ "adapter": adapter, "steps": steps, "seeds": seeds, "blocks": rows }));
    }
    Ok(())
}

fn row(variant: &Variant, runs: &[Run], baseline: &[f32]) -> Row {
    let val_losses: Vec<f32> = runs.iter().map(|r| r.val_loss).collect();
    let differences: Vec<f64> = val_losses.iter().zip(baseline).map(|(a, b)| f64::from(a - b)).collect();
    let n = runs.len() as f64;
    let difference = differences.iter().sum::<f64>() / n;
    let squares: f64 = differences.iter().map(|d| (d - difference).powi(2)).sum();
    Row {
        name: variant.name,
        d_ff: variant.model.d_ff,
        parameters: variant.parameters,
        mean_val_loss: val_losses.iter().map(|&x| f64::from(x)).sum::<f64>() / n,
        val_losses,
        difference,
        standard_error: (runs.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()),
        contribution: runs[0].steps.last().map_or(vec![], |s| s.contribution.clone()),
        seconds: runs.iter().map(|r| r.seconds).sum(),
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Row { name, d_ff, parameters, mean_val_loss, difference, .. } = self;
        let error = self.standard_error.map_or(String::new(), |e| format!("+- {e:.4}"));
        write!(f, "{name:16} {d_ff:5} {parameters:10}  {mean_val_loss:8.4}  {difference:+8.4} {error:9} ")?;
        self.contribution.iter().try_for_each(|c| write!(f, " {c:.2}"))
    }
}
