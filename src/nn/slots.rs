//! Adapters that each sequence of a batch chooses for itself.

use super::lora::{LORA_A, LORA_B, Lora};
use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::tensor::TensorType;

/// Room for low-rank adapters in a decoder, of which each sequence uses one or none: characters of a game, or users of a
/// server, each with a fine-tuned model of their own on one base in memory.
///
/// A slot holds an adapter of any rank up to [`rank`](Self::rank), for some or all of the layers that there is room for.
/// What slots take is planned once: to load another adapter into a slot costs its own bytes, and nothing of the base.
///
/// ```
/// use throughline::decode::DecodeOptions;
/// use throughline::nn::AdapterSlots;
/// let slots = AdapterSlots::new(8, 16); // on all linear layers
/// let attention_only = AdapterSlots { targets: vec!["attn.q".into(), "attn.v".into()], ..slots };
/// let options = DecodeOptions { batch: 3, adapters: Some(&attention_only), ..DecodeOptions::new(512) };
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSlots {
    /// Number of adapters that are in memory at a time.
    pub count: usize,
    /// The largest rank. Smaller ones are padded with zeros.
    pub rank: usize,
    /// The linear layers that may have adapters, by the end of their names, as in [`Lora::targets`]. Empty for all in
    /// blocks.
    pub targets: Vec<String>,
}

impl AdapterSlots {
    /// Room for so many adapters of at most this rank, on all linear layers in blocks.
    pub fn new(count: usize, rank: usize) -> Self {
        AdapterSlots { count, rank, targets: vec![] }
    }

    /// Checks all settings. The error names the first field with an impossible value.
    pub fn validate(&self) -> Result<()> {
        // The last number stands for no slot.
        Error::unless((1..u32::MAX as usize).contains(&self.count), "adapters.count", "at least 1", self.count)?;
        self.lora().validate().map_err(of_slots)
    }

    /// The settings of adapters that fill a slot.
    fn lora(&self) -> Lora {
        Lora { targets: self.targets.clone(), ..Lora::new(self.rank, 1.0) }
    }

    /// Whether adapters of the layer of this full name have room.
    pub(crate) fn has_room_for(&self, layer: &str) -> bool {
        self.lora().adapts(layer)
    }

    /// Returns an error if a target is no layer of the model, by the names of its parameters and of these matrices.
    pub(super) fn check_names<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        self.lora().check_names(names).map_err(of_slots)
    }
}

/// The same error, about the fields of slots.
fn of_slots(e: Error) -> Error {
    match e {
        Error::Config { field: "lora.rank", message } => Error::Config { field: "adapters.rank", message },
        Error::Config { message, .. } => Error::Config { field: "adapters.targets", message },
        e => e,
    }
}

/// The adapters of a decoder in a graph, collected while blocks are added.
#[derive(Debug)]
pub(super) struct Slots {
    room: AdapterSlots,
    /// The slot of each sequence: u32 `[batch]`.
    pub ids: Value,
    /// `{layer}.lora_a`, `[count, d_in, rank]`, and `{layer}.lora_b`, `[count, rank, d_out]`, of each layer.
    pub stacks: Vec<Value>,
}

impl Slots {
    /// Adds the input that chooses slots.
    pub fn new(g: &mut Graph, room: &AdapterSlots, batch: usize) -> Result<Self> {
        let ids = g.input("adapters", TensorType::u32([batch]))?;
        Ok(Slots { room: room.clone(), ids, stacks: vec![] })
    }

    /// Whether the layer of this full name has room.
    pub fn has_room_for(&self, layer: &str) -> bool {
        self.room.has_room_for(layer)
    }

    /// `y + (x a) b`, with the matrices of each sequence's slot. The sum has the layer's name.
    pub fn add(&mut self, g: &mut Graph, name: &str, x: Value, y: Value) -> Result<Value> {
        let AdapterSlots { count, rank, .. } = self.room;
        let (d_in, d_out) = (g.ty(x).shape.cols(), g.ty(y).shape.cols());
        let x = self.by_sequence(g, name, x)?;
        let a = g.input(&format!("{name}.{LORA_A}"), TensorType::f32([count, d_in, rank]))?;
        let b = g.input(&format!("{name}.{LORA_B}"), TensorType::f32([count, rank, d_out]))?;
        self.stacks.extend([a, b]);
        let low = g.matmul_by_id(&format!("{name}.low"), x, a, self.ids)?;
        let delta = g.matmul_by_id(&format!("{name}.delta"), low, b, self.ids)?;
        let delta = g.reshape_like(delta, y)?;
        g.residual_add(name, y, delta)
    }

    /// `x` as `[batch, .., d_in]`. A block may have made one list of all rows.
    fn by_sequence(&self, g: &mut Graph, name: &str, x: Value) -> Result<Value> {
        let (batch, shape) = (g.ty(self.ids).len(), g.ty(x).shape.clone());
        if shape.lead().first() == Some(&batch) {
            return Ok(x);
        }
        if !shape.rows().is_multiple_of(batch) {
            let message = format!("`{}`: {shape} has no rows for each of {batch} sequences", g.full_name(name));
            return Err(Error::Graph(message));
        }
        g.reshape(&format!("{name}.rows"), x, [batch, shape.rows() / batch, shape.cols()])
    }
}
