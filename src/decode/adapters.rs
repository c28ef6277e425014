//! The adapters of a decoder: what each slot holds, and which slot each sequence uses.

use std::borrow::Cow;

use crate::device::{Gpu, Tensor};
use crate::error::{Error, Result, quoted};
use crate::model::{Adapter, AdapterLayer};
use crate::nn::{AdapterSlots, LORA_A, LORA_B};

/// What kernels take for the slot of a sequence without an adapter.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// The matrices of a layer, of all slots: `[count, d_in, rank]` and `[count, rank, d_out]`.
#[derive(Debug)]
pub(super) struct Stacks {
    pub layer: String,
    pub a: Tensor,
    pub b: Tensor,
}

/// The slots of a decoder.
#[derive(Debug)]
pub(super) struct Slots {
    room: AdapterSlots,
    layers: Vec<Stacks>,
    /// Whether each slot holds an adapter.
    filled: Vec<bool>,
    /// The slot that each sequence uses.
    used: Vec<Option<usize>>,
}

impl Slots {
    pub fn new(room: AdapterSlots, layers: Vec<Stacks>, batch: usize) -> Self {
        let (filled, used) = (vec![false; room.count], vec![None; batch]);
        Slots { room, layers, filled, used }
    }

    /// The slot that a sequence uses.
    pub fn of(&self, sequence: usize) -> Option<usize> {
        self.used.get(sequence).copied().flatten()
    }

    /// Whether the sequence can be fed: the slot that it uses, if any, holds an adapter.
    pub fn is_ready(&self, sequence: usize) -> bool {
        self.of(sequence).is_none_or(|slot| self.filled[slot])
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.room.count
    }

    /// What kernels read: the slot of each sequence.
    pub fn ids(&self) -> Vec<u32> {
        self.used.iter().map(|slot| slot.map_or(NO_SLOT, |slot| slot as u32)).collect()
    }

    /// Slots that take as long as any, to measure with: all of them in turn.
    pub fn ids_to_measure(&self) -> Vec<u32> {
        (0..self.used.len()).map(|i| (i % self.room.count) as u32).collect()
    }

    /// Lets a sequence use a slot, which may be about to be filled.
    pub fn choose(&mut self, sequence: usize, slot: Option<usize>) -> Result<()> {
        let n = self.used.len();
        if let Some(slot) = slot {
            self.expect(slot)?;
        }
        let used = self.used.get_mut(sequence);
        let used = used.ok_or_else(|| Error::data("sequence", format!("one of {n}, counted from 0"), sequence))?;
        *used = slot;
        Ok(())
    }

    pub fn expect(&self, slot: usize) -> Result<()> {
        let n = self.room.count;
        let error = || Error::data("adapter slot", format!("one of {n}, counted from 0"), slot);
        if slot < n { Ok(()) } else { Err(error()) }
    }

    /// Returns an error unless there is such a slot and it holds an adapter.
    pub fn expect_filled(&self, slot: usize) -> Result<()> {
        self.expect(slot)?;
        if self.filled[slot] { Ok(()) } else { Err(Error::data("adapter slot", "one that holds an adapter", slot)) }
    }

    /// Returns an error if a sequence uses a slot that holds nothing.
    pub fn check_ready(&self) -> Result<()> {
        self.used.iter().flatten().try_for_each(|&slot| self.expect_filled(slot))
    }

    /// Notes that a slot holds an adapter, or no whole one.
    pub fn set_filled(&mut self, slot: usize, filled: bool) {
        self.filled[slot] = filled;
    }

    /// Returns an error if a slot does not take this adapter: it names file and tensor.
    pub fn check(&self, slot: usize, adapter: &Adapter) -> Result<()> {
        self.expect(slot)?;
        let err = |message: String| Err(Error::format(adapter.path(), message));
        if let Some((name, _)) = adapter.whole().next() {
            let message = "trained whole, which a slot has no room for: merge the adapter into its model";
            return err(format!("tensor {}: {message}", quoted(name)));
        }
        for (name, layer) in adapter.layers() {
            let Some(Stacks { a, b, .. }) = self.layers.iter().find(|stacks| stacks.layer == name) else {
                let message = "the slots have no room for adapters of this layer: see `AdapterSlots::targets`";
                return err(format!("layer {}: {message}", quoted(name)));
            };
            let AdapterLayer { d_in, d_out, rank, scale, .. } = *layer;
            if rank > self.room.rank {
                return err(format!("layer {}: rank {rank}, but slots have room for {}", quoted(name), self.room.rank));
            }
            let [expected_in, expected_out] = [a.ty().shape.dims()[1], b.ty().shape.dims()[2]];
            if d_in != expected_in {
                let message = format!("expected [{expected_in}, {rank}], got [{d_in}, {rank}]");
                return err(format!("tensor `{name}.{LORA_A}`: {message}"));
            }
            if d_out != expected_out {
                let message = format!("expected [{rank}, {expected_out}], got [{rank}, {d_out}]");
                return err(format!("tensor `{name}.{LORA_B}`: {message}"));
            }
            if layer.b.iter().any(|v| !(v * scale).is_finite()) {
                return err(format!("tensor `{name}.{LORA_B}`: its elements times the scale, {scale}, are beyond f32"));
            }
        }
        Ok(())
    }

    /// Queues the writes of one layer of an adapter into a slot that [takes](Self::check) it. Returns how many bytes
    /// they are; `None` if there is no such layer.
    pub fn write(&self, gpu: &Gpu, slot: usize, adapter: &Adapter, index: usize) -> Result<Option<usize>> {
        let Some(Stacks { layer, a, b }) = self.layers.get(index) else { return Ok(None) };
        let [rank, d_out] = [1, 2].map(|axis| b.ty().shape.dims()[axis]);
        let mut bytes = 0;
        let mut write = |stack: &Tensor, values: &[f32]| {
            let values: &[u8] = bytemuck::cast_slice(values);
            bytes += values.len();
            gpu.write(stack.buffer(), stack.offset() + (slot * values.len()) as u64, values)
        };
        let Some(layer) = adapter.layer(layer) else {
            write(a, &vec![0.0; a.ty().shape.dims()[1] * rank])?;
            write(b, &vec![0.0; rank * d_out])?;
            return Ok(Some(bytes));
        };
        write(a, &widened(&layer.a, layer.rank, rank))?;
        let mut scaled: Vec<f32> = layer.b.iter().map(|v| v * layer.scale).collect();
        scaled.resize(rank * d_out, 0.0);
        write(b, &scaled)?;
        Ok(Some(bytes))
    }
}

/// Rows of `from` columns, with zeros up to `to` columns.
fn widened(values: &[f32], from: usize, to: usize) -> Cow<'_, [f32]> {
    if from == to {
        return Cow::Borrowed(values);
    }
    let row = |row: &[f32]| row.iter().copied().chain(std::iter::repeat_n(0.0, to - from)).collect::<Vec<f32>>();
    Cow::Owned(values.chunks_exact(from).flat_map(row).collect())
}
