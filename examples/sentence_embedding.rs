//! Compares texts: embeds them with a sentence encoder such as all-MiniLM-L6-v2 and prints their cosine similarities.
//!
//! `cargo run --release --example sentence_embedding -- --model FOLDER --text "A man is eating." "A man eats."`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::path::PathBuf;

use clap::Parser;
use throughline::Gpu;
use throughline::embed::{Pooling, SentenceEncoder};
use throughline::model::Model;
use throughline::tokenize::ModelTokenizer;

#[derive(Parser)]
#[command(about = "Embed texts and print their cosine similarities")]
struct Flags {
    /// Folder with config.json, model.safetensors and tokenizer.json
    #[arg(long)]
    model: PathBuf,
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
    let model = Model::open(&flags.model)?;
    let tokenizer = ModelTokenizer::of(model.weights())?;
    let ids = flags.text.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<Vec<_>, _>>()?;
    let gpu = Gpu::headless_blocking()?;
    let mut encoder = SentenceEncoder::new(&gpu, &model, Pooling::of_folder(&flags.model)?)?;
    let embeddings = encoder.embed_blocking(&ids)?;
    for (i, (text, a)) in flags.text.iter().zip(&embeddings).enumerate() {
        let cosine = |b: &Vec<f32>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let cosines: Vec<String> = embeddings.iter().map(|b| format!("{:6.3}", cosine(b))).collect();
        println!("{i} {}  {text}", cosines.join(" "));
    }
    if flags.json {
        println!("{}", serde_json::json!({ "ids": ids, "embeddings": embeddings, "adapter": gpu.describe() }));
    }
    Ok(())
}
