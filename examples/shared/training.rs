//! Shared by the training examples: flags, the training loop, progress and checkpoints.
#![allow(dead_code)] // each example uses a part

#[path = "precision.rs"]
mod precision;

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use throughline::decode::sample::Sampling;
use throughline::decode::{Decoder, GenerationOptions};
use throughline::nn::{Biases, Init, Mlp, Norm, NormPlacement, TransformerConfig};
use throughline::optim::{AdamWConfig, Decay, MuonConfig, Schedule};
use throughline::train::checkpoint::{Checkpoint, RunState, text_hash};
use throughline::train::data::{Batch, CharTokenizer, Dataset};
use throughline::train::{StepLoss, TrainConfig, TrainOptions, TrainPlan, Trainer};
use throughline::{Gpu, Precision, Tuner};

use self::precision::PrecisionFlag;

/// Fraction of the text held out for validation.
const VAL_FRACTION: f64 = 0.1;

/// File with one line of JSON per validation.
const LOG: &str = "log.jsonl";

/// Steps in flight before the loop waits for the oldest.
const IN_FLIGHT: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NormFlag {
    Pre,
    Post,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum InitFlag {
    /// Normally distributed weights; projections into the stream are scaled down with depth
    Gpt2,
    /// Projections into the stream start at zero
    Zero,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OptimizerFlag {
    Adamw,
    /// Muon for the matrices in blocks, AdamW for the rest
    Muon,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PartsFlag {
    /// LayerNorm, learned positions, GELU, biases
    Gpt2,
    /// RMSNorm, RoPE, SwiGLU, no biases
    Llama,
    /// LayerNorm, RoPE, SwiGLU, biases: this learned fastest in our trials
    Mixed,
}

/// Flags of a training run. The defaults are in brackets; with --resume, the checkpoint has them.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainFlags {
    /// UTF-8 text file to train on [default: examples/data/shakespeare.txt]
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Training steps [default: 1600]
    #[arg(long)]
    pub steps: Option<u64>,
    /// Number of blocks [default: 3]
    #[arg(long)]
    pub layers: Option<usize>,
    /// Width of the residual stream [default: 64]
    #[arg(long)]
    pub dim: Option<usize>,
    /// Attention heads per block [default: 4]
    #[arg(long)]
    pub heads: Option<usize>,
    /// Key/value heads per block [default: the same as --heads]
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// Sequence length in characters [default: 64]
    #[arg(long)]
    pub context: Option<usize>,
    /// Sequences per micro-batch [default: 8]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Micro-batches per step; their gradients are averaged [default: 1]
    #[arg(long)]
    pub micro_batches: Option<usize>,
    /// Peak learning rate [default: 0.006]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Optimiser [default: adamw]
    #[arg(long, value_enum)]
    pub optimizer: Option<OptimizerFlag>,
    /// Muon's learning rate as a multiple of --lr [default: 1]
    #[arg(long)]
    pub muon_factor: Option<f64>,
    /// Dropout probability [default: 0]
    #[arg(long)]
    pub dropout: Option<f32>,
    /// Standard deviation of the initial weights [default: 0.1]
    #[arg(long)]
    pub std: Option<f32>,
    /// Seed for weights, batches and samples [default: 1337]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Normalise before or after each half of a block [default: pre]
    #[arg(long, value_enum)]
    pub norm: Option<NormFlag>,
    /// Initial weights of projections into the stream [default: gpt2]
    #[arg(long, value_enum)]
    pub init: Option<InitFlag>,
    /// Parts that blocks are built from [default: mixed]
    #[arg(long, value_enum)]
    pub parts: Option<PartsFlag>,
    /// GPU memory that training may use, in bytes: what does not fit is computed twice
    #[arg(long)]
    pub max_bytes: Option<u64>,
    /// How activations and gradients are stored [default: f32]
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionFlag>,
    /// Folder for checkpoints and logs [default: target/train, or the folder given to --resume]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Continue from the checkpoint in this folder
    #[arg(long)]
    pub resume: Option<PathBuf>,
    /// Save and stop after this many steps in total, as Ctrl-C would
    #[arg(long)]
    pub stop_after: Option<u64>,
    /// Steps between validations, checkpoints and samples [default: a tenth of --steps]
    #[arg(long)]
    pub eval_every: Option<u64>,
    /// Tune first: measure the variants of each kernel, and remember the fastest in this file. Different variants may
    /// round differently
    #[arg(long)]
    pub tune: Option<PathBuf>,
}

impl TrainFlags {
    fn config(&self, vocab_size: usize) -> TrainConfig {
        let (context, dim, heads) = (self.context.unwrap_or(64), self.dim.unwrap_or(64), self.heads.unwrap_or(4));
        let layers = self.layers.unwrap_or(3);
        let gpt2 = TransformerConfig::gpt2(vocab_size, context, layers, dim, heads);
        let llama = TransformerConfig::llama(vocab_size, context, layers, dim, heads);
        let mut model = match self.parts.unwrap_or(PartsFlag::Mixed) {
            PartsFlag::Gpt2 => gpt2,
            PartsFlag::Llama => llama,
            PartsFlag::Mixed => TransformerConfig {
                norm: Norm::LayerNorm,
                mlp: Mlp::SwiGlu,
                biases: Biases::ALL,
                tied_head: true,
                ..llama
            },
        };
        let std = self.std.unwrap_or(0.1);
        model.n_kv_heads = self.kv_heads.unwrap_or(heads);
        model.dropout = self.dropout.unwrap_or(0.0);
        model.norm_placement = match self.norm {
            Some(NormFlag::Post) => NormPlacement::Post,
            _ => NormPlacement::Pre,
        };
        model.init = match self.init {
            Some(InitFlag::Zero) => Init::ZeroResidual { std },
            _ => Init::Gpt2 { std },
        };
        let steps = self.steps.unwrap_or(1600);
        TrainConfig {
            micro_batches: self.micro_batches.unwrap_or(1),
            schedule: Schedule {
                peak: self.lr.unwrap_or(6e-3),
                warmup: steps / 20,
                steps,
                final_fraction: 0.0,
                decay: Decay::Cosine,
            },
            adamw: AdamWConfig { beta2: 0.98, ..AdamWConfig::default() },
            muon: (self.optimizer == Some(OptimizerFlag::Muon))
                .then(|| MuonConfig { lr_factor: self.muon_factor.unwrap_or(1.0), ..MuonConfig::default() }),
            seed: self.seed.unwrap_or(1337),
            precision: self.precision.map_or(Precision::F32, Precision::from),
            ..TrainConfig::new(model, self.batch.unwrap_or(8))
        }
    }

    /// The checkpoint's settings, if the given flags agree with them.
    fn resumed_config(&self, state: &RunState) -> Result<TrainConfig> {
        let mut config = state.config.clone();
        if let Some(steps) = self.steps {
            config.schedule.steps = steps;
        }
        let m = &config.model;
        let given = [
            ("layers", self.layers.map(|x| x as u64), m.n_layers as u64),
            ("dim", self.dim.map(|x| x as u64), m.d_model as u64),
            ("heads", self.heads.map(|x| x as u64), m.n_heads as u64),
            ("kv-heads", self.kv_heads.map(|x| x as u64), m.n_kv_heads as u64),
            ("context", self.context.map(|x| x as u64), m.context as u64),
            ("batch", self.batch.map(|x| x as u64), config.batch as u64),
            ("micro-batches", self.micro_batches.map(|x| x as u64), config.micro_batches as u64),
            ("seed", self.seed, config.seed),
        ];
        for (flag, given, has) in given {
            if let Some(given) = given.filter(|&g| g != has) {
                bail!("--{flag} {given}: the checkpoint was trained with {has}; omit the flag to resume");
            }
        }
        let others = [
            ("lr", self.lr.is_some_and(|x| x != config.schedule.peak)),
            ("optimizer", self.optimizer.is_some_and(|o| (o == OptimizerFlag::Muon) != config.muon.is_some())),
            ("muon-factor", self.muon_factor.is_some_and(|f| config.muon.is_none_or(|m| m.lr_factor != f))),
            ("dropout", self.dropout.is_some_and(|x| x != m.dropout)),
            ("std", self.std.is_some()),
            ("norm", self.norm.is_some_and(|n| (n == NormFlag::Post) != (m.norm_placement == NormPlacement::Post))),
            ("init", self.init.is_some_and(|i| (i == InitFlag::Zero) != matches!(m.init, Init::ZeroResidual { .. }))),
            ("parts", self.parts.is_some()),
            ("precision", self.precision.is_some_and(|p| Precision::from(p) != config.precision)),
        ];
        if let Some((flag, _)) = others.into_iter().find(|(_, differs)| *differs) {
            bail!("--{flag} cannot change with --resume; omit it");
        }
        Ok(config)
    }

    pub fn text_path(&self) -> PathBuf {
        self.text.clone().unwrap_or_else(|| "examples/data/shakespeare.txt".into())
    }

    pub fn out_dir(&self) -> PathBuf {
        self.out.clone().or_else(|| self.resume.clone()).unwrap_or_else(|| "target/train".into())
    }
}

/// A measurement during training.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    pub step: u64,
    pub train_loss: f32,
    pub val_loss: f32,
    pub seconds: f64,
}

/// The last line that --json prints.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub adapter: String,
    pub parameters: usize,
    pub steps: u64,
    pub train_loss: f32,
    pub val_loss: f32,
    pub tokens_per_s: f64,
    pub first_step_s: f64,
    /// Steps of the whole run that changed nothing but the loss scale.
    pub skipped_steps: u32,
    pub peak_buffer_bytes: usize,
}

/// A finished run: the schedule ended, or Ctrl-C did.
pub struct Outcome {
    pub summary: Summary,
    pub history: Vec<Point>,
    /// Step and loss of every step of this run.
    pub losses: Vec<(u64, f32)>,
    pub sample: String,
    pub interrupted: bool,
    pub trainer: Trainer,
    pub checkpoint: Checkpoint,
}

/// A run in progress.
struct Run {
    trainer: Trainer,
    decoder: Decoder,
    tokenizer: CharTokenizer,
    data: Dataset,
    val: Vec<Batch>,
    text_hash: u64,
    out: PathBuf,
    bar: ProgressBar,
    pending: VecDeque<StepLoss>,
    losses: Vec<(u64, f32)>,
    history: Vec<Point>,
    started: Instant,
}

/// Trains with the given flags, printing progress to stderr.
pub fn run(flags: &TrainFlags) -> Result<Outcome> {
    let stop = Arc::new(AtomicBool::new(false));
    let handler = stop.clone();
    // A second Ctrl-C while saving is ignored, so that the file is complete.
    ctrlc::set_handler(move || handler.store(true, Ordering::SeqCst)).context("setting the Ctrl-C handler")?;
    for (flag, value) in [("steps", flags.steps), ("stop-after", flags.stop_after), ("eval-every", flags.eval_every)] {
        ensure!(value != Some(0), "--{flag} must be at least 1");
    }
    let started = Instant::now();
    let mut run = Run::start(flags)?;
    let steps = run.trainer.config().schedule.steps;
    let stop_at = flags.stop_after.unwrap_or(steps).min(steps);
    let eval_every = flags.eval_every.unwrap_or(steps / 10).max(1);
    let mut first_step_s = 0.0;
    let mut after_first = Instant::now();
    let mut first = true;
    while run.trainer.step_count() < stop_at && !stop.load(Ordering::SeqCst) {
        run.step()?;
        if first {
            run.drain(0)?;
            first_step_s = started.elapsed().as_secs_f64();
            (after_first, first) = (Instant::now(), false);
        }
        if run.trainer.step_count() % eval_every == 0 && run.trainer.step_count() < stop_at {
            run.evaluate()?;
            run.save()?;
            run.show_sample()?;
        }
    }
    run.drain(0)?;
    let timed = run.losses.len().saturating_sub(1) * run.trainer.config().tokens_per_step();
    let tokens_per_s = timed as f64 / after_first.elapsed().as_secs_f64().max(1e-9);
    let interrupted = run.trainer.step_count() < steps;
    let point = run.evaluate()?;
    run.save()?;
    run.bar.finish_and_clear();
    let sample = run.sample(1000)?;
    let summary = Summary {
        adapter: run.trainer.gpu().describe(),
        parameters: run.trainer.parameter_count(),
        steps: run.trainer.step_count(),
        train_loss: point.train_loss,
        val_loss: point.val_loss,
        tokens_per_s,
        first_step_s,
        skipped_steps: run.trainer.graph_trainer().loss_scale_blocking()?.map_or(0, |state| state.skipped),
        peak_buffer_bytes: run.trainer.buffer_bytes(),
    };
    let Run { history, losses, trainer, out, .. } = run;
    let checkpoint = Checkpoint::load(&checkpoint_path(&out))?;
    Ok(Outcome { summary, history, losses, sample, interrupted, trainer, checkpoint })
}

impl Run {
    fn start(flags: &TrainFlags) -> Result<Run> {
        let path = flags.text_path();
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading the text {}", path.display()))?;
        ensure!(!text.is_empty(), "{}: the text is empty", path.display());
        let text_hash = text_hash(&text);
        let tokenizer = CharTokenizer::of(&text);
        let resumed = match &flags.resume {
            None => None,
            Some(dir) => Some(Checkpoint::load(&checkpoint_path(dir))?),
        };
        let muon = flags.optimizer == Some(OptimizerFlag::Muon) || resumed.is_some();
        ensure!(muon || flags.muon_factor.is_none(), "--muon-factor is for --optimizer muon");
        let config = match &resumed {
            None => flags.config(tokenizer.vocab_size()),
            Some(checkpoint) => {
                ensure!(
                    checkpoint.state.text_hash == text_hash,
                    "{} is not the text that this checkpoint was trained on; pass that text with --text",
                    path.display()
                );
                flags.resumed_config(&checkpoint.state)?
            }
        };
        let data = Dataset::new(tokenizer.encode(&text)?, VAL_FRACTION, config.seq_len())
            .with_context(|| format!("splitting {}", path.display()))?;
        let out = flags.out_dir();
        std::fs::create_dir_all(&out).with_context(|| format!("creating the folder {}", out.display()))?;
        if resumed.is_none() && out.join(LOG).exists() {
            std::fs::remove_file(out.join(LOG)).context("removing the log of an earlier run")?;
        }
        let mut gpu = Gpu::headless_blocking()?;
        if let Some(path) = &flags.tune {
            let options = TrainOptions { max_bytes: flags.max_bytes, ..TrainOptions::default() };
            let plan = TrainPlan::new(&config, &options, gpu.profile())?;
            let choices = Tuner::open(path)?.tune_blocking(&gpu, plan.plans())?;
            gpu = gpu.with_choices(choices);
        }
        let options = TrainOptions { init: resumed.is_none(), max_bytes: flags.max_bytes, ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(&gpu, config.clone(), &options)?;
        if let Some(checkpoint) = &resumed {
            checkpoint.restore_blocking(&mut trainer)?;
        }
        let decoder =
            gpu.run_blocking(Decoder::on_params(&gpu, &config.model, trainer.params(), config.model.context))?;
        eprintln!(
            "{}\n{} parameters, {} tokens per step, {} of GPU memory",
            gpu.describe(),
            trainer.parameter_count(),
            config.tokens_per_step(),
            HumanBytes(trainer.buffer_bytes() as u64)
        );
        let bar = ProgressBar::new(config.schedule.steps).with_position(trainer.step_count());
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
        // The time left is estimated from the steps of this run, not from those before a resume.
        bar.reset_eta();
        let val =
            data.val_batches((10_240 / (config.batch * config.seq_len())).max(1), config.batch, config.seq_len())?;
        Ok(Run {
            trainer,
            decoder,
            tokenizer,
            data,
            val,
            text_hash,
            out,
            bar,
            pending: VecDeque::new(),
            losses: vec![],
            history: vec![],
            started: Instant::now(),
        })
    }

    fn step(&mut self) -> Result<()> {
        let c = self.trainer.config();
        let (micro, step) = (c.micro_batches as u64, self.trainer.step_count());
        let batches = (0..micro).map(|i| self.data.batch(c.seed, step * micro + i, c.batch, c.seq_len()));
        let batches = batches.collect::<Result<Vec<Batch>, _>>()?;
        self.pending.push_back(self.trainer.step(&batches)?);
        self.drain(IN_FLIGHT - 1)
    }

    /// Waits until at most `left` steps are in flight.
    fn drain(&mut self, left: usize) -> Result<()> {
        while self.pending.len() > left {
            let Some(loss) = self.pending.pop_front() else { break };
            let step = loss.step;
            let loss = loss.wait_blocking()?;
            ensure!(
                loss.is_finite(),
                "the loss is {loss} at step {step}; try a lower --lr. The last checkpoint in {} is untouched",
                self.out.display()
            );
            self.losses.push((step, loss));
            let rate = self.losses.len() * self.trainer.config().tokens_per_step();
            let rate = rate as f64 / self.started.elapsed().as_secs_f64();
            self.bar.set_position(step + 1);
            self.bar.set_message(format!("loss {loss:.3}, {rate:.0} tokens/s"));
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Point> {
        self.drain(0)?;
        let val_loss = self.trainer.evaluate_blocking(&self.val)?;
        let step = self.trainer.step_count();
        let train_loss = self.losses.last().map_or(f32::NAN, |l| l.1);
        let point = Point { step, train_loss, val_loss, seconds: self.started.elapsed().as_secs_f64() };
        self.history.push(point);
        self.say(&format!("step {step}: training loss {train_loss:.4}, validation loss {val_loss:.4}"));
        let log = self.out.join(LOG);
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        writeln!(file, "{}", serde_json::to_string(&point)?).with_context(|| format!("writing {}", log.display()))?;
        Ok(point)
    }

    fn save(&self) -> Result<()> {
        let (alphabet, path) = (self.tokenizer.alphabet(), checkpoint_path(&self.out));
        Ok(Checkpoint::save_trainer_blocking(&self.trainer, &alphabet, self.text_hash, &path)?)
    }

    fn show_sample(&mut self) -> Result<()> {
        let sample = self.sample(120)?;
        self.say(&format!("  | {}", sample.trim_end().replace('\n', "\n  | ")));
        Ok(())
    }

    fn sample(&mut self, n: usize) -> Result<String> {
        let prompt = self.tokenizer.encode("\n").unwrap_or_else(|_| vec![0]);
        let sampling = Sampling { seed: self.trainer.config().seed, ..Sampling::default() };
        // The text may be longer than the context. The cache was made with older weights, so it is cleared.
        let keep = self.decoder.capacity() / 2;
        let options = GenerationOptions { max_tokens: n, sampling, keep, ..GenerationOptions::default() };
        self.decoder.clear();
        let ids = self.decoder.generate(&prompt, options)?.blocking().collect::<Result<Vec<u32>, _>>()?;
        Ok(self.tokenizer.decode(&ids))
    }

    /// Prints a line above the bar, or to stderr where there is no terminal.
    fn say(&self, line: &str) {
        match self.bar.is_hidden() {
            true => eprintln!("{line}"),
            false => self.bar.println(line),
        }
    }
}

/// The checkpoint in a folder, or the file itself.
pub fn checkpoint_path(place: &Path) -> PathBuf {
    if place.is_file() { place.to_path_buf() } else { place.join("checkpoint.safetensors") }
}
