//! Measures what depth does to a transformer, in pre-norm and post-norm: stream and gradient by layer at
//! initialisation, and the largest learning rate that a short run tolerates, with and without warm-up.
//!
//! `cargo run --release --example depth -- --out target/depth`

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
mod chart;
mod fit;
mod init;
mod rates;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, value_parser};
use serde::{Deserialize, Serialize};
use throughline::Gpu;
use throughline::nn::{Init, NormPlacement, TransformerConfig};
use throughline::train::checkpoint::write_atomically;

#[derive(Parser)]
#[command(about = "Measure what depth does to gradients, the stream and the learning rate, in pre- and post-norm")]
struct Flags {
    /// Numbers of layers, comma-separated [default: 6,12,24,48,100]
    #[arg(long, value_delimiter = ',', value_parser = value_parser!(u16).range(1..=1000))]
    depths: Option<Vec<u16>>,
    /// Width of the stream, a multiple of 4 [default: 32]
    #[arg(long)]
    dim: Option<usize>,
    /// Steps of each run that tries a learning rate [default: 24]
    #[arg(long, value_parser = value_parser!(u64).range(4..=100_000))]
    steps: Option<u64>,
    /// Models to average over at initialisation [default: 8]
    #[arg(long, value_parser = value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// First seed; learning rates are tried with this one only
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for depth.svg and depth.json
    #[arg(long, default_value = "target/depth")]
    out: PathBuf,
    /// Redraw the chart from this depth.json without measuring anything
    #[arg(long)]
    from: Option<PathBuf>,
    /// Use small defaults, to check that everything works rather than to measure
    #[arg(long)]
    quick: bool,
    /// Print the results as JSON on the last line
    #[arg(long)]
    json: bool,
}

/// Settings shared by all parts of the study.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Settings {
    depths: Vec<usize>,
    dim: usize,
    steps: u64,
    seeds: u64,
    seed: u64,
}

impl Flags {
    fn settings(&self) -> Settings {
        let small = self.quick;
        let given = self.depths.clone().unwrap_or(if small { vec![2, 4] } else { vec![6, 12, 24, 48, 100] });
        let mut depths: Vec<usize> = given.into_iter().map(usize::from).collect();
        depths.sort_unstable();
        depths.dedup();
        Settings {
            depths,
            dim: self.dim.unwrap_or(if small { 16 } else { 32 }),
            steps: self.steps.unwrap_or(if small { 8 } else { 24 }),
            seeds: self.seeds.unwrap_or(if small { 2 } else { 8 }),
            seed: self.seed,
        }
    }
}

/// Vocabulary size.
pub const VOCAB: usize = 64;

pub const PLACEMENTS: [NormPlacement; 2] = [NormPlacement::Pre, NormPlacement::Post];

pub fn name(placement: NormPlacement) -> &'static str {
    match placement {
        NormPlacement::Post => "post",
        _ => "pre",
    }
}

impl Settings {
    /// Xavier's variance for a square matrix everywhere, or with projections into the stream scaled down with depth.
    fn inits(&self) -> [(&'static str, Init); 2] {
        let std = 1.0 / (self.dim as f32).sqrt();
        [("plain", Init::Plain { std }), ("gpt2", Init::Gpt2 { std })]
    }

    /// GPT-2's parts, with an untied head.
    fn model(&self, layers: usize, context: usize, norm_placement: NormPlacement, init: Init) -> TransformerConfig {
        let gpt2 = TransformerConfig::gpt2(VOCAB, context, layers, self.dim, 4);
        TransformerConfig { norm_placement, init, tied_head: false, ..gpt2 }
    }
}

/// The contents of depth.json.
#[derive(Deserialize, Serialize)]
pub struct Report {
    adapter: String,
    settings: Settings,
    initialisation: Vec<init::Family>,
    learning_rates: Vec<rates::Search>,
    seconds: f64,
}

fn measure(settings: Settings) -> Result<Report> {
    let gpu = Gpu::headless_blocking()?;
    println!("{}", gpu.describe());
    let started = Instant::now();
    let initialisation = init::study(&gpu, &settings)?;
    let learning_rates = rates::study(&gpu, &settings)?;
    let seconds = started.elapsed().as_secs_f64();
    println!("\n{seconds:.0} seconds");
    Ok(Report { adapter: gpu.describe(), settings, initialisation, learning_rates, seconds })
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    let settings = flags.settings();
    ensure!(settings.seed.checked_add(settings.seeds).is_some(), "--seed plus --seeds is too large a number");
    std::fs::create_dir_all(&flags.out).with_context(|| format!("creating the folder {}", flags.out.display()))?;
    let report = match &flags.from {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("{} is not a depth.json", path.display()))?
        }
        None => measure(settings)?,
    };
    let write = |name: &str, text: String| -> Result<()> {
        let path = flags.out.join(name);
        write_atomically(&path, text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
        println!("{}", path.display());
        Ok(())
    };
    if flags.from.is_none() {
        write("depth.json", serde_json::to_string_pretty(&report)?)?;
    }
    write("depth.svg", chart::svg(&report)?)?;
    if flags.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}
