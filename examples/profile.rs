//! Shows where the time of a training step goes: a table by node and by op, and a trace for Perfetto.
//!
//! `cargo run --release --example profile -- --layers 6 --dim 384 --heads 6 --context 256 --batch 4 --trace step.json`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/shape.rs"]
mod shape;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use shape::Shape;
use throughline::optim::{MuonConfig, Schedule};
use throughline::rng::Rng;
use throughline::train::data::Batch;
use throughline::train::{TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::{Gpu, Tuner};

#[derive(Parser)]
#[command(about = "Profile a training step of a GPT on random tokens")]
struct Flags {
    #[command(flatten)]
    shape: Shape,
    /// Use Muon for the matrices in blocks and AdamW for the rest, instead of AdamW for all
    #[arg(long)]
    muon: bool,
    /// Tune first: measure the variants of each op, and remember the fastest in this file
    #[arg(long)]
    tune: Option<PathBuf>,
    /// Cache the driver's compiled pipelines in this folder. Nothing else may write to it
    #[arg(long)]
    pipelines: Option<PathBuf>,
    /// Write a trace for Perfetto or chrome://tracing
    #[arg(long)]
    trace: Option<PathBuf>,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(f: Flags) -> anyhow::Result<()> {
    let started = Instant::now();
    cli::check_output(f.trace.as_deref())?;
    cli::check_output(f.tune.as_deref())?;
    let mut gpu = Gpu::headless_blocking()?;
    if let Some(dir) = &f.pipelines {
        // SAFETY: the flag's help asks for a folder that only this program writes to.
        unsafe { gpu.load_pipelines(dir)? };
    }
    let config = TrainConfig {
        schedule: Schedule::constant(1e-3),
        muon: f.muon.then(MuonConfig::default),
        ..TrainConfig::new(f.shape.config(), f.shape.batch)
    };
    let plan = TrainPlan::new(&config, &TrainOptions::default(), gpu.profile())?;
    if let Some(path) = &f.tune {
        gpu = gpu.with_choices(Tuner::open(path)?.tune_blocking(&gpu, plan.plans())?);
    }
    let mut rng = Rng::new(&[1]);
    let mut ids = || (0..config.tokens_per_step()).map(|_| rng.below(f.shape.vocab as u64) as u32).collect::<Vec<_>>();
    let batch = Batch::new(ids(), ids());
    let mut trainer = Trainer::new_blocking(&gpu, config)?;
    trainer.step(std::slice::from_ref(&batch))?.wait_blocking()?;
    println!("first step done after {:.2} s", started.elapsed().as_secs_f64());
    let timeline = trainer.profile_blocking(std::slice::from_ref(&batch))?;
    print!("{timeline}");
    if let Some(path) = &f.trace {
        timeline.write_trace(path)?;
        println!("trace written to {}", path.display());
    }
    if let Some(dir) = &f.pipelines {
        gpu.save_pipelines(dir)?;
    }
    Ok(())
}
