//! The update of all parameters, planned from an arena's layout before there is a device.

use std::sync::Arc;

use super::arena::{Arena, ArenaLayout, numbered};
use super::config::{OptimizerConfig, SgdConfig};
use super::muon::{Batch, MuonConfig};
use super::scaling::LossScaling;
use crate::device::Tensor;
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::ops::sgd::Sgd;
use crate::plan::Plan;
use crate::plan::requirements::Requirements;
use crate::profile::Profile;
use crate::tensor::TensorType;

/// The plan of an [`Optimizer`](super::Optimizer): its memory and its requirements, before there is a device.
///
/// ```
/// use std::sync::Arc;
/// use throughline::optim::{AdamWConfig, ArenaLayout, OptimizerPlan};
/// use throughline::{AdapterClass, Profile};
///
/// let profile = Profile::portable(AdapterClass::Gpu);
/// let layout = ArenaLayout::new(vec![("w".into(), [64, 64].into())], profile.max_tensor_bytes())?;
/// let plan = OptimizerPlan::new(AdamWConfig::default(), &Arc::new(layout), &profile)?;
/// assert!(plan.bytes() >= 2 * 4 * 64 * 64); // two moments
/// assert_eq!(plan.requirements().binding_bytes, 4 * 64 * 64);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OptimizerPlan {
    pub(super) config: OptimizerConfig,
    /// Layout of the parameters and the gradients.
    pub(super) layout: Arc<ArenaLayout>,
    /// Layout of the first moments.
    pub(super) first: Arc<ArenaLayout>,
    /// Layout of the second moments.
    pub(super) second: Arc<ArenaLayout>,
    pub(super) plan: Arc<Plan>,
    pub(super) bound: Vec<(Value, Range)>,
    /// The input for the settings of AdamW or SGD; `None` if Muon updates everything.
    pub(super) hyper: Option<Value>,
    /// The input for those of Muon, if it is used.
    pub(super) muon_hyper: Option<Value>,
    pub(super) norm: Value,
    /// Loss scaling, if any.
    pub(super) scaling: Option<Scaled>,
}

/// The values of loss scaling in an update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaled {
    pub settings: LossScaling,
    /// The input for the learning rate's schedule.
    pub schedule: Value,
    /// The states.
    pub scale: Value,
    pub counts: Value,
    /// What became of the step.
    pub outcome: Value,
    /// The counts after it.
    counted: Value,
}

/// One of the four arenas.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which {
    Params,
    Grads,
    M,
    V,
}

/// A range of an arena, bound to a state of the update.
#[derive(Clone, Debug)]
pub(super) struct Range {
    which: Which,
    part: usize,
    /// Its first element.
    offset: usize,
    ty: TensorType,
}

impl Range {
    /// This range in one of the arenas: parameters, gradients, first moments, second moments.
    pub fn of(&self, arenas: [&Arena; 4]) -> Result<Tensor> {
        let arena = arenas[self.which as usize];
        let part = arena.parts.get(self.part).ok_or_else(|| {
            Error::data(
                format!("{:?}", self.which),
                format!("an arena of {} parts or more", self.part + 1),
                arena.parts.len(),
            )
        })?;
        part.range(part.offset() + 4 * self.offset as u64, self.ty.clone())
    }
}

impl OptimizerPlan {
    /// Plans the update of parameters in arenas of this layout. Muon updates the parts that the layout sets apart for
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names a setting with an impossible value: see [`OptimizerConfig::validate`].
    pub fn new(config: impl Into<OptimizerConfig>, layout: &Arc<ArenaLayout>, profile: &Profile) -> Result<Self> {
        Self::scaled(config, None, layout, profile)
    }

    /// [`new`](Self::new) for gradients of a loss that is multiplied by a scale, if it is: see
    /// [`Optimizer::loss_scale`](super::Optimizer::loss_scale).
    pub fn scaled(
        config: impl Into<OptimizerConfig>,
        loss_scaling: Option<LossScaling>,
        layout: &Arc<ArenaLayout>,
        profile: &Profile,
    ) -> Result<Self> {
        let config = config.into();
        config.validate()?;
        loss_scaling.as_ref().map_or(Ok(()), LossScaling::validate)?;
        if config.muon().is_some() && !layout.parts.iter().any(|part| part.muon) {
            return Err(Error::config(
                "muon",
                "the layout has no matrices for it: name them in `ArenaLayout::with_muon` or `GraphTrainOptions::muon`",
            ));
        }
        let (first, second) = match &config {
            OptimizerConfig::AdamW(_) => (layout.clone(), layout.clone()),
            OptimizerConfig::Muon { .. } => (layout.clone(), Arc::new(layout.without_muon())),
            OptimizerConfig::Sgd(sgd) if sgd.momentum > 0.0 => (layout.clone(), Arc::new(layout.empty())),
            OptimizerConfig::Sgd(_) => (Arc::new(layout.empty()), Arc::new(layout.empty())),
        };
        let mut step = StepBuilder { g: Graph::new(), bound: vec![], layout, scaling: None };
        let grads = (0..layout.parts.len()).map(|i| step.part("grads", Which::Grads, i));
        let grads = grads.collect::<Result<Vec<_>>>()?;
        let mut norm = global_norm(&mut step.g, &grads)?;
        if let Some(settings) = loss_scaling {
            norm = step.scale(norm, settings, config.max_grad_norm())?;
        }
        let parts = (0..layout.parts.len()).filter(|&i| config.muon().is_none() || !layout.parts[i].muon);
        let hyper = match &config {
            OptimizerConfig::Sgd(sgd) => Some(step.sgd(sgd, norm, &grads)?),
            _ => step.adamw(norm, parts.collect(), &grads)?,
        };
        let muon_hyper = config.muon().map(|muon| step.muon(muon, norm)).transpose()?;
        let read: Vec<Value> = [norm].into_iter().chain(step.scaling.map(|scaled| scaled.outcome)).collect();
        let plan = Arc::new(Plan::new(&step.g, &read, profile)?);
        let (layout, bound, scaling) = (layout.clone(), step.bound, step.scaling);
        Ok(OptimizerPlan { config, layout, first, second, plan, bound, hyper, muon_hyper, norm, scaling })
    }

    /// The plan of an update.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What a device must offer for the update, including the arenas.
    pub fn requirements(&self) -> Requirements {
        let largest = self.layout.parts.iter().map(|part| 4 * part.len).max().unwrap_or(0);
        Requirements::of(&self.plan).and(Requirements::of_buffer(largest))
    }

    /// Number of elements of all moments.
    pub(crate) fn moments_len(&self) -> usize {
        self.first.total_len() + self.second.total_len()
    }

    /// Bytes of GPU memory for the moments, and for an update while it runs.
    pub fn bytes(&self) -> usize {
        let is_bound = |v| self.bound.iter().any(|(bound, _)| *bound == v);
        4 * self.moments_len() + self.plan.allocated_bytes(is_bound)
    }
}

/// Builds the graph of an update and records what its states are bound to.
struct StepBuilder<'a> {
    g: Graph,
    bound: Vec<(Value, Range)>,
    layout: &'a ArenaLayout,
    scaling: Option<Scaled>,
}

impl StepBuilder<'_> {
    fn state(&mut self, name: &str, range: Range) -> Result<Value> {
        let value = self.g.state(name, range.ty.clone())?;
        self.bound.push((value, range));
        Ok(value)
    }

    /// A state bound to part `i` of an arena with the full layout.
    fn part(&mut self, name: &str, which: Which, i: usize) -> Result<Value> {
        self.part_as(&numbered(name, i), which, i, i)
    }

    /// The same for an arena that has this part as its `nth`.
    fn part_as(&mut self, name: &str, which: Which, i: usize, nth: usize) -> Result<Value> {
        let ty = TensorType::f32([self.layout.parts[i].len]);
        self.state(name, Range { which, part: nth, offset: 0, ty })
    }

    /// Adds loss scaling, by the norm of the scaled gradient. Returns what that is without the scale.
    fn scale(&mut self, norm: Value, settings: LossScaling, max_grad_norm: f64) -> Result<Value> {
        let scale = self.g.state("scale", TensorType::f32([1]))?;
        let counts = self.g.state("counts", TensorType::u32([3]))?;
        let op = settings.op(max_grad_norm);
        let [outcome, norm, scaled, counted] = self.g.loss_scale("loss_scale", norm, [scale, counts], op)?;
        self.g.store(scaled, scale)?;
        self.g.store(counted, counts)?;
        let schedule = self.g.input("schedule", TensorType::f32([5]))?;
        self.scaling = Some(Scaled { settings, schedule, scale, counts, outcome, counted });
        Ok(norm)
    }

    /// What updates read: of settings of this length, an input, the settings of a step; and of the gradient's `norm`
    /// what they need. With loss scaling both depend on what became of the step.
    fn settings(&mut self, name: &str, len: usize, norm: Value) -> Result<[Value; 3]> {
        let input = self.g.input(name, TensorType::f32([len]))?;
        match self.scaling {
            None => Ok([input, input, norm]),
            Some(Scaled { schedule, counted, outcome, .. }) => {
                let hyper = self.g.scheduled(&format!("{name}.scheduled"), input, schedule, counted)?;
                Ok([input, hyper, outcome])
            }
        }
    }

    /// Adds AdamW for these parts of the parameters and first moments; the second moments have only these. Returns the
    /// input for its settings, if there are any parts.
    fn adamw(&mut self, norm: Value, parts: Vec<usize>, grads: &[Value]) -> Result<Option<Value>> {
        if parts.is_empty() {
            return Ok(None);
        }
        let [input, hyper, norm] = self.settings("hyper", 8, norm)?;
        for (nth, part) in parts.into_iter().enumerate() {
            let param = self.part("params", Which::Params, part)?;
            let m = self.part("m", Which::M, part)?;
            let v = self.part_as(&numbered("v", part), Which::V, part, nth)?;
            let decay_len = self.layout.parts[part].decay_len;
            let arenas = [param, grads[part], m, v];
            let new = self.g.adamw(&numbered("adamw", part), arenas, hyper, norm, decay_len)?;
            for (value, state) in new.into_iter().zip([param, m, v]) {
                self.g.store(value, state)?;
            }
        }
        Ok(Some(input))
    }

    /// Adds gradient descent for all parts. Returns the input for its settings.
    fn sgd(&mut self, config: &SgdConfig, norm: Value, grads: &[Value]) -> Result<Value> {
        let [input, hyper, norm] = self.settings("hyper", 4, norm)?;
        for (part, &grad) in grads.iter().enumerate() {
            let mut updated = vec![self.part("params", Which::Params, part)?];
            if config.momentum > 0.0 {
                updated.push(self.part("velocity", Which::M, part)?);
            }
            let op = Sgd { decay_len: self.layout.parts[part].decay_len, nesterov: config.nesterov };
            let inputs = [&[updated[0], grad], &updated[1..], &[hyper, norm]].concat();
            let new = self.g.op(&numbered("sgd", part), op, &inputs)?;
            for (value, state) in new.into_iter().zip(updated) {
                self.g.store(value, state)?;
            }
        }
        Ok(input)
    }

    /// Adds Muon for its parts of the parameters, gradients and momenta. Returns the input for its settings.
    fn muon(&mut self, config: &MuonConfig, norm: Value) -> Result<Value> {
        let [input, hyper, norm] = self.settings("muon.hyper", 4, norm)?;
        for (i, batch) in Batch::all(self.layout).into_iter().enumerate() {
            let Batch { part, offset, count, rows, cols } = batch;
            let range = |which| Range { which, part, offset, ty: TensorType::f32([count, rows, cols]) };
            let param = self.state(&format!("muon.{i}.params"), range(Which::Params))?;
            let grad = self.state(&format!("muon.{i}.grads"), range(Which::Grads))?;
            let m = self.state(&format!("muon.{i}.m"), range(Which::M))?;
            let step = config.step(rows, cols);
            let new = self.g.muon(&format!("muon.{i}"), [param, grad, m], hyper, norm, step)?;
            for (value, state) in new.into_iter().zip([param, m]) {
                self.g.store(value, state)?;
            }
        }
        Ok(input)
    }
}

/// The Euclidean norm of all parts of an arena: the norm of the parts' norms.
fn global_norm(g: &mut Graph, parts: &[Value]) -> Result<Value> {
    if let [whole] = parts {
        return g.l2_norm("grad_norm", *whole);
    }
    let norms = parts.iter().enumerate().map(|(i, &part)| g.l2_norm(&format!("grad_norm.{i}"), part));
    let norms = norms.collect::<Result<Vec<_>>>()?;
    let norms = g.concat("grad_norms", &norms, 0)?;
    g.l2_norm("grad_norm", norms)
}
