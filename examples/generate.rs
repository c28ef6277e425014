//! Generates text and prints it as it arrives. Takes a GGUF file, a Hugging Face model folder, or a checkpoint of the
//! `train` example.
//!
//! `cargo run --release --example generate -- --model FILE.gguf --chat --prompt "What is a tide?" --greedy`
//! `cargo run --release --example generate -- --model FOLDER --prompt "The harbour was quiet"`
//! `cargo run --release --example generate -- --model CHECKPOINT --prompt "KING:"`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/model.rs"]
mod model;
#[path = "shared/storage.rs"]
mod storage;
#[path = "shared/training.rs"]
mod training;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{anyhow, ensure};
use clap::Parser;
use throughline::Gpu;
use throughline::decode::sample::Sampling;
use throughline::decode::{Decoder, GenerationOptions};
use throughline::format::{SaveTensor, Stored, save_safetensors};
use throughline::model::Model;
use throughline::optim::{Arena, ArenaLayout};
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::CharTokenizer;

#[derive(Parser)]
#[command(about = "Generate text with a GGUF file, a Hugging Face model folder, or a checkpoint of `train`")]
struct Flags {
    /// GGUF file, folder with config.json and safetensors, or checkpoint file or folder
    #[arg(long)]
    model: PathBuf,
    /// Text to continue [default: a new line]
    #[arg(long, conflicts_with = "ids")]
    prompt: Option<String>,
    /// Token ids to continue, as in 1,2,3; not for checkpoints
    #[arg(long, value_delimiter = ',')]
    ids: Vec<u32>,
    /// Send the prompt as a user message, in the model's chat format
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// Number of tokens to generate (characters, for checkpoints)
    #[arg(long, default_value_t = 100)]
    tokens: usize,
    /// Always pick the most likely token; the same as --temperature 0
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    greedy: bool,
    /// Sampling temperature; 0 always picks the most likely token
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Sample from the K most likely tokens; 0 means all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the most likely tokens with this total probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed for sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    storage: storage::Storage,
    /// Also write the logits at every token of the prompt to this safetensors file; not for checkpoints
    #[arg(long)]
    dump_logits: Option<PathBuf>,
    /// Print the results as JSON on the last line; not for checkpoints
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    cli::check_output(flags.dump_logits.as_deref())?;
    match model::is_pretrained(&flags.model)? {
        true => decode(&flags),
        false => write_text(&flags),
    }
}

impl Flags {
    fn sampling(&self) -> Sampling {
        let temperature = if self.greedy { 0.0 } else { self.temperature };
        Sampling { temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed }
    }

    fn prompt_ids(&self, tokenizer: &throughline::Result<ModelTokenizer>) -> anyhow::Result<Vec<u32>> {
        if !self.ids.is_empty() {
            return Ok(self.ids.clone());
        }
        let text = self.prompt.as_deref().unwrap_or("\n");
        let tokenizer = tokenizer.as_ref().map_err(|e| anyhow!("{e}; without a tokenizer, pass --ids"))?;
        Ok(match self.chat {
            true => tokenizer.chat_ids(&[Message::new("user", text)], true)?,
            false => tokenizer.encode(text, true)?,
        })
    }
}

/// Generates with a pretrained model.
fn decode(flags: &Flags) -> anyhow::Result<()> {
    let model = Model::open(&flags.model)?;
    // With --ids the model needs no tokenizer, and ids are printed.
    let tokenizer = ModelTokenizer::of(model.weights());
    let prompt = flags.prompt_ids(&tokenizer)?;
    ensure!(!prompt.is_empty(), "--prompt has no tokens: pass at least one character");
    let gpu = Gpu::headless_blocking()?;
    // The last token generated is never fed back.
    let capacity = prompt.len().saturating_add(flags.tokens.saturating_sub(1));
    let context = model.config().context;
    ensure!(
        capacity <= context,
        "a prompt of {} tokens and --tokens {} exceed the model's context of {context}; lower --tokens",
        prompt.len(),
        flags.tokens
    );
    let mut decoder = Decoder::new_blocking(&gpu, &model, flags.storage.options(capacity))?;
    if let Some(path) = &flags.dump_logits {
        dump_logits(&mut decoder, &prompt, path)?;
    }
    let (mut text, mut ids, mut whole) = (tokenizer.as_ref().ok().map(|t| t.stream(false)), vec![], String::new());
    let (begin, mut first) = (Instant::now(), None);
    let usual = tokenizer.as_ref().map_or_else(|_| GenerationOptions::default(), GenerationOptions::of);
    let options = GenerationOptions { max_tokens: flags.tokens, sampling: flags.sampling(), ..usual };
    let mut out = std::io::stdout();
    for id in decoder.generate(&prompt, options)?.blocking() {
        let id = id?;
        first.get_or_insert_with(|| begin.elapsed());
        ids.push(id);
        // A character may take several tokens; it arrives with the last one.
        let piece = match &mut text {
            Some(text) => text.push(id)?,
            None => format!("{id} "),
        };
        whole += &piece;
        // A reader that hangs up ends the text, and is no error.
        if write!(out, "{piece}").and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
    let rest = text.map_or(Ok(String::new()), |text| text.finish())?;
    println!("{rest}");
    if flags.json {
        let prefill = first.unwrap_or_default().as_secs_f64();
        let decode = begin.elapsed().as_secs_f64() - prefill;
        let figures = serde_json::json!({
            "prompt_ids": prompt,
            "ids": ids,
            "text": whole + &rest,
            "prefill_tokens_per_s": prompt.len() as f64 / prefill,
            "decode_tokens_per_s": ids.len().saturating_sub(1) as f64 / decode,
            "weight_bytes": decoder.weight_bytes(),
            "peak_buffer_bytes": decoder.buffer_bytes(),
            "adapter": gpu.describe(),
        });
        println!("{figures}");
    }
    Ok(())
}

fn dump_logits(decoder: &mut Decoder, prompt: &[u32], path: &Path) -> anyhow::Result<()> {
    let values = decoder.feed_all_blocking(prompt)?;
    decoder.clear();
    let shape = [prompt.len(), values.len() / prompt.len()];
    let logits = SaveTensor { name: "logits", shape: &shape, values: &values, stored: Stored::F32 };
    Ok(save_safetensors(path, &[logits], &Default::default())?)
}

/// Generates with a checkpoint of the `train` example.
fn write_text(flags: &Flags) -> anyhow::Result<()> {
    let others = flags.ids.is_empty() && !flags.chat && !flags.json && flags.dump_logits.is_none();
    ensure!(others, "--ids, --chat, --json and --dump-logits do not work with checkpoints of `train`: use --prompt");
    let prompt = flags.prompt.as_deref().unwrap_or("\n");
    let checkpoint = Checkpoint::load(&training::checkpoint_path(&flags.model))?;
    let tokenizer = CharTokenizer::of(&checkpoint.state.alphabet);
    let ids = tokenizer.encode(prompt)?;
    ensure!(!ids.is_empty(), "--prompt is empty: pass at least one character");
    let config = &checkpoint.state.config.model;

    let gpu = Gpu::headless_blocking()?;
    let layout = ArenaLayout::of_model(config, gpu.profile().max_tensor_bytes())?;
    let params = Arena::zeros(&gpu, "parameters", &Arc::new(layout))?;
    checkpoint.restore_weights_blocking(&gpu, &params)?;
    let mut decoder =
        gpu.run_blocking(Decoder::on_params(&gpu, config, &params, flags.storage.options(config.context)))?;

    // Both the prompt and the text may be longer than the context.
    let window = &ids[ids.len().saturating_sub(config.context)..];
    let (max_tokens, keep) = (flags.tokens, config.context / 2);
    let options = GenerationOptions { max_tokens, sampling: flags.sampling(), stop: vec![], keep };

    let mut out = std::io::stdout();
    write!(out, "{prompt}")?;
    for id in decoder.generate(window, options)?.blocking() {
        // A reader that hangs up ends the text, and is no error.
        if write!(out, "{}", tokenizer.decode(&[id?])).and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
    println!();
    Ok(())
}
