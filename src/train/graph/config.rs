//! The settings of a run on a graph.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::device::Tensor;
use crate::error::Result;
use crate::graph::Value;
use crate::optim::{AdamWConfig, LossScaling, MuonConfig, OptimizerConfig, Schedule, SgdConfig};
use crate::precision::Precision;
use crate::probe::Probe;
use crate::train::config::{check_count, scaling};

/// How a [`GraphTrainer`](super::GraphTrainer) trains.
///
/// Start from one of the constructors and change the fields that differ.
///
/// ```
/// use throughline::optim::{AdamWConfig, Decay, Schedule};
/// use throughline::train::GraphTrainConfig;
/// let simple = GraphTrainConfig::adamw(1e-3);
/// let schedule = Schedule { peak: 1e-3, warmup: 100, steps: 5000, final_fraction: 0.1, decay: Decay::Cosine };
/// let adamw = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
/// let config = GraphTrainConfig { schedule, optimizer: adamw.into(), seed: 7, ..simple };
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GraphTrainConfig {
    /// The optimiser, including weight decay and the norm that gradients are clipped to.
    pub optimizer: OptimizerConfig,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Number of micro-batches per step: larger batches without more memory. Their gradients are added up.
    pub micro_batches: usize,
    /// Multiplies the loss by a scale before gradients are taken, and adapts that on the device: for gradients in 16
    /// bits, which would vanish or overflow. `None` scales nothing in f32, and takes the default settings in [mixed
    /// precision](Self::precision): see [`scaling`](Self::scaling).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaling: Option<LossScaling>,
    /// Seed of initial parameters and of [`Graph::step_seed`](crate::Graph::step_seed).
    pub seed: u64,
    /// How activations and gradients are stored: in f32, or mostly in f16.
    #[serde(default)]
    pub precision: Precision,
}

impl GraphTrainConfig {
    /// AdamW with its [default settings](AdamWConfig) at a constant learning rate, such as 1e-3.
    pub fn adamw(lr: f64) -> Self {
        Self::new(AdamWConfig::default(), lr)
    }

    /// Plain gradient descent at a constant learning rate, such as 0.1.
    pub fn sgd(lr: f64) -> Self {
        Self::new(SgdConfig::default(), lr)
    }

    /// Muon for [some matrices](GraphTrainOptions::muon) and AdamW for all else, at a constant learning rate that suits
    /// AdamW, such as 1e-3.
    pub fn muon(lr: f64) -> Self {
        Self::new(OptimizerConfig::Muon { muon: MuonConfig::default(), adamw: AdamWConfig::default() }, lr)
    }

    /// This optimiser at a constant learning rate; one micro-batch; no loss scaling; seed 0.
    pub fn new(optimizer: impl Into<OptimizerConfig>, lr: f64) -> Self {
        let schedule = Schedule::constant(lr);
        let (optimizer, loss_scaling, precision) = (optimizer.into(), None, Precision::F32);
        GraphTrainConfig { optimizer, schedule, micro_batches: 1, loss_scaling, seed: 0, precision }
    }

    /// The loss scaling of a run with these settings: always some in mixed precision. For a scale that never changes, set
    /// [`least`](LossScaling::least) and [`largest`](LossScaling::largest) to it.
    ///
    /// ```
    /// use throughline::Precision;
    /// use throughline::train::GraphTrainConfig;
    /// let config = GraphTrainConfig::adamw(1e-3);
    /// assert!(config.scaling().is_none());
    /// let mixed = GraphTrainConfig { precision: Precision::MIXED, ..config };
    /// assert_eq!(mixed.scaling(), Some(Default::default()));
    /// ```
    pub fn scaling(&self) -> Option<LossScaling> {
        scaling(self.loss_scaling, self.precision)
    }

    /// Checks all settings. The error names the first field with an impossible value. Plans and trainers call this
    /// themselves.
    pub fn validate(&self) -> Result<()> {
        check_count("micro_batches", self.micro_batches)?;
        self.precision.validate()?;
        self.schedule.validate()?;
        self.loss_scaling.as_ref().map_or(Ok(()), LossScaling::validate)?;
        self.optimizer.check_at(self.schedule.peak)
    }
}

/// Options of a [`GraphTrainer`](super::GraphTrainer) that are not settings of the run: what to keep frozen, what to
/// read, tensors of your own, a memory limit.
#[derive(Clone, Debug)]
pub struct GraphTrainOptions {
    /// Values to [read](super::GraphTrainer::read) after a step, besides the loss.
    pub outputs: Vec<Value>,
    /// Parameters that are not trained. They are part of the model all the same: initialised, saved and loaded.
    pub frozen: Vec<Value>,
    /// Probes. With several micro-batches they report on the last one, whose loss counts by its weight. Gradients of
    /// parameters, however, are those of the whole step, before clipping.
    pub probes: Vec<Probe>,
    /// Tensors of your own for inputs, states and frozen parameters.
    pub bindings: HashMap<Value, Tensor>,
    /// Further values to be bound to tensors that do not exist yet: those that a plan, made before there is a device,
    /// gets in [`GraphTrainer::from_plan`](super::GraphTrainer::from_plan).
    pub bound: Vec<Value>,
    /// The matrices that Muon updates, if the optimiser is Muon: of hidden layers, not of the first or the last.
    /// `None` chooses by name, which suits the models of [`nn`](crate::nn): see
    /// [`is_hidden_matrix`](crate::nn::is_hidden_matrix).
    pub muon: Option<Vec<Value>>,
    /// Limit on GPU memory ([`GraphTrainPlan::bytes`](super::GraphTrainPlan::bytes)). What does not fit is made to by
    /// computing more a second time in backward: see
    /// [`GraphTrainPlan::recomputed`](super::GraphTrainPlan::recomputed). It is an error if that is not enough.
    pub max_bytes: Option<u64>,
    /// Whether backward may compute again what it would otherwise keep of forward. True by default: results of
    /// activations and norms are made again as far as that takes next to no time, and others as
    /// [`max_bytes`](Self::max_bytes) demands. Gradients are the same, bit for bit. See
    /// [`Plan::recomputing`](crate::Plan::recomputing).
    pub recompute: bool,
    /// Whether to draw initial parameters; true by default. Set it to false if all of them are loaded next: it saves
    /// the time, and parameters may then lack an initialisation. They are zero until then.
    pub init: bool,
}

impl GraphTrainOptions {
    /// Whether a value is in a tensor of the caller's, now or later.
    pub(super) fn binds(&self, value: Value) -> bool {
        self.bindings.contains_key(&value) || self.bound.contains(&value)
    }
}

impl Default for GraphTrainOptions {
    fn default() -> Self {
        GraphTrainOptions {
            outputs: vec![],
            frozen: vec![],
            probes: vec![],
            bindings: HashMap::new(),
            bound: vec![],
            muon: None,
            max_bytes: None,
            recompute: true,
            init: true,
        }
    }
}
