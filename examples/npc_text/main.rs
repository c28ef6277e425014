//! A game loop without a window, in which characters talk to each other. Each frame records as much of the language
//! model's work as a time budget allows, and no frame waits for it. Each character has an adapter of its own, trained on
//! the lines that it has in its play; of the model beneath there is one.
//!
//! `cargo run --release --example npc_text`, optionally with `-- --model` and a GGUF file, model folder or checkpoint

#[macro_use]
#[path = "../shared/cli.rs"]
mod cli;
#[path = "../shared/model.rs"]
mod model;
#[path = "../shared/storage.rs"]
mod storage;
mod words;
mod world;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use throughline::decode::sample::Sampling;
use throughline::decode::{DecodeOptions, Event, FrameDecoder, GenerationOptions};
use throughline::model::Adapter;
use throughline::rng::Rng;
use throughline::{Gpu, Pace};
use words::{CAPACITY, Cast, NAMES, Words};
use world::World;

#[derive(Parser)]
#[command(about = "Run a game loop in which characters talk, within a time budget per frame")]
struct Flags {
    /// GGUF file, folder with config.json and safetensors, or checkpoint of `train` [default: train a small one]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Adapter of a character, for the model: a folder of peft's, or a GGUF file; once for each of the first characters,
    /// then in turn
    #[arg(long, value_name = "FILE", requires = "model")]
    adapter: Vec<PathBuf>,
    /// Training steps of the model that is trained first
    #[arg(long, default_value_t = 300, conflicts_with = "model")]
    train_steps: u64,
    /// Training steps of each character's adapter for that model; 0 for characters that all talk alike
    #[arg(long, default_value_t = 60, conflicts_with = "model")]
    adapter_steps: u64,
    /// Number of characters
    #[arg(long, default_value_t = 4)]
    characters: usize,
    /// Frames with speech; the same number of silent frames comes first, for comparison
    #[arg(long, default_value_t = 600)]
    frames: usize,
    /// GPU time that speech may take per frame, in microseconds
    #[arg(long, default_value_t = 2000)]
    budget_us: u64,
    #[command(flatten)]
    storage: storage::Storage,
    /// Print the results as JSON on the last line
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(flags: Flags) -> Result<()> {
    ensure!(flags.characters > 0, "--characters must be at least 1");
    ensure!(flags.frames > 0, "--frames must be at least 1");
    ensure!(flags.train_steps > 0, "--train-steps must be at least 1");
    // A game would call `Gpu::from_device` with the device it draws with.
    let gpu = Gpu::headless_blocking()?;
    let options = DecodeOptions { batch: flags.characters, ..flags.storage.options(CAPACITY) };
    let Cast { decoder, words, adapters } = match &flags.model {
        Some(path) => words::load(&gpu, path, &flags.adapter, options)?,
        None => words::train(&gpu, [flags.train_steps, flags.adapter_steps], options)?,
    };
    let bytes = |adapter: &Adapter| adapter.layers().map(|(_, layer)| 4 * (layer.a.len() + layer.b.len())).sum();
    let weight_bytes = decoder.weight_bytes();
    let adapter_bytes: Vec<usize> = adapters.iter().map(bytes).collect();
    let mut cast = FrameDecoder::new_blocking(decoder)?;
    // They are written in the first frames, a part in each.
    for (slot, adapter) in adapters.into_iter().enumerate() {
        cast.load_adapter(slot, adapter)?;
    }
    if !adapter_bytes.is_empty() {
        for i in 0..flags.characters {
            cast.set_adapter(i, Some(i % adapter_bytes.len()))?;
        }
    }
    let mut game = Game::new(&gpu, cast, words, &flags)?;
    let silent = (0..flags.frames).map(|_| game.frame(false)).collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let talking = (0..flags.frames).map(|_| game.frame(true)).collect::<Result<Vec<_>>>()?;
    let seconds = start.elapsed().as_secs_f64();
    if flags.json {
        let (ms, usual) = ([&silent, &talking].map(|times| percentiles(times)), median(&silent));
        let budget = usual + Duration::from_micros(flags.budget_us);
        let over = talking.iter().filter(|time| **time > budget).count();
        let [token, chunk] = game.cast.estimates().map(|time| time.as_micros() as u64);
        let figures = serde_json::json!({
            "adapter": gpu.describe(),
            "characters": flags.characters,
            // Of one model, and of the adapters beside it.
            "weight_bytes": weight_bytes,
            "adapter_bytes": adapter_bytes,
            "frames": flags.frames,
            "budget_us": flags.budget_us,
            "pass_us": { "token": token, "prompt": chunk },
            "frame_ms": { "silent": ms[0], "talking": ms[1] },
            // Share of frames that took longer than a silent frame plus the budget.
            "over_budget": over as f64 / flags.frames as f64,
            "texts": game.texts,
            "tokens": game.tokens,
            "tokens_per_frame": game.tokens as f64 / flags.frames as f64,
            "tokens_per_s": game.tokens as f64 / seconds,
        });
        println!("{figures}");
    }
    Ok(())
}

struct Game {
    gpu: Gpu,
    world: World,
    cast: FrameDecoder,
    words: Words,
    options: GenerationOptions,
    pace: Pace,
    characters: Vec<Character>,
    /// The last thing anyone said.
    heard: String,
    rng: Rng,
    texts: usize,
    tokens: usize,
    live: bool,
}

struct Character {
    name: String,
    ids: Vec<u32>,
    said: String,
    /// Frames of silence before it speaks again.
    pause: usize,
}

impl Game {
    fn new(gpu: &Gpu, cast: FrameDecoder, words: Words, flags: &Flags) -> Result<Game> {
        let character = |i: usize| Character {
            name: NAMES[i % NAMES.len()].into(),
            ids: vec![],
            said: String::new(),
            pause: 3 * i,
        };
        let options = GenerationOptions { max_tokens: words::MAX_TOKENS, stop: words.stop(), ..Default::default() };
        // On a terminal, each character has a row that is updated in place.
        let live = std::io::stdout().is_terminal();
        print!("{}", if live { "\n".repeat(flags.characters) } else { String::new() });
        Ok(Game {
            gpu: gpu.clone(),
            world: World::new(gpu),
            cast,
            words,
            options,
            pace: Pace::new(gpu, Duration::from_micros(flags.budget_us))?,
            characters: (0..flags.characters).map(character).collect(),
            heard: "Who is there?".into(),
            rng: Rng::new(&[1]),
            texts: 0,
            tokens: 0,
            live,
        })
    }

    /// Runs a frame and returns how long it took until the GPU had finished.
    fn frame(&mut self, talking: bool) -> Result<Duration> {
        let start = Instant::now();
        // Poll first, so that this frame continues from the tokens that earlier ones have produced.
        let events = self.cast.poll()?;
        let mut encoder = self.gpu.device().create_command_encoder(&Default::default());
        self.world.record(&mut encoder);
        if talking {
            self.take_turns()?;
            let may = self.pace.begin(&mut encoder)?;
            let taken = self.cast.record(&mut encoder, may)?;
            self.pace.end(&mut encoder, taken)?;
        }
        let submitted = self.gpu.submit(encoder)?;
        self.gpu.wait_for_blocking(submitted)?; // stands in for presenting the frame
        let time = start.elapsed();
        self.take_up(&events)?;
        Ok(time)
    }

    /// Starts the characters whose pause is over.
    fn take_turns(&mut self) -> Result<()> {
        for (i, character) in self.characters.iter_mut().enumerate() {
            if self.cast.speaks(i) {
                continue;
            }
            if character.pause > 0 {
                character.pause -= 1;
                continue;
            }
            let sampling = Sampling { seed: self.rng.below(1 << 32), ..self.options.sampling };
            let capacity = self.cast.decoder().capacity();
            let room = capacity - self.options.max_tokens.min(capacity / 2);
            let prompt = self.words.prompt(&character.name, &self.heard, room)?;
            self.cast.say(i, &prompt, GenerationOptions { sampling, ..self.options.clone() })?;
            character.ids.clear();
        }
        Ok(())
    }

    fn take_up(&mut self, events: &[(usize, Event)]) -> Result<()> {
        for &(i, event) in events {
            let character = &mut self.characters[i];
            match event {
                Event::Token(id) => {
                    character.ids.push(id);
                    character.said = self.words.text(&character.ids)?;
                    self.tokens += 1;
                }
                Event::Finished(_) => {
                    self.texts += 1;
                    character.pause = 5 + self.rng.below(20) as usize;
                    if !self.live {
                        println!("{}: {}", character.name, character.said);
                    }
                    self.heard.clone_from(&character.said);
                }
            }
        }
        if self.live && !events.is_empty() {
            let rows = self.characters.iter().map(|c| format!("\x1b[2K{}: {:.100}\n", c.name, c.said));
            print!("\x1b[{}A{}", self.characters.len(), rows.collect::<String>());
            std::io::stdout().flush()?;
        }
        Ok(())
    }
}

fn sorted(times: &[Duration]) -> Vec<Duration> {
    let mut times = times.to_vec();
    times.sort();
    times
}

fn median(times: &[Duration]) -> Duration {
    sorted(times)[times.len() / 2]
}

/// Percentiles in milliseconds.
fn percentiles(times: &[Duration]) -> serde_json::Value {
    let times = sorted(times);
    let at = |share: f64| times[((share * times.len() as f64).ceil() as usize).max(1) - 1].as_secs_f64() * 1e3;
    serde_json::json!({ "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1.0) })
}
