//! The update of all parameters, planned from an arena's layout before there is a device.

use std::sync::Arc;

use super::arena::{Arena, ArenaLayout, numbered};
use super::muon::{Batch, MuonConfig};
use super::schedule::AdamWConfig;
use crate::device::Tensor;
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
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
/// let plan = OptimizerPlan::new(AdamWConfig::default(), None, &Arc::new(layout), &profile)?;
/// assert!(plan.bytes() >= 2 * 4 * 64 * 64); // two moments
/// assert_eq!(plan.requirements().binding_bytes, 4 * 64 * 64);
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OptimizerPlan {
    pub(super) config: AdamWConfig,
    /// Layout of the parameters, the gradients and the first moments.
    pub(super) layout: Arc<ArenaLayout>,
    /// Layout of the second moments.
    pub(super) second: Arc<ArenaLayout>,
    pub(super) plan: Arc<Plan>,
    pub(super) bound: Vec<(Value, Range)>,
    pub(super) hyper: Option<Value>,
    pub(super) muon: Option<(MuonConfig, Value)>,
    pub(super) norm: Value,
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
    /// Plans the update of parameters in arenas of this layout. If `muon` is set, Muon updates the parts that the
    /// layout sets apart for it. AdamW updates the others.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names a setting with an impossible value: see [`AdamWConfig::validate`].
    pub fn new(
        config: AdamWConfig,
        muon: Option<MuonConfig>,
        layout: &Arc<ArenaLayout>,
        profile: &Profile,
    ) -> Result<Self> {
        config.validate()?;
        if let Some(muon) = &muon {
            muon.validate()?;
            if !layout.parts.iter().any(|part| part.muon) {
                return Err(Error::config(
                    "muon",
                    "the layout has no matrices for it: are there any, and does `ArenaLayout::with_muon` know?",
                ));
            }
        }
        let second = if muon.is_some() { Arc::new(layout.without_muon()) } else { layout.clone() };
        let mut step = StepBuilder { g: Graph::new(), bound: vec![], layout };
        let grads = (0..layout.parts.len()).map(|i| step.part("grads", Which::Grads, i));
        let grads = grads.collect::<Result<Vec<_>>>()?;
        let norm = global_norm(&mut step.g, &grads)?;
        let parts = (0..layout.parts.len()).filter(|&i| muon.is_none() || !layout.parts[i].muon);
        let hyper = step.adamw(norm, parts.collect(), &grads)?;
        let muon = match muon {
            Some(muon) => Some((muon, step.muon(&muon, norm)?)),
            None => None,
        };
        let plan = Arc::new(Plan::new(&step.g, &[norm], profile)?);
        let (layout, bound) = (layout.clone(), step.bound);
        Ok(OptimizerPlan { config, layout, second, plan, bound, hyper, muon, norm })
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

    /// Number of elements of the second moments.
    pub(crate) fn second_len(&self) -> usize {
        self.second.total_len()
    }

    /// Bytes of GPU memory for the moments, and for an update while it runs.
    pub fn bytes(&self) -> usize {
        let is_bound = |v| self.bound.iter().any(|(bound, _)| *bound == v);
        4 * (self.layout.total_len() + self.second.total_len()) + self.plan.allocated_bytes(is_bound)
    }
}

/// Builds the graph of an update and records what its states are bound to.
struct StepBuilder<'a> {
    g: Graph,
    bound: Vec<(Value, Range)>,
    layout: &'a ArenaLayout,
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

    /// Adds AdamW for these parts of the parameters and first moments; the second moments have only these. Returns the
    /// input for its settings, if there are any parts.
    fn adamw(&mut self, norm: Value, parts: Vec<usize>, grads: &[Value]) -> Result<Option<Value>> {
        if parts.is_empty() {
            return Ok(None);
        }
        let hyper = self.g.input("hyper", TensorType::f32([8]))?;
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
        Ok(Some(hyper))
    }

    /// Adds Muon for its parts of the parameters, gradients and momenta. Returns the input for its settings.
    fn muon(&mut self, config: &MuonConfig, norm: Value) -> Result<Value> {
        let hyper = self.g.input("muon.hyper", TensorType::f32([4]))?;
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
        Ok(hyper)
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
