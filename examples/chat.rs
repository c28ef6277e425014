//! Chats with a model: reads your messages line by line, prints its replies as they come, and remembers what was said.
//!
//! `cargo run --release --example chat -- --model FILE.gguf --system "Answer in one sentence."`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Parser;
use throughline::Gpu;
use throughline::decode::sample::Sampling;
use throughline::decode::{Chat, GenerationOptions};

#[derive(Parser)]
#[command(about = "Chat with a GGUF file or a Hugging Face model folder that has a chat template")]
struct Flags {
    /// GGUF file, or folder with config.json, safetensors and a tokenizer
    #[arg(long)]
    model: PathBuf,
    /// What the model is told before all else
    #[arg(long)]
    system: Option<String>,
    /// Most tokens of a reply
    #[arg(long, default_value_t = 300)]
    tokens: usize,
    /// Tokens of the chat that the model reads; it forgets older turns
    #[arg(long, default_value_t = 2048)]
    capacity: usize,
    /// Sampling temperature; 0 always picks the most likely token
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Seed for sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let gpu = Gpu::headless_blocking()?;
    let mut chat = Chat::open_blocking(&gpu, &flags.model, flags.capacity)?;
    let sampling = Sampling { temperature: flags.temperature, seed: flags.seed, ..Default::default() };
    *chat.options_mut() = GenerationOptions { max_tokens: flags.tokens, sampling, ..Default::default() };
    if let Some(system) = flags.system {
        chat.set_system(system);
    }
    prompt()?;
    for line in std::io::stdin().lines() {
        for piece in chat.say(line?)?.blocking() {
            print!("{}", piece?);
            std::io::stdout().flush()?;
        }
        println!();
        prompt()?;
    }
    Ok(())
}

/// Asks whoever sits there for the next message.
fn prompt() -> std::io::Result<()> {
    if std::io::stdin().is_terminal() {
        print!("> ");
    }
    std::io::stdout().flush()
}
