//! Fine-tunes a pretrained model on your own text. All parameters are trained, in f32. Writes a folder that PyTorch and
//! the `generate` example can load, with the tokenizer and the chat template of the original.
//!
//! `cargo run --release --example finetune -- --model FILE.gguf --text FILE --steps 20 --out FOLDER`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use throughline::Gpu;
use throughline::model::Model;
use throughline::optim::{AdamWConfig, Decay, Schedule};
use throughline::tokenize::ModelTokenizer;
use throughline::train::data::Dataset;
use throughline::train::{TrainConfig, TrainOptions, Trainer};

#[derive(Parser)]
#[command(about = "Fine-tune a pretrained model on a text")]
struct Flags {
    /// A GGUF file, or a folder with config.json and safetensors
    #[arg(long)]
    model: PathBuf,
    /// Text file; the last tenth is held out for validation
    #[arg(long)]
    text: PathBuf,
    /// Folder to write to
    #[arg(long)]
    out: PathBuf,
    /// Training steps
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Sequences per step
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens per sequence
    #[arg(long, default_value_t = 64)]
    seq_len: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-5)]
    lr: f64,
    /// Seed for drawing batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the results as JSON on the last line
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    ensure!(flags.steps > 0, "--steps must be at least 1");
    ensure!(!flags.out.is_file(), "--out {} is a file; name a folder", flags.out.display());
    let text = std::fs::read_to_string(&flags.text).with_context(|| format!("reading {}", flags.text.display()))?;
    let model = Model::open(&flags.model)?;
    let ids = ModelTokenizer::of(model.weights())?.encode(&text, false)?;
    let data = Dataset::new(ids, 0.1, flags.seq_len)?;
    let config = TrainConfig {
        seq_len: Some(flags.seq_len),
        schedule: Schedule {
            peak: flags.lr,
            warmup: flags.steps / 10,
            steps: flags.steps,
            final_fraction: 0.1,
            decay: Decay::Cosine,
        },
        adamw: AdamWConfig { weight_decay: 0.01, beta2: 0.999, ..Default::default() },
        seed: flags.seed,
        ..TrainConfig::new(model.config().clone(), flags.batch)
    };
    let gpu = Gpu::headless_blocking()?;
    let options = TrainOptions { init: false, ..TrainOptions::default() };
    let mut trainer = Trainer::with_options_blocking(&gpu, config, &options)?;
    model.load_blocking(&gpu, trainer.params())?;

    let validation = data.val_batches(4, flags.batch, flags.seq_len)?;
    let before = trainer.evaluate_blocking(&validation)?;
    println!("{} parameters; validation loss {before:.4} nats per token", trainer.parameter_count());
    for step in 0..flags.steps {
        let batch = data.batch(flags.seed, step, flags.batch, flags.seq_len)?;
        let loss = trainer.step(&[batch])?.wait_blocking()?;
        println!("step {step}: {loss:.4}");
    }
    let after = trainer.evaluate_blocking(&validation)?;
    println!("validation loss {after:.4}, {:+.4}", after - before);

    model.save_blocking(&flags.out, &gpu, trainer.params())?;
    if flags.json {
        println!("{}", serde_json::json!({ "before": before, "after": after, "adapter": gpu.describe() }));
    }
    Ok(())
}
