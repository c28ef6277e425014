//! Measures how well a model predicts a text, in nats per token and as perplexity.
//!
//! `cargo run --release --example perplexity -- --model FILE.gguf --text FILE --tokens 256`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/storage.rs"]
mod storage;

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use throughline::Gpu;
use throughline::decode::Decoder;
use throughline::model::Model;
use throughline::tokenize::ModelTokenizer;

#[derive(Parser)]
#[command(about = "Measure the perplexity of a text under a model")]
struct Flags {
    /// A GGUF file, or a folder with config.json and safetensors
    #[arg(long)]
    model: PathBuf,
    /// Text file
    #[arg(long)]
    text: PathBuf,
    /// Number of tokens to read; each is predicted from all the tokens before it
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    #[command(flatten)]
    storage: storage::Storage,
    /// Print the results as JSON on the last line
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&flags.text).with_context(|| format!("reading {}", flags.text.display()))?;
    let model = Model::open(&flags.model)?;
    let tokenizer = ModelTokenizer::of(model.weights())?;
    // A token is at least one byte long, and rarely longer than 16.
    let begin = text.char_indices().nth(flags.tokens.saturating_mul(16)).map_or(text.len(), |(i, _)| i);
    let mut ids = tokenizer.encode(&text[..begin], true)?;
    ids.truncate(flags.tokens);
    ensure!(ids.len() > 1, "{}: expected at least two tokens, got {}", flags.text.display(), ids.len());
    let gpu = Gpu::headless_blocking()?;
    let mut decoder = Decoder::new_blocking(&gpu, &model, flags.storage.options(ids.len()))?;
    let vocab = model.config().vocab_size;
    let (mut nats, mut predicted) = (0.0, 0);
    for (i, part) in ids.chunks(128).enumerate() {
        let logits = decoder.feed_all_blocking(part)?;
        for (logits, &next) in logits.chunks(vocab).zip(&ids[128 * i + 1..]) {
            nats += cross_entropy(logits, next as usize);
            predicted += 1;
        }
    }
    let nats = nats / f64::from(predicted);
    ensure!(nats.is_finite(), "the model's scores are no numbers: do weights or activations overflow f32?");
    println!("{nats:.4} nats per token over {predicted} tokens; perplexity {:.2}", nats.exp());
    if flags.json {
        let figures = serde_json::json!({
            "nats_per_token": nats, "perplexity": nats.exp(), "tokens": predicted, "adapter": gpu.describe(),
        });
        println!("{figures}");
    }
    Ok(())
}

/// Cross-entropy of one prediction, in nats.
fn cross_entropy(logits: &[f32], token: usize) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln() - f64::from(logits[token])
}
