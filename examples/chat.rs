//! Chats with a model: reads your messages line by line, prints its replies as they come, and remembers what was said.
//!
//! Ctrl-C stops a reply, not the program. Lines that begin with a slash are commands: `/help` lists them.
//!
//! `cargo run --release --example chat -- --model FILE.gguf --system "Answer in one sentence."`
//! `cargo run --release --example chat -- --model FILE.gguf --adapter FOLDER`

#[macro_use]
#[path = "shared/cli.rs"]
mod cli;
#[path = "shared/storage.rs"]
mod storage;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Parser;
use throughline::Gpu;
use throughline::decode::sample::Sampling;
use throughline::decode::{Chat, DecodeOptions, Decoder, GenerationOptions};
use throughline::model::{Adapter, Model};
use throughline::nn::AdapterSlots;
use throughline::tokenize::ModelTokenizer;

const HELP: &str = "\
/adapter FILE    speak with this adapter: a folder of peft's, or a GGUF file
/adapter         speak without one
/history         show what was said
/reset           forget what was said
/quit            end the program, as Ctrl-D does";

#[derive(Parser)]
#[command(about = "Chat with a GGUF file or a Hugging Face model folder that has a chat template")]
struct Flags {
    /// GGUF file, or folder with config.json, safetensors and a tokenizer
    #[arg(long)]
    model: PathBuf,
    /// Adapter to speak with: a folder of peft's, or a GGUF file
    #[arg(long)]
    adapter: Option<PathBuf>,
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
    #[command(flatten)]
    storage: storage::Storage,
}

/// A chat, and what it takes to make it anew with more room for adapters.
struct Session {
    gpu: Gpu,
    model: Model,
    tokenizer: Arc<ModelTokenizer>,
    options: DecodeOptions<'static>,
    /// The largest rank of an adapter that there is room for.
    rank: usize,
    chat: Chat,
}

/// What Ctrl-C does: it stops a reply if there is one, and otherwise the program.
#[derive(Default)]
struct Interrupts {
    replying: AtomicBool,
    stop: AtomicBool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let interrupts = Arc::new(Interrupts::default());
    let handler = interrupts.clone();
    ctrlc::set_handler(move || match handler.replying.load(Ordering::SeqCst) {
        true => handler.stop.store(true, Ordering::SeqCst),
        false => std::process::exit(130),
    })
    .context("setting the Ctrl-C handler")?;
    let mut session = Session::open(&flags)?;
    prompt()?;
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.split_once(char::is_whitespace).map_or((line.as_str(), ""), |(first, rest)| (first, rest.trim())) {
            ("/quit", _) => break,
            ("/help", _) => println!("{HELP}"),
            ("/reset", _) => session.reset(),
            ("/history", _) => {
                session.chat.messages().iter().for_each(|m| println!("{}: {}", m.role, m.content.trim()));
            }
            ("/adapter", file) => {
                let file = (!file.is_empty()).then(|| Path::new(file));
                if let Err(error) = session.use_adapter(file) {
                    println!("{error}");
                }
            }
            (command, _) if command.starts_with('/') => println!("{command} is no command\n{HELP}"),
            _ if line.trim().is_empty() => {}
            _ => session.answer(line, &interrupts)?,
        }
        prompt()?;
    }
    Ok(())
}

impl Session {
    fn open(flags: &Flags) -> anyhow::Result<Self> {
        let gpu = Gpu::headless_blocking()?;
        let model = Model::open(&flags.model)?;
        let tokenizer = Arc::new(ModelTokenizer::of(model.weights())?);
        let options = flags.storage.options(flags.capacity);
        let mut chat = Chat::new(decoder(&gpu, &model, options, 0)?, tokenizer.clone())?;
        let sampling = Sampling { temperature: flags.temperature, seed: flags.seed, ..Default::default() };
        *chat.options_mut() = GenerationOptions { max_tokens: flags.tokens, sampling, ..Default::default() };
        if let Some(system) = &flags.system {
            chat.set_system(system);
        }
        let mut session = Session { gpu, model, tokenizer, options, rank: 0, chat };
        if let Some(adapter) = &flags.adapter {
            session.use_adapter(Some(adapter))?;
        }
        Ok(session)
    }

    /// Prints the reply to a message, until it ends or is stopped.
    fn answer(&mut self, message: String, interrupts: &Interrupts) -> anyhow::Result<()> {
        interrupts.replying.store(true, Ordering::SeqCst);
        for piece in self.chat.say(message)?.blocking() {
            print!("{}", piece?);
            std::io::stdout().flush()?;
            if interrupts.stop.swap(false, Ordering::SeqCst) {
                break;
            }
        }
        interrupts.replying.store(false, Ordering::SeqCst);
        println!();
        Ok(())
    }

    /// Forgets all but the system message.
    fn reset(&mut self) {
        self.chat.messages_mut().retain(|message| message.role == "system");
    }

    /// Speaks with the adapter of a file from now on, or without one.
    fn use_adapter(&mut self, file: Option<&Path>) -> anyhow::Result<()> {
        let Some(file) = file else { return Ok(self.chat.set_adapter(None)?) };
        let adapter = Adapter::open(file, &self.model)?;
        let rank = adapter.layers().map(|(_, layer)| layer.rank).max().unwrap_or(0);
        if rank > self.rank {
            // A decoder has room for the ranks that it was made for.
            let mut larger = Chat::new(decoder(&self.gpu, &self.model, self.options, rank)?, self.tokenizer.clone())?;
            *larger.options_mut() = self.chat.options().clone();
            *larger.messages_mut() = self.chat.messages().to_vec();
            (self.chat, self.rank) = (larger, rank);
        }
        Ok(self.chat.set_adapter(Some(&adapter))?)
    }
}

/// A decoder with room for an adapter of this rank; none for 0.
fn decoder(gpu: &Gpu, model: &Model, options: DecodeOptions<'_>, rank: usize) -> throughline::Result<Decoder> {
    let slots = AdapterSlots::new(1, rank);
    let adapters = (rank > 0).then_some(&slots);
    Decoder::new_blocking(gpu, model, DecodeOptions { adapters, ..options })
}

/// Asks whoever sits there for the next message.
fn prompt() -> std::io::Result<()> {
    if std::io::stdin().is_terminal() {
        print!("> ");
    }
    std::io::stdout().flush()
}
