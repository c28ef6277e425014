//! A trainer of a language model, planned before there is a device: its step, and evaluation on the same parameters.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::base::BasePlan;
use super::config::{TrainConfig, TrainOptions};
use super::data::Batch;
use super::graph::{Feed, GraphTrainConfig, GraphTrainOptions, GraphTrainPlan};
use crate::error::Result;
use crate::format::Packed;
use crate::graph::{Graph, Value};
use crate::nn::Transformer;
use crate::ops::chunks::LOGIT_BYTES;
use crate::optim::ArenaLayout;
use crate::plan::requirements::Requirements;
use crate::plan::{External, Plan, Recomputed};
use crate::precision::Precision;
use crate::probe::{self, Probe};
use crate::profile::Profile;

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
/// assert!(error.contains("This fits: batch 8, seq_len 1024, micro_batches 8"), "{error}");
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TrainPlan {
    pub(super) config: TrainConfig,
    pub(super) training: GraphTrainPlan,
    /// Inputs of the training step.
    pub(super) inputs: Inputs,
    pub(super) evaluation: EvaluationPlan,
    /// The model that adapters are trained for.
    pub(super) base: Option<BasePlan>,
    /// Whether parameters are drawn or loaded, rather than left zero.
    pub(super) init: bool,
}

/// What a graph with a model and a loss reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs {
    tokens: Value,
    targets: Value,
    /// Where texts begin, and places in texts, if they share sequences.
    starts: Option<Value>,
    positions: Option<Value>,
    /// Zeros, if the model has token types.
    pub token_types: Option<Value>,
}

/// Forward and loss alone, on the same parameters, and as far as possible in the buffers of the training step: the two
/// never run at the same time.
#[derive(Clone, Debug)]
pub(super) struct EvaluationPlan {
    pub plan: Arc<Plan>,
    /// Which of the training step's buffers each of the plan's is.
    pub lent: Vec<Option<usize>>,
    pub inputs: Inputs,
    pub loss: Value,
    /// Tokens of a sequence.
    pub time: usize,
    params: Vec<Value>,
}

impl Inputs {
    /// The data of a batch of sequences of `time` tokens.
    pub fn feeds<'a>(&self, batch: &'a Batch, time: usize) -> Vec<Feed<'a>> {
        let mut feeds = vec![self.tokens.with(&batch.tokens), self.targets.with(&batch.targets)];
        feeds.extend(self.starts.zip(batch.starts.as_ref()).map(|(input, starts)| input.with(starts)));
        feeds.extend(self.positions.map(|input| input.with_owned(batch.positions(time))));
        feeds
    }
}

impl TrainPlan {
    /// Like [`new`](Self::new), without advice on what would fit.
    pub(super) fn as_is(config: &TrainConfig, options: &TrainOptions<'_>, profile: &Profile) -> Result<Self> {
        config.validate()?;
        let base = BasePlan::of(config, options, profile)?;
        let (mut graph, gpt) = options.build(profile, config, packed(&base), true)?;
        let [frozen, bound] = base.as_ref().map_or([vec![], vec![]], |base| base.frozen(&graph, &gpt));
        let mut probes = options.probes.clone();
        if options.standard_probes {
            probes.extend(probe::standard(&graph, &gpt.stream, true));
        }
        let (inputs, loss) = add_loss(&mut graph, &gpt, &probes)?;
        let TrainOptions { init, recompute, .. } = *options;
        let of_graph = GraphTrainOptions { probes, init, recompute, frozen, bound, ..GraphTrainOptions::default() };
        let planned = |max: Option<u64>| -> Result<TrainPlan> {
            let training = GraphTrainPlan::within(graph.clone(), loss, &config.of_graph(), &of_graph, profile, max)?;
            let evaluation = EvaluationPlan::new(config, options, profile, (&training, &base))?;
            Ok(TrainPlan { evaluation, training, config: config.clone(), inputs, base: base.clone(), init })
        };
        let of_base = base.as_ref().map_or(0, BasePlan::bytes) as u64;
        let mut plan = planned(options.max_bytes.map(|max| max.saturating_sub(of_base)))?;
        if let Some(max) = options.max_bytes.filter(|&max| plan.bytes() as u64 > max) {
            // Evaluation is known only once there is a step whose memory it is in.
            plan = planned(Some(max.saturating_sub(of_base + plan.evaluation.bytes() as u64)))?;
        }
        plan.training.check_memory(plan.bytes(), options.max_bytes)?;
        Ok(plan)
    }

    /// The configuration that was planned.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The plans of forward and backward, of evaluation, and of the update. A [`Tuner`](crate::Tuner) takes them.
    pub fn plans(&self) -> [&Plan; 3] {
        let [step, update] = self.training.plans();
        [step, &self.evaluation.plan, update]
    }

    /// What backward computes a second time rather than keep, and what that costs: see
    /// [`TrainOptions::max_bytes`].
    pub fn recomputed(&self) -> &Recomputed {
        self.training.recomputed()
    }

    /// The layout of the parameters' arena, which is that of the gradients, too.
    pub fn layout(&self) -> &ArenaLayout {
        self.training.layout()
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        self.training.requirements().and(Requirements::of(&self.evaluation.plan))
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.training.parameter_count()
    }

    /// Bytes of GPU memory: parameters, gradients, moments, activations, inputs, the base of adapters. Evaluation is in
    /// the memory of the training step, unless it comes between slices of one: see
    /// [`Trainer::start_sliced`](super::Trainer::start_sliced).
    pub fn bytes(&self) -> usize {
        self.training.bytes() + self.evaluation.bytes() + self.base_bytes()
    }

    /// Bytes of the weights that adapters are trained for, as they are stored; 0 without adapters.
    pub fn base_bytes(&self) -> usize {
        self.base.as_ref().map_or(0, BasePlan::bytes)
    }
}

impl TrainConfig {
    /// What a [`GraphTrainer`](super::GraphTrainer) knows of these settings.
    fn of_graph(&self) -> GraphTrainConfig {
        let TrainConfig { schedule, micro_batches, loss_scaling, seed, precision, .. } = *self;
        GraphTrainConfig { optimizer: self.optimizer(), schedule, micro_batches, loss_scaling, seed, precision }
    }
}

impl EvaluationPlan {
    fn new(
        config: &TrainConfig,
        options: &TrainOptions<'_>,
        profile: &Profile,
        (training, base): (&GraphTrainPlan, &Option<BasePlan>),
    ) -> Result<Self> {
        let profile = &config.precision.profile(profile);
        let (mut graph, gpt) = options.build(profile, config, packed(base), false)?;
        let (inputs, loss) = add_loss(&mut graph, &gpt, &[])?;
        if let Precision::Mixed { stream } = config.precision {
            let copied: HashSet<&str> = training.copied().collect();
            let copied: Vec<Value> = gpt.params.iter().copied().filter(|&v| copied.contains(graph.name(v))).collect();
            graph.store_mixed(&[loss], &copied, stream, profile)?;
        }
        let plan = Arc::new(Plan::new(&graph, &[loss], profile)?);
        Ok(EvaluationPlan {
            lent: training.plans()[0].lend_to(&plan),
            plan,
            inputs,
            loss,
            time: config.seq_len(),
            params: gpt.params,
        })
    }

    /// Its parameters, and matrices in their stored format.
    pub fn params(&self) -> impl Iterator<Item = &External> {
        self.plan.externals.iter().filter(|external| self.params.contains(&external.value))
    }

    /// Bytes, not counting the parameters and what is lent.
    fn bytes(&self) -> usize {
        let lent = self.plan.buffers.iter().zip(&self.lent).filter(|(_, lent)| lent.is_some());
        let lent: usize = lent.map(|(buffer, _)| buffer.bytes).sum();
        self.plan.allocated_bytes(|value| self.params().any(|param| param.value == value)) - lent
    }
}

/// The matrices of a base that stay as they are stored.
fn packed(base: &Option<BasePlan>) -> &BTreeMap<String, Packed> {
    static NONE: BTreeMap<String, Packed> = BTreeMap::new();
    base.as_ref().map_or(&NONE, |base| &base.packed)
}

/// Adds the loss of a model's logits, in chunks if they are large and no probe looks at them.
fn add_loss(g: &mut Graph, gpt: &Transformer, probes: &[Probe]) -> Result<(Inputs, Value)> {
    let targets = g.input("targets", g.ty(gpt.tokens).clone())?;
    let before: HashSet<usize> = g.needed(&[gpt.hidden]).into_iter().collect();
    let head: Vec<usize> = g.needed(&[gpt.logits]).into_iter().filter(|id| !before.contains(id)).collect();
    let looks = |id: &usize| g.node(*id).op().is_some() && probes.iter().any(|probe| probe.is_of(&g.node(*id).name));
    let loss = match head.iter().any(looks) {
        true => g.cross_entropy("loss", gpt.logits, targets)?,
        false => g.cross_entropy_in_chunks("loss", gpt.logits, targets, LOGIT_BYTES)?,
    };
    let &Transformer { tokens, token_types, starts, positions, .. } = gpt;
    Ok((Inputs { tokens, targets, starts, positions, token_types }, loss))
}
