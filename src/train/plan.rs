//! A trainer, planned before there is a device: its three plans, and which of their values are in arenas.

use std::collections::HashMap;
use std::sync::Arc;

use super::config::{TrainConfig, TrainOptions};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::graph::{Graph, ParamInit, Value};
use crate::nn::Transformer;
use crate::optim::{ArenaLayout, OptimizerPlan};
use crate::plan::Plan;
use crate::plan::requirements::Requirements;
use crate::probe::{self, Instruments};
use crate::profile::{Lanes, Profile};
use crate::tensor::TensorType;

/// The plan of a [`Trainer`](super::Trainer): what it needs of a device and how much memory it takes, before there is
/// one.
///
/// It is plain data, made for a [`Profile`] in milliseconds. Use it to check whether a configuration fits, or to
/// request a device with sufficient limits. Ops use the variants of [`Profile::choices`].
///
/// ```
/// use throughline::nn::TransformerConfig;
/// use throughline::train::{TrainConfig, TrainOptions, TrainPlan};
/// use throughline::{AdapterClass, Profile};
///
/// let gpt2 = TransformerConfig::gpt2(50_257, 1024, 12, 768, 12);
/// let config = TrainConfig { seq_len: Some(256), micro_batches: 8, ..TrainConfig::new(gpt2, 1) };
/// // Of an adapter, `Profile::of_adapter`. WebGPU's default limits do for GPT-2: its table and arenas are in parts.
/// let plan = TrainPlan::new(&config, &TrainOptions::default(), &Profile::portable(AdapterClass::Gpu))?;
/// assert_eq!(plan.parameter_count(), 124_439_808);
/// assert!(plan.bytes() > 16 * plan.parameter_count()); // with gradients, two moments, activations
/// plan.requirements().check(&wgpu::Limits::default())?;
///
/// // What does not fit says what would.
/// let large = TrainConfig { batch: 64, seq_len: None, micro_batches: 1, ..config };
/// let portable = Profile::portable(AdapterClass::Gpu);
/// let error = TrainPlan::new(&large, &TrainOptions::default(), &portable).unwrap_err().to_string();
/// assert!(error.contains("This fits: batch 1, seq_len 512, micro_batches 128"), "{error}");
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TrainPlan {
    pub(super) config: TrainConfig,
    /// Layout of the parameters, the gradients and the first moments.
    pub(super) layout: Arc<ArenaLayout>,
    /// Initialisation of each parameter, in the layout's order; empty if they stay zero.
    pub(super) inits: Vec<ParamInit>,
    pub(super) forward_backward: StepPlan,
    pub(super) evaluation: StepPlan,
    pub(super) optimizer: OptimizerPlan,
    lanes: Lanes,
}

/// A planned graph with the values that a step writes and reads, and those that are bound to arenas.
#[derive(Clone, Debug)]
pub(super) struct StepPlan {
    pub plan: Arc<Plan>,
    /// Bound to the parameters, in the layout's order.
    pub params: Vec<Value>,
    /// Bound to the gradients, if they are computed.
    pub grads: Vec<Value>,
    pub tokens: Value,
    pub targets: Value,
    /// The micro-batch's share of the targets that count, if there are several.
    pub weight: Option<Value>,
    /// Zeros, if the model has token types.
    pub token_types: Option<Value>,
    pub dropout_seed: Option<Value>,
    pub loss: Value,
    pub loss_state: Option<Value>,
    pub instruments: Option<Instruments>,
}

impl StepPlan {
    /// Bytes of this step, not counting the arenas.
    fn bytes(&self) -> usize {
        self.plan.allocated_bytes(|v| self.params.contains(&v) || self.grads.contains(&v))
    }
}

impl TrainPlan {
    /// Like [`new`](Self::new), without advice on what would fit.
    pub(super) fn as_is(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<Self> {
        config.validate()?;
        let (graph, gpt) = options.build(profile, config, true)?;
        let layout = Arc::new(ArenaLayout::for_training(&graph, &gpt.params, profile, config.muon.is_some())?);
        let plan = TrainPlan {
            config: config.clone(),
            inits: gpt.params.iter().filter_map(|&p| graph.init(p)).filter(|_| options.init).collect(),
            forward_backward: training_plan(graph, &gpt, (config, options), profile)?,
            evaluation: evaluation_plan(config, options, profile)?,
            optimizer: OptimizerPlan::new(config.adamw, config.muon, &layout, profile)?,
            layout,
            lanes: profile.lanes(),
        };
        plan.check_memory(options.max_bytes)?;
        Ok(plan)
    }

    fn check_memory(&self, max_bytes: Option<u64>) -> Result<()> {
        let bytes = self.bytes();
        match max_bytes.filter(|&max| bytes as u64 > max) {
            None => Ok(()),
            Some(max) => {
                let (parameters, arenas) = (self.parameter_count(), self.arena_bytes());
                let arenas = format!("{arenas} of them for {parameters} parameters with gradients and moments");
                Err(Error::limit(
                    format!("bytes of GPU memory for training by `max_bytes` ({arenas})"),
                    bytes as u64,
                    max,
                ))
            }
        }
    }

    /// The configuration that was planned.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The plans of forward and backward, of evaluation, and of the update. A [`Tuner`](crate::Tuner) takes them.
    pub fn plans(&self) -> [&Plan; 3] {
        [&self.forward_backward.plan, &self.evaluation.plan, self.optimizer.plan()]
    }

    /// The layout of the parameters' arena, shared by gradients and first moments.
    pub fn layout(&self) -> &ArenaLayout {
        &self.layout
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        let [forward_backward, evaluation, _] = self.plans().map(Requirements::of);
        forward_backward.and(evaluation).and(self.optimizer.requirements())
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.layout.tensors.iter().map(|(_, shape)| shape.len()).sum()
    }

    /// Bytes of GPU memory: parameters, gradients, moments, activations, evaluation, inputs.
    pub fn bytes(&self) -> usize {
        let steps = self.forward_backward.bytes() + self.evaluation.bytes();
        2 * 4 * self.layout.total_len() + self.optimizer.bytes() + steps
    }

    fn arena_bytes(&self) -> usize {
        4 * (3 * self.layout.total_len() + self.optimizer.second_len())
    }

    /// Returns an error if this plan does not suit the device.
    pub(super) fn check(&self, gpu: &Gpu) -> Result<()> {
        gpu.check(&self.requirements(), self.lanes)
    }
}

/// Forward, loss and gradients, with the gradients stored in states.
fn training_plan(
    mut g: Graph,
    gpt: &Transformer,
    (config, options): (&TrainConfig, &TrainOptions<'_>),
    profile: &Profile,
) -> Result<StepPlan> {
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let mut loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let accumulate = config.micro_batches > 1;
    let mut weight = None;
    if accumulate {
        let share = g.input("loss.weight", TensorType::f32([1]))?;
        loss = g.mul("loss.mean", loss, share)?;
        weight = Some(share);
    }
    let params = gpt.params.clone();
    let mut probes = options.probes.clone();
    if options.standard_probes {
        probes.extend(probe::standard(&g, &gpt.stream, true));
    }
    let tapped = [&params[..], &probe::gradient_taps(&g, &probes)?].concat();
    let gradients = g.gradients(loss, &tapped)?;
    let mut by_value: HashMap<Value, Value> = tapped.into_iter().zip(gradients.iter().copied()).collect();
    let mut grads = vec![];
    // Where gradients accumulate, the addition to the state is a node. Fusion then folds it into the op that computes
    // the gradient.
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
    let plan = Arc::new(Plan::new(&g, &[&[loss], &outputs[..]].concat(), profile)?);
    let Transformer { tokens, token_types, dropout_seed, .. } = *gpt;
    Ok(StepPlan {
        plan,
        params,
        grads,
        tokens,
        targets,
        weight,
        token_types,
        dropout_seed,
        loss,
        loss_state,
        instruments,
    })
}

/// Forward and loss alone, on the same parameters.
fn evaluation_plan(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<StepPlan> {
    let (mut g, gpt) = options.build(profile, config, false)?;
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let loss = g.cross_entropy("loss", gpt.logits, targets)?;
    let plan = Arc::new(Plan::new(&g, &[loss], profile)?);
    let params = gpt.params;
    let (weight, dropout_seed, loss_state, instruments) = (None, None, None, None);
    let (tokens, token_types, grads) = (gpt.tokens, gpt.token_types, vec![]);
    Ok(StepPlan {
        plan,
        params,
        grads,
        tokens,
        targets,
        weight,
        token_types,
        dropout_seed,
        loss,
        loss_state,
        instruments,
    })
}
