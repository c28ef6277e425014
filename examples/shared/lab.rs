//! Shared by the experiments on small models: flags, the text, and a training run that keeps its probe readings.
#![allow(dead_code)] // each example uses a part

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use throughline::nn::{Block, Init, Positions, Transformer, TransformerConfig};
use throughline::ops::rope::Scaling;
use throughline::optim::{AdamWConfig, Decay, Schedule};
use throughline::probe::{self, Probe, ProbeReadback, Readings};
use throughline::train::data::{Batch, CharTokenizer, Dataset};
use throughline::train::{StepLoss, TrainConfig, TrainOptions, Trainer};
use throughline::views::{LogitLens, Subject};
use throughline::{Gpu, Graph};

/// Tokens of the validation text that the final loss of a run is averaged over.
const VAL_TOKENS: usize = 16_384;

/// Sequences of the validation text that the logit lens reads: always the same ones.
const LENS_SEQUENCES: usize = 16;

/// Steps in flight before the loop waits for the oldest.
const IN_FLIGHT: usize = 2;

#[derive(Clone, Debug, clap::Args)]
pub struct LabFlags {
    /// UTF-8 text file to train on
    #[arg(long, default_value = "examples/data/shakespeare.txt")]
    pub text: PathBuf,
    /// Number of blocks
    #[arg(long, default_value_t = 8)]
    pub layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 32)]
    pub dim: usize,
    /// Attention heads per block
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Sequence length in characters
    #[arg(long, default_value_t = 32)]
    pub context: usize,
    /// Sequences per step
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Training steps per run
    #[arg(long, default_value_t = 300)]
    pub steps: u64,
    /// Peak learning rate
    #[arg(long, default_value_t = 6e-3)]
    pub lr: f64,
    /// Seed for weights and batches
    #[arg(long, default_value_t = 1337)]
    pub seed: u64,
}

/// The readings of one step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub step: u64,
    /// Training loss, nats per character.
    pub loss: f32,
    /// For each layer, the RMS of what it adds divided by the RMS of the stream it adds to.
    pub contribution: Vec<f64>,
    /// RMS of the stream before each layer, and after the last one.
    pub stream_rms: Vec<f64>,
    /// RMS of the gradient of the loss at the same places.
    pub stream_grad_rms: Vec<f64>,
    /// Loss of the logit lens at the same places, on validation text. Not measured in every step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lens: Option<Vec<f64>>,
}

/// A training run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub name: String,
    pub parameters: usize,
    /// After the last step, nats per character.
    pub val_loss: f32,
    pub seconds: f64,
    #[serde(skip)]
    pub steps: Vec<Step>,
}

/// A device and a text.
pub struct Lab {
    pub gpu: Gpu,
    flags: LabFlags,
    data: Dataset,
    vocab_size: usize,
}

impl Lab {
    pub fn new(flags: &LabFlags) -> Result<Lab> {
        ensure!(flags.steps > 0, "--steps must be at least 1");
        let path = flags.text.display();
        let text = std::fs::read_to_string(&flags.text).with_context(|| format!("reading the text {path}"))?;
        let tokenizer = CharTokenizer::of(&text);
        let data = Dataset::new(tokenizer.encode(&text)?, 0.1, flags.context);
        let data = data.with_context(|| format!("splitting {path}"))?;
        let lab =
            Lab { gpu: Gpu::headless_blocking()?, flags: flags.clone(), data, vocab_size: tokenizer.vocab_size() };
        lab.model().validate()?;
        Ok(lab)
    }

    /// The baseline, from which every other model differs in one thing. It has GPT-2's parts with three changes: RoPE,
    /// which needs fewer steps than learned positions; an untied head, so that the logit lens does not start out
    /// predicting its input; and a norm after the embedding, so that the stream starts with an RMS of 1 wherever the
    /// norms are placed.
    pub fn model(&self) -> TransformerConfig {
        let f = &self.flags;
        TransformerConfig {
            positions: Positions::Rope { theta: 10_000.0, interleaved: false, scaling: Scaling::None },
            tied_head: false,
            embed_norm: true,
            // GPT-2's 0.02 suits a width of 768; narrower models need more.
            init: Init::Gpt2 { std: 0.1 },
            ..TransformerConfig::gpt2(self.vocab_size, f.context, f.layers, f.dim, f.heads)
        }
    }

    /// Trains a model on batches that depend on the seed alone. With `every`, the logit lens reads the model before
    /// each step that is a multiple of it.
    pub fn run(
        &self,
        name: &str,
        model: &TransformerConfig,
        block: &dyn Block,
        seed: u64,
        every: Option<u64>,
    ) -> Result<Run> {
        self.train(name, model, (block, seed), self.flags.steps, every)
    }

    /// Runs only the first step of a model, for its readings before any training.
    pub fn untrained(&self, name: &str, model: &TransformerConfig, block: &dyn Block, seed: u64) -> Result<Run> {
        self.train(name, model, (block, seed), 1, Some(1))
    }

    fn train(
        &self,
        name: &str,
        model: &TransformerConfig,
        (block, seed): (&dyn Block, u64),
        steps: u64,
        every: Option<u64>,
    ) -> Result<Run> {
        let (f, started) = (&self.flags, Instant::now());
        let options = TrainOptions { block, probes: probes(model, block)?, ..TrainOptions::default() };
        let mut trainer = Trainer::with_options_blocking(&self.gpu, self.config(model, seed), &options)?;
        let lens = match every {
            Some(_) => {
                let model = Subject::of(&trainer).with_block(block);
                Some(self.gpu.run_blocking(LogitLens::new(&model, [LENS_SEQUENCES, f.context]))?)
            }
            None => None,
        };
        let seen = self.data.val_batches(1, LENS_SEQUENCES, f.context)?;
        let bar = ProgressBar::new(steps);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
        bar.set_message(name.to_string());
        let mut log = Log { layers: model.n_layers, pending: VecDeque::new(), steps: vec![] };
        for step in 0..steps {
            let mut seen_by_lens = None;
            if let (Some(lens), Some(every)) = (&lens, every)
                && step % every == 0
            {
                let readings = lens.run_blocking(&seen[0])?;
                let losses = readings.iter().filter(|r| r.name == "lens_cross_entropy").map(|r| r.value);
                seen_by_lens = Some(losses.collect());
            }
            let loss = trainer.step(&[self.data.batch(seed, step, f.batch, f.context)?])?;
            let probes = trainer.take_probes().context("the step has no probes")?;
            log.pending.push_back((loss, probes, seen_by_lens));
            log.drain(IN_FLIGHT - 1).context(name.to_string())?;
            bar.inc(1);
        }
        log.drain(0).context(name.to_string())?;
        bar.finish_and_clear();
        let val_loss = trainer.evaluate_blocking(&self.validation()?)?;
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{name}: validation loss {val_loss:.3}, {seconds:.0} s");
        Ok(Run { name: name.into(), parameters: trainer.parameter_count(), val_loss, seconds, steps: log.steps })
    }

    fn config(&self, model: &TransformerConfig, seed: u64) -> TrainConfig {
        let f = &self.flags;
        TrainConfig {
            schedule: Schedule {
                peak: f.lr,
                warmup: f.steps / 20,
                steps: f.steps,
                final_fraction: 0.0,
                decay: Decay::Cosine,
            },
            adamw: AdamWConfig { beta2: 0.98, ..AdamWConfig::default() },
            seed,
            ..TrainConfig::new(model.clone(), f.batch)
        }
    }

    fn validation(&self) -> Result<Vec<Batch>> {
        let f = &self.flags;
        Ok(self.data.val_batches((VAL_TOKENS / (f.batch * f.context)).max(1), f.batch, f.context)?)
    }
}

/// The standard probes that a [`Step`] keeps.
fn probes(model: &TransformerConfig, block: &dyn Block) -> Result<Vec<Probe>> {
    let mut g = Graph::new();
    let transformer = Transformer::build_with(&mut g, model, block, 1, 1, true)?;
    let mut probes = probe::standard(&g, &transformer.stream, true);
    probes.retain(|p| p.name.ends_with("_ratio") || p.name == "stream_rms" || p.name == "stream_grad_rms");
    Ok(probes)
}

/// Collects steps as they come back from the GPU.
struct Log {
    layers: usize,
    pending: VecDeque<(StepLoss, ProbeReadback, Option<Vec<f64>>)>,
    steps: Vec<Step>,
}

impl Log {
    /// Waits until at most `left` steps are in flight.
    fn drain(&mut self, left: usize) -> Result<()> {
        while self.pending.len() > left {
            let Some((loss, probes, lens)) = self.pending.pop_front() else { break };
            let (step, loss) = (loss.step, loss.wait_blocking()?);
            ensure!(loss.is_finite(), "the loss is {loss} at step {step}; try a lower --lr");
            let readings = probes.wait_blocking()?;
            let depths = |name| (0..=self.layers).filter_map(|l| readings.get(name, l)).collect();
            self.steps.push(Step {
                step,
                loss,
                contribution: (0..self.layers).map(|l| contribution(&readings, l)).collect(),
                stream_rms: depths("stream_rms"),
                stream_grad_rms: depths("stream_grad_rms"),
                lens,
            });
        }
        Ok(())
    }
}

/// All branches of a layer combined as if they were orthogonal: the root of the sum of their squares.
fn contribution(readings: &Readings, layer: usize) -> f64 {
    let of_layer = readings.values.iter().filter(|r| r.layer == Some(layer) && r.name.ends_with("_ratio"));
    of_layer.map(|r| r.value.powi(2)).sum::<f64>().sqrt()
}
