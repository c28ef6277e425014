//! Compares texts: embeds them with a sentence encoder such as all-MiniLM-L6-v2 and prints their cosine similarities.
//!
//! `cargo run --release --example sentence_embedding -- --model FOLDER --text "A man is eating." "A man eats."`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::path::PathBuf;

use clap::Parser;
use throughline::Gpu;
use throughline::sentence::TextEncoder;

#[derive(Parser)]
#[command(about = "Embed texts and print their cosine similarities")]
struct Flags {
    /// Folder of sentence-transformers, or with config.json, model.safetensors and tokenizer.json
    #[arg(long)]
    model: PathBuf,
    /// Name of the model's prompt to put before each text, instead of its default one
    #[arg(long)]
    prompt: Option<String>,
    /// Texts to compare
    #[arg(long, num_args = 1.., required = true)]
    text: Vec<String>,
    /// Print the embeddings as JSON on the last line
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let mut encoder = TextEncoder::open_blocking(&gpu, &flags.model)?;
    if flags.prompt.is_some() {
        encoder.set_prompt(flags.prompt.as_deref())?;
    }
    let embeddings = encoder.embed_blocking(&flags.text)?;
    for (i, (text, a)) in flags.text.iter().zip(&embeddings).enumerate() {
        let cosines: Vec<String> = embeddings.iter().map(|b| format!("{:6.3}", cosine(a, b))).collect();
        println!("{i} {}  {text}", cosines.join(" "));
    }
    if flags.json {
        let ids = flags.text.iter().map(|text| encoder.ids(text)).collect::<Result<Vec<_>, _>>()?;
        println!("{}", serde_json::json!({ "ids": ids, "embeddings": embeddings, "adapter": gpu.describe() }));
    }
    Ok(())
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f32::MIN_POSITIVE)
}
