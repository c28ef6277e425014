//! Writes text with a model that `train` made, as it comes.
//!
//! `cargo run --release --example generate -- --model DIR --prompt "KING:"`

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use throughline::Gpu;
use throughline::checkpoint::Checkpoint;
use throughline::data::CharTokenizer;
use throughline::optim::{Arena, ArenaLayout};
use throughline::sample::{Generator, Sampling};

#[derive(Parser)]
#[command(about = "Writes text with a model that the train example made")]
struct Flags {
    /// Folder or file of the checkpoint
    #[arg(long)]
    model: PathBuf,
    /// Text to go on from
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Characters to write
    #[arg(long, default_value_t = 500)]
    tokens: usize,
    /// Divides the logits; 0 takes the likeliest character
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Keep this many likeliest characters; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest characters of this total probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let checkpoint = Checkpoint::load(&common::checkpoint_path(&flags.model))?;
    let tokenizer = CharTokenizer::of(&checkpoint.state.alphabet);
    let mut ids = tokenizer.encode(&flags.prompt)?;
    let config = &checkpoint.state.config.model;

    let gpu = Gpu::headless_blocking()?;
    let params = Arena::zeros(&gpu, "parameters", &Arc::new(ArenaLayout::of_model(config)?))?;
    checkpoint.restore_weights(&gpu, &params)?;
    let generator = Generator::new_blocking(&gpu, config, &params)?;

    let Flags { temperature, top_k, top_p, seed, .. } = flags;
    let sampling = Sampling { temperature, top_k, top_p, seed };
    let mut out = std::io::stdout();
    write!(out, "{}", flags.prompt)?;
    // A reader that hangs up ends the text, and is no error.
    let show = |id| write!(out, "{}", tokenizer.decode(&[id])).and_then(|()| out.flush()).is_ok();
    generator.generate_blocking(&mut ids, flags.tokens, &sampling, show)?;
    println!();
    Ok(())
}
