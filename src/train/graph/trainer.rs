//! A training step of any graph: forward, backward, clipping and the update, with nothing read back.

use std::collections::HashMap;
use std::time::Duration;

use super::config::{GraphTrainConfig, GraphTrainOptions};
use super::feed::{Feed, Feeds};
use super::loss::StepLoss;
use super::plan::{GraphTrainPlan, StepPlan};
use crate::device::timeline::Timeline;
use crate::device::{ExecOptions, Executable, Gpu, Readback, Submits, Tally, Tensor, Uploads};
use crate::error::{Error, Result, joined};
use crate::graph::{Graph, Source, Value};
use crate::optim::{Arena, ArenaLayout, Copies, LossScaleState, Optimizer};
use crate::plan::{External, Plan};
use crate::probe::ProbeReadback;
use crate::tensor::{DType, Element};

/// Trains the parameters of a graph of your own, so that a loss becomes small. Parameters and moments stay on the GPU.
///
/// ```
/// use throughline::graph::ParamInit;
/// use throughline::train::{GraphTrainConfig, GraphTrainer};
/// use throughline::{Gpu, TensorType};
///
/// let gpu = Gpu::headless_blocking()?;
/// let mut g = gpu.graph();
/// let x = g.input("x", TensorType::f32([64, 2]))?;
/// let y = g.input("y", TensorType::u32([64]))?;
/// let w = g.param_with("w", [2, 2], ParamInit::fan_in(2))?;
/// let b = g.param_with("b", [2], ParamInit::ZEROS)?;
/// let logits = g.linear("logits", x, w, Some(b))?;
/// let loss = g.cross_entropy("loss", logits, y)?;
///
/// // Which of two numbers is larger?
/// let mut rng = throughline::rng::Rng::new(&[0]);
/// let xs: Vec<f32> = (0..128).map(|_| rng.normal() as f32).collect();
/// let ys: Vec<u32> = xs.chunks(2).map(|x| u32::from(x[1] > x[0])).collect();
/// let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, GraphTrainConfig::adamw(0.1))?;
/// for _ in 0..100 {
///     trainer.step(&[x.with(&xs), y.with(&ys)])?; // waits for nothing
/// }
/// assert!(trainer.loss_blocking()? < 0.1);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug)]
pub struct GraphTrainer {
    gpu: Gpu,
    config: GraphTrainConfig,
    params: Arena,
    grads: Arena,
    /// The frozen parameters that are not in tensors of the caller's.
    frozen: Arena,
    /// What a step reads instead of parameters, in mixed precision.
    copies: Option<Copies>,
    optimizer: Optimizer,
    exec: Executable,
    step: StepPlan,
    /// Bytes of GPU memory.
    bytes: usize,
    steps: Tally,
    /// Whether a slice of a step was ever recorded.
    pub(super) sliced: bool,
    /// What happened to a step of which only a part was submitted.
    broken: Option<String>,
    /// Probes of the last step, until they are taken.
    probes: Option<ProbeReadback>,
}

impl GraphTrainer {
    /// A trainer of all parameters of `graph`, which start from their
    /// [initialisation](crate::Graph::param_with). `loss` is f32 `[1]`. Resolves once the device has been polled,
    /// several times for a large model; outside of frames, use [`new_blocking`](Self::new_blocking).
    ///
    /// The graph's values remain those of inputs to [feed](Value::with) and of outputs to [read](Self::read).
    ///
    /// # Errors
    ///
    /// As for [`GraphTrainPlan::new`].
    pub async fn new(gpu: &Gpu, graph: Graph, loss: Value, config: GraphTrainConfig) -> Result<Self> {
        Self::with_options(gpu, graph, loss, config, &GraphTrainOptions::default()).await
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, graph: Graph, loss: Value, config: GraphTrainConfig) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, graph, loss, config))
    }

    /// [`new`](Self::new) with outputs to read, frozen parameters, probes, tensors of your own, or a bound on the
    /// memory.
    pub async fn with_options(
        gpu: &Gpu,
        graph: Graph,
        loss: Value,
        config: GraphTrainConfig,
        options: &GraphTrainOptions,
    ) -> Result<Self> {
        let plan = GraphTrainPlan::new(graph, loss, &config, options, gpu.profile())?;
        Self::from_plan(gpu, &plan, &options.bindings).await
    }

    /// [`with_options`](Self::with_options), waiting.
    pub fn with_options_blocking(
        gpu: &Gpu,
        graph: Graph,
        loss: Value,
        config: GraphTrainConfig,
        options: &GraphTrainOptions,
    ) -> Result<Self> {
        gpu.run_blocking(Self::with_options(gpu, graph, loss, config, options))
    }

    /// A trainer from a plan. Plan first if your application requests its device for this, or wants to know the bytes
    /// before it allocates them. `bindings` are tensors of yours, as in [`GraphTrainOptions::bindings`].
    ///
    /// # Errors
    ///
    /// An error names a limit of the device that is too low for the plan, or a binding that it has no use for: a frozen
    /// parameter is bound only if the plan's options had it bound. [What the plan awaits](GraphTrainOptions::bound) must
    /// be there.
    pub async fn from_plan(gpu: &Gpu, plan: &GraphTrainPlan, bindings: &HashMap<Value, Tensor>) -> Result<Self> {
        plan.check(gpu)?;
        plan.step.check_bindings(bindings)?;
        let params = gpu.scoped(|| Arena::zeros(gpu, "parameters", &plan.layout)).await?;
        let grads = gpu.scoped(|| Arena::zeros(gpu, "gradients", &plan.layout)).await?;
        let frozen = gpu.scoped(|| Arena::zeros(gpu, "frozen parameters", &plan.frozen)).await?;
        let mut uploads = Uploads::new(gpu);
        let named = |arena: &Arena| arena.layout.tensors.clone().into_iter().zip(arena.tensors.clone());
        for (((name, shape), tensor), init) in named(&params).chain(named(&frozen)).zip(&plan.inits) {
            let values = init.values(shape.len(), plan.config.seed, &name);
            uploads.write(&tensor, 0, bytemuck::cast_slice(&values)).await?;
        }
        uploads.finish()?;
        let step = plan.step.clone();
        let copies = match &plan.copies {
            Some(plan) => Some(Copies::from_plan(gpu, plan, &params).await?),
            None => None,
        };
        let read = |(i, master)| copies.as_ref().and_then(|copies| copies.of(i)).unwrap_or(master);
        let read: Vec<&Tensor> = params.tensors.iter().enumerate().map(read).collect();
        let of_arenas = [(&step.grads, &grads), (&step.frozen, &frozen)];
        let bound = of_arenas.into_iter().flat_map(|(values, arena)| values.iter().copied().zip(&arena.tensors));
        let bound = step.params.iter().copied().zip(read).chain(bound);
        // A frozen parameter need not be part of the step.
        let used = bound.filter(|&(value, _)| step.plan.bound(value).is_ok());
        let optimizer = Optimizer::from_plan(gpu, &plan.optimizer, &params, &grads).await?;
        let scale = optimizer.loss_scale()?;
        let scale = step.loss_scale.zip(scale.as_ref());
        let all = used.chain(scale).chain(bindings.iter().map(|(&value, tensor)| (value, tensor)));
        let options = ExecOptions::bound(all.map(|(value, tensor)| (value, tensor.clone())).collect());
        Ok(GraphTrainer {
            exec: Executable::new(gpu, step.plan.clone(), options).await?,
            optimizer,
            gpu: gpu.clone(),
            config: plan.config.clone(),
            bytes: plan.bytes(),
            step,
            params,
            grads,
            frozen,
            copies,
            steps: Tally::default(),
            sliced: false,
            broken: None,
            probes: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &GraphTrainConfig {
        &self.config
    }

    /// Number of completed steps. One that was recorded counts as completed, unless its encoder was dropped.
    ///
    /// With [loss scaling](GraphTrainConfig::loss_scaling), steps that the device skips are completed too: this numbers
    /// the data and the random numbers, and is what to log and to save by. The schedule and the bias correction go by
    /// the steps that were applied, which the device counts: see [`loss_scale`](Self::loss_scale).
    pub fn step_count(&self) -> u64 {
        self.steps.count()
    }

    /// Sets the number of completed steps. The learning rate schedule and the bias correction follow it. After a step
    /// that was [submitted in part](Self::step) this says that parameters and moments have been written again.
    ///
    /// With loss scaling, all of them count as applied and none as skipped; the scale stays.
    ///
    /// # Errors
    ///
    /// With loss scaling, if the device is lost.
    pub fn set_step_count(&mut self, step: u64) -> Result<()> {
        self.optimizer.set_applied(step)?;
        self.steps.set(step);
        self.broken = None;
        Ok(())
    }

    /// The same for a run that comes from a file, with what loss scaling had come to there. A run without it has applied
    /// all steps.
    pub(crate) fn set_position(&mut self, step: u64, scaling: Option<&LossScaleState>) -> Result<()> {
        if let Some(settings) = self.optimizer.loss_scaling() {
            let state = scaling.map_or(settings.state_at(step), |state| settings.bounded(state));
            self.optimizer.set_loss_scale_state(&state)?;
        }
        self.steps.set(step);
        self.broken = None;
        Ok(())
    }

    /// What [loss scaling](GraphTrainConfig::loss_scaling) has come to after all that was submitted: the scale, and how
    /// many steps were applied and skipped. `None` without it. Resolves once the device has been polled; outside of
    /// frames, use [`loss_scale_blocking`](Self::loss_scale_blocking).
    ///
    /// Of a single step, [`StepLoss::report`] tells this without waiting for later ones.
    pub async fn loss_scale(&self) -> Result<Option<LossScaleState>> {
        self.optimizer.loss_scale_state().await
    }

    /// [`loss_scale`](Self::loss_scale), waiting for the GPU.
    pub fn loss_scale_blocking(&self) -> Result<Option<LossScaleState>> {
        self.optimizer.loss_scale_state_blocking()
    }

    /// Queues a write of the loss scale, to happen before the next submit.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] without loss scaling, or if this is not a power of two within the bounds of its settings.
    pub fn set_loss_scale(&self, scale: f32) -> Result<()> {
        self.optimizer.set_loss_scale(scale)
    }

    /// An error if only a part of a step was submitted.
    pub(crate) fn check_whole(&self) -> Result<()> {
        self.broken.as_ref().map_or(Ok(()), |message| Err(Error::Device(message.clone())))
    }

    /// The device that this trains on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Forward and backward.
    pub(crate) fn exec(&self) -> &Executable {
        &self.exec
    }

    /// Whether a slice of a step was ever recorded: since then, what is submitted next may be in the middle of a step.
    pub(crate) fn was_sliced(&self) -> bool {
        self.sliced
    }

    /// The plan of forward and backward.
    pub fn plan(&self) -> &Plan {
        self.exec.plan()
    }

    /// The trained parameters. Their names and shapes are in the layout.
    pub fn params(&self) -> &Arena {
        &self.params
    }

    /// The gradients of the last step, in the layout of the parameters. With [loss
    /// scaling](GraphTrainConfig::loss_scaling) they are those of the loss times the scale that the step had.
    pub fn grads(&self) -> &Arena {
        &self.grads
    }

    /// The [frozen](GraphTrainOptions::frozen) parameters, except those in tensors of yours.
    pub fn frozen(&self) -> &Arena {
        &self.frozen
    }

    /// What a step reads of a parameter: its copy in f16, if it has one.
    pub(crate) fn read_param(&self, name: &str, dtype: DType) -> Option<Tensor> {
        let i = self.params.layout.tensors.iter().position(|(known, _)| known == name);
        match (&self.copies, i) {
            (Some(copies), Some(i)) if dtype == DType::F16 => copies.of(i).cloned(),
            _ => self.param(name),
        }
    }

    /// Lets evaluation see what the arena holds now: makes the copies in f16.
    pub(crate) fn refresh(&self) -> Result<()> {
        self.copies.as_ref().map_or(Ok(()), Copies::submit)
    }

    /// The tensor of a trained parameter that a step reads from a copy.
    fn master(&self, value: Value) -> Option<&Tensor> {
        let i = self.step.params.iter().position(|&param| param == value)?;
        self.copies.as_ref().filter(|copies| copies.of(i).is_some()).map(|_| &self.params.tensors[i])
    }

    /// The update, with its moments.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        let ArenaLayout { tensors, .. } = &*self.params.layout;
        tensors.iter().map(|(_, shape)| shape.len()).sum()
    }

    /// Bytes of GPU memory, as planned in [`GraphTrainPlan::bytes`].
    pub fn buffer_bytes(&self) -> usize {
        self.bytes
    }

    /// Runs one step on this data, without waiting. The loss can be read later, while the GPU is at work on the next
    /// steps.
    ///
    /// Inputs that are not fed keep what they have, so what stays the same is fed once, or
    /// [written](Self::write). `&[]` is for steps that need nothing new.
    ///
    /// A step that takes long is cut into several submits, by estimates that are corrected by what submits take: see
    /// [`set_submit_time`](Self::set_submit_time). What another thread submits may run in between, and may see a part of
    /// the update.
    ///
    /// # Errors
    ///
    /// If the data of an input has another length or type, an input never got any, or an id is of no class or row: the
    /// error names it. This is found before anything is recorded.
    ///
    /// If a submit fails, the step does not count. If others of the same step went before it, weights may be half
    /// updated: then steps, evaluation and saving are errors that say so, until a checkpoint is
    /// [restored](super::GraphCheckpoint::restore).
    pub fn step<'a>(&mut self, feeds: impl Into<Feeds<'a>>) -> Result<StepLoss> {
        let feeds = feeds.into();
        let weights = self.check(&feeds)?;
        let step = self.step_count();
        let mut submits = self.exec.submits(format!("training step {step}"));
        let run = self.submit(&mut submits, &feeds, &weights);
        let (readback, outcome, submitted) = run.inspect_err(|e| {
            self.steps.set(step);
            self.probes = None;
            let before = submits.count();
            if before > 0 {
                let advice = "restore a checkpoint, or make a new trainer";
                let what = format!("only {before} submits of step {step} went through, so weights may be half updated");
                self.broken = Some(format!("{what}: {advice}. The error was: {e}"));
            }
        })?;
        if let Some(probes) = &mut self.probes {
            probes.submitted = Some(submitted.clone());
        }
        Ok(StepLoss { step, submits: submits.count(), readback, outcome, submitted })
    }

    /// Submits a step. Returns the loss on its way to the host and, with loss scaling, what became of the step.
    fn submit(
        &mut self,
        submits: &mut Submits,
        feeds: &Feeds<'_>,
        weights: &[f32],
    ) -> Result<(Readback, Option<Readback>, wgpu::SubmissionIndex)> {
        self.clear(submits.encoder())?;
        if let Some(copies) = &self.copies {
            copies.record_in(submits)?;
        }
        for (batch, &weight) in feeds.batches.iter().zip(weights) {
            self.exec.make_room_in(submits)?;
            self.feed(submits.encoder(), batch, weight)?;
            self.exec.record_in(submits)?;
        }
        let step = self.step_count();
        let loss = self.record_read(submits.encoder(), step)?;
        self.optimizer.record_in(submits, &self.config.schedule, step)?;
        let outcome = self.optimizer.outcome()?.map(|outcome| outcome.record_read(&self.gpu, submits.encoder()));
        self.steps.record(submits.encoder());
        Ok((loss, outcome, submits.submit()?))
    }

    /// Sets the time that a submit of [`step`](Self::step) takes at most, by estimate: 75 milliseconds at first. Each
    /// micro-batch begins a new submit unless all of it fits into the one before.
    ///
    /// Systems reset a device whose submit takes long, Windows after two seconds. A shorter time lets other users of the
    /// device in more often, such as an app that renders on another thread. Each submit costs the host some ten
    /// microseconds. A single kernel is never cut.
    pub fn set_submit_time(&self, time: Duration) {
        self.exec.set_submit_time(time);
    }

    /// Records one step into your encoder. Several steps may follow each other in one encoder. Returns the loss, `[1]`,
    /// on its way to the host. From the second step on, nothing is allocated on the GPU. Errors are those of
    /// [`step`](Self::step).
    ///
    /// All of it is one submit of yours, which must not take long: Windows resets a device after two seconds. For steps
    /// of that order there are [`step`](Self::step), which cuts them, and [slices](Self::start_sliced).
    ///
    /// Submit the encoder, or drop it: then the step does not count, and its loss and probes are an `Err`.
    pub fn record<'a>(&mut self, encoder: &mut wgpu::CommandEncoder, feeds: impl Into<Feeds<'a>>) -> Result<Readback> {
        let feeds = feeds.into();
        let weights = self.check(&feeds)?;
        self.clear(encoder)?;
        self.begin(encoder)?;
        for (batch, weight) in feeds.batches.iter().zip(weights) {
            self.feed(encoder, batch, weight)?;
            self.exec.record(encoder)?;
        }
        self.update(encoder)
    }

    /// Records what comes before the first micro-batch.
    pub(super) fn begin(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.copies.as_ref().map_or(Ok(()), |copies| copies.record(encoder))
    }

    /// Number of commands before the first micro-batch, as profiles count them.
    pub(super) fn begin_count(&self) -> usize {
        self.copies.as_ref().map_or(0, Copies::command_count)
    }

    /// Records what follows the last micro-batch.
    pub(super) fn update(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<Readback> {
        let step = self.step_count();
        let loss = self.record_read(encoder, step)?;
        self.optimizer.record(encoder, self.config.schedule, step)?;
        self.steps.record(encoder);
        Ok(loss)
    }

    /// Records the copies of probes and of the loss, which is returned. This comes before the update: a loss may be a
    /// view of a parameter.
    fn record_read(&mut self, encoder: &mut wgpu::CommandEncoder, step: u64) -> Result<Readback> {
        if let Some(instruments) = &self.step.instruments {
            let probes = instruments.record_read(&self.exec, encoder, step)?;
            self.probes = Some(match self.optimizer.loss_scale()? {
                Some(scale) => probes.with_scale(scale.record_read(&self.gpu, encoder)),
                None => probes,
            });
        }
        Ok(self.loss()?.record_read(&self.gpu, encoder))
    }

    /// The answers of the probes in the last step, on their way to the host. Take them right after the step, and read
    /// them once the next step is submitted, so that nothing waits. `None` without probes, before the first step, and
    /// when called again.
    pub fn take_probes(&mut self) -> Option<ProbeReadback> {
        self.probes.take()
    }

    /// Runs one step and measures where its time goes, node by node. It is a normal step, except that the copies of the
    /// data are not timed. Resolves once the device has been polled. Like [`Executable::profile`], it needs a device
    /// with timestamps.
    pub async fn profile<'a>(&mut self, feeds: impl Into<Feeds<'a>>) -> Result<Timeline> {
        self.profile_by(&feeds.into(), async |exec| exec.profile().await).await
    }

    /// [`profile`](Self::profile), waiting; without timestamps by the host's clock.
    pub fn profile_blocking<'a>(&mut self, feeds: impl Into<Feeds<'a>>) -> Result<Timeline> {
        let (gpu, feeds) = (self.gpu.clone(), feeds.into());
        gpu.run_blocking(self.profile_by(&feeds, async |exec| exec.profile_blocking()))
    }

    async fn profile_by(
        &mut self,
        feeds: &Feeds<'_>,
        profile: impl AsyncFn(&Executable) -> Result<Timeline>,
    ) -> Result<Timeline> {
        let weights = self.check(feeds)?;
        let mut timelines = vec![];
        if let Some(copies) = &self.copies {
            timelines.push(copies.profile_by(&profile).await?);
        }
        for (i, (batch, weight)) in feeds.batches.iter().zip(weights).enumerate() {
            let mut encoder = self.gpu.encoder("profiled training step");
            if i == 0 {
                self.clear(&mut encoder)?;
            }
            self.feed(&mut encoder, batch, weight)?;
            self.gpu.submit(encoder)?;
            timelines.push(profile(&self.exec).await?);
        }
        let step = self.step_count();
        let update = self.optimizer.profile_by(&self.config.schedule, step, profile).await?;
        self.steps.set(step.saturating_add(1));
        Ok(timelines.into_iter().rev().fold(update, |rest, part| part.then(rest)))
    }

    /// Records the clearing of what accumulates over micro-batches.
    pub(super) fn clear(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        if let Some(loss) = self.step.loss_state {
            // Gradients and loss accumulate over micro-batches.
            let loss = self.exec.tensor(loss)?;
            self.grads.parts.iter().for_each(|part| encoder.clear_buffer(part.buffer(), 0, None));
            encoder.clear_buffer(loss.buffer(), loss.offset(), Some(loss.ty().storage_bytes() as u64));
        }
        Ok(())
    }

    /// Records the copy of a micro-batch into the inputs.
    pub(super) fn feed(&self, encoder: &mut wgpu::CommandEncoder, feeds: &[Feed<'_>], weight: f32) -> Result<()> {
        if let Some(value) = self.step.weight {
            self.exec.record_write(encoder, value, &[weight])?;
        }
        if let Some(seed) = self.step.seed {
            self.exec.record_write(encoder, seed, &[self.config.seed as u32, self.step_count() as u32])?;
        }
        feeds.iter().try_for_each(|feed| feed.record(&self.exec, encoder))
    }

    /// Checks that this is the data of a step. Returns the weight of each micro-batch.
    pub(super) fn check(&self, feeds: &Feeds<'_>) -> Result<Vec<f32>> {
        self.check_whole()?;
        let weights = feeds.weights(self.config.micro_batches)?;
        for batch in &feeds.batches {
            for (i, feed) in batch.iter().enumerate() {
                let external = self.input(feed.value)?;
                feed.data.check(&external.name, &external.ty)?;
                if let Some(&below) = self.step.ids_below.get(&feed.value) {
                    feed.data.check_ids(&external.name, below)?;
                }
                if batch[..i].iter().any(|earlier| earlier.value == feed.value) {
                    return Err(Error::data(&external.name, "data once for each micro-batch", "it twice"));
                }
            }
        }
        let written = self.step.weight.into_iter().chain(self.step.seed);
        let fed: Vec<Value> = feeds.batches.iter().take(1).flatten().map(|feed| feed.value).chain(written).collect();
        let missing = self.exec.unset().filter(|external| !fed.contains(&external.value));
        let missing: Vec<String> = missing.map(|external| format!("`{}`", external.name)).collect();
        match missing[..] {
            [] => Ok(weights),
            _ => Err(Error::Graph(format!(
                "inputs that were never fed or written: {}. Feed them with `Value::with`",
                joined(missing, ", ")
            ))),
        }
    }

    /// The input of a value to feed.
    fn input(&self, value: Value) -> Result<&External> {
        let plan = self.plan();
        let found = plan.externals.iter().find(|external| external.value == value);
        let problem = match found {
            Some(_) if Some(value) == self.step.seed || Some(value) == self.step.weight => "the trainer writes it",
            Some(external) if matches!(external.source, Source::Input) => return Ok(external),
            Some(_) => "it is no input; `GraphTrainer::write` writes states and parameters",
            None => "it is not an input that the loss or an output depends on",
        };
        let name = plan.names.of(value).map_err(|message| Error::Graph(format!("a feed: {message}")))?;
        Err(Error::Graph(format!("`{name}` cannot be fed: {problem}")))
    }

    /// Queues a write of an input, state or parameter, to happen before the next submit: data that stays the same for
    /// many steps.
    ///
    /// # Errors
    ///
    /// If the value is none of these, or `data` has another length or type.
    pub fn write<T: Element>(&self, value: Value, data: &[T]) -> Result<()> {
        match self.master(value) {
            Some(master) => master.write(&self.gpu, data),
            None => self.exec.write(value, data),
        }
    }

    /// The tensor of one of the [outputs](GraphTrainOptions::outputs), or of an input, state or parameter: to read it
    /// from passes of your own.
    pub fn tensor(&self, value: Value) -> Result<Tensor> {
        self.master(value).map_or_else(|| self.exec.tensor(value), |master| Ok(master.clone()))
    }

    /// Reads one of the [outputs](GraphTrainOptions::outputs), or an input, state or parameter, as the last submit left
    /// it. (Between slices of a step, read a state that the step stores to.) Resolves once the device has been polled;
    /// outside of frames, use [`read_blocking`](Self::read_blocking).
    pub async fn read<T: Element>(&self, value: Value) -> Result<Vec<T>> {
        match self.master(value) {
            Some(master) => master.read(&self.gpu).await,
            None => self.exec.read(value).await,
        }
    }

    /// [`read`](Self::read), waiting for the GPU.
    pub fn read_blocking<T: Element>(&self, value: Value) -> Result<Vec<T>> {
        self.gpu.run_blocking(self.read(value))
    }

    /// The loss of the last step, on the GPU: `[1]`.
    pub fn loss(&self) -> Result<Tensor> {
        self.exec.tensor(self.step.loss_state.unwrap_or(self.step.loss))
    }

    /// The loss of the last step, waiting for it and all that was submitted later. To wait for a single step, keep its
    /// [`StepLoss`].
    pub fn loss_blocking(&self) -> Result<f32> {
        Ok(self.loss()?.read_blocking::<f32>(&self.gpu)?[0])
    }
}
