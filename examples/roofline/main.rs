//! Measures how close the kernels come to the limits of the adapter. Probes measure its peak rates of multiply-adds and
//! of matrix products, and its copy bandwidth; then every op of the table is timed, and its results are checked against the f64 reference.
//!
//! `cargo run --release --example roofline -- --json roofline.json --svg roofline.svg`
//! `cargo run --release --example roofline -- matmul attention`
//! `cargo run --release --example roofline -- --matrices --f16 matmul`

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
mod chart;
#[path = "../../benches/measure/mod.rs"]
mod measure;
mod probes;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use measure::{Check, Clock};
use probes::{Roofs, Units};
use serde::Serialize;
use throughline::check::Harness;
use throughline::ops::{Case, TABLE};
use throughline::{Gpu, TensorType};

#[derive(Parser)]
#[command(about = "Measure every kernel against the adapter's peak rate and bandwidth")]
struct Flags {
    /// Ops to measure, as in docs/ops.md [default: all]
    ops: Vec<String>,
    /// Store the tensors of the cases in f16
    #[arg(long)]
    f16: bool,
    /// Use the adapter's cooperative matrices (tensor cores, simdgroup matrices)
    #[arg(long)]
    matrices: bool,
    /// Skip cases of more than this many GFLOP, whose f64 reference takes long
    #[arg(long, default_value_t = 5.0)]
    max_gflop: f64,
    /// Milliseconds to spend on each measurement
    #[arg(long, default_value_t = 400)]
    budget: u64,
    /// Write the results to this JSON file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw the roofline to this SVG file
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// The results, as in the JSON file. Rates are per second of the clock.
#[derive(Serialize)]
struct Report {
    adapter: String,
    /// `CPU-second` on software adapters, where rates are those of one core; otherwise `second`.
    rates_per: &'static str,
    roofs: Roofs,
    kernels: Vec<Figure>,
}

/// One direction of one case.
#[derive(Serialize)]
pub struct Figure {
    op: &'static str,
    case: String,
    direction: &'static str,
    microseconds: f64,
    gflops: f64,
    gbs: f64,
    flop_per_byte: f64,
    /// Percentage of the nearer roof.
    percent: f64,
    roof: &'static str,
    /// Largest normalised mean squared error of outputs and gradients.
    nmse: f64,
    nmse_bound: f64,
    right: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    let unknown = flags.ops.iter().find(|op| TABLE.iter().all(|row| row.name != op.as_str()));
    ensure!(unknown.is_none(), "no op `{}`; docs/ops.md lists the ops", unknown.map_or("", String::as_str));
    ensure!(flags.max_gflop > 0.0, "--max-gflop must be a positive number");
    cli::check_output(flags.json.as_deref())?;
    cli::check_output(flags.svg.as_deref())?;
    let gpu = &if flags.matrices { measure::with_matrices()? } else { Gpu::headless_blocking()? };
    let clock = Clock::of(gpu);
    println!("{}; rates per {}", gpu.describe(), clock.unit());
    let budget = Duration::from_millis(flags.budget);
    let roofs = Roofs::measure(gpu, clock, budget)?;
    println!("multiply-adds: {:.1} GFLOP ({}); copy: {:.2} GB ({})", roofs.gflops, roofs.fma, roofs.gbs, roofs.copy);
    if let Some(gflops) = roofs.gflops_f16 {
        println!("multiply-adds in f16: {gflops:.1} GFLOP");
    }
    if let (Some(gflops), Some(kind)) = (roofs.gflops_matrices, &roofs.matrices) {
        println!("cooperative matrices ({kind}): {gflops:.1} GFLOP");
    }
    let mut report = Report { adapter: gpu.describe(), rates_per: clock.unit(), roofs, kernels: vec![] };
    println!("{:14} {:44} {:8} {:>10} {:>8} {:>7} {:>6}", "op", "case", "", "us", "GFLOP", "GB", "roof");
    for row in TABLE.iter().filter(|r| flags.ops.is_empty() || flags.ops.iter().any(|op| op == r.name)) {
        for case in (row.bench)() {
            let case = if flags.f16 { case.halved() } else { case };
            let op = case.op.clone();
            let (graph, _, outputs) = case.graph()?;
            let outputs: Vec<TensorType> = outputs.into_iter().map(|y| graph.ty(y).clone()).collect();
            if op.flops(&case.types(), &outputs) as f64 > flags.max_gflop * 1e9 {
                println!("{:14} {:44} skipped: over {} GFLOP", row.name, case.name, flags.max_gflop);
                continue;
            }
            report.kernels.extend(figures(row.name, &case, gpu, (clock, budget), &report.roofs));
        }
    }
    if let Some(path) = &flags.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &flags.svg {
        let svg = chart::svg(&report.adapter, report.rates_per, &report.roofs, &report.kernels)?;
        std::fs::write(path, svg).with_context(|| format!("writing {}", path.display()))?;
    }
    let wrong = report.kernels.iter().filter(|f| !f.right).count();
    ensure!(wrong == 0, "{wrong} measurements are of kernels that differ from the reference");
    Ok(())
}

fn figures(op: &'static str, case: &Case, gpu: &Gpu, (clock, budget): (Clock, Duration), roofs: &Roofs) -> Vec<Figure> {
    let harness = Harness::new(case, 1).expect("the case has a graph");
    let check = Check::of(case, &harness, gpu);
    let figure = |piece: measure::Piece| {
        let seconds = clock.seconds(&piece.exec, budget);
        let units = if piece.on_matrices { Units::Matrices } else { Units::Lanes };
        let (share, roof) = roofs.share(units, piece.flops, piece.bytes, seconds);
        let figure = Figure {
            op,
            case: case.name.clone(),
            direction: piece.name,
            microseconds: seconds * 1e6,
            gflops: piece.flops / seconds / 1e9,
            gbs: piece.bytes / seconds / 1e9,
            flop_per_byte: piece.flops / piece.bytes,
            percent: 100.0 * share,
            roof,
            nmse: check.nmse,
            nmse_bound: check.bound,
            right: check.ok(),
        };
        println!("{figure}");
        figure
    };
    measure::pieces(&harness, gpu).into_iter().map(figure).collect()
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Figure { op, case, direction, microseconds, gflops, gbs, percent, roof, nmse, .. } = self;
        write!(
            f,
            "{op:14} {case:44} {direction:8} {microseconds:10.1} {gflops:8.2} {gbs:7.2} {percent:5.1}% of {roof:8}"
        )?;
        write!(f, "  {}, NMSE {nmse:.0e}", if self.right { "right" } else { "WRONG" })
    }
}
