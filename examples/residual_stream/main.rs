//! Makes the residual stream visible. Trains one small transformer in six ways, {pre-norm, post-norm} x {GPT-2's
//! initialisation, zero initialisation, gates that start at zero}, and the blocks of the `architectures` example.
//! Watches every layer throughout and writes an HTML report.
//!
//! `cargo run --release --example residual_stream -- --out target/residual_stream`

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
mod chart;
mod figures;
#[path = "../shared/lab.rs"]
mod lab;
#[path = "../shared/page.rs"]
mod page;
#[path = "../architectures/parallel.rs"]
mod parallel;
mod report;
#[path = "../architectures/sandwich.rs"]
mod sandwich;
#[path = "../architectures/value_residuals.rs"]
mod value_residuals;
#[path = "../architectures/variants.rs"]
mod variants;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lab::{Lab, LabFlags, Run, Step};
use serde::Serialize;
use throughline::nn::{Init, NormPlacement, StandardBlock, TransformerConfig};
use throughline::train::checkpoint::write_atomically;

#[derive(Parser)]
#[command(about = "Show what each layer adds to the residual stream while a small transformer learns")]
pub struct Flags {
    #[command(flatten)]
    lab: LabFlags,
    /// Steps between columns of the heat maps [default: a fortieth of --steps]
    #[arg(long)]
    every: Option<u64>,
    /// A layer has kicked in when it adds more than this fraction of the stream
    #[arg(long, default_value_t = 0.1)]
    threshold: f64,
    /// Folder for report.html, readings.jsonl and the charts
    #[arg(long, default_value = "target/residual_stream")]
    out: PathBuf,
    /// Print a JSON summary as the last line
    #[arg(long)]
    json: bool,
}

const PLACEMENTS: [(&str, NormPlacement); 2] = [("pre-norm", NormPlacement::Pre), ("post-norm", NormPlacement::Post)];

/// Everything the report shows.
pub struct Experiment {
    pub adapter: String,
    pub lab: LabFlags,
    pub every: u64,
    pub threshold: f64,
    /// One run for each placement of the norm and each initialisation.
    pub runs: Vec<Run>,
    /// The first step of both placements, with initial weights that are not scaled by depth.
    pub plain: Vec<Run>,
    /// The baseline (the first of `runs`) and the other blocks.
    pub blocks: Vec<Run>,
}

/// When a layer kicked in.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KickIn {
    pub layer: usize,
    /// `None`: never.
    pub step: Option<u64>,
}

/// A line of readings.jsonl.
#[derive(Serialize)]
struct Line<'a> {
    run: &'a str,
    #[serde(flatten)]
    step: &'a Step,
}

/// A run in the summary.
#[derive(Serialize)]
struct Entry<'a> {
    #[serde(flatten)]
    run: &'a Run,
    /// RMS of the gradient of the stream before the first layer divided by that after the last, before any training.
    gradient_first_over_last: f64,
    kicked_in: Vec<KickIn>,
}

/// The line that --json prints.
#[derive(Serialize)]
struct Summary<'a> {
    adapter: &'a str,
    report: String,
    threshold: f64,
    runs: Vec<Entry<'a>>,
    plain: Vec<Entry<'a>>,
    blocks: Vec<Entry<'a>>,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    let every = flags.every.unwrap_or((flags.lab.steps / 40).max(1));
    ensure!(every > 0, "--every must be at least 1");
    ensure!(flags.threshold > 0.0 && flags.threshold.is_finite(), "--threshold must be a positive number");
    let lab = Lab::new(&flags.lab)?;
    std::fs::create_dir_all(&flags.out).with_context(|| format!("creating the folder {}", flags.out.display()))?;
    let adapter = lab.gpu.describe();
    eprintln!("{adapter}");
    let runs = ways(&lab.model())
        .iter()
        .map(|(name, model)| lab.run(name, model, &StandardBlock, flags.lab.seed, Some(every)))
        .collect::<Result<Vec<Run>>>()?;
    let mut plain = vec![];
    for (placement, norm_placement) in PLACEMENTS {
        // Xavier's variance, as in Xiong et al. 2020.
        let init = Init::Plain { std: 1.0 / (flags.lab.dim as f32).sqrt() };
        let model = TransformerConfig { norm_placement, init, ..lab.model() };
        plain.push(lab.untrained(&format!("{placement}, plain init"), &model, &StandardBlock, flags.lab.seed)?);
    }
    let mut blocks = vec![Run { name: "baseline".into(), ..runs[0].clone() }];
    for v in &variants::variants(&lab.model())?[1..] {
        blocks.push(lab.run(v.name, &v.model, v.block, flags.lab.seed, Some(every))?);
    }
    let (lab, threshold) = (flags.lab.clone(), flags.threshold);
    let experiment = Experiment { adapter, lab, every, threshold, runs, plain, blocks };
    write(&flags, &experiment)?;
    if flags.json {
        println!("{}", serde_json::to_string(&experiment.summary(&flags))?);
    }
    Ok(())
}

/// The six ways to train the baseline, starting with the baseline itself.
fn ways(baseline: &TransformerConfig) -> Vec<(String, TransformerConfig)> {
    let (Init::Plain { std } | Init::Gpt2 { std } | Init::ZeroResidual { std }) = baseline.init;
    let mut ways = vec![];
    for (placement, norm_placement) in PLACEMENTS {
        for (start, init, residual_gate) in [
            ("GPT-2 init", Init::Gpt2 { std }, None),
            ("zero init", Init::ZeroResidual { std }, None),
            ("zero gates", Init::Gpt2 { std }, Some(0.0)),
        ] {
            let model = TransformerConfig { norm_placement, init, residual_gate, ..baseline.clone() };
            ways.push((format!("{placement}, {start}"), model));
        }
    }
    ways
}

/// Writes the page, each chart as a file, and all readings.
fn write(flags: &Flags, experiment: &Experiment) -> Result<()> {
    let save = |name: &str, text: &str| -> Result<()> {
        let path = flags.out.join(name);
        write_atomically(&path, text.as_bytes()).with_context(|| format!("writing {name}"))?;
        println!("{}", path.display());
        Ok(())
    };
    let figures = figures::all(experiment)?;
    for figure in &figures {
        save(&format!("{}.svg", figure.name), &figure.svg)?;
    }
    let mut lines = String::new();
    for run in experiment.runs.iter().chain(&experiment.plain).chain(&experiment.blocks[1..]) {
        for step in &run.steps {
            writeln!(lines, "{}", serde_json::to_string(&Line { run: &run.name, step })?)?;
        }
    }
    save("readings.jsonl", &lines)?;
    save("report.html", &report::html(experiment, &figures)?)
}

impl Experiment {
    /// The layers in the order in which they kicked in.
    pub fn kicked_in(&self, run: &Run) -> Vec<KickIn> {
        let first = |layer: usize| run.steps.iter().find(|s| s.contribution[layer] > self.threshold).map(|s| s.step);
        let mut order: Vec<KickIn> = (0..self.lab.layers).map(|layer| KickIn { layer, step: first(layer) }).collect();
        order.sort_by_key(|k| (k.step.unwrap_or(u64::MAX), k.layer));
        order
    }

    fn summary(&self, flags: &Flags) -> Summary<'_> {
        let entry = |run| Entry { run, gradient_first_over_last: gradient_ratio(run), kicked_in: self.kicked_in(run) };
        Summary {
            adapter: &self.adapter,
            report: flags.out.join("report.html").display().to_string(),
            threshold: self.threshold,
            runs: self.runs.iter().map(entry).collect(),
            plain: self.plain.iter().map(entry).collect(),
            blocks: self.blocks.iter().map(entry).collect(),
        }
    }
}

/// The gradient that reaches the first layer divided by the gradient at the last one, before any training.
pub fn gradient_ratio(run: &Run) -> f64 {
    let gradient = &run.steps[0].stream_grad_rms;
    gradient[0] / gradient[gradient.len() - 1]
}
