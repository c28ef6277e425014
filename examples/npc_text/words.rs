//! The language model of the characters, and its tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use throughline::Gpu;
use throughline::decode::{AdapterSlots, DecodeOptions, Decoder};
use throughline::model::{Adapter, Model, save_arena_blocking};
use throughline::nn::{Init, Lora, TransformerConfig};
use throughline::optim::{AdamWConfig, Arena, ArenaLayout, Decay, Schedule};
use throughline::tokenize::{Message, ModelTokenizer};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::{CharTokenizer, Dataset};
use throughline::train::{TrainConfig, TrainOptions, Trainer};

/// Capacity of a character's context, in tokens.
pub const CAPACITY: usize = 128;
/// Most tokens that a character says at a time.
pub const MAX_TOKENS: usize = 48;

/// The characters, who have at least a hundred speeches each.
pub const NAMES: [&str; 8] = ["BRUTUS", "MACBETH", "DUKE", "OTHELLO", "IAGO", "CASSIUS", "DESDEMONA", "MENENIUS"];
/// Rank of their adapters.
const RANK: usize = 8;

/// Who talks: a model with a sequence for each, and the adapters of the first of them.
pub struct Cast {
    pub decoder: Decoder,
    pub words: Words,
    pub adapters: Vec<Adapter>,
}

impl Cast {
    /// Characters who all talk alike.
    fn alike(decoder: Decoder, words: Words) -> Self {
        Cast { decoder, words, adapters: vec![] }
    }
}

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

/// A decoder with a pretrained model and adapters for it, or a checkpoint of the `train` example.
pub fn load(gpu: &Gpu, path: &Path, adapters: &[PathBuf], options: DecodeOptions<'_>) -> Result<Cast> {
    let room = |context: usize| DecodeOptions { capacity: options.capacity.min(context), ..options };
    if crate::model::is_pretrained(path)? {
        let model = Model::open(path)?;
        let words = Words::Pieces(Box::new(ModelTokenizer::of(model.weights())?));
        let adapters = adapters.iter().map(|path| Ok(Adapter::open(path, &model)?)).collect::<Result<Vec<_>>>()?;
        let slots = AdapterSlots::new(adapters.len(), adapters.iter().map(Adapter::max_rank).max().unwrap_or(0));
        let adapters_of = (!adapters.is_empty()).then_some(&slots);
        let options = DecodeOptions { adapters: adapters_of, ..room(model.config().context) };
        return Ok(Cast { decoder: Decoder::new_blocking(gpu, &model, options)?, words, adapters });
    }
    ensure!(adapters.is_empty(), "--adapter is for a pretrained model, not for a checkpoint: {}", path.display());
    let path = if path.is_dir() { path.join("checkpoint.safetensors") } else { path.to_path_buf() };
    let checkpoint = Checkpoint::load(&path)?;
    let config = &checkpoint.state.config.model;
    let layout = ArenaLayout::of_model(config, gpu.profile().max_tensor_bytes())?;
    let params = Arena::zeros(gpu, "parameters", &Arc::new(layout))?;
    checkpoint.restore_weights_blocking(gpu, &params)?;
    let words = Words::Characters(CharTokenizer::of(&checkpoint.state.alphabet));
    Ok(Cast::alike(gpu.run_blocking(Decoder::on_params(gpu, config, &params, room(config.context)))?, words))
}

/// The same with a small model that is trained to write plays, character by character, and an adapter for each speaker:
/// for this many steps each.
pub fn train(gpu: &Gpu, [steps, adapter_steps]: [u64; 2], options: DecodeOptions<'_>) -> Result<Cast> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/shakespeare.txt");
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let tokenizer = CharTokenizer::of(&text);
    let model = TransformerConfig {
        init: Init::Gpt2 { std: 0.1 },
        tied_head: true,
        ..TransformerConfig::llama(tokenizer.vocab_size(), CAPACITY, 2, 64, 4)
    };
    let config = TrainConfig {
        schedule: schedule(6e-3, steps),
        adamw: AdamWConfig { beta2: 0.98, ..AdamWConfig::default() },
        seed: 1,
        ..TrainConfig::new(model, 4)
    };
    let mut trainer = Trainer::new_blocking(gpu, config)?;
    run(&mut trainer, steps, "the model", &tokenizer.encode(&text)?)?;
    if adapter_steps == 0 {
        let decoder = gpu.run_blocking(Decoder::on_params(gpu, &trainer.config().model, trainer.params(), options))?;
        return Ok(Cast::alike(decoder, Words::Characters(tokenizer)));
    }
    // Adapters are for a model in a file.
    let folder = tempfile::tempdir()?;
    save_arena_blocking(folder.path(), &trainer.config().model, gpu, trainer.params())?;
    let base = Arc::new(Model::open(folder.path())?);
    let mut adapters = vec![];
    for name in NAMES.into_iter().take(options.batch) {
        let config = TrainConfig {
            schedule: schedule(3e-3, adapter_steps),
            lora: Some(Lora::new(RANK, 2.0 * RANK as f32)),
            ..trainer.config().clone()
        };
        let options = TrainOptions { base: Some(base.clone()), ..TrainOptions::default() };
        let mut tuned = Trainer::with_options_blocking(gpu, config, &options)?;
        run(&mut tuned, adapter_steps, name, &tokenizer.encode(&speeches(&text, name))?)?;
        adapters.push(tuned.adapter_blocking()?);
    }
    let slots = AdapterSlots::new(adapters.len(), RANK);
    let decoder = Decoder::new_blocking(gpu, &base, DecodeOptions { adapters: Some(&slots), ..options })?;
    Ok(Cast { decoder, words: Words::Characters(tokenizer), adapters })
}

fn schedule(peak: f64, steps: u64) -> Schedule {
    Schedule { peak, warmup: steps / 20, steps, final_fraction: 0.1, decay: Decay::Cosine }
}

/// Trains for this many steps on a text.
fn run(trainer: &mut Trainer, steps: u64, what: &str, ids: &[u32]) -> Result<()> {
    let data = Dataset::new(ids.to_vec(), 0.1, CAPACITY)?;
    for step in 0..steps {
        let loss = trainer.step(&[data.batch(1, step, 4, CAPACITY)?])?;
        // Wait now and then, so that not too many steps are in flight.
        if step % 50 == 49 || step + 1 == steps {
            eprintln!("{what}, step {}: loss {:.3}", step + 1, loss.wait_blocking()?);
        }
    }
    Ok(())
}

/// What someone says in a play, with the name before each speech.
fn speeches(text: &str, name: &str) -> String {
    let begins = format!("{name}:\n");
    let own = text.split("\n\n").filter(|speech| speech.starts_with(&begins));
    own.map(|speech| format!("{speech}\n\n")).collect()
}
