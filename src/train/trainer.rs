//! A language model in training: batches, the weights of micro-batches, and evaluation.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::config::{TrainConfig, TrainOptions};
use super::data::{Batch, counted};
use super::graph::{Feeds, GraphTrainer, SlicedStep, StepLoss, StepSlices};
use super::plan::{EvaluationPlan, Inputs, TrainPlan};
use crate::device::timeline::Timeline;
use crate::device::{ExecOptions, Executable, Gpu, Memory, Readback, Tensor};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::model::{Model, Uploaded};
use crate::optim::{Arena, LossScaleState, Optimizer};
use crate::plan::{External, Plan};
use crate::probe::ProbeReadback;

/// A model in training: parameters and moments on the GPU, and the step that updates them.
///
/// ```no_run
/// use throughline::nn::TransformerConfig;
/// use throughline::train::data::{CharTokenizer, Dataset};
/// use throughline::train::{TrainConfig, Trainer};
/// use throughline::Gpu;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let text = std::fs::read_to_string("shakespeare.txt")?;
/// let tokenizer = CharTokenizer::of(&text);
/// let data = Dataset::new(tokenizer.encode(&text)?, 0.1, 64)?;
/// let config = TrainConfig::new(TransformerConfig::gpt2(tokenizer.vocab_size(), 64, 4, 128, 4), 8);
///
/// let gpu = Gpu::headless_blocking()?;
/// let mut trainer = gpu.run_blocking(Trainer::new(&gpu, config))?;
/// for step in 0..1000 {
///     trainer.step(&[data.batch(0, step, 8, 64)?])?;
/// }
/// println!("{}", trainer.evaluate_blocking(&data.val_batches(4, 8, 64)?)?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    training: GraphTrainer,
    inputs: Inputs,
    evaluation: Evaluation,
    base: Option<Base>,
    /// Bytes of GPU memory.
    bytes: usize,
}

/// The model that adapters are trained for.
#[derive(Debug)]
struct Base {
    model: Arc<Model>,
    fingerprint: u64,
    weights: Uploaded,
}

/// Forward and loss alone, on the same parameters.
#[derive(Debug)]
struct Evaluation {
    /// In the buffers of the training step.
    exec: Executable,
    /// In buffers of its own, made when evaluation first comes between slices of a step.
    apart: Mutex<Option<Arc<Executable>>>,
    inputs: Inputs,
    loss: Value,
    /// Tokens of a sequence.
    time: usize,
}

impl Evaluation {
    async fn new(plan: &EvaluationPlan, training: &GraphTrainer, base: Option<&Base>) -> Result<Self> {
        let of_base = |name: &str| base.and_then(|base| base.weights.tensors.get(name).cloned());
        let tensor = |p: &External| of_base(&p.name).or_else(|| training.read_param(&p.name, p.ty.dtype));
        let bound = plan.params().filter_map(|param| Some((param.value, tensor(param)?)));
        let options = ExecOptions::bound(bound.collect());
        let memory = Memory { lent: training.exec().lend(&plan.lent), ..Memory::default() };
        let exec = Executable::with_memory(training.gpu(), plan.plan.clone(), options, memory).await?;
        let &EvaluationPlan { inputs, loss, time, .. } = plan;
        let evaluation = Evaluation { exec, apart: Mutex::default(), inputs, loss, time };
        if let Some(types) = plan.inputs.token_types {
            evaluation.exec.leave_zero(types)?;
        }
        Ok(evaluation)
    }

    /// The executable in buffers of its own.
    async fn apart(&self) -> Result<Arc<Executable>> {
        let made = || self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(exec) = made().clone() {
            return Ok(exec);
        }
        let exec = Arc::new(self.exec.apart().await?);
        Ok(made().get_or_insert(exec).clone())
    }

    /// Submits a pass over a batch. Returns the loss on its way to the host.
    fn submit(&self, exec: &Executable, batch: &Batch) -> Result<Readback> {
        let submitted = exec.submit_with("evaluation", |submits| {
            for feed in self.inputs.feeds(batch, self.time) {
                feed.record(exec, submits.encoder())?;
            }
            exec.record_in(submits)?;
            Ok(exec.tensor(self.loss)?.record_read(exec.gpu(), submits.encoder()))
        });
        submitted.map(|(loss, _)| loss)
    }
}

impl Trainer {
    /// A fresh model, initialised as the configuration says: the usual way to start. Resolves once the device has been
    /// polled, several times for a large model.
    pub async fn new(gpu: &Gpu, config: TrainConfig) -> Result<Self> {
        Self::with_options(gpu, config, &TrainOptions::default()).await
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, config: TrainConfig) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, config))
    }

    /// [`new`](Self::new) with probes, patches, blocks of your own, or a bound on the memory.
    pub async fn with_options(gpu: &Gpu, config: TrainConfig, options: &TrainOptions<'_>) -> Result<Self> {
        let plan = TrainPlan::new(&config, options, gpu.profile())?;
        Self::from_plan(gpu, &plan).await
    }

    /// [`with_options`](Self::with_options), waiting.
    pub fn with_options_blocking(gpu: &Gpu, config: TrainConfig, options: &TrainOptions<'_>) -> Result<Self> {
        gpu.run_blocking(Self::with_options(gpu, config, options))
    }

    /// A fresh model from a plan. Plan first if your application requests its device for this, or wants to know the
    /// bytes before it allocates them. An error names a limit of the device that is too low for the plan.
    ///
    /// ```no_run
    /// # use throughline::train::TrainConfig;
    /// # async fn app(adapter: wgpu::Adapter, config: TrainConfig) -> Result<(), Box<dyn std::error::Error>> {
    /// use throughline::train::{TrainOptions, TrainPlan, Trainer};
    /// use throughline::{Gpu, Profile};
    /// let plan = TrainPlan::new(&config, &TrainOptions::default(), &Profile::of_adapter(&adapter))?;
    /// println!("{} bytes", plan.bytes());
    /// // Add what your application itself needs.
    /// let (device, queue) = adapter.request_device(&plan.requirements().descriptor(&adapter)).await?;
    /// let trainer = Trainer::from_plan(&Gpu::from_device(device, queue), &plan).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn from_plan(gpu: &Gpu, plan: &TrainPlan) -> Result<Self> {
        let step = plan.training.plans()[0];
        let (mut base, mut bindings) = (None, HashMap::new());
        if let Some(planned) = &plan.base {
            let weights = planned.upload(gpu).await?;
            bindings = weights.bindings(step);
            base = Some(Base { model: planned.model.clone(), fingerprint: planned.fingerprint, weights });
        }
        let training = GraphTrainer::from_plan(gpu, &plan.training, &bindings).await?;
        if let (Some(planned), true) = (&plan.base, plan.init) {
            planned.load_trained(gpu, training.params()).await?;
        }
        if let Some(types) = plan.inputs.token_types {
            training.exec().leave_zero(types)?;
        }
        let evaluation = Evaluation::new(&plan.evaluation, &training, base.as_ref()).await?;
        let (config, inputs, bytes) = (plan.config.clone(), plan.inputs, plan.bytes());
        Ok(Trainer { config, training, inputs, evaluation, base, bytes })
    }

    /// The model that adapters are trained for, if they are.
    pub fn base(&self) -> Option<&Arc<Model>> {
        self.base.as_ref().map(|base| &base.model)
    }

    /// Tells the base from other models.
    pub(super) fn base_fingerprint(&self) -> Option<u64> {
        self.base.as_ref().map(|base| base.fingerprint)
    }

    /// The settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The trainer of the model's graph, which this one feeds with batches: for its files, and for other graphs on the
    /// same parameters.
    pub fn graph_trainer(&self) -> &GraphTrainer {
        &self.training
    }

    /// Number of completed steps. One that was recorded counts as completed, unless its encoder was dropped; one that
    /// [loss scaling](TrainConfig::loss_scaling) skipped does, too. See [`GraphTrainer::step_count`].
    pub fn step_count(&self) -> u64 {
        self.training.step_count()
    }

    /// Sets the number of completed steps. The learning rate schedule and the bias correction follow it. See
    /// [`GraphTrainer::set_step_count`].
    pub fn set_step_count(&mut self, step: u64) -> Result<()> {
        self.training.set_step_count(step)
    }

    /// The same for a run that comes from a file, with what loss scaling had come to there.
    pub(super) fn set_position(&mut self, step: u64, scaling: Option<&LossScaleState>) -> Result<()> {
        self.training.set_position(step, scaling)
    }

    /// The device that this trains on.
    pub fn gpu(&self) -> &Gpu {
        self.training.gpu()
    }

    /// The plan of forward and backward.
    pub fn plan(&self) -> &Plan {
        self.training.plan()
    }

    /// Parameters. Their names and shapes are in the layout.
    pub fn params(&self) -> &Arena {
        self.training.params()
    }

    /// Gradients of the last step: see [`GraphTrainer::grads`].
    pub fn grads(&self) -> &Arena {
        self.training.grads()
    }

    /// Moments, and the update.
    pub fn optimizer(&self) -> &Optimizer {
        self.training.optimizer()
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.training.parameter_count()
    }

    /// Bytes of GPU memory, as planned in [`TrainPlan::bytes`].
    pub fn buffer_bytes(&self) -> usize {
        self.bytes
    }

    /// Runs one step on [`micro_batches`](TrainConfig::micro_batches) batches, without waiting. The loss can be read
    /// later, while the GPU is at work on the next steps. A step that takes long is cut into
    /// [several submits](Self::set_submit_time).
    ///
    /// # Errors
    ///
    /// If a batch has not the size of the plan, an id is not in the vocabulary (the error names it and its place), or
    /// all targets are [`IGNORE_INDEX`](super::data::IGNORE_INDEX). This is found before anything is recorded.
    ///
    /// If a submit fails: see [`GraphTrainer::step`].
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepLoss> {
        self.training.step(self.feeds(batches)?)
    }

    /// Sets the time that a submit of [`step`](Self::step) or [`evaluate`](Self::evaluate) takes at most, by estimate:
    /// see [`GraphTrainer::set_submit_time`].
    pub fn set_submit_time(&self, time: Duration) {
        self.training.set_submit_time(time);
        self.evaluation.exec.set_submit_time(time);
    }

    /// The answers of the probes in the last step, on their way to the host. Take them right after the step, and read
    /// them once the next step is submitted, so that nothing waits. `None` without probes, before the first step, and
    /// when called again.
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
    ///         let readings = probes.wait_blocking()?; // of the step before
    ///         println!("{:?}", readings.get("stream_rms", 0));
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_probes(&mut self) -> Option<ProbeReadback> {
        self.training.take_probes()
    }

    /// Queues a write of an input that a patch added, such as `h.3.attn.o.factor`. It affects training and evaluation
    /// alike.
    pub fn write_patch(&self, input: &str, data: &[f32]) -> Result<()> {
        let mut found = false;
        for exec in [self.training.exec(), &self.evaluation.exec] {
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

    /// Records one step into your encoder. Several steps may follow each other in one encoder. Returns the loss, `[1]`,
    /// on its way to the host. From the second step on, nothing is allocated on the GPU. Errors are those of
    /// [`step`](Self::step).
    ///
    /// Submit the encoder, or drop it: then the step does not count, and its loss and probes are an `Err`.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder, batches: &[Batch]) -> Result<Readback> {
        self.training.record(encoder, self.feeds(batches)?)
    }

    /// Runs one step and measures where its time goes, node by node: see [`GraphTrainer::profile`].
    pub async fn profile(&mut self, batches: &[Batch]) -> Result<Timeline> {
        self.training.profile(self.feeds(batches)?).await
    }

    /// [`profile`](Self::profile), waiting; without timestamps by the host's clock.
    pub fn profile_blocking(&mut self, batches: &[Batch]) -> Result<Timeline> {
        self.training.profile_blocking(self.feeds(batches)?)
    }

    /// Divides steps into slices of at most `budget` each, to train within the frames of an application: see
    /// [`GraphTrainer::slices`].
    pub fn slices(&self, profile: &Timeline, budget: Duration) -> Result<StepSlices> {
        self.training.slices(profile, budget)
    }

    /// Starts a step in slices. Records nothing yet. Errors are those of [`step`](Self::step).
    ///
    /// Other steps run in the same memory as [evaluation](Self::evaluate). With slices, that may come in the middle of a
    /// step, so from the first slice on it has memory of its own, which [`buffer_bytes`](Self::buffer_bytes) does not
    /// count.
    ///
    /// ```no_run
    /// # use throughline::train::{Trainer, data::Batch};
    /// # fn app(trainer: &mut Trainer, batches: &[Batch]) -> throughline::Result<()> {
    /// # let (device, queue) = (trainer.gpu().device().clone(), trainer.gpu().queue().clone());
    /// let profile = trainer.profile_blocking(batches)?; // once; a step like others
    /// let slices = trainer.slices(&profile, std::time::Duration::from_micros(500))?;
    /// let mut step = trainer.start_sliced(&slices, batches)?;
    /// // A frame: your passes and one slice, in one submit.
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// if let Some(loss) = trainer.record_slice(&mut encoder, &mut step)? {
    ///     step = trainer.start_sliced(&slices, batches)?;
    ///     # drop(loss);
    /// }
    /// queue.submit([encoder.finish()]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_sliced(&self, slices: &StepSlices, batches: &[Batch]) -> Result<SlicedStep> {
        self.training.start_sliced(slices, self.feeds(batches)?)
    }

    /// Records the next slice of a step: see [`GraphTrainer::record_slice`].
    pub fn record_slice(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        step: &mut SlicedStep,
    ) -> Result<Option<Readback>> {
        self.training.record_slice(encoder, step)
    }

    /// The data of a step, checked. Each batch weighs as much as its share of the targets that count.
    fn feeds<'a>(&self, batches: &'a [Batch]) -> Result<Feeds<'a>> {
        let n = self.config.micro_batches;
        if batches.len() != n {
            return Err(Error::data("batches", format!("{n}, one for each micro-batch"), batches.len()));
        }
        let (counts, total) = self.counted(batches)?;
        let weights: Vec<f32> = counts.into_iter().map(|count| (count as f64 / total as f64) as f32).collect();
        let feeds = batches.iter().map(|batch| self.inputs.feeds(batch, self.config.seq_len()));
        Ok(Feeds::micro_batches(feeds).weighted(weights))
    }

    /// Checks sizes and ids of batches, and counts the targets of each and of all.
    fn counted(&self, batches: &[Batch]) -> Result<(Vec<usize>, usize)> {
        let shape = [self.config.batch, self.config.seq_len()];
        for (i, batch) in batches.iter().enumerate() {
            batch.check(format_args!("batches[{i}]"), shape, self.config.model.vocab_size, self.config.packing)?;
        }
        counted(batches)
    }

    /// The loss of the last step, on the GPU: `[1]`.
    pub fn loss(&self) -> Result<Tensor> {
        self.training.loss()
    }

    /// Mean loss in nats per token over all targets that count of one or more batches, without dropout.
    /// Resolves once the device has been polled; outside of frames, use [`evaluate_blocking`](Self::evaluate_blocking).
    ///
    /// # Errors
    ///
    /// As for [`step`](Self::step), with any number of batches but none.
    pub async fn evaluate(&self, batches: &[Batch]) -> Result<f32> {
        if batches.is_empty() {
            return Err(Error::data("batches", "at least one", "none"));
        }
        self.training.check_whole()?;
        let (counts, total) = self.counted(batches)?;
        let apart = match self.training.was_sliced() {
            true => Some(self.evaluation.apart().await?),
            false => None,
        };
        self.training.refresh()?;
        let exec = apart.as_deref().unwrap_or(&self.evaluation.exec);
        let mut losses = vec![];
        for (batch, count) in batches.iter().zip(counts).filter(|(_, count)| *count > 0) {
            losses.push((self.evaluation.submit(exec, batch)?, count));
        }
        let mut sum = 0.0;
        for (loss, count) in losses {
            sum += f64::from(loss.take::<f32>().await?[0]) * count as f64;
        }
        Ok((sum / total as f64) as f32)
    }

    /// [`evaluate`](Self::evaluate), waiting for the GPU.
    pub fn evaluate_blocking(&self, batches: &[Batch]) -> Result<f32> {
        self.gpu().run_blocking(self.evaluate(batches))
    }
}
