//! A decoder, planned before there is a device.

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

/// Number of prompt tokens processed at a time.
const CHUNK: usize = 32;

/// The likeliest tokens, in steps that compute logits for the last row only.
#[derive(Clone, Copy, Debug)]
pub(super) struct Top {
    /// One temperature per sequence.
    pub temperature: Value,
    /// Logits, ids and log of the sum, as returned by [`Graph::top_k`].
    pub candidates: [Value; 3],
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

/// The plan for a fixed number of new tokens.
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

    /// Whether all steps share it: parameters and caches.
    pub fn is_shared(&self, value: Value) -> bool {
        self.is_cache(value) || self.values.params.contains(&value)
    }

    pub fn caches(&self) -> impl Iterator<Item = &External> {
        self.plan.externals.iter().filter(|e| self.is_cache(e.value))
    }

    /// Bytes of a step, not counting what steps share.
    pub fn bytes(&self) -> usize {
        self.plan.allocated_bytes(|v| self.is_shared(v))
    }
}

impl DecodePlan {
    /// Plans for `batch` sequences with room for `capacity` tokens each, on devices with this profile.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] names a tensor, the limit that it exceeds, and the largest capacity that fits.
    pub fn new(model: &Model, batch: usize, capacity: usize, profile: &Profile) -> Result<Self> {
        let placed = model.placed(profile.max_tensor_bytes())?;
        Self::on(model.config(), &placed, batch, capacity, profile)
    }

    /// `capacity` if [`new`](Self::new) takes it, or else the largest that it takes. An `Err` if none is.
    pub fn fitted_capacity(model: &Model, batch: usize, capacity: usize, profile: &Profile) -> Result<usize> {
        let placed = model.placed(profile.max_tensor_bytes())?;
        match Self::of_capacity(model.config(), &placed, batch, capacity, profile) {
            Err(e @ Error::Limit { .. }) => Self::smaller(model.config(), &placed, batch, capacity, profile).ok_or(e),
            other => other.map(|_| capacity),
        }
    }

    pub(super) fn on(
        config: &TransformerConfig,
        placed: &Placed,
        batch: usize,
        capacity: usize,
        profile: &Profile,
    ) -> Result<Self> {
        if batch == 0 {
            return Err(Error::config("batch", "must be at least 1"));
        }
        Self::of_capacity(config, placed, batch, capacity, profile).map_err(|e| match e {
            Error::Limit { .. } => match Self::smaller(config, placed, batch, capacity, profile) {
                Some(fitting) => e.advise(format!("A capacity of {fitting} fits")),
                None => e,
            },
            e => e,
        })
    }

    /// The largest capacity that fits, below one that does not.
    fn smaller(
        config: &TransformerConfig,
        placed: &Placed,
        batch: usize,
        mut too_many: usize,
        profile: &Profile,
    ) -> Option<usize> {
        let fits = |n| Self::of_capacity(config, placed, batch, n, profile).is_ok();
        let mut fitting = 1;
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

    /// The plans of a step: for many tokens, and for one. A [`Tuner`](crate::Tuner) takes them.
    pub fn plans(&self) -> [&Plan; 2] {
        [&self.chunk.plan, &self.single.plan]
    }

    /// What a device must offer.
    pub fn requirements(&self) -> Requirements {
        Requirements::of(&self.chunk.plan).and(Requirements::of(&self.single.plan))
    }

    /// Bytes of GPU memory: weights, caches, activations.
    pub fn bytes(&self) -> usize {
        let caches: usize = self.single.caches().map(|e| e.ty.storage_bytes()).sum();
        self.placed.bytes() + caches + self.chunk.bytes() + self.single.bytes()
    }

    /// Bytes of the weights alone.
    pub fn weight_bytes(&self) -> usize {
        self.placed.bytes()
    }

    /// Returns an error if this plan was not made for the model, or does not suit the device.
    pub(super) fn check(&self, gpu: &Gpu, model: &Model) -> Result<()> {
        if self.config != *model.config() || self.placed != model.placed(self.placed.max_bytes)? {
            return Err(Error::data("decode plan", "a plan of this model", "one of another"));
        }
        gpu.check(&self.requirements(), self.lanes)
    }
}
