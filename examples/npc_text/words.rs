//! The language model of the characters, and its tokens.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use throughline::Gpu;
use throughline::decode::{DecodeOptions, Decoder};
use throughline::model::Model;
use throughline::nn::{Init, TransformerConfig};
use throughline::optim::{AdamWConfig, Arena, ArenaLayout, Decay, Schedule};
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::{CharTokenizer, Dataset};
use throughline::train::{TrainConfig, Trainer};

/// Capacity of a character's context, in tokens.
const CAPACITY: usize = 128;
/// Most tokens that a character says at a time.
pub const MAX_TOKENS: usize = 48;

/// The tokenizer of the model.
pub enum Words {
    Characters(CharTokenizer),
    Pieces(Box<ModelTokenizer>),
}

impl Words {
    /// The prompt for a character with this name to answer what it heard. If it exceeds `room` tokens, only the end is
    /// kept.
    pub fn prompt(&self, name: &str, heard: &str, room: usize) -> Result<Vec<u32>> {
        let ids = match self {
            // Drops characters that are not in the model's alphabet.
            Words::Characters(t) => {
                let letters = format!("{heard}\n\n{name}:\n");
                letters.chars().filter_map(|c| t.encode(&c.to_string()).ok()).flatten().collect()
            }
            Words::Pieces(t) if t.has_chat() => {
                let text = format!("You are {name} in a play. Answer in a few words: {heard}");
                t.chat_ids(&[Message::new("user", &text)], true)?
            }
            Words::Pieces(t) => t.encode(&format!("{heard}\n\n{name}:\n"), true)?,
        };
        Ok(ids[ids.len().saturating_sub(room)..].to_vec())
    }

    pub fn text(&self, ids: &[u32]) -> Result<String> {
        Ok(match self {
            Words::Characters(t) => t.decode(ids),
            Words::Pieces(t) => t.decode(ids, true)?.replace('\n', " "),
        })
    }

    /// Tokens that end a speech.
    pub fn stop(&self) -> Vec<u32> {
        match self {
            Words::Characters(t) => t.encode("\n").unwrap_or_default(),
            Words::Pieces(t) => t.stop_tokens().to_vec(),
        }
    }
}

/// A decoder for this many characters, with a pretrained model or a checkpoint of the `train` example.
pub fn load(gpu: &Gpu, path: &Path, characters: usize) -> Result<(Decoder, Words)> {
    let room = |context: usize| DecodeOptions { batch: characters, ..DecodeOptions::new(context.min(CAPACITY)) };
    if crate::model::is_pretrained(path)? {
        let model = Model::open(path)?;
        let words = Words::Pieces(Box::new(ModelTokenizer::of(model.weights())?));
        return Ok((Decoder::new_blocking(gpu, &model, room(model.config().context))?, words));
    }
    let path = if path.is_dir() { path.join("checkpoint.safetensors") } else { path.to_path_buf() };
    let checkpoint = Checkpoint::load(&path)?;
    let config = &checkpoint.state.config.model;
    let layout = ArenaLayout::of_model(config, gpu.profile().max_tensor_bytes())?;
    let params = Arena::zeros(gpu, "parameters", &Arc::new(layout))?;
    checkpoint.restore_weights_blocking(gpu, &params)?;
    let words = Words::Characters(CharTokenizer::of(&checkpoint.state.alphabet));
    Ok((gpu.run_blocking(Decoder::on_params(gpu, config, &params, room(config.context)))?, words))
}

/// The same with a small model that is trained for this many steps to write plays, character by character.
pub fn train(gpu: &Gpu, steps: u64, characters: usize) -> Result<(Decoder, Words)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/shakespeare.txt");
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let tokenizer = CharTokenizer::of(&text);
    let model = TransformerConfig {
        init: Init::Gpt2 { std: 0.1 },
        tied_head: true,
        ..TransformerConfig::llama(tokenizer.vocab_size(), CAPACITY, 2, 64, 4)
    };
    let config = TrainConfig {
        schedule: Schedule { peak: 6e-3, warmup: steps / 20, steps, final_fraction: 0.1, decay: Decay::Cosine },
        adamw: AdamWConfig { beta2: 0.98, ..AdamWConfig::default() },
        seed: 1,
        ..TrainConfig::new(model, 4)
    };
    let data = Dataset::new(tokenizer.encode(&text)?, 0.1, CAPACITY)?;
    let mut trainer = Trainer::new_blocking(gpu, config)?;
    for step in 0..steps {
        let loss = trainer.step(&[data.batch(1, step, 4, CAPACITY)?])?;
        // Wait now and then, so that not too many steps are in flight.
        if step % 50 == 49 || step + 1 == steps {
            eprintln!("step {}: loss {:.3}", step + 1, loss.wait_blocking()?);
        }
    }
    let options = DecodeOptions { batch: characters, ..DecodeOptions::new(CAPACITY) };
    let decoder = gpu.run_blocking(Decoder::on_params(gpu, &trainer.config().model, trainer.params(), options))?;
    Ok((decoder, Words::Characters(tokenizer)))
}
