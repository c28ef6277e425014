//! A decoder before there is a device.

use std::sync::Arc;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::model::{Model, Placed};
use crate::nn::{DecodeRows, DecodeShape, TransformerConfig, TransformerDecoder};
use crate::ops::top_k::MAX_K;
use crate::plan::requirements::Requirements;
use crate::plan::{External, Plan};
use crate::profile::{Lanes, Profile};
use crate::tensor::TensorType;

/// Tokens of a prompt that go through at a time.
const CHUNK: usize = 32;

/// The likeliest tokens, in steps that give scores for the last row only.
#[derive(Clone, Copy, Debug)]
pub(super) struct Top {
    /// One for each sequence.
    pub temperature: Value,
    /// Scores, ids and the log of the sum, as [`Graph::top_k`] gives them.
    pub candidates: [Value; 3],
}

/// A [`Decoder`](super::Decoder) of a model before there is a device: what it needs of one, and how much memory it
/// takes. For [`feed_all_blocking`](super::Decoder::feed_all_blocking) a decoder plans more when that is first called.
///
/// ```
/// use throughline::decode::DecodePlan;
/// use throughline::{AdapterClass, Profile};
/// use throughline::model::Model;
///
/// let model = Model::open("tests/data/hf/qwen3".as_ref())?;
/// // Of an adapter, `Profile::of_adapter`.
/// let plan = DecodePlan::new(&model, 1, 16, &Profile::portable(AdapterClass::Gpu))?;
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
    pub(super) chunk: StepPlan,
    pub(super) single: StepPlan,
    lanes: Lanes,
}

/// The plan for some new tokens at a time.
#[derive(Clone, Debug)]
pub(super) struct StepPlan {
    pub plan: Arc<Plan>,
    pub values: TransformerDecoder,
    pub shape: DecodeShape,
    pub top: Option<Top>,
}

impl StepPlan {
    pub fn new(config: &TransformerConfig, placed: &Placed, shape: DecodeShape, profile: &Profile) -> Result<Self> {
        let mut g = Graph::with_max_tensor_bytes(placed.max_bytes);
        let values = TransformerDecoder::build(&mut g, config, &placed.packed(), shape)?;
        let top = match shape.rows {
            DecodeRows::Last => {
                let temperature = g.input("temperature", TensorType::f32([shape.batch]))?;
                let k = MAX_K.min(config.vocab_size);
                Some(Top { temperature, candidates: g.top_k("top", values.logits, temperature, k)? })
            }
            DecodeRows::All => None,
        };
        let candidates = top.iter().flat_map(|top| top.candidates);
        let outputs: Vec<Value> = [values.logits].into_iter().chain(candidates).collect();
        Ok(StepPlan { plan: Arc::new(Plan::new(&g, &outputs, profile)?), values, shape, top })
    }

    pub fn is_cache(&self, value: Value) -> bool {
        self.values.caches.contains(&value)
    }

    /// Whether steps share it: parameters and caches.
    pub fn is_shared(&self, value: Value) -> bool {
        self.is_cache(value) || self.values.params.contains(&value)
    }

    pub fn caches(&self) -> impl Iterator<Item = &External> {
        self.plan.externals.iter().filter(|e| self.is_cache(e.value))
    }

    /// Bytes that it takes beside what steps share.
    pub fn bytes(&self) -> usize {
        self.plan.allocated_bytes(|v| self.is_shared(v))
    }
}

impl DecodePlan {
    /// Plans for `batch` sequences with room for `capacity` tokens each, on devices of this profile. An
    /// [`Error::Limit`] names a tensor and the limit that it is over, and the largest capacity that fits.
    pub fn new(model: &Model, batch: usize, capacity: usize, profile: &Profile) -> Result<Self> {
        let placed = model.placed(profile.max_tensor_bytes())?;
        Self::on(model.config(), &placed, batch, capacity, profile)
    }

    pub(super) fn on(
        config: &TransformerConfig,
        placed: &Placed,
        batch: usize,
        capacity: usize,
        profile: &Profile,
    ) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Config { field: "batch", message: "must be at least 1".into() });
        }
        let e = match Self::of_capacity(config, placed, batch, capacity, profile) {
            Ok(plan) => return Ok(plan),
            Err(e @ Error::Config { .. }) => return Err(e),
            Err(e) => e,
        };
        let fits = |n| Self::of_capacity(config, placed, batch, n, profile).is_ok();
        let (mut fitting, mut too_many) = (1, capacity);
        if capacity < 2 || !fits(fitting) {
            return Err(e);
        }
        while too_many - fitting > 1 {
            let middle = fitting.midpoint(too_many);
            if fits(middle) { fitting = middle } else { too_many = middle }
        }
        let message = match e {
            Error::Limit(message) => message,
            e => e.to_string(),
        };
        Err(Error::Limit(format!("{message}. A capacity of {fitting} fits")))
    }

    fn of_capacity(
        config: &TransformerConfig,
        placed: &Placed,
        batch: usize,
        capacity: usize,
        profile: &Profile,
    ) -> Result<Self> {
        let step = |time| {
            let shape = DecodeShape { batch, time, capacity, rows: DecodeRows::Last };
            StepPlan::new(config, placed, shape, profile)
        };
        let (chunk, single) = (step(CHUNK.min(capacity))?, step(1)?);
        let (config, placed, lanes) = (config.clone(), placed.clone(), profile.lanes());
        Ok(DecodePlan { config, placed, batch, capacity, chunk, single, lanes })
    }

    /// The plans of a step: by many tokens, and by one.
    pub fn plans(&self) -> [&Plan; 2] {
        [&self.chunk.plan, &self.single.plan]
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        Requirements::of(&self.chunk.plan).and(Requirements::of(&self.single.plan))
    }

    /// Bytes in GPU memory: weights, caches, activations.
    pub fn bytes(&self) -> usize {
        let caches: usize = self.single.caches().map(|e| e.ty.storage_bytes()).sum();
        self.placed.bytes() + caches + self.chunk.bytes() + self.single.bytes()
    }

    /// Those of the weights alone.
    pub fn weight_bytes(&self) -> usize {
        self.placed.bytes()
    }

    /// An `Err` if this is not a plan of the model, or not one for the device.
    pub(super) fn check(&self, gpu: &Gpu, model: &Model) -> Result<()> {
        if self.config != *model.config() || self.placed != model.placed(self.placed.max_bytes)? {
            let (expected, got) = ("a plan of this model".into(), "one of another".into());
            return Err(Error::Data { tensor: "decode plan".into(), expected, got });
        }
        gpu.check(&self.requirements(), self.lanes)
    }
}
