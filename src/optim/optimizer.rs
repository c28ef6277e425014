//! The update of all parameters, on the GPU.

use super::arena::{Arena, ArenaLayout};
use super::config::OptimizerConfig;
use super::plan::{OptimizerPlan, Scaled};
use super::scaling::{LossScaleState, LossScaling, count};
use super::schedule::Schedule;
use crate::device::timeline::Timeline;
use crate::device::{ExecOptions, Executable, Gpu, Submits, Tensor};
use crate::error::{Error, Result};
use crate::graph::Value;
use crate::plan::Plan;

/// Updates all parameters on the GPU: global norm, clipping, then the update of each.
///
/// A [`GraphTrainer`](crate::train::GraphTrainer) has one. Create one yourself for a training loop of your own, and call
/// [`record`](Self::record) after the backward pass, in the same encoder.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// First moments: those of AdamW, Muon's momentum, the velocity of SGD. Empty for SGD without momentum.
    pub m: Arena,
    /// Second moments of everything that AdamW updates.
    pub v: Arena,
    exec: Executable,
    hyper: Option<Value>,
    muon_hyper: Option<Value>,
    norm: Value,
    scaling: Option<Scaled>,
}

impl Optimizer {
    /// Moments for `params`, zeroed, and the dispatches of a step. Muon updates the matrices that the arenas' layout
    /// has for it ([`ArenaLayout::with_muon`]), at least one.
    pub async fn new(gpu: &Gpu, config: impl Into<OptimizerConfig>, params: &Arena, grads: &Arena) -> Result<Self> {
        let plan = OptimizerPlan::new(config, &params.layout, gpu.profile())?;
        Self::from_plan(gpu, &plan, params, grads).await
    }

    /// [`new`](Self::new), waiting.
    pub fn new_blocking(gpu: &Gpu, config: impl Into<OptimizerConfig>, params: &Arena, grads: &Arena) -> Result<Self> {
        gpu.run_blocking(Self::new(gpu, config, params, grads))
    }

    /// What a plan says, on arenas of its layout.
    pub async fn from_plan(gpu: &Gpu, plan: &OptimizerPlan, params: &Arena, grads: &Arena) -> Result<Self> {
        let lens = |layout: &ArenaLayout| layout.parts.iter().map(|part| part.len).collect::<Vec<_>>();
        for (tensor, arena) in [("parameters", params), ("gradients", grads)] {
            let [expected, got] = [&plan.layout, &arena.layout].map(|layout| lens(layout));
            if expected != got {
                let [expected, got] = [expected, got].map(|lens| format!("an arena with parts of {lens:?} elements"));
                return Err(Error::data(tensor, expected, got));
            }
        }
        let m = gpu.scoped(|| Arena::zeros(gpu, "first moments", &plan.first)).await?;
        let v = gpu.scoped(|| Arena::zeros(gpu, "second moments", &plan.second)).await?;
        let arenas = [params, grads, &m, &v];
        let bindings = plan.bound.iter().map(|(value, range)| Ok((*value, range.of(arenas)?)));
        let options = ExecOptions::bound(bindings.collect::<Result<_>>()?);
        let exec = Executable::new(gpu, plan.plan.clone(), options).await?;
        let OptimizerPlan { config, hyper, muon_hyper, norm, scaling, .. } = *plan;
        let optimizer = Optimizer { config, m, v, exec, hyper, muon_hyper, norm, scaling };
        if let Some(scaled) = scaling {
            optimizer.set_loss_scale_state(&scaled.settings.state_at(0))?;
        }
        Ok(optimizer)
    }

    /// Records an update. `rate` is a learning rate, or a schedule of them. `step` counts from 0 and determines the rate
    /// and the bias correction.
    ///
    /// With [loss scaling](OptimizerPlan::scaled), the device itself counts the steps that it applies, and these
    /// determine both; `step` does not matter.
    ///
    /// # Errors
    ///
    /// If the rate is negative, above 10 or no number, or so high that the weight decay would subtract more than the
    /// whole weight. Nothing is recorded then.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder, rate: impl Into<Schedule>, step: u64) -> Result<()> {
        self.record_hyper(encoder, &rate.into(), step)?;
        self.exec.record(encoder)
    }

    /// [`record`](Self::record), in as many submits as it takes.
    pub(crate) fn record_in(&self, submits: &mut Submits, schedule: &Schedule, step: u64) -> Result<()> {
        self.exec.make_room_in(submits)?;
        self.record_hyper(submits.encoder(), schedule, step)?;
        self.exec.record_in(submits)
    }

    /// Runs an update like [`record`](Self::record) and times it kernel by kernel. Resolves once the device has been
    /// polled. Like [`Executable::profile`], it needs a device with timestamps.
    pub async fn profile(&self, rate: impl Into<Schedule>, step: u64) -> Result<Timeline> {
        self.profile_by(&rate.into(), step, async |exec| exec.profile().await).await
    }

    /// [`profile`](Self::profile), waiting; without timestamps by the host's clock.
    pub fn profile_blocking(&self, rate: impl Into<Schedule>, step: u64) -> Result<Timeline> {
        let schedule = rate.into();
        self.exec.gpu().run_blocking(self.profile_by(&schedule, step, async |exec| exec.profile_blocking()))
    }

    pub(crate) async fn profile_by(
        &self,
        schedule: &Schedule,
        step: u64,
        profile: impl AsyncFn(&Executable) -> Result<Timeline>,
    ) -> Result<Timeline> {
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("optimizer step");
        self.record_hyper(&mut encoder, schedule, step)?;
        gpu.submit(encoder)?;
        profile(&self.exec).await
    }

    /// Records what the kernels read: the settings at this step of the schedule. Where the device counts the steps, what
    /// it makes them of.
    fn record_hyper(&self, encoder: &mut wgpu::CommandEncoder, schedule: &Schedule, step: u64) -> Result<()> {
        let lr = if self.scaling.is_some() { schedule.peak } else { schedule.at(step) };
        let (mut hyper, mut muon_hyper) = match &self.config {
            OptimizerConfig::AdamW(adamw) => (adamw.at(lr, step)?.to_vec(), None),
            OptimizerConfig::Muon { muon, adamw } => {
                (adamw.at(lr, step)?.to_vec(), Some(muon.values(lr, adamw.max_grad_norm)?))
            }
            OptimizerConfig::Sgd(sgd) => (sgd.values(lr)?.to_vec(), None),
        };
        if let Some(scaled) = &self.scaling {
            schedule.validate()?;
            self.exec.record_write(encoder, scaled.schedule, &schedule.values())?;
            hyper[0] = 1.0;
            if let OptimizerConfig::AdamW(adamw) | OptimizerConfig::Muon { adamw, .. } = &self.config {
                hyper[5..7].copy_from_slice(&adamw.log_betas());
            }
            if let (Some(hyper), Some(muon)) = (&mut muon_hyper, self.config.muon()) {
                hyper[0] = muon.lr_factor as f32;
            }
        }
        if let Some((value, data)) = self.muon_hyper.zip(muon_hyper) {
            self.exec.record_write(encoder, value, &data)?;
        }
        self.hyper.map_or(Ok(()), |value| self.exec.record_write(encoder, value, &hyper))
    }

    /// The settings of loss scaling, if there is any.
    pub fn loss_scaling(&self) -> Option<&LossScaling> {
        self.scaling.as_ref().map(|scaled| &scaled.settings)
    }

    /// With loss scaling, the scale, f32 `[1]`. Bind it to a state of your graph, multiply the loss by that, and take
    /// the gradients of the product.
    ///
    /// ```
    /// use std::collections::HashMap;
    /// use std::sync::Arc;
    /// use throughline::optim::{Arena, ArenaLayout, LossScaling, Optimizer, OptimizerPlan, SgdConfig};
    /// use throughline::{ExecOptions, Executable, Gpu, TensorType};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let mut g = gpu.graph();
    /// let x = g.input("x", TensorType::f32([1, 2]))?;
    /// let w = g.param("w", [2, 1])?;
    /// let y = g.matmul("y", x, w)?;
    /// let loss = g.sum("loss", y)?;
    /// let scale = g.state("scale", TensorType::f32([1]))?;
    /// let scaled = g.mul("scaled", loss, scale)?;
    /// let dw = g.gradients(scaled, &[w])?[0];
    /// let state = g.state("dw", TensorType::f32([2, 1]))?;
    /// g.store(dw, state)?;
    ///
    /// let layout = Arc::new(ArenaLayout::of(&g, &[w], gpu.profile().max_tensor_bytes())?);
    /// let (params, grads) = (Arena::zeros(&gpu, "params", &layout)?, Arena::zeros(&gpu, "grads", &layout)?);
    /// let scaling = Some(LossScaling::default());
    /// let plan = OptimizerPlan::scaled(SgdConfig::default(), scaling, &layout, gpu.profile())?;
    /// let optimizer = gpu.run_blocking(Optimizer::from_plan(&gpu, &plan, &params, &grads))?;
    /// let mut bindings = HashMap::from([(w, params.tensors[0].clone()), (state, grads.tensors[0].clone())]);
    /// bindings.extend(optimizer.loss_scale()?.map(|tensor| (scale, tensor)));
    /// let exec = Executable::new_blocking(&gpu, Arc::new(gpu.plan(&g, &[loss])?), ExecOptions::bound(bindings))?;
    ///
    /// for x0 in [1.0, f32::INFINITY, 1.0] {
    ///     exec.write(x, &[x0, 2.0])?;
    ///     let mut encoder = gpu.device().create_command_encoder(&Default::default());
    ///     exec.record(&mut encoder)?;
    ///     optimizer.record(&mut encoder, 0.5, 0)?; // the device counts
    ///     gpu.submit(encoder)?;
    /// }
    /// assert_eq!(params.read_blocking(&gpu)?, [[-1.0, -2.0]]); // two steps of -0.5 and -1
    /// let state = optimizer.loss_scale_state_blocking()?.unwrap();
    /// assert_eq!((state.applied, state.skipped, state.scale), (2, 1, 32768.0));
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn loss_scale(&self) -> Result<Option<Tensor>> {
        self.scaling.map(|scaled| self.exec.tensor(scaled.scale)).transpose()
    }

    /// With loss scaling, what became of the last step, f32 `[3]`: the factor of the gradient; 1 if the step was skipped
    /// or else 0; and the scale that it had.
    pub fn outcome(&self) -> Result<Option<Tensor>> {
        self.scaling.map(|scaled| self.exec.tensor(scaled.outcome)).transpose()
    }

    /// The scale and the counts of steps after everything submitted so far; `None` without loss scaling. Resolves once
    /// the device has been polled; outside of frames, use [`loss_scale_state_blocking`](Self::loss_scale_state_blocking).
    pub async fn loss_scale_state(&self) -> Result<Option<LossScaleState>> {
        let Some(scaled) = self.scaling else { return Ok(None) };
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("read the loss scale");
        let [scale, counts] = [scaled.scale, scaled.counts].map(|value| self.exec.tensor(value));
        let [scale, counts] = [scale?, counts?].map(|tensor| tensor.record_read(gpu, &mut encoder));
        gpu.submit(encoder)?;
        let (scale, counts) = (scale.take::<f32>().await?, counts.take::<u32>().await?);
        Ok(Some(LossScaleState { scale: scale[0], finite: counts[0], applied: counts[1], skipped: counts[2] }))
    }

    /// [`loss_scale_state`](Self::loss_scale_state), waiting for the GPU.
    pub fn loss_scale_state_blocking(&self) -> Result<Option<LossScaleState>> {
        self.exec.gpu().run_blocking(self.loss_scale_state())
    }

    /// Queues a write of the scale and the counts of steps, to happen before the next submit.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] without loss scaling, or if the scale is not one that its settings allow.
    pub fn set_loss_scale_state(&self, state: &LossScaleState) -> Result<()> {
        self.set_loss_scale(state.scale)?;
        let Some(scaled) = self.scaling else { return Ok(()) };
        self.exec.write(scaled.counts, &[state.finite, state.applied, state.skipped])
    }

    /// The same for the counts: so many steps were applied, and none skipped. Without loss scaling there is nothing to
    /// write.
    pub(crate) fn set_applied(&self, steps: u64) -> Result<()> {
        self.scaling.map_or(Ok(()), |scaled| self.exec.write(scaled.counts, &[0, count(steps), 0]))
    }

    /// The same for the scale alone.
    pub fn set_loss_scale(&self, scale: f32) -> Result<()> {
        let Some(scaled) = self.scaling else {
            return Err(Error::config("loss_scaling", "is off, so there is no scale to set"));
        };
        scaled.settings.check_scale("loss_scale.scale", scale.into())?;
        self.exec.write(scaled.scale, &[scale])
    }

    /// The settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// The global norm of the gradient in the last step, before clipping: `[1]`. Of a gradient with a loss scale, this
    /// is the norm without it, or infinity if the step was skipped.
    pub fn grad_norm(&self) -> Result<Tensor> {
        self.exec.tensor(self.norm)
    }

    /// The plan of an update.
    pub fn plan(&self) -> &Plan {
        self.exec.plan()
    }
}
