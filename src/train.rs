//! A training step as one submit: forward, backward, clipping and AdamW, with nothing read back.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::exec::{ExecOptions, Executable};
use crate::gpu::{Gpu, Readback};
use crate::graph::{Graph, Value};
use crate::nn::{Block, StandardBlock, Transformer, TransformerConfig};
use crate::optim::{AdamWConfig, Arena, ArenaLayout, MuonConfig, Optimizer, Schedule};
use crate::plan::Plan;
use crate::probe::{self, Instruments, Patch, Probe, ProbeReadback};
use crate::tensor::{Tensor, TensorType};
use crate::timeline::Timeline;

mod slices;

pub use slices::{SlicedStep, StepSlices};

/// Everything that defines a training run, but for the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// The model.
    pub model: TransformerConfig,
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Tokens of a sequence; the model's context by default.
    #[serde(default)]
    pub seq_len: Option<usize>,
    /// Micro-batches per step; their gradients are averaged.
    pub micro_batches: usize,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// The optimiser, and the norm that gradients are clipped to.
    pub adamw: AdamWConfig,
    /// Muon in AdamW's place for the [hidden matrices](crate::nn::is_hidden_matrix); by default AdamW for all.
    #[serde(default)]
    pub muon: Option<MuonConfig>,
    /// Seed of initial weights, batches and dropout.
    pub seed: u64,
}

impl TrainConfig {
    /// Tokens of one step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch * self.micro_batches * self.seq_len()
    }

    /// Tokens of a sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len.unwrap_or(self.model.context)
    }

    fn validate(&self) -> Result<()> {
        for (field, n) in [("batch", self.batch), ("micro_batches", self.micro_batches), ("seq_len", self.seq_len())] {
            if n == 0 || n > 1 << 20 {
                return Err(Error::Config { field, message: format!("must be from 1 to 2^20, but is {n}") });
            }
        }
        let peak = self.schedule.peak;
        if !peak.is_finite() || peak < 0.0 {
            let message = format!("must be finite and not negative, but is {peak}");
            return Err(Error::Config { field: "lr", message });
        }
        self.muon.map_or(Ok(()), |muon| muon.validate())
    }
}

/// What a [`Trainer`] may have beside its configuration.
///
/// ```
/// use throughline::train::TrainOptions;
/// let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
/// ```
#[derive(Clone, Debug)]
pub struct TrainOptions<'a> {
    /// The layers.
    pub block: &'a dyn Block,
    /// Whether the [standard probes](probe::standard) are in the step.
    pub standard_probes: bool,
    /// More probes. With several micro-batches, what they tell is that of the last, whose loss counts as a part of the
    /// mean; but the gradients of parameters are those of the whole step, before clipping.
    pub probes: Vec<Probe>,
    /// Changes to the model, in training and evaluation alike. [`Trainer::write_patch`] writes their inputs.
    pub patches: Vec<Patch>,
}

impl Default for TrainOptions<'_> {
    fn default() -> Self {
        TrainOptions { block: &StandardBlock, standard_probes: false, probes: vec![], patches: vec![] }
    }
}

impl TrainOptions<'_> {
    /// A model as these want it.
    fn build(&self, gpu: &Gpu, config: &TrainConfig, train: bool) -> Result<(Graph, Transformer)> {
        let mut graph = gpu.graph();
        let (batch, time) = (config.batch, config.seq_len());
        let gpt = Transformer::build_with(&mut graph, &config.model, self.block, batch, time, train)?;
        if self.patches.is_empty() {
            return Ok((graph, gpt));
        }
        let patched = graph.patched(&self.patches)?;
        let gpt = patched.transformer(&gpt);
        Ok((patched.graph, gpt))
    }
}

/// A model in training: parameters and moments on the GPU, and the step that updates them.
#[derive(Debug)]
pub struct Trainer {
    gpu: Gpu,
    config: TrainConfig,
    /// Parameters. Their names and shapes are in the layout.
    pub params: Arena,
    /// Gradients of the last step.
    pub grads: Arena,
    /// Moments and the update.
    pub optimizer: Optimizer,
    forward_backward: StepGraph,
    evaluation: StepGraph,
    /// Tokens and targets of all micro-batches of a step, `[2, micro_batches, batch, time]`.
    staged: Tensor,
    step: u64,
    /// Of the last step, unless somebody has them.
    probes: Option<ProbeReadback>,
}

/// An executable with the values that a step writes and reads.
#[derive(Debug)]
struct StepGraph {
    exec: Executable,
    tokens: Value,
    targets: Value,
    dropout_seed: Option<Value>,
    loss: Value,
    loss_state: Option<Value>,
    instruments: Option<Instruments>,
}

/// The loss of a submitted step, to be read when convenient.
#[derive(Debug)]
pub struct StepLoss {
    /// The step that this is the loss of.
    pub step: u64,
    readback: Readback,
    submitted: wgpu::SubmissionIndex,
}

impl StepLoss {
    /// Waits for this step, and not for later ones: mean cross-entropy in nats per token.
    pub fn wait_blocking(self, gpu: &Gpu) -> Result<f32> {
        let mut readback = self.readback;
        readback.request();
        gpu.wait_for_blocking(self.submitted)?;
        Ok(pollster::block_on(readback.take::<f32>())?[0])
    }

    /// The loss, without blocking a thread; resolves once the device has been polled.
    pub async fn take(self) -> Result<f32> {
        Ok(self.readback.take::<f32>().await?[0])
    }
}

impl Trainer {
    /// A fresh model, initialised as the configuration says.
    pub async fn new(gpu: &Gpu, config: TrainConfig) -> Result<Self> {
        Self::with_block(gpu, config, &StandardBlock).await
    }

    /// The same with layers of another kind.
    pub async fn with_block(gpu: &Gpu, config: TrainConfig, block: &dyn Block) -> Result<Self> {
        Self::with_options(gpu, config, &TrainOptions { block, ..TrainOptions::default() }).await
    }

    /// The same with probes, patches or layers of another kind.
    pub async fn with_options(gpu: &Gpu, config: TrainConfig, options: &TrainOptions<'_>) -> Result<Self> {
        config.validate()?;
        let (graph, gpt) = options.build(gpu, &config, true)?;
        let values: Vec<Value> = gpt.params.iter().map(|p| p.value).collect();
        let (max_bytes, muon) = (gpu.profile().max_arena_bytes(), config.muon.is_some());
        let layout = Arc::new(ArenaLayout::for_training(&graph, &values, max_bytes, muon)?);
        let params = gpu.scoped(|| Arena::zeros(gpu, "parameters", &layout)).await?;
        let grads = gpu.scoped(|| Arena::zeros(gpu, "gradients", &layout)).await?;
        for (i, p) in gpt.params.iter().enumerate() {
            let values = p.init.values(graph.ty(p.value).len(), config.seed, graph.name(p.value));
            params.write_tensor(gpu, i, &values)?;
        }
        let forward_backward = training_graph(gpu, graph, &gpt, (&config, options), &params, &grads).await?;
        let evaluation = evaluation_graph(gpu, &config, options, &params).await?;
        let optimizer = match config.muon {
            Some(muon) => Optimizer::with_muon(gpu, config.adamw, muon, &params, &grads).await?,
            None => Optimizer::new(gpu, config.adamw, &params, &grads).await?,
        };
        let staged = TensorType::u32([2, config.micro_batches, config.batch, config.seq_len()]);
        let staged = Tensor::zeros(gpu, "staged batches", staged)?;
        Ok(Trainer {
            gpu: gpu.clone(),
            config,
            params,
            grads,
            optimizer,
            forward_backward,
            evaluation,
            staged,
            step: 0,
            probes: None,
        })
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, config: TrainConfig) -> Result<Self> {
        pollster::block_on(Self::new(gpu, config))
    }

    /// [`with_block`](Self::with_block), waiting.
    pub fn with_block_blocking(gpu: &Gpu, config: TrainConfig, block: &dyn Block) -> Result<Self> {
        pollster::block_on(Self::with_block(gpu, config, block))
    }

    /// [`with_options`](Self::with_options), waiting.
    pub fn with_options_blocking(gpu: &Gpu, config: TrainConfig, options: &TrainOptions<'_>) -> Result<Self> {
        pollster::block_on(Self::with_options(gpu, config, options))
    }

    /// The settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Steps done.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Continues the count from here: the schedule and the bias correction follow it.
    pub fn set_step_count(&mut self, step: u64) {
        self.step = step;
    }

    /// The device that this trains on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The plan of forward and backward.
    pub fn plan(&self) -> &Plan {
        self.forward_backward.exec.plan()
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.params.layout.tensors.iter().map(|(_, shape)| shape.len()).sum()
    }

    /// Bytes in GPU memory: parameters, gradients, moments, activations, evaluation.
    pub fn buffer_bytes(&self) -> usize {
        let arenas = [&self.params, &self.grads, &self.optimizer.m, &self.optimizer.v];
        let arenas = arenas.iter().map(|arena| 4 * arena.layout.total_len()).sum::<usize>();
        let plans = [self.plan(), self.evaluation.exec.plan(), self.optimizer.plan()];
        arenas + plans.map(Plan::buffer_bytes).iter().sum::<usize>() + self.staged.ty().bytes()
    }

    /// Runs one step on `micro_batches` batches: one submit, no waiting. The returned loss can be
    /// read late.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepLoss> {
        let step = self.step;
        let mut encoder = self.gpu.device().create_command_encoder(&Default::default());
        let readback = self.record(&mut encoder, batches)?;
        let submitted = self.gpu.queue().submit([encoder.finish()]);
        if let Some(probes) = &mut self.probes {
            probes.submitted = Some(submitted.clone());
        }
        Ok(StepLoss { step, readback, submitted })
    }

    /// What the probes told in the last step, on its way to the host: to be asked for right after the step, and read
    /// once the next is submitted, so that nobody waits. `None` without probes, before a step, and the second time.
    ///
    /// ```no_run
    /// # fn main() -> throughline::Result<()> {
    /// # let (gpu, config, batches) = (throughline::Gpu::headless_blocking()?, todo!(), [[]]);
    /// use throughline::train::{TrainOptions, Trainer};
    /// let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
    /// let mut trainer = Trainer::with_options_blocking(&gpu, config, &options)?;
    /// let mut late = None;
    /// for batch in &batches {
    ///     trainer.step(batch)?;
    ///     if let Some(probes) = std::mem::replace(&mut late, trainer.take_probes()) {
    ///         let readings = probes.wait_blocking(&gpu)?; // of the step before
    ///         println!("{:?}", readings.get("stream_rms", 0));
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_probes(&mut self) -> Option<ProbeReadback> {
        self.probes.take()
    }

    /// Queues a write of an input that a patch brought, `h.3.attn.o.factor` say, in training and evaluation alike.
    pub fn write_patch(&self, input: &str, data: &[f32]) -> Result<()> {
        let mut found = false;
        for exec in [&self.forward_backward.exec, &self.evaluation.exec] {
            if let Some(external) = exec.plan().externals.iter().find(|e| e.name == input) {
                exec.write(external.value, data)?;
                found = true;
            }
        }
        match found {
            true => Ok(()),
            false => Err(Error::Graph(format!("no patch of the model has an input `{input}`"))),
        }
    }

    /// Records one step into the caller's encoder, which must be submitted before the next is
    /// recorded: the tokens and the learning rate go through the queue, which writes them before
    /// the next submit. Returns the loss, `[1]`, on its way to the host.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder, batches: &[Batch]) -> Result<Readback> {
        self.begin(encoder, batches)?;
        for i in 0..self.config.micro_batches {
            self.load(encoder, i)?;
            self.forward_backward.exec.record(encoder);
        }
        self.update(encoder)
    }

    /// Records what comes behind the last micro-batch.
    fn update(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<Readback> {
        if let Some(instruments) = &self.forward_backward.instruments {
            self.probes = Some(instruments.read_later(&self.forward_backward.exec, encoder, self.step)?);
        }
        self.optimizer.record(encoder, self.config.schedule.at(self.step), self.step)?;
        self.step += 1;
        Ok(self.loss()?.read_later(&self.gpu, encoder))
    }

    /// Runs one step and says what it spent its time on, node by node. It is a step like others; only
    /// the copies of the batch are not timed. Waits for the GPU.
    pub fn profile_blocking(&mut self, batches: &[Batch]) -> Result<Timeline> {
        let mut timeline: Option<Timeline> = None;
        for i in 0..self.config.micro_batches {
            let mut encoder = self.gpu.device().create_command_encoder(&Default::default());
            if i == 0 {
                self.begin(&mut encoder, batches)?;
            }
            self.load(&mut encoder, i)?;
            self.gpu.queue().submit([encoder.finish()]);
            let part = self.forward_backward.exec.profile_blocking()?;
            timeline = Some(match timeline {
                Some(all) => all.then(part),
                None => part,
            });
        }
        let update = self.optimizer.profile_blocking(self.config.schedule.at(self.step), self.step)?;
        self.step += 1;
        Ok(match timeline {
            Some(all) => all.then(update),
            None => update,
        })
    }

    /// Hands a step's batches to the queue and records what comes before its first micro-batch.
    fn begin(&self, encoder: &mut wgpu::CommandEncoder, batches: &[Batch]) -> Result<()> {
        self.prepare(batches)?;
        self.clear(encoder)
    }

    /// Hands a step's batches to the queue.
    fn prepare(&self, batches: &[Batch]) -> Result<()> {
        self.stage(batches)?;
        let s = &self.forward_backward;
        match s.dropout_seed {
            Some(seed) => s.exec.write(seed, &[self.config.seed as u32, self.step as u32]),
            None => Ok(()),
        }
    }

    /// Records the clearing of what adds up over micro-batches.
    fn clear(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let s = &self.forward_backward;
        if let Some(loss) = s.loss_state {
            // Gradients and loss add up over micro-batches.
            let loss = s.exec.tensor(loss)?;
            self.grads.parts.iter().for_each(|part| encoder.clear_buffer(part.buffer(), 0, None));
            encoder.clear_buffer(loss.buffer(), loss.offset(), Some(loss.ty().storage_bytes() as u64));
        }
        Ok(())
    }

    /// Records the copies that make micro-batch `i` the input.
    fn load(&self, encoder: &mut wgpu::CommandEncoder, i: usize) -> Result<()> {
        let s = &self.forward_backward;
        let (i, n) = (i as u64, self.config.micro_batches as u64);
        let part = (self.config.batch * self.config.seq_len() * 4) as u64;
        let (tokens, targets) = (s.exec.tensor(s.tokens)?, s.exec.tensor(s.targets)?);
        for (to, at) in [(tokens, i * part), (targets, (n + i) * part)] {
            encoder.copy_buffer_to_buffer(self.staged.buffer(), at, to.buffer(), to.offset(), Some(part));
        }
        Ok(())
    }

    fn stage(&self, batches: &[Batch]) -> Result<()> {
        let n = self.config.batch * self.config.seq_len();
        let fits = |b: &Batch| b.tokens.len() == n && b.targets.len() == n;
        if batches.len() != self.config.micro_batches || !batches.iter().all(fits) {
            return Err(Error::Data {
                tensor: "batch".into(),
                expected: format!("{} micro-batches of {n} tokens", self.config.micro_batches),
                got: format!("{:?} tokens", batches.iter().map(|b| b.tokens.len()).collect::<Vec<_>>()),
            });
        }
        let tokens = batches.iter().flat_map(|b| &b.tokens);
        let all: Vec<u32> = tokens.chain(batches.iter().flat_map(|b| &b.targets)).copied().collect();
        self.staged.write(&self.gpu, &all)
    }

    /// The loss of the last step, on the GPU: `[1]`.
    pub fn loss(&self) -> Result<Tensor> {
        let s = &self.forward_backward;
        s.exec.tensor(s.loss_state.unwrap_or(s.loss))
    }

    /// Mean loss over batches, without dropout; waits for the GPU.
    pub fn evaluate_blocking(&self, batches: &[Batch]) -> Result<f32> {
        let s = &self.evaluation;
        let mut losses = vec![];
        for batch in batches {
            s.exec.write(s.tokens, &batch.tokens)?;
            s.exec.write(s.targets, &batch.targets)?;
            let mut encoder = self.gpu.device().create_command_encoder(&Default::default());
            s.exec.record(&mut encoder);
            losses.push(s.exec.tensor(s.loss)?.read_later(&self.gpu, &mut encoder));
            self.gpu.queue().submit([encoder.finish()]);
        }
        let mut sum = 0.0;
        for loss in losses {
            sum += f64::from(loss.wait_blocking::<f32>(&self.gpu)?[0]);
        }
        Ok((sum / batches.len().max(1) as f64) as f32)
    }
}

/// Forward, loss and gradients, with the gradients left in `grads`.
async fn training_graph(
    gpu: &Gpu,
    mut g: Graph,
    gpt: &Transformer,
    (config, options): (&TrainConfig, &TrainOptions<'_>),
    params: &Arena,
    grads: &Arena,
) -> Result<StepGraph> {
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let mut loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let accumulate = config.micro_batches > 1;
    if accumulate {
        loss = g.scale("loss.mean", loss, 1.0 / config.micro_batches as f32)?;
    }
    let wrt: Vec<Value> = gpt.params.iter().map(|p| p.value).collect();
    let mut probes = options.probes.clone();
    if options.standard_probes {
        probes.extend(probe::standard(&g, gpt, true));
    }
    let tapped = [&wrt[..], &probe::gradient_taps(&g, &probes)?].concat();
    let gradients = g.gradients(loss, &tapped)?;
    let mut by_value: HashMap<Value, Value> = tapped.into_iter().zip(gradients.iter().copied()).collect();
    let mut bindings: Vec<(Value, Tensor)> = wrt.iter().copied().zip(params.tensors.iter().cloned()).collect();
    // Where gradients accumulate, the addition to the state is a node, which fusion then folds into
    // whoever makes the gradient.
    for ((&param, &gradient), tensor) in wrt.iter().zip(&gradients).zip(&grads.tensors) {
        let state = g.state(&format!("{}.grad_state", g.name(param)), g.ty(param).clone())?;
        let value = match accumulate {
            true => g.residual_add(&format!("{}.grad_sum", g.name(param)), state, gradient)?,
            false => gradient,
        };
        g.store(value, state)?;
        by_value.insert(param, value);
        bindings.push((state, tensor.clone()));
    }
    let mut loss_state = None;
    if accumulate {
        let state = g.state("loss_state", TensorType::f32([1]))?;
        let sum = g.residual_add("loss_sum", state, loss)?;
        g.store(sum, state)?;
        loss_state = Some(state);
    }
    let instruments = match probes.is_empty() {
        true => None,
        false => Some(Instruments::new(&mut g, &probes, &by_value)?),
    };
    let outputs = instruments.as_ref().map_or(vec![], Instruments::outputs);
    let plan = Arc::new(gpu.plan(&g, &[&[loss], &outputs[..]].concat())?);
    let options = ExecOptions { bindings: bindings.into_iter().collect(), ..Default::default() };
    let exec = Executable::new(gpu, plan, options).await?;
    let (tokens, dropout_seed) = (gpt.tokens, gpt.dropout_seed);
    Ok(StepGraph { exec, tokens, targets, dropout_seed, loss, loss_state, instruments })
}

/// Forward and loss alone, on the same parameters.
async fn evaluation_graph(
    gpu: &Gpu,
    config: &TrainConfig,
    options: &TrainOptions<'_>,
    params: &Arena,
) -> Result<StepGraph> {
    let (mut g, gpt) = options.build(gpu, config, false)?;
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let plan = Arc::new(gpu.plan(&g, &[loss])?);
    let bindings = gpt.params.iter().map(|p| p.value).zip(params.tensors.iter().cloned()).collect();
    let exec = Executable::new(gpu, plan, ExecOptions { bindings, ..Default::default() }).await?;
    Ok(StepGraph { exec, tokens: gpt.tokens, targets, dropout_seed: None, loss, loss_state: None, instruments: None })
}
