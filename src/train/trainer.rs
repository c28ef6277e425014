//! A training step as one submit: forward, backward, clipping and AdamW, with nothing read back.

use super::config::{TrainConfig, TrainOptions};
use super::data::{Batch, counted};
use super::plan::{StepPlan, TrainPlan};
use crate::device::timeline::Timeline;
use crate::device::{ExecOptions, Executable, Gpu, Readback, Tally, Tensor, Uploads};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::optim::{Arena, Optimizer};
use crate::plan::Plan;
use crate::probe::{Instruments, ProbeReadback};

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
    gpu: Gpu,
    pub(super) config: TrainConfig,
    /// Parameters. Their names and shapes are in the layout.
    pub params: Arena,
    /// Gradients of the last step.
    pub grads: Arena,
    /// Moments, and the update.
    pub optimizer: Optimizer,
    pub(super) forward_backward: StepGraph,
    evaluation: StepGraph,
    /// Bytes of GPU memory.
    bytes: usize,
    steps: Tally,
    /// Probes of the last step, until they are taken.
    probes: Option<ProbeReadback>,
}

/// An executable with the values that a step writes and reads.
#[derive(Debug)]
pub(super) struct StepGraph {
    pub(super) exec: Executable,
    tokens: Value,
    targets: Value,
    weight: Option<Value>,
    dropout_seed: Option<Value>,
    loss: Value,
    loss_state: Option<Value>,
    instruments: Option<Instruments>,
}

impl StepGraph {
    async fn new(gpu: &Gpu, step: &StepPlan, params: &Arena, grads: &Arena) -> Result<Self> {
        let bound = (step.params.iter().zip(&params.tensors)).chain(step.grads.iter().zip(&grads.tensors));
        let bindings = bound.map(|(&value, tensor)| (value, tensor.clone())).collect();
        let exec = Executable::new(gpu, step.plan.clone(), ExecOptions::bound(bindings)).await?;
        if let Some(types) = step.token_types {
            let len = exec.plan().find(types)?.1.len();
            exec.write(types, &vec![0u32; len])?;
        }
        let StepPlan { tokens, targets, weight, dropout_seed, loss, loss_state, .. } = *step;
        let instruments = step.instruments.clone();
        Ok(StepGraph { exec, tokens, targets, weight, dropout_seed, loss, loss_state, instruments })
    }
}

/// The loss of a submitted step, to be read when convenient: the mean cross-entropy over all targets that count.
///
/// It is NaN or infinite if training has diverged, and stays so. Look at it now and then, stop, and continue from a
/// checkpoint at a lower learning rate.
#[derive(Debug)]
pub struct StepLoss {
    /// The step that this is the loss of.
    pub step: u64,
    readback: Readback,
    submitted: wgpu::SubmissionIndex,
}

impl StepLoss {
    /// The mean cross-entropy in nats per token. Waits for this step, but not for later ones.
    pub fn wait_blocking(self) -> Result<f32> {
        self.readback.gpu().wait_for_blocking(self.submitted.clone())?;
        Ok(self.readback.wait_blocking::<f32>()?[0])
    }

    /// The mean cross-entropy in nats per token. Resolves once the device has been polled after the step.
    pub async fn take(self) -> Result<f32> {
        Ok(self.readback.take::<f32>().await?[0])
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
        plan.check(gpu)?;
        let (layout, config) = (&plan.layout, plan.config.clone());
        let params = gpu.scoped(|| Arena::zeros(gpu, "parameters", layout)).await?;
        let grads = gpu.scoped(|| Arena::zeros(gpu, "gradients", layout)).await?;
        let mut uploads = Uploads::new(gpu);
        for (((name, shape), tensor), init) in layout.tensors.iter().zip(&params.tensors).zip(&plan.inits) {
            let values = init.values(shape.len(), config.seed, name);
            uploads.write(tensor, 0, bytemuck::cast_slice(&values)).await?;
        }
        uploads.finish()?;
        Ok(Trainer {
            gpu: gpu.clone(),
            forward_backward: StepGraph::new(gpu, &plan.forward_backward, &params, &grads).await?,
            evaluation: StepGraph::new(gpu, &plan.evaluation, &params, &grads).await?,
            optimizer: Optimizer::from_plan(gpu, &plan.optimizer, &params, &grads).await?,
            bytes: plan.bytes(),
            config,
            params,
            grads,
            steps: Tally::default(),
            probes: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Number of completed steps. One that was recorded counts as completed, unless its encoder was dropped.
    pub fn step_count(&self) -> u64 {
        self.steps.count()
    }

    /// Sets the number of completed steps. The learning rate schedule and the bias correction follow it.
    pub fn set_step_count(&mut self, step: u64) {
        self.steps.set(step);
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

    /// Bytes of GPU memory, as planned in [`TrainPlan::bytes`].
    pub fn buffer_bytes(&self) -> usize {
        self.bytes
    }

    /// Runs one step on [`micro_batches`](TrainConfig::micro_batches) batches, in one submit and without waiting. The
    /// loss can be read later, while the GPU is at work on the next steps.
    ///
    /// # Errors
    ///
    /// If a batch has not the size of the plan, an id is not in the vocabulary (the error names it and its place), or
    /// all targets are [`IGNORE_INDEX`](super::data::IGNORE_INDEX). This is found before anything is recorded.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepLoss> {
        let step = self.step_count();
        let mut encoder = self.gpu.encoder("training step");
        let readback = self.record(&mut encoder, batches)?;
        let submitted = self.gpu.submit(encoder).inspect_err(|_| {
            self.steps.set(step);
            self.probes = None;
        })?;
        if let Some(probes) = &mut self.probes {
            probes.submitted = Some(submitted.clone());
        }
        Ok(StepLoss { step, readback, submitted })
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
    /// let mut trainer = gpu.run_blocking(Trainer::with_options(&gpu, config, &options))?;
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
        self.probes.take()
    }

    /// Queues a write of an input that a patch added, such as `h.3.attn.o.factor`. It affects training and evaluation
    /// alike.
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

    /// Records one step into your encoder. Several steps may follow each other in one encoder. Returns the loss, `[1]`,
    /// on its way to the host. From the second step on, nothing is allocated on the GPU. Errors are those of
    /// [`step`](Self::step).
    ///
    /// Submit the encoder, or drop it: then the step does not count, and its loss and probes are an `Err`.
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder, batches: &[Batch]) -> Result<Readback> {
        let weights = self.check(batches)?;
        self.clear(encoder)?;
        for (batch, weight) in batches.iter().zip(weights) {
            self.load(encoder, batch, weight)?;
            self.forward_backward.exec.record(encoder)?;
        }
        self.update(encoder)
    }

    /// Records what follows the last micro-batch.
    pub(super) fn update(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<Readback> {
        let step = self.step_count();
        if let Some(instruments) = &self.forward_backward.instruments {
            self.probes = Some(instruments.record_read(&self.forward_backward.exec, encoder, step)?);
        }
        self.optimizer.record(encoder, self.config.schedule.at(step), step)?;
        self.steps.record(encoder);
        Ok(self.loss()?.record_read(&self.gpu, encoder))
    }

    /// Runs one step and measures where its time goes, node by node. It is a normal step, except that the copies of the
    /// batch are not timed. Resolves once the device has been polled. Like [`Executable::profile`], it needs a device
    /// with timestamps.
    pub async fn profile(&mut self, batches: &[Batch]) -> Result<Timeline> {
        self.profile_by(batches, async |exec| exec.profile().await).await
    }

    /// [`profile`](Self::profile), waiting; without timestamps by the host's clock.
    pub fn profile_blocking(&mut self, batches: &[Batch]) -> Result<Timeline> {
        let gpu = self.gpu.clone();
        gpu.run_blocking(self.profile_by(batches, async |exec| exec.profile_blocking()))
    }

    async fn profile_by(
        &mut self,
        batches: &[Batch],
        profile: impl AsyncFn(&Executable) -> Result<Timeline>,
    ) -> Result<Timeline> {
        let weights = self.check(batches)?;
        let mut timelines = vec![];
        for (i, (batch, weight)) in batches.iter().zip(weights).enumerate() {
            let mut encoder = self.gpu.encoder("profiled training step");
            if i == 0 {
                self.clear(&mut encoder)?;
            }
            self.load(&mut encoder, batch, weight)?;
            self.gpu.submit(encoder)?;
            timelines.push(profile(&self.forward_backward.exec).await?);
        }
        let step = self.step_count();
        let update = self.optimizer.profile_by(self.config.schedule.at(step), step, profile).await?;
        self.steps.set(step.saturating_add(1));
        Ok(timelines.into_iter().rev().fold(update, |rest, part| part.then(rest)))
    }

    /// Records the clearing of what accumulates over micro-batches.
    pub(super) fn clear(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let s = &self.forward_backward;
        if let Some(loss) = s.loss_state {
            // Gradients and loss accumulate over micro-batches.
            let loss = s.exec.tensor(loss)?;
            self.grads.parts.iter().for_each(|part| encoder.clear_buffer(part.buffer(), 0, None));
            encoder.clear_buffer(loss.buffer(), loss.offset(), Some(loss.ty().storage_bytes() as u64));
        }
        Ok(())
    }

    /// Records the copy of a micro-batch into the inputs.
    pub(super) fn load(&self, encoder: &mut wgpu::CommandEncoder, batch: &Batch, weight: f32) -> Result<()> {
        let s = &self.forward_backward;
        if let Some(value) = s.weight {
            s.exec.record_write(encoder, value, &[weight])?;
        }
        if let Some(seed) = s.dropout_seed {
            s.exec.record_write(encoder, seed, &[self.config.seed as u32, self.step_count() as u32])?;
        }
        s.exec.record_write(encoder, s.tokens, &batch.tokens)?;
        s.exec.record_write(encoder, s.targets, &batch.targets)
    }

    /// Checks that these are the batches of a step. Returns the weight of each: its share of the targets that count.
    pub(super) fn check(&self, batches: &[Batch]) -> Result<Vec<f32>> {
        let n = self.config.micro_batches;
        if batches.len() != n {
            return Err(Error::data("batches", format!("{n}, one for each micro-batch"), batches.len()));
        }
        let (counts, total) = self.counted(batches)?;
        Ok(counts.into_iter().map(|count| (count as f64 / total as f64) as f32).collect())
    }

    /// Checks sizes and ids of batches, and counts the targets of each and of all.
    fn counted(&self, batches: &[Batch]) -> Result<(Vec<usize>, usize)> {
        let shape = [self.config.batch, self.config.seq_len()];
        for (i, batch) in batches.iter().enumerate() {
            batch.check(format_args!("batches[{i}]"), shape, self.config.model.vocab_size)?;
        }
        counted(batches)
    }

    /// The loss of the last step, on the GPU: `[1]`.
    pub fn loss(&self) -> Result<Tensor> {
        let s = &self.forward_backward;
        s.exec.tensor(s.loss_state.unwrap_or(s.loss))
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
        let (counts, total) = self.counted(batches)?;
        let s = &self.evaluation;
        let mut losses = vec![];
        for (batch, count) in batches.iter().zip(counts).filter(|(_, count)| *count > 0) {
            let mut encoder = self.gpu.encoder("evaluation");
            s.exec.record_write(&mut encoder, s.tokens, &batch.tokens)?;
            s.exec.record_write(&mut encoder, s.targets, &batch.targets)?;
            s.exec.record(&mut encoder)?;
            losses.push((s.exec.tensor(s.loss)?.record_read(&self.gpu, &mut encoder), count));
            self.gpu.submit(encoder)?;
        }
        let mut sum = 0.0;
        for (loss, count) in losses {
            sum += f64::from(loss.take::<f32>().await?[0]) * count as f64;
        }
        Ok((sum / total as f64) as f32)
    }

    /// [`evaluate`](Self::evaluate), waiting for the GPU.
    pub fn evaluate_blocking(&self, batches: &[Batch]) -> Result<f32> {
        self.gpu.run_blocking(self.evaluate(batches))
    }
}
