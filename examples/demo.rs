//! Trains a small GPT on Shakespeare and writes a report.
//!
//! `cargo xtask demo` finds or installs a graphics driver first, and then runs this.

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/page.rs"]
mod page;
#[path = "shared/report.rs"]
mod report;
#[path = "shared/training.rs"]
mod training;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use throughline::train::TrainConfig;
use throughline::train::checkpoint::write_atomically;

#[derive(Parser)]
#[command(about = "Train a small GPT on Shakespeare and write a report")]
struct Flags {
    #[command(flatten)]
    train: training::TrainFlags,
}

/// The contents of run.json.
#[derive(Serialize)]
struct Record<'a> {
    summary: &'a training::Summary,
    config: &'a TrainConfig,
    /// Every validation.
    history: &'a [training::Point],
    /// Training loss by step.
    losses: &'a [(u64, f32)],
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    let mut flags = flags.train;
    let out = flags.out.get_or_insert_with(|| PathBuf::from("target/demo")).clone();
    let outcome = training::run(&flags)?;
    println!("{}", outcome.sample);
    let write = |name: &str, bytes: &[u8]| -> Result<()> {
        let path = out.join(name);
        write_atomically(&path, bytes).with_context(|| format!("writing {name}"))?;
        println!("{}", path.display());
        Ok(())
    };
    let run = Record {
        summary: &outcome.summary,
        config: outcome.trainer.config(),
        history: &outcome.history,
        losses: &outcome.losses,
    };
    write("report.html", report::html(&flags, &outcome)?.as_bytes())?;
    write("run.json", serde_json::to_string_pretty(&run)?.as_bytes())?;
    write("sample.txt", outcome.sample.as_bytes())?;
    let model = out.join("model.safetensors");
    outcome.checkpoint.save_weights(&model)?;
    println!("{}", model.display());
    if outcome.interrupted {
        eprintln!("stopped at step {}; go on with --resume {}", outcome.summary.steps, out.display());
    }
    Ok(())
}
