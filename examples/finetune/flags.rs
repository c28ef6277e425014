//! The flags, and the run that they describe.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use throughline::format::Stored;
use throughline::model::{Model, TensorTypes};
use throughline::nn::Lora;
use throughline::optim::{AdamWConfig, Decay, Schedule};
use throughline::tokenize::ModelTokenizer;
use throughline::train::checkpoint::{Checkpoint, text_hash};
use throughline::train::data::{Batches, Examples};
use throughline::train::{TrainConfig, TrainOptions};

use crate::precision::PrecisionFlag;

#[derive(Parser)]
#[command(about = "Fine-tune a pretrained model on chats, completions or texts")]
pub struct Flags {
    /// A GGUF file, or a folder with config.json and safetensors
    #[arg(long)]
    pub model: PathBuf,
    /// Examples: .jsonl with `messages`, `prompt` and `completion`, or `text` in each line, or a .txt file
    #[arg(long, alias = "text")]
    pub data: PathBuf,
    /// Examples for validation, in a file of their own
    #[arg(long, conflicts_with = "val_fraction")]
    pub val_data: Option<PathBuf>,
    /// Share of the examples that is held out for validation; 0 for none
    #[arg(long, default_value_t = 0.1)]
    pub val_fraction: f64,
    /// Folder for the adapter, or the model, and the checkpoint
    #[arg(long, required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,
    /// Rank of the adapters; 0 trains all weights
    #[arg(long, default_value_t = 8)]
    pub lora_rank: usize,
    /// The adapters' output is scaled by this over their rank [default: twice the rank]
    #[arg(long)]
    pub lora_alpha: Option<f32>,
    /// Probability of dropping an input of the adapters
    #[arg(long, default_value_t = 0.0)]
    pub lora_dropout: f32,
    /// Scale by alpha over the root of the rank
    #[arg(long)]
    pub rslora: bool,
    /// Layers to adapt, as in q_proj,v_proj
    #[arg(long, value_delimiter = ',', default_value = "all-linear")]
    pub target_modules: Vec<String>,
    /// Modules to train whole besides, as in embed_tokens,norm
    #[arg(long, value_delimiter = ',')]
    pub modules_to_save: Vec<String>,
    /// How often to go through the examples [default: 3]
    #[arg(long, conflicts_with = "steps")]
    pub epochs: Option<f64>,
    /// Training steps
    #[arg(long)]
    pub steps: Option<u64>,
    /// Sequences of a batch
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Batches of a step
    #[arg(long, default_value_t = 1)]
    pub micro_batches: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256)]
    pub seq_len: usize,
    /// One example to a sequence, rather than as many as fit
    #[arg(long)]
    pub no_packing: bool,
    /// Peak learning rate [default: 2e-4 for adapters, 2e-5 for all weights]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Seed of adapters, order and dropout
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How activations and gradients are stored; what is trained and its moments are f32
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: PrecisionFlag,
    /// Most memory to take on the device, as in 800M or 6G: what does not fit is computed twice
    #[arg(long, value_parser = bytes)]
    pub max_memory: Option<u64>,
    /// Steps between validations [default: ten in the run]
    #[arg(long)]
    pub eval_every: Option<u64>,
    /// Stop after so many validations without a lower loss
    #[arg(long)]
    pub patience: Option<usize>,
    /// Go on from the checkpoint in --out with its settings, but for --steps or --epochs
    #[arg(long)]
    pub resume: bool,
    /// Whole model to write in the end: a .gguf file, or a folder of safetensors
    #[arg(long)]
    pub export: Option<PathBuf>,
    /// Type of the matrices in a .gguf file, as in Q8_0 or F16 [default: as the model has them]
    #[arg(long, requires = "export")]
    pub export_type: Option<String>,
    /// Say what would be done, and what it takes
    #[arg(long)]
    pub dry_run: bool,
    /// Print the results as JSON on the last line
    #[arg(long)]
    pub json: bool,
}

/// What is to be trained.
pub struct Job {
    pub model: Arc<Model>,
    pub config: TrainConfig,
    pub batches: Batches,
    pub validation: Option<Batches>,
    /// Where to go on from.
    pub checkpoint: Option<Checkpoint>,
    /// Tells the data from others.
    pub data_hash: u64,
}

/// A number of bytes, with or without a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim().trim_end_matches(['B', 'b']);
    let split = text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len());
    let unit = match text[split..].to_ascii_uppercase().trim_end_matches('I') {
        "" => 1.0,
        "K" => 1024.0,
        "M" => 1024.0 * 1024.0,
        "G" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("expected a number of bytes, as in 800M or 6G".into()),
    };
    match text[..split].trim().parse::<f64>() {
        Ok(number) if number > 0.0 => Ok((number * unit) as u64),
        _ => Err("expected a number of bytes, as in 800M or 6G".into()),
    }
}

impl Flags {
    /// Checks what needs no files.
    pub fn check(&self) -> Result<()> {
        for (flag, value) in [("steps", self.steps), ("eval-every", self.eval_every)] {
            ensure!(value != Some(0), "--{flag} must be at least 1");
        }
        self.export_types()?;
        ensure!(self.epochs.is_none_or(|epochs| epochs > 0.0), "--epochs must be above 0");
        if let Some(out) = &self.out {
            ensure!(!out.is_file(), "--out {} is a file; name a folder", out.display());
        }
        if let Some(file) = self.export.as_deref().filter(|path| is_gguf(path)) {
            crate::cli::check_output(Some(file))?;
        }
        Ok(())
    }

    /// The types of the tensors in an exported file.
    pub fn export_types(&self) -> Result<TensorTypes> {
        let Some(name) = &self.export_type else { return Ok(TensorTypes::Keep) };
        let found = Stored::ALL.into_iter().find(|stored| stored.name().eq_ignore_ascii_case(name));
        let names = || Stored::ALL.map(Stored::name).join(", ");
        let stored = found.with_context(|| format!("--export-type {name}: expected one of {}", names()))?;
        Ok(TensorTypes::Matrices(stored))
    }

    /// Opens model and data.
    pub fn job(&self) -> Result<Job> {
        let model = Arc::new(Model::open(&self.model)?);
        let tokenizer = ModelTokenizer::of(model.weights())?;
        let examples = Examples::read(&self.data, &tokenizer)?;
        let [train, val] = match &self.val_data {
            Some(path) => [examples, Examples::read(path, &tokenizer)?],
            None => examples.split(self.val_fraction, self.seed)?,
        };
        let data = std::fs::read(&self.data).with_context(|| format!("reading {}", self.data.display()))?;
        let data_hash = text_hash(&String::from_utf8_lossy(&data));
        let checkpoint = match (&self.out, self.resume) {
            (Some(out), true) => Some(Checkpoint::load(&crate::run::checkpoint_path(out))?),
            _ => None,
        };
        let mut config = match &checkpoint {
            Some(checkpoint) => checkpoint.state.config.clone(),
            None => self.config(&model)?,
        };
        if let Some(checkpoint) = &checkpoint {
            let same = checkpoint.state.text_hash == data_hash;
            ensure!(same, "{} is not the data of this checkpoint; pass that with --data", self.data.display());
        }
        let batches = Batches::new(train, &config)?;
        match (&checkpoint, self.steps, self.epochs) {
            (Some(_), None, None) => {}
            (Some(_), steps, epochs) => {
                config.schedule.steps = steps.unwrap_or_else(|| batches.steps(epochs.unwrap_or_default()));
            }
            (None, steps, epochs) => {
                let steps = steps.unwrap_or_else(|| batches.steps(epochs.unwrap_or(3.0)));
                config.schedule = Schedule { warmup: steps / 20, steps, ..config.schedule };
            }
        }
        let validation = if val.is_empty() { None } else { Some(Batches::new(val, &config)?) };
        Ok(Job { model, config, batches, validation, checkpoint, data_hash })
    }

    /// The settings, but for the number of steps.
    fn config(&self, model: &Model) -> Result<TrainConfig> {
        let lora = match self.lora_rank {
            0 => None,
            rank => {
                let settings = Lora {
                    rank_stabilized: self.rslora,
                    dropout: self.lora_dropout,
                    trained: self.modules_to_save.clone(),
                    ..Lora::new(rank, self.lora_alpha.unwrap_or(2.0 * rank as f32))
                };
                let targets: Vec<&str> = self.target_modules.iter().map(|name| &name[..]).collect();
                Some(model.lora(settings, &targets)?)
            }
        };
        let lr = self.lr.unwrap_or(if lora.is_some() { 2e-4 } else { 2e-5 });
        let schedule = Schedule { peak: lr, warmup: 0, steps: 1, final_fraction: 0.1, decay: Decay::Cosine };
        Ok(TrainConfig {
            lora,
            seq_len: Some(self.seq_len.min(model.config().context)),
            micro_batches: self.micro_batches,
            packing: !self.no_packing,
            schedule,
            adamw: AdamWConfig { weight_decay: 0.01, beta2: 0.999, ..AdamWConfig::default() },
            seed: self.seed,
            precision: self.precision.into(),
            ..TrainConfig::new(model.config().clone(), self.batch)
        })
    }
}

impl Job {
    pub fn options(&self, flags: &Flags) -> TrainOptions<'static> {
        let base = self.config.lora.as_ref().map(|_| self.model.clone());
        let init = base.is_some() && self.checkpoint.is_none();
        TrainOptions { base, init, max_bytes: flags.max_memory, ..TrainOptions::default() }
    }
}

pub fn is_gguf(path: &std::path::Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}
