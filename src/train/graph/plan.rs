//! A graph's training step, planned before there is a device.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::config::{GraphTrainConfig, GraphTrainOptions};
use crate::device::{Gpu, Tensor};
use crate::error::{Error, Result, quoted};
use crate::graph::{Graph, ParamInit, Source, Value};
use crate::nn::is_hidden_matrix;
use crate::ops::cross_entropy::{CrossEntropy, TargetShare};
use crate::ops::embedding::Embedding;
use crate::optim::{ArenaLayout, CopiesPlan, OPTIMIZER, OptimizerPlan};
use crate::plan::requirements::Requirements;
use crate::plan::{Plan, Recompute, Recomputed};
use crate::precision::Precision;
use crate::probe::{self, Instruments};
use crate::profile::{Lanes, Profile};
use crate::tensor::{DType, Shape, TensorType};

/// The plan of a [`GraphTrainer`](super::GraphTrainer): what it needs of a device and how much memory it takes, before
/// there is one.
///
/// It is made for a [`Profile`] in milliseconds. Use it to check whether a graph fits, or to request a device with
/// sufficient limits.
///
/// ```
/// use throughline::graph::ParamInit;
/// use throughline::train::{GraphTrainConfig, GraphTrainOptions, GraphTrainPlan};
/// use throughline::{AdapterClass, Graph, Profile, TensorType};
///
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([256, 64]))?;
/// let w = g.param_with("w", [64, 64], ParamInit::fan_in(64))?;
/// let y = g.matmul("y", x, w)?;
/// let loss = g.sum("loss", y)?;
///
/// let (config, options) = (GraphTrainConfig::adamw(1e-3), GraphTrainOptions::default());
/// // Of an adapter, `Profile::of_adapter`.
/// let plan = GraphTrainPlan::new(g, loss, &config, &options, &Profile::portable(AdapterClass::Gpu))?;
/// assert!(plan.bytes() > 4 * plan.parameter_count() * 4); // with gradients and two moments
/// plan.requirements().check(&wgpu::Limits::default())?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GraphTrainPlan {
    pub(super) config: GraphTrainConfig,
    /// Layout of the parameters and the gradients.
    pub(super) layout: Arc<ArenaLayout>,
    /// Layout of the frozen parameters, except those that are bound to the caller's tensors.
    pub(super) frozen: Arc<ArenaLayout>,
    /// Initialisation of each parameter, then of each frozen one; empty if they stay zero.
    pub(super) inits: Vec<ParamInit>,
    pub(super) step: StepPlan,
    pub(super) optimizer: OptimizerPlan,
    /// What the step reads instead of parameters, in mixed precision.
    pub(super) copies: Option<CopiesPlan>,
    lanes: Lanes,
}

/// Forward and backward, with the values that a step writes and reads, and those that are bound to arenas.
#[derive(Clone, Debug)]
pub(super) struct StepPlan {
    pub plan: Arc<Plan>,
    /// Bound to the parameters, in the layout's order.
    pub params: Vec<Value>,
    /// Bound to the gradients.
    pub grads: Vec<Value>,
    /// Bound to the frozen parameters.
    pub frozen: Vec<Value>,
    /// The micro-batch's weight, if there are several.
    pub weight: Option<Value>,
    /// The input that dropout draws from.
    pub seed: Option<Value>,
    pub loss: Value,
    pub loss_state: Option<Value>,
    /// Bound to the optimiser's scale of the loss, if there is loss scaling.
    pub loss_scale: Option<Value>,
    pub instruments: Option<Instruments>,
    /// What ids must be below: the classes of cross-entropies, the rows of tables.
    pub ids_below: HashMap<Value, usize>,
    /// All that is bound to tensors: those of arenas, and the caller's.
    bound: HashSet<Value>,
    /// What is to be bound to tensors that did not exist when this was planned.
    awaited: Vec<Value>,
}

impl GraphTrainPlan {
    /// Plans the training of all parameters of `graph` that are not frozen, so that `loss`, f32 `[1]`, becomes small.
    ///
    /// # Errors
    ///
    /// If the loss does not depend on one of the parameters, or one has no initialisation: the error names it.
    /// [`Error::Limit`] names a tensor and the limit that it exceeds.
    pub fn new(
        graph: Graph,
        loss: Value,
        config: &GraphTrainConfig,
        options: &GraphTrainOptions,
        profile: &Profile,
    ) -> Result<Self> {
        let plan = Self::within(graph, loss, config, options, profile, options.max_bytes)?;
        plan.check_memory(plan.bytes(), options.max_bytes)?;
        Ok(plan)
    }

    /// A plan of at most so many bytes, if what is computed twice can achieve that; otherwise the smallest.
    pub(crate) fn within(
        graph: Graph,
        loss: Value,
        config: &GraphTrainConfig,
        options: &GraphTrainOptions,
        profile: &Profile,
        max_bytes: Option<u64>,
    ) -> Result<Self> {
        config.validate()?;
        check_values(&graph, loss, options)?;
        let params = trained(&graph, loss, options)?;
        let mut frozen: Vec<Value> = vec![];
        for &v in &options.frozen {
            if !options.binds(v) && !frozen.contains(&v) {
                frozen.push(v);
            }
        }
        let (by_muon, optimizer) = (muon_takes(&graph, options)?, &config.optimizer);
        let takes = |name: &str, shape: &Shape| optimizer.muon().is_some() && by_muon(name, shape);
        let (lanes, profile) = (profile.lanes(), &config.precision.profile(profile));
        let kind = (profile, config.precision);
        let layout = Arc::new(ArenaLayout::for_training(&graph, &params, kind, optimizer.buffers(), takes)?);
        let frozen_layout = match frozen[..] {
            [] => layout.empty(),
            _ => ArenaLayout::of(&graph, &frozen, profile.max_tensor_bytes())?,
        };
        let inits = match options.init {
            true => params.iter().chain(&frozen).map(|&v| init_of(&graph, v)).collect::<Result<_>>()?,
            false => vec![],
        };
        let optimizer = OptimizerPlan::scaled(config.optimizer, config.scaling(), &layout, profile)?;
        let step = StepGraph::new(graph, loss, [params, frozen], (config, options), profile)?;
        let copies = match config.precision {
            Precision::F32 => None,
            Precision::Mixed { .. } => {
                let has_copy = |i: usize| step.g.ty(step.params[i]).dtype == DType::F16;
                Some(CopiesPlan::new(&layout, has_copy, profile)?)
            }
        };
        let arenas = 4 * (2 * layout.total_len() + frozen_layout.total_len()) + optimizer.bytes();
        let arenas = arenas + copies.as_ref().map_or(0, CopiesPlan::bytes);
        let room = max_bytes.map(|max| (max as usize).saturating_sub(arenas));
        Ok(GraphTrainPlan {
            config: config.clone(),
            step: step.planned(options, profile, room)?,
            optimizer,
            copies,
            frozen: Arc::new(frozen_layout),
            inits,
            layout,
            lanes,
        })
    }

    /// Returns an error if training takes more bytes than it may.
    pub(crate) fn check_memory(&self, bytes: usize, max_bytes: Option<u64>) -> Result<()> {
        let Some(max) = max_bytes.filter(|&max| bytes as u64 > max) else { return Ok(()) };
        let arenas = 4 * (2 * self.layout.total_len() + self.optimizer.moments_len());
        let arenas = format!("{arenas} of them for {} parameters with gradients and moments", self.parameter_count());
        let twice = match self.recomputed().nodes.len() {
            0 => String::new(),
            n => format!(", with {n} nodes computed twice"),
        };
        let what = format!("bytes of GPU memory for training by `max_bytes` ({arenas}{twice})");
        Err(Error::limit(what, bytes as u64, max))
    }

    /// The configuration that was planned.
    pub fn config(&self) -> &GraphTrainConfig {
        &self.config
    }

    /// The plans of forward and backward, and of the update. A [`Tuner`](crate::Tuner) takes them.
    pub fn plans(&self) -> [&Plan; 2] {
        [&self.step.plan, self.optimizer.plan()]
    }

    /// What backward computes a second time rather than keep, and what that costs.
    pub fn recomputed(&self) -> &Recomputed {
        self.step.plan.recomputed()
    }

    /// The layout of the arena of trained parameters, which is that of the gradients, too.
    pub fn layout(&self) -> &ArenaLayout {
        &self.layout
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        let largest = self.frozen.parts.iter().map(|part| 4 * part.len).max().unwrap_or(0);
        let frozen = Requirements::of_buffer(largest);
        let all = Requirements::of(&self.step.plan).and(self.optimizer.requirements()).and(frozen);
        self.copies.iter().fold(all, |all, copies| all.and(copies.requirements()))
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.layout.tensors.iter().map(|(_, shape)| shape.len()).sum()
    }

    /// Bytes of GPU memory: parameters, gradients, moments, activations, inputs, copies of matrices in mixed precision.
    /// Without tensors of yours.
    pub fn bytes(&self) -> usize {
        let step = self.step.plan.allocated_bytes(|v| self.step.bound.contains(&v));
        let copies = self.copies.as_ref().map_or(0, CopiesPlan::bytes);
        4 * (2 * self.layout.total_len() + self.frozen.total_len()) + self.optimizer.bytes() + copies + step
    }

    /// The parameters that a step reads from a copy in f16.
    pub(crate) fn copied(&self) -> impl Iterator<Item = &str> {
        let has_copy = |i: &usize| self.copies.as_ref().is_some_and(|copies| copies.has(*i));
        (0..self.layout.tensors.len()).filter(has_copy).map(|i| &self.layout.tensors[i].0[..])
    }

    /// Returns an error if this plan does not suit the device.
    pub(super) fn check(&self, gpu: &Gpu) -> Result<()> {
        gpu.check(&self.requirements(), self.lanes)
    }
}

/// The graph of a step, which is to be planned.
struct StepGraph {
    g: Graph,
    params: Vec<Value>,
    grads: Vec<Value>,
    frozen: Vec<Value>,
    weight: Option<Value>,
    loss: Value,
    loss_scale: Option<Value>,
    loss_state: Option<Value>,
    instruments: Option<Instruments>,
    /// What is read after a step.
    read: Vec<Value>,
}

impl StepGraph {
    /// Adds the gradients, stored in states, and chooses what is stored in f16.
    fn new(
        mut g: Graph,
        loss: Value,
        [params, frozen]: [Vec<Value>; 2],
        (config, options): (&GraphTrainConfig, &GraphTrainOptions),
        profile: &Profile,
    ) -> Result<Self> {
        let accumulate = config.micro_batches > 1;
        let (name, mut loss, mut weight) = (g.name(loss).to_string(), loss, None);
        if accumulate {
            let share = g.input(&format!("{name}.weight"), TensorType::f32([1]))?;
            loss = g.mul(&format!("{name}.mean"), loss, share)?;
            weight = Some(share);
        }
        let (mut scaled, mut loss_scale) = (loss, None);
        if config.scaling().is_some() {
            let scale = g.state(&format!("{name}.scale"), TensorType::f32([1]))?;
            scaled = g.mul(&format!("{name}.scaled"), loss, scale)?;
            loss_scale = Some(scale);
        }
        let tapped = [&params[..], &probe::gradient_taps(&g, &options.probes)?].concat();
        let gradients = g.gradients(scaled, &tapped)?;
        let mut by_value: HashMap<Value, Value> = tapped.into_iter().zip(gradients.iter().copied()).collect();
        let mut grads = vec![];
        // Where gradients accumulate, the addition to the state is a node. Fusion then folds it into the op that
        // computes the gradient.
        for (&param, &gradient) in params.iter().zip(&gradients) {
            let state = g.state(&format!("{}.grad_state", g.name(param)), g.ty(param).clone())?;
            let value = match accumulate {
                true => g.residual_add(&format!("{}.grad_sum", g.name(param)), state, gradient)?,
                false => gradient,
            };
            g.store(value, state)?;
            by_value.insert(param, value);
            grads.push(state);
        }
        let mut loss_state = None;
        if accumulate {
            let state = g.state(&format!("{name}_state"), TensorType::f32([1]))?;
            let sum = g.residual_add(&format!("{name}_sum"), state, loss)?;
            g.store(sum, state)?;
            loss_state = Some(state);
        }
        let instruments = match options.probes[..] {
            [] => None,
            _ => Some(Instruments::new(&mut g, &options.probes, &by_value)?),
        };
        let probed = instruments.as_ref().map_or(vec![], Instruments::outputs);
        let read = [&[loss], &options.outputs[..], &probed].concat();
        if let Precision::Mixed { stream } = config.precision {
            // What a probe copies as a whole is stored as it would be without. Parameters are read from the arena.
            let outputs = options.outputs.iter().filter(|value| !params.contains(value));
            let outputs: Vec<Value> = outputs.copied().chain([loss]).collect();
            g.store_mixed(&outputs, &params, stream, profile)?;
        }
        Ok(StepGraph { g, params, grads, frozen, weight, loss, loss_scale, loss_state, instruments, read })
    }

    /// Plans all of it: in `room` bytes, if that can be.
    fn planned(self, options: &GraphTrainOptions, profile: &Profile, room: Option<usize>) -> Result<StepPlan> {
        let StepGraph { g, params, grads, frozen, weight, loss, loss_scale, loss_state, instruments, read } = self;
        let ours = [&params, &grads, &frozen].into_iter().flatten().chain(&loss_scale);
        let bound: HashSet<Value> = ours.chain(options.bindings.keys()).chain(&options.bound).copied().collect();
        let recompute = if options.recompute { Recompute::Cheap } else { Recompute::Nothing };
        let mut plan = Plan::recomputing(&g, &read, profile, recompute)?;
        let bytes = plan.allocated_bytes(|v| bound.contains(&v));
        if let Some(room) = room.filter(|&room| bytes > room && options.recompute) {
            let own = plan.allocated_bytes(|_| true);
            plan = Plan::recomputing(&g, &read, profile, Recompute::UpTo(own.saturating_sub(bytes - room)))?;
        }
        let plan = Arc::new(plan);
        let seed = g.find_step_seed().filter(|&seed| plan.bound(seed).is_ok());
        // A frozen parameter need not be part of the step.
        let awaited = options.bound.iter().copied().filter(|&value| plan.bound(value).is_ok()).collect();
        let ids_below = ids_below(&g);
        Ok(StepPlan {
            plan,
            params,
            grads,
            frozen,
            weight,
            seed,
            loss,
            loss_state,
            loss_scale,
            instruments,
            ids_below,
            bound,
            awaited,
        })
    }
}

impl StepPlan {
    /// Returns an error if one of these is planned to be in an arena, or one is missing that was to come.
    pub fn check_bindings(&self, bindings: &HashMap<Value, Tensor>) -> Result<()> {
        let arenas = [&self.params, &self.grads, &self.frozen];
        let problem = |value: Value, message: &str| match self.plan.names.of(value) {
            Ok(name) => Error::Graph(format!("`{name}` {message}")),
            Err(message) => Error::Graph(message),
        };
        if let Some(&value) = bindings.keys().filter(|value| arenas.iter().any(|arena| arena.contains(value))).min() {
            return Err(problem(value, "cannot be bound: it was planned to be in memory of the trainer's"));
        }
        match self.awaited.iter().find(|value| !bindings.contains_key(value)) {
            None => Ok(()),
            Some(&value) => Err(problem(value, "was planned to be bound to a tensor of yours, but is not")),
        }
    }
}

/// Checks that the values that a trainer is made with are of this graph, and what they should be.
fn check_values(graph: &Graph, loss: Value, options: &GraphTrainOptions) -> Result<()> {
    graph.check_values(&[loss], |_| "the loss".into())?;
    graph.check_values(&options.outputs, |i| format!("outputs[{i}]"))?;
    graph.check_values(&options.frozen, |i| format!("frozen[{i}]"))?;
    let mut bound: Vec<Value> = options.bindings.keys().chain(&options.bound).copied().collect();
    bound.sort();
    graph.check_values(&bound, |_| "a binding".into())?;
    if let Some(&v) = options.frozen.iter().find(|&&v| !is_param(graph, v)) {
        return Err(Error::Graph(format!("frozen: `{}` is not a parameter", graph.name(v))));
    }
    if let Some(&v) = bound.iter().find(|&&v| is_param(graph, v) && !options.frozen.contains(&v)) {
        let name = graph.name(v);
        return Err(Error::Graph(format!(
            "`{name}` is trained in a buffer of the trainer's: only frozen ones are bound"
        )));
    }
    Ok(())
}

/// What each value with ids must be below: the number of classes, or of rows of a table, in all of its parts.
fn ids_below(graph: &Graph) -> HashMap<Value, usize> {
    let mut found = HashMap::new();
    for node in graph.nodes() {
        let Some(op) = node.op().map(|op| op.as_ref() as &dyn Any) else { continue };
        let (ids, end) = match (op.downcast_ref::<Embedding>(), op.downcast_ref::<TargetShare>(), &node.inputs[..]) {
            (Some(table), _, [rows, ids]) => (ids, table.first + graph.ty(*rows).shape.dims()[0]),
            (_, Some(share), [targets]) => (targets, share.classes),
            (_, _, [logits, targets]) if op.is::<CrossEntropy>() => (targets, graph.ty(*logits).shape.cols()),
            _ => continue,
        };
        found.entry(*ids).and_modify(|n: &mut usize| *n = end.max(*n)).or_insert(end);
    }
    found
}

fn is_param(graph: &Graph, v: Value) -> bool {
    matches!(graph.node(v.node()).source, Source::Param(_))
}

/// The parameters to train: at least one, all of which the loss depends on.
fn trained(graph: &Graph, loss: Value, options: &GraphTrainOptions) -> Result<Vec<Value>> {
    let mut params = graph.params();
    params.retain(|v| !options.frozen.contains(v));
    if params.is_empty() {
        return Err(Error::Graph("there are no parameters to train: see `Graph::param_with`".into()));
    }
    let needed: HashSet<usize> = graph.needed(&[loss]).into_iter().collect();
    let loss = graph.name(loss);
    for &param in &params {
        let name = graph.name(param);
        let problem = if !needed.contains(&param.node()) {
            format!("the loss `{loss}` does not depend on it: use it, or name it in `GraphTrainOptions::frozen`")
        } else if graph.stores().iter().any(|&(_, state)| state == param) {
            "the graph stores to it, and the optimiser would, too".into()
        } else if name.starts_with(OPTIMIZER) {
            format!("names that begin with `{OPTIMIZER}` are those of moments in checkpoints")
        } else {
            continue;
        };
        return Err(Error::Graph(format!("parameter {}: {problem}", quoted(name))));
    }
    Ok(params)
}

/// Which parameters are Muon's, by name and shape.
fn muon_takes(graph: &Graph, options: &GraphTrainOptions) -> Result<impl Fn(&str, &Shape) -> bool + use<>> {
    let chosen = options.muon.as_deref();
    let values = chosen.unwrap_or_default();
    graph.check_values(values, |i| format!("muon[{i}]"))?;
    for &v in values {
        let (name, ty) = (graph.name(v), graph.ty(v));
        let problem = if !is_param(graph, v) {
            "is not a parameter".into()
        } else if options.frozen.contains(&v) {
            "is frozen".into()
        } else if ty.shape.rank() != 2 {
            format!("must be a matrix, but is {ty}")
        } else {
            continue;
        };
        return Err(Error::Graph(format!("muon: `{name}` {problem}")));
    }
    let names: Option<HashSet<String>> = chosen.map(|_| values.iter().map(|&v| graph.name(v).to_string()).collect());
    Ok(move |name: &str, shape: &Shape| match &names {
        Some(names) => names.contains(name),
        None => is_hidden_matrix(name, shape),
    })
}

fn init_of(graph: &Graph, param: Value) -> Result<ParamInit> {
    graph.init(param).ok_or_else(|| {
        Error::Graph(format!(
            "parameter `{}` has no initialisation: add it with `Graph::param_with`, or set `GraphTrainOptions::init` \
             to false and load its values",
            graph.name(param)
        ))
    })
}
