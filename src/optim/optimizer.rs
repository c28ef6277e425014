//! The update of all parameters, on the GPU.

use super::arena::{Arena, ArenaLayout};
use super::config::OptimizerConfig;
use super::plan::OptimizerPlan;
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
        let OptimizerPlan { config, hyper, muon_hyper, norm, .. } = *plan;
        Ok(Optimizer { config, m, v, exec, hyper, muon_hyper, norm })
    }

    /// Records an update with learning rate `lr`. `step` counts from 0 and determines the bias correction.
    ///
    /// # Errors
    ///
    /// If the rate is negative, above 10 or no number, or so high that the weight decay would subtract more than the
    /// whole weight. Nothing is recorded then.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder, lr: f64, step: u64) -> Result<()> {
        self.record_hyper(encoder, lr, step)?;
        self.exec.record(encoder)
    }

    /// [`record`](Self::record), in as many submits as it takes.
    pub(crate) fn record_in(&self, submits: &mut Submits, lr: f64, step: u64) -> Result<()> {
        self.exec.make_room_in(submits)?;
        self.record_hyper(submits.encoder(), lr, step)?;
        self.exec.record_in(submits)
    }

    /// Runs an update like [`record`](Self::record) and times it kernel by kernel. Resolves once the device has been
    /// polled. Like [`Executable::profile`], it needs a device with timestamps.
    pub async fn profile(&self, lr: f64, step: u64) -> Result<Timeline> {
        self.profile_by(lr, step, async |exec| exec.profile().await).await
    }

    /// [`profile`](Self::profile), waiting; without timestamps by the host's clock.
    pub fn profile_blocking(&self, lr: f64, step: u64) -> Result<Timeline> {
        self.exec.gpu().run_blocking(self.profile_by(lr, step, async |exec| exec.profile_blocking()))
    }

    pub(crate) async fn profile_by(
        &self,
        lr: f64,
        step: u64,
        profile: impl AsyncFn(&Executable) -> Result<Timeline>,
    ) -> Result<Timeline> {
        let gpu = self.exec.gpu();
        let mut encoder = gpu.encoder("optimizer step");
        self.record_hyper(&mut encoder, lr, step)?;
        gpu.submit(encoder)?;
        profile(&self.exec).await
    }

    /// Records what the kernels read: the settings at this rate and step.
    fn record_hyper(&self, encoder: &mut wgpu::CommandEncoder, lr: f64, step: u64) -> Result<()> {
        let mut write = |value: Option<Value>, data: &[f32]| match value {
            Some(value) => self.exec.record_write(encoder, value, data),
            None => Ok(()),
        };
        match &self.config {
            OptimizerConfig::AdamW(adamw) => write(self.hyper, &adamw.at(lr, step)?),
            OptimizerConfig::Muon { muon, adamw } => {
                let hyper = adamw.at(lr, step)?;
                write(self.muon_hyper, &muon.values(lr, adamw.max_grad_norm)?)?;
                write(self.hyper, &hyper)
            }
            OptimizerConfig::Sgd(sgd) => write(self.hyper, &sgd.values(lr)?),
        }
    }

    /// The settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// The global norm of the gradient in the last step, before clipping: `[1]`.
    pub fn grad_norm(&self) -> Result<Tensor> {
        self.exec.tensor(self.norm)
    }

    /// The plan of an update.
    pub fn plan(&self) -> &Plan {
        self.exec.plan()
    }
}
