//! Lists the contents of a model file.
//!
//! `cargo run --example tensors -- MODEL.gguf`, or a `.safetensors` file, or a folder with safetensors files

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Parser;
use throughline::format::Weights;

#[derive(Parser)]
#[command(about = "List the metadata and tensors of a model file")]
struct Args {
    /// GGUF or safetensors file, or folder with safetensors files
    path: PathBuf,
    /// Also decode every tensor, and fail if one has NaN or infinite elements
    #[arg(long)]
    check: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> anyhow::Result<()> {
    let weights = Weights::open(&args.path)?;
    for (key, value) in weights.metadata().iter() {
        println!("{key} = {}", value.summary());
    }
    if let Some(config) = weights.config() {
        println!("config.json = {config:#}");
    }
    let mut totals: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for tensor in weights.iter() {
        println!("{}: {}{}", tensor.name(), tensor.stored(), tensor.shape());
        let total = totals.entry(tensor.stored().name()).or_default();
        *total = (total.0 + 1, total.1 + tensor.byte_len());
        if args.check {
            tensor.check_finite()?;
        }
    }
    for (name, ty) in weights.unread() {
        println!("{name}: {ty} (not read)");
    }
    for (stored, (count, bytes)) in totals {
        println!("{count} tensors of {stored}, {:.1} MiB", bytes as f64 / f64::from(1 << 20));
    }
    Ok(())
}
