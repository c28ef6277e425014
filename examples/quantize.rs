//! Writes a model as a GGUF file, in another precision if you like. Needs no GPU.
//!
//! ```sh
//! cargo run --release --example quantize -- --model FOLDER --out model.gguf --type Q8_0
//! ```

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use throughline::format::Stored;
use throughline::model::{Model, TensorTypes};

#[derive(Parser)]
#[command(about = "Write a model as a GGUF file, which llama.cpp and others run, too")]
struct Flags {
    /// Folder with config.json and safetensors files, or GGUF file
    #[arg(long)]
    model: PathBuf,
    /// File to write
    #[arg(long)]
    out: PathBuf,
    /// Type of all matrices, such as F16, Q8_0 or Q4_K; by default each keeps its own
    #[arg(long = "type", value_parser = stored)]
    stored: Option<Stored>,
}

fn stored(name: &str) -> anyhow::Result<Stored> {
    let found = Stored::ALL.into_iter().find(|stored| stored.name().eq_ignore_ascii_case(name));
    found.with_context(|| format!("expected one of {}", Stored::ALL.map(Stored::name).join(", ")))
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    cli::check_output(Some(&flags.out))?;
    let model = Model::open(&flags.model)?;
    let started = Instant::now();
    model.save_gguf(&flags.out, flags.stored.map_or(TensorTypes::Keep, TensorTypes::Matrices), |_| Ok(None))?;
    let mib = std::fs::metadata(&flags.out)?.len() as f64 / f64::from(1 << 20);
    println!("{}: {mib:.1} MiB in {:.1} s", flags.out.display(), started.elapsed().as_secs_f64());
    Ok(())
}
