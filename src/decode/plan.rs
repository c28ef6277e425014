//! A decoder, planned before there is a device.

use std::sync::Arc;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::model::{Model, Placed};
use crate::nn::{AdapterSlots, Block, DecodeRows, DecodeShape, StandardBlock, TransformerConfig, TransformerDecoder};
use crate::ops::packed_i8::Activations;
use crate::ops::top_k::MAX_K;
use crate::plan::requirements::Requirements;
use crate::plan::{External, Plan};
use crate::profile::{AdapterClass, Lanes, Profile};
use crate::tensor::{DType, TensorType};

/// Number of tokens per sequence of a step for short prompts, and of any prompt on software adapters.
const SHORT: usize = 32;

/// Numbers of tokens of a step for long prompts on GPUs, over all sequences. The first that suits is used: more rows
/// give products more workgroups, and weights are read less often.
const LONG: [usize; 3] = [512, 256, 128];

/// Bytes that such a step may take whatever the size of the model.
const LONG_BYTES: usize = 64 << 20;

/// The likeliest tokens, in steps that compute logits for the last row only.
#[derive(Clone, Copy, Debug)]
pub(super) struct Top {
    /// One temperature per sequence.
    pub temperature: Value,
    /// Logits, ids and log of the sum, as returned by [`Graph::top_k`].
    pub candidates: [Value; 3],
}

/// What a [`Decoder`](super::Decoder) has room for, and its blocks. A number of tokens becomes options for one
/// sequence of that many.
///
/// ```
/// use throughline::decode::DecodeOptions;
/// use throughline::DType;
/// let four_texts = DecodeOptions { batch: 4, ..DecodeOptions::new(512) };
/// let long_text = DecodeOptions { cache: DType::F16, ..DecodeOptions::new(8192) };
/// assert_eq!(DecodeOptions::from(512).batch, 1);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DecodeOptions<'a> {
    /// Number of sequences that are decoded together. A step reads the weights once for all of them, so several texts
    /// cost little more than one.
    pub batch: usize,
    /// Number of tokens that the cache of each sequence has room for.
    pub capacity: usize,
    /// The layers of the model: those that it was trained with.
    pub block: &'a dyn Block,
    /// How products with packed weights read their inputs. [`Activations::I8`] is faster where arithmetic is the limit,
    /// and less exact.
    pub activations: Activations,
    /// How the caches of keys and values are stored. [`DType::F16`] has room for twice the tokens in the same memory,
    /// and a token reads half the bytes of those before it; use it where a context is long or memory is short.
    /// Attention computes in f32 either way. With the default, [`DType::F32`], logits are those of a pass without a
    /// cache, up to the order of sums.
    ///
    /// For 2,048 tokens, SmolLM2-135M's takes 47 MB in place of 94, beside 97 MB of weights in Q4_1. With caches and
    /// prompts in f16, its logits after two prompts are off by at most 0.026, 64 greedy tokens after each are the same,
    /// and 64 tokens of prose have 3.4990 nats each in place of 3.4992.
    pub cache: DType,
    /// How passes of several tokens store what blocks compute: those of prompts, and of
    /// [`feed_all`](super::Decoder::feed_all). [`DType::F16`] halves the memory of their activations and what moves
    /// between kernels; use it on GPUs, for long prompts. The residual stream and all logits stay f32, and so do passes
    /// of one token. The default is [`DType::F32`].
    ///
    /// Values beyond 65504 become infinite: logits are then no numbers, and to draw from them is an error.
    pub prompts: DType,
    /// Room for adapters, of which each sequence can use one. None by default.
    pub adapters: Option<&'a AdapterSlots>,
}

impl DecodeOptions<'_> {
    /// One sequence of at most `capacity` tokens, standard blocks, and all in f32.
    pub fn new(capacity: usize) -> Self {
        DecodeOptions {
            batch: 1,
            capacity,
            block: &StandardBlock,
            activations: Activations::F32,
            cache: DType::F32,
            prompts: DType::F32,
            adapters: None,
        }
    }
}

impl From<usize> for DecodeOptions<'_> {
    fn from(capacity: usize) -> Self {
        Self::new(capacity)
    }
}

/// The plan of a [`Decoder`](super::Decoder): what it needs of a device and how much memory it takes, before there is
/// one.
///
/// Use it to choose a capacity, or to request a device with sufficient limits.
/// [`feed_all_blocking`](super::Decoder::feed_all_blocking) plans one more step when it is first called.
///
/// ```
/// use throughline::decode::DecodePlan;
/// use throughline::{AdapterClass, Profile};
/// use throughline::model::Model;
///
/// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
/// # let folder = doctest::qwen3();
/// let model = Model::open(folder.path())?;
/// // Of an adapter, `Profile::of_adapter`.
/// let plan = DecodePlan::new(&model, 16, &Profile::portable(AdapterClass::Gpu))?;
/// plan.requirements().check(&wgpu::Limits::default())?;
/// assert!(plan.bytes() > plan.weight_bytes());
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DecodePlan {
    pub(super) config: TransformerConfig,
    pub(super) placed: Placed,
    pub(super) batch: usize,
    pub(super) capacity: usize,
    pub(super) adapters: Option<AdapterSlots>,
    /// For one token per sequence, for short prompts, and on GPUs for long ones: by number of tokens.
    pub(super) steps: Vec<StepPlan>,
    pub(super) all: Arc<StepGraph>,
    lanes: Lanes,
}

/// The graph of a step for a fixed number of new tokens.
#[derive(Debug)]
pub(super) struct StepGraph {
    graph: Graph,
    values: TransformerDecoder,
    shape: DecodeShape,
    top: Option<Top>,
}

/// The plan for a fixed number of new tokens.
#[derive(Clone, Debug)]
pub(super) struct StepPlan {
    pub plan: Arc<Plan>,
    pub values: TransformerDecoder,
    pub shape: DecodeShape,
    pub top: Option<Top>,
}

impl StepGraph {
    fn new(
        config: &TransformerConfig,
        placed: &Placed,
        options: DecodeOptions<'_>,
        time: usize,
        rows: DecodeRows,
    ) -> Result<Self> {
        let DecodeOptions { batch, capacity, block, activations, cache, prompts, adapters } = options;
        let shape = DecodeShape { batch, time, capacity, rows, activations, cache, prompts };
        let mut graph = Graph::with_max_tensor_bytes(placed.max_bytes);
        let values = TransformerDecoder::assemble(&mut graph, config, block, &placed.packed(), shape, adapters)?;
        let top = match shape.rows {
            DecodeRows::Last => {
                let temperature = graph.input("temperature", TensorType::f32([shape.batch]))?;
                let k = MAX_K.min(config.vocab_size);
                Some(Top { temperature, candidates: graph.top_k("top", values.logits, temperature, k)? })
            }
            DecodeRows::All => None,
        };
        Ok(StepGraph { graph, values, shape, top })
    }

    pub fn plan(&self, profile: &Profile) -> Result<StepPlan> {
        let StepGraph { graph, values, shape, top } = self;
        let candidates = top.iter().flat_map(|top| top.candidates);
        let outputs: Vec<Value> = [values.logits].into_iter().chain(candidates).collect();
        let plan = Arc::new(Plan::new(graph, &outputs, profile)?);
        Ok(StepPlan { plan, values: values.clone(), shape: *shape, top: *top })
    }
}

impl StepPlan {
    fn is_made(&self, value: Value) -> bool {
        self.values.caches.contains(&value) || self.values.adapters.contains(&value)
    }

    /// Whether all steps share it: parameters, caches and adapters.
    pub fn is_shared(&self, value: Value) -> bool {
        self.is_made(value) || self.values.params.contains(&value)
    }

    /// What the first step makes for all of them: caches, and the slots of adapters.
    pub fn made(&self) -> impl Iterator<Item = &External> {
        self.plan.externals.iter().filter(|e| self.is_made(e.value))
    }

    fn caches(&self) -> impl Iterator<Item = &External> {
        self.plan.externals.iter().filter(|e| self.values.caches.contains(&e.value))
    }

    /// Bytes of a step, not counting what steps share.
    pub fn bytes(&self) -> usize {
        self.plan.allocated_bytes(|v| self.is_shared(v))
    }
}

impl DecodePlan {
    /// Plans for devices with this profile. `options` may be a number of tokens, for one sequence.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] names a tensor, the limit that it exceeds, and the largest capacity that fits. [`Error::Graph`]
    /// names a node of a [block](DecodeOptions::block) that cannot be decoded.
    pub fn new<'a>(model: &Model, options: impl Into<DecodeOptions<'a>>, profile: &Profile) -> Result<Self> {
        let placed = model.placed(profile.max_tensor_bytes())?;
        Self::on(model.config(), &placed, options.into(), profile)
    }

    /// The capacity of these options if [`new`](Self::new) takes it, or else the largest that it takes. An `Err` if none
    /// is.
    pub fn fitted_capacity<'a>(
        model: &Model,
        options: impl Into<DecodeOptions<'a>>,
        profile: &Profile,
    ) -> Result<usize> {
        let (placed, options) = (model.placed(profile.max_tensor_bytes())?, options.into());
        match Self::of_capacity(model.config(), &placed, options, profile) {
            Err(e @ Error::Limit { .. }) => Self::smaller(model.config(), &placed, options, profile).ok_or(e),
            other => other.map(|_| options.capacity),
        }
    }

    pub(super) fn on(
        config: &TransformerConfig,
        placed: &Placed,
        options: DecodeOptions<'_>,
        profile: &Profile,
    ) -> Result<Self> {
        if options.batch == 0 {
            return Err(Error::config("batch", "must be at least 1"));
        }
        let plan = Self::of_capacity(config, placed, options, profile).map_err(|e| match e {
            Error::Limit { .. } => match Self::smaller(config, placed, options, profile) {
                Some(fitting) => e.advise(format!("A capacity of {fitting} fits")),
                None => e,
            },
            e => e,
        })?;
        TransformerDecoder::check_blocks(config, options.block, placed.max_bytes)?;
        plan.with_long_step(options, profile)
    }

    /// The largest capacity that fits, below one that does not.
    fn smaller(
        config: &TransformerConfig,
        placed: &Placed,
        options: DecodeOptions<'_>,
        profile: &Profile,
    ) -> Option<usize> {
        let fits = |capacity| Self::of_capacity(config, placed, DecodeOptions { capacity, ..options }, profile).is_ok();
        let (mut fitting, mut too_many) = (1, options.capacity);
        if too_many < 2 || !fits(fitting) {
            return None;
        }
        while too_many - fitting > 1 {
            let middle = fitting.midpoint(too_many);
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        Some(fitting)
    }

    fn of_capacity(
        config: &TransformerConfig,
        placed: &Placed,
        options: DecodeOptions<'_>,
        profile: &Profile,
    ) -> Result<Self> {
        let DecodeOptions { batch, capacity, .. } = options;
        let step = |time, rows| StepGraph::new(config, placed, options, time, rows);
        let short = SHORT.min(capacity);
        let mut steps = vec![step(1, DecodeRows::Last)?.plan(profile)?];
        if short > 1 {
            steps.push(step(short, DecodeRows::Last)?.plan(profile)?);
        }
        let all = Arc::new(step(short, DecodeRows::All)?);
        let (config, placed, lanes) = (config.clone(), placed.clone(), profile.lanes());
        Ok(DecodePlan { config, placed, batch, capacity, adapters: options.adapters.cloned(), steps, all, lanes })
    }

    /// Adds the step for long prompts, on GPUs: the largest that the device can run and that takes no more memory than
    /// the weights and caches, if that is much.
    fn with_long_step(mut self, options: DecodeOptions<'_>, profile: &Profile) -> Result<Self> {
        if profile.class == AdapterClass::Cpu {
            return Ok(self);
        }
        for tokens in LONG {
            let time = (tokens / options.batch).min(options.capacity);
            if time <= SHORT {
                break;
            }
            let graph = StepGraph::new(&self.config, &self.placed, options, time, DecodeRows::Last);
            match graph.and_then(|graph| graph.plan(profile)) {
                Ok(step) if step.bytes() <= self.shared_bytes().max(LONG_BYTES) => {
                    self.steps.push(step);
                    break;
                }
                Ok(_) | Err(Error::Limit { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(self)
    }

    /// The plans of a step, by number of tokens per sequence: for one, for a short prompt, and on GPUs for a long one. A
    /// [`Tuner`](crate::Tuner) takes them.
    pub fn plans(&self) -> Vec<&Plan> {
        self.steps.iter().map(|step| &*step.plan).collect()
    }

    /// The most tokens of a sequence that one pass takes: a longer prompt needs several. 32 on software adapters, up to
    /// 512 on GPUs, whose kernels then have enough to do at a time.
    ///
    /// ```
    /// # use throughline::decode::DecodePlan;
    /// # use throughline::model::Model;
    /// # use throughline::{AdapterClass, Profile};
    /// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
    /// # let folder = doctest::qwen3();
    /// # let model = Model::open(folder.path())?;
    /// let plan = DecodePlan::new(&model, 64, &Profile::portable(AdapterClass::Cpu))?;
    /// assert_eq!(plan.tokens_per_pass(), 32);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn tokens_per_pass(&self) -> usize {
        self.steps.iter().map(|step| step.shape.time).max().unwrap_or(1)
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        let all = self.steps.iter().map(|step| Requirements::of(&step.plan));
        all.reduce(Requirements::and).unwrap_or_default()
    }

    /// Bytes of GPU memory: weights, slots of adapters, caches, activations.
    pub fn bytes(&self) -> usize {
        self.shared_bytes() + self.steps.iter().map(StepPlan::bytes).sum::<usize>()
    }

    /// Bytes of what all steps share: weights, slots and caches.
    fn shared_bytes(&self) -> usize {
        let made = self.steps.first().into_iter().flat_map(StepPlan::made);
        self.placed.bytes() + made.map(|e| e.ty.storage_bytes()).sum::<usize>()
    }

    /// Bytes of the weights alone.
    pub fn weight_bytes(&self) -> usize {
        self.placed.bytes()
    }

    /// Bytes of the caches alone: for all layers and sequences, and as many tokens as there is room for.
    ///
    /// ```
    /// # use throughline::decode::{DecodeOptions, DecodePlan};
    /// # use throughline::model::Model;
    /// # use throughline::{AdapterClass, DType, Profile};
    /// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
    /// # let folder = doctest::qwen3();
    /// # let model = Model::open(folder.path())?;
    /// let profile = Profile::portable(AdapterClass::Gpu);
    /// let half = DecodeOptions { cache: DType::F16, ..DecodeOptions::new(64) };
    /// let [whole, half] = [DecodeOptions::new(64), half].map(|options| DecodePlan::new(&model, options, &profile));
    /// assert_eq!(half?.cache_bytes(), whole?.cache_bytes() / 2);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub fn cache_bytes(&self) -> usize {
        let caches = self.steps.first().into_iter().flat_map(StepPlan::caches);
        caches.map(|cache| cache.ty.storage_bytes()).sum()
    }

    /// Returns an error if this plan was not made for the model, or does not suit the device.
    pub(super) fn check(&self, gpu: &Gpu, model: &Model) -> Result<()> {
        if self.config != *model.config() || self.placed != model.placed(self.placed.max_bytes)? {
            return Err(Error::data("decode plan", "a plan of this model", "one of another"));
        }
        gpu.check(&self.requirements(), self.lanes)
    }
}
