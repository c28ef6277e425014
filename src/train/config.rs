//! The settings of a training run.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::Packed;
use crate::graph::Graph;
use crate::model::Model;
use crate::nn::{Block, Lora, StandardBlock, Transformer, TransformerConfig, TransformerOptions};
use crate::optim::{AdamWConfig, LossScaling, MuonConfig, OptimizerConfig, Schedule};
use crate::precision::Precision;
use crate::probe::{Patch, Probe};
use crate::profile::Profile;

/// Everything that defines a training run, except the text.
///
/// Start from [`new`](Self::new) and change the fields that differ.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// The model.
    pub model: TransformerConfig,
    /// Number of sequences per micro-batch.
    pub batch: usize,
    /// Number of tokens per sequence; the model's context if `None`.
    #[serde(default)]
    pub seq_len: Option<usize>,
    /// Number of micro-batches per step: larger batches without more memory. Loss and gradients are those of one batch
    /// of all of them, the mean over all targets that count.
    pub micro_batches: usize,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Settings of AdamW, including the norm that gradients are clipped to.
    pub adamw: AdamWConfig,
    /// Uses Muon instead of AdamW for the [hidden matrices](crate::nn::is_hidden_matrix). `None` uses AdamW for
    /// everything.
    #[serde(default)]
    pub muon: Option<MuonConfig>,
    /// Multiplies the loss by a scale before gradients are taken, and adapts that on the device: for gradients in 16
    /// bits, which would vanish or overflow. `None` scales nothing in f32, and takes the default settings in mixed
    /// [precision](Self::precision).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaling: Option<LossScaling>,
    /// Trains adapters beside the weights of a [base](TrainOptions::base), which stay as they are. `None` trains all
    /// weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// Whether sequences may hold several texts, one after another, each of which sees only itself: see
    /// [`Batch::starts`](super::data::Batch::starts), which every batch then needs. Use it for many short texts: without
    /// it, each takes a sequence of its own and most of a batch is padding. Loss and gradients are the same.
    #[serde(default)]
    pub packing: bool,
    /// Seed of initial weights, batches and dropout.
    pub seed: u64,
    /// How activations and gradients are stored: in f32, or mostly in f16. Evaluation is in the same precision.
    #[serde(default)]
    pub precision: Precision,
}

impl TrainConfig {
    /// `batch` sequences per step, each as long as the model's context; AdamW at a constant learning rate of 1e-3; seed
    /// 0.
    ///
    /// ```
    /// use throughline::nn::TransformerConfig;
    /// use throughline::train::TrainConfig;
    /// let model = TransformerConfig::gpt2(65, 64, 4, 128, 4);
    /// let config = TrainConfig { micro_batches: 2, ..TrainConfig::new(model, 12) };
    /// assert_eq!(config.tokens_per_step(), 2 * 12 * 64);
    /// ```
    pub fn new(model: TransformerConfig, batch: usize) -> Self {
        TrainConfig {
            model,
            batch,
            seq_len: None,
            micro_batches: 1,
            schedule: Schedule::constant(1e-3),
            adamw: AdamWConfig::default(),
            muon: None,
            loss_scaling: None,
            lora: None,
            packing: false,
            seed: 0,
            precision: Precision::F32,
        }
    }

    /// Number of tokens of one step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch.saturating_mul(self.micro_batches).saturating_mul(self.seq_len())
    }

    /// Number of tokens per sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len.unwrap_or(self.model.context)
    }

    /// The optimiser that [`adamw`](Self::adamw) and [`muon`](Self::muon) describe.
    pub fn optimizer(&self) -> OptimizerConfig {
        match self.muon {
            Some(muon) => OptimizerConfig::Muon { muon, adamw: self.adamw },
            None => self.adamw.into(),
        }
    }

    /// The loss scaling of a run with these settings: see [`GraphTrainConfig::scaling`](super::GraphTrainConfig::scaling).
    pub fn scaling(&self) -> Option<LossScaling> {
        scaling(self.loss_scaling, self.precision)
    }

    /// Checks all settings. The error names the first field with an impossible value. Plans and trainers call this
    /// themselves, also with a configuration from a checkpoint.
    ///
    /// ```
    /// use throughline::nn::TransformerConfig;
    /// use throughline::optim::AdamWConfig;
    /// use throughline::train::TrainConfig;
    /// let model = TransformerConfig::gpt2(65, 64, 4, 128, 4);
    /// let adamw = AdamWConfig { eps: 1e-60, ..Default::default() }; // zero as f32
    /// let error = TrainConfig { adamw, ..TrainConfig::new(model, 12) }.validate().unwrap_err();
    /// assert!(error.to_string().contains("`eps`"));
    /// ```
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        check_count("batch", self.batch)?;
        check_count("micro_batches", self.micro_batches)?;
        check_count("seq_len", self.seq_len())?;
        self.lora.as_ref().map_or(Ok(()), Lora::validate)?;
        if self.packing && self.model.bidirectional {
            return Err(Error::config("packing", "needs a model whose tokens see only those before them"));
        }
        self.precision.validate()?;
        self.schedule.validate()?;
        self.loss_scaling.as_ref().map_or(Ok(()), LossScaling::validate)?;
        self.optimizer().check_at(self.schedule.peak)
    }
}

/// More steps than any run takes: at one per microsecond, 9000 years.
pub(super) const MAX_STEPS: u64 = 1 << 58;

/// The loss scaling of a run in this precision, for which this was chosen.
pub(super) fn scaling(chosen: Option<LossScaling>, precision: Precision) -> Option<LossScaling> {
    chosen.or_else(|| precision.is_mixed().then(LossScaling::default))
}

/// Checks a number of sequences, tokens or batches.
pub(super) fn check_count(field: &'static str, n: usize) -> Result<()> {
    Error::unless((1..=1 << 20).contains(&n), field, "from 1 to 2^20", n)
}

/// Options of a [`Trainer`](super::Trainer) that are not part of the run's configuration: blocks of your own, probes,
/// patches, a memory limit, the model to fine-tune.
///
/// ```
/// use throughline::train::TrainOptions;
/// let options = TrainOptions { standard_probes: true, ..TrainOptions::default() };
/// ```
#[derive(Clone, Debug)]
pub struct TrainOptions<'a> {
    /// The layers of the model.
    pub block: &'a dyn Block,
    /// The model that [adapters](TrainConfig::lora) are trained for. Its weights go to the device as the file has them,
    /// in 16 bits or in blocks of few, and are neither changed nor saved.
    ///
    /// Without adapters there is none: to train all weights of a model, [load](crate::model::Model::load) it.
    pub base: Option<Arc<Model>>,
    /// Whether to draw initial parameters; true by default. Set it to false if a [model](crate::model::Model::load) or
    /// a [checkpoint](super::checkpoint::Checkpoint::restore) is loaded next, which overwrites them: it saves the time.
    /// All parameters are zero until then.
    pub init: bool,
    /// Whether to include the [standard probes](crate::probe::standard).
    pub standard_probes: bool,
    /// Further probes. With several micro-batches they report on the last one, whose loss counts as its part of the
    /// mean: its share of the targets that count. Gradients of parameters, however, are those of the whole step, before
    /// clipping.
    pub probes: Vec<Probe>,
    /// Changes to the model, in training and evaluation alike. [`Trainer::write_patch`](super::Trainer::write_patch)
    /// writes their inputs.
    pub patches: Vec<Patch>,
    /// Limit on GPU memory for training ([`TrainPlan::bytes`](super::TrainPlan::bytes)). What does not fit is made to
    /// by computing more a second time in backward: whatever saves the most bytes for its time, up to products and
    /// attention. [`TrainPlan::recomputed`](super::TrainPlan::recomputed) says what, and how much longer a step takes.
    /// Weights are the same, bit for bit. The error of a plan that cannot fit says what would.
    pub max_bytes: Option<u64>,
    /// Whether backward may compute again what it would otherwise keep of forward. True by default: results of
    /// activations and norms are made again as far as that takes next to no time, and others as
    /// [`max_bytes`](Self::max_bytes) demands. False keeps everything. See
    /// [`Plan::recomputing`](crate::Plan::recomputing).
    pub recompute: bool,
}

impl Default for TrainOptions<'_> {
    fn default() -> Self {
        TrainOptions {
            block: &StandardBlock,
            base: None,
            init: true,
            standard_probes: false,
            probes: vec![],
            patches: vec![],
            max_bytes: None,
            recompute: true,
        }
    }
}

impl TrainOptions<'_> {
    /// A model with these options. `packed` are the matrices of the base that stay as they are stored.
    pub(super) fn build(
        &self,
        profile: &Profile,
        config: &TrainConfig,
        packed: &BTreeMap<String, Packed>,
        training: bool,
    ) -> Result<(Graph, Transformer)> {
        let mut graph = Graph::with_max_tensor_bytes(profile.max_tensor_bytes());
        let (packed, lora) = (Some(packed), config.lora.as_ref());
        let options = TransformerOptions { block: self.block, training, packed, lora, packing: config.packing };
        let gpt = Transformer::build_of(&mut graph, &config.model, [config.batch, config.seq_len()], &options)?;
        if self.patches.is_empty() {
            return Ok((graph, gpt));
        }
        let patched = graph.patched(&self.patches)?;
        let gpt = patched.transformer(&gpt);
        Ok((patched.graph, gpt))
    }
}
