//! Writes text as it comes, with a model that `train` made or one in a GGUF file.
//!
//! `cargo run --release --example generate -- --model DIR --prompt "KING:"`
//! `cargo run --release --example generate -- --model FILE.gguf --prompt "The harbour was quiet" --temperature 0`

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{anyhow, ensure};
use clap::Parser;
use throughline::checkpoint::Checkpoint;
use throughline::data::CharTokenizer;
use throughline::decode::Decoder;
use throughline::format::Weights;
use throughline::optim::{Arena, ArenaLayout};
use throughline::sample::{Generator, Sampling};
use throughline::{Gpu, tokenize};

#[derive(Parser)]
#[command(about = "Writes text with a model that the train example made, or one in a GGUF file")]
struct Flags {
    /// Folder or file of the checkpoint, or a GGUF file
    #[arg(long)]
    model: PathBuf,
    /// Text to go on from [a new line]
    #[arg(long, conflicts_with = "ids")]
    prompt: Option<String>,
    /// Token ids to go on from, as in 1,2,3; for GGUF files
    #[arg(long, value_delimiter = ',')]
    ids: Vec<u32>,
    /// Characters, or tokens, to write
    #[arg(long, default_value_t = 500)]
    tokens: usize,
    /// Print figures as JSON on the last line; for GGUF files
    #[arg(long)]
    json: bool,
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
    match flags.model.extension().is_some_and(|e| e == "gguf") {
        true => decode(&flags),
        false => write_text(&flags),
    }
}

impl Flags {
    fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed }
    }
}

/// With a model of a GGUF file.
fn decode(flags: &Flags) -> anyhow::Result<()> {
    let weights = Weights::open(&flags.model)?;
    let tokenizer = tokenize::of_gguf(&weights)?;
    let end = tokenize::end_of_text(&weights)?;
    let prompt = match flags.ids.is_empty() {
        true => {
            let text = flags.prompt.as_deref().unwrap_or("\n");
            tokenizer.encode(text, false).map_err(|e| anyhow!("--prompt: {e}"))?.get_ids().to_vec()
        }
        false => flags.ids.clone(),
    };
    let gpu = Gpu::headless_blocking()?;
    let mut decoder = Decoder::new_blocking(&gpu, &weights, prompt.len() + flags.tokens)?;
    let mut text = tokenizer.decode_stream(false);
    let (mut ids, mut whole, begin, mut first) = (vec![], String::new(), Instant::now(), None);
    let mut out = std::io::stdout();
    // A reader that hangs up ends the text, and is no error.
    let show = |id| {
        first.get_or_insert_with(|| begin.elapsed());
        if Some(id) == end {
            return false;
        }
        ids.push(id);
        // Some characters take several tokens, and come with the last.
        let piece = text.step(id).ok().flatten().unwrap_or_default();
        whole += &piece;
        write!(out, "{piece}").and_then(|()| out.flush()).is_ok()
    };
    decoder.generate_blocking(&prompt, flags.tokens, &flags.sampling(), show)?;
    println!();
    if flags.json {
        let prefill = first.unwrap_or_default().as_secs_f64();
        let decode = begin.elapsed().as_secs_f64() - prefill;
        let figures = serde_json::json!({
            "prompt_ids": prompt,
            "ids": ids,
            "text": whole,
            "prefill_tokens_per_s": prompt.len() as f64 / prefill,
            "decode_tokens_per_s": ids.len().saturating_sub(1) as f64 / decode,
            "weight_bytes": decoder.weight_bytes(),
            "adapter": gpu.describe(),
        });
        println!("{figures}");
    }
    Ok(())
}

fn write_text(flags: &Flags) -> anyhow::Result<()> {
    ensure!(flags.ids.is_empty(), "--ids is for GGUF files; this is a checkpoint: give --prompt");
    let prompt = flags.prompt.as_deref().unwrap_or("\n");
    let checkpoint = Checkpoint::load(&common::checkpoint_path(&flags.model))?;
    let tokenizer = CharTokenizer::of(&checkpoint.state.alphabet);
    let mut ids = tokenizer.encode(prompt)?;
    let config = &checkpoint.state.config.model;

    let gpu = Gpu::headless_blocking()?;
    let layout = ArenaLayout::of_model(config, gpu.profile().max_tensor_bytes())?;
    let params = Arena::zeros(&gpu, "parameters", &Arc::new(layout))?;
    checkpoint.restore_weights(&gpu, &params)?;
    let generator = Generator::new_blocking(&gpu, config, &params)?;

    let mut out = std::io::stdout();
    write!(out, "{prompt}")?;
    // A reader that hangs up ends the text, and is no error.
    let show = |id| write!(out, "{}", tokenizer.decode(&[id])).and_then(|()| out.flush()).is_ok();
    generator.generate_blocking(&mut ids, flags.tokens, &flags.sampling(), show)?;
    println!();
    Ok(())
}
