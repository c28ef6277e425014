//! Muon's settings, and the batches of matrices that it updates at once.

use serde::{Deserialize, Serialize};

use super::arena::ArenaLayout;
use crate::error::{Error, Result};
use crate::ops::muon::{MAX_STEPS, MuonStep, check_muon};
use crate::ops::{NOT_NEGATIVE, is_not_negative};

/// Settings of Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>), which updates the [hidden
/// matrices](crate::nn::is_hidden_matrix) of a model instead of AdamW.
///
/// Consider it where a step has many more tokens than a matrix has rows: its extra work is then small. The figures
/// below show what it gained on one task.
///
/// The update of a matrix is its momentum with all singular values brought close to 1; [`ops::muon`](crate::ops::muon)
/// has the formula. Learning rate and weight decay are AdamW's, except for what is set here. Gradients are clipped by
/// the same global norm.
///
/// Muon keeps one moment where AdamW keeps two. While a step runs, it needs two copies of a batch of matrices of one
/// shape, and two products of each matrix with itself. A batch is as many matrices as fit 8 MiB, so all this takes at
/// most 32 MiB, or four times the largest matrix if that is more.
///
/// Each step adds 5 times `4 s^2 l + 2 s^3` operations for a matrix of sides `s <= l`; for a square matrix that is as
/// much as training it on 5 `s` tokens. On the demo's task (`train --steps 400`; 512 tokens per step, d64) the
/// validation loss was 1.965 nats per character at Muon's best learning rate, 0.010, and 2.064 at AdamW's, 0.006, for
/// 1.4 times the time per step. `docs/performance.md` in the repository has more figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MuonConfig {
    /// Decay rate of the running mean of gradients.
    pub momentum: f64,
    /// Whether the newest gradient counts once more (Nesterov momentum).
    pub nesterov: bool,
    /// Number of Newton-Schulz iterations.
    pub steps: usize,
    /// Muon's learning rate is the schedule's multiplied by this.
    pub lr_factor: f64,
    /// How the size of an update depends on the shape of its matrix.
    pub scale: MuonScale,
    /// Decoupled weight decay: each step subtracts this times Muon's learning rate times the matrix.
    pub weight_decay: f64,
}

impl Default for MuonConfig {
    fn default() -> Self {
        let scale = MuonScale::MatchAdamW;
        MuonConfig { momentum: 0.95, nesterov: true, steps: 5, lr_factor: 1.0, scale, weight_decay: 0.1 }
    }
}

/// Factor of Muon's update, by the shape of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MuonScale {
    /// `sqrt(max(1, outputs / inputs))`, as in the published code. Good learning rates are near 0.02.
    Original,
    /// `0.2 sqrt(max(outputs, inputs))`: elements change about as much as under AdamW, so one learning rate and one
    /// weight decay serve both (Liu et al. 2025, <https://arxiv.org/abs/2502.16982>).
    MatchAdamW,
}

impl MuonScale {
    /// The factor for a matrix `[inputs, outputs]`, the layout of [`nn`](crate::nn).
    pub fn of(self, inputs: usize, outputs: usize) -> f64 {
        match self {
            MuonScale::Original => (outputs as f64 / inputs as f64).max(1.0).sqrt(),
            MuonScale::MatchAdamW => 0.2 * (outputs.max(inputs) as f64).sqrt(),
        }
    }
}

impl MuonConfig {
    /// Checks the settings. The error names the first field with an impossible value.
    pub fn validate(&self) -> Result<()> {
        let steps = format!("from 1 to {MAX_STEPS}");
        Error::unless((1..=MAX_STEPS).contains(&self.steps), "muon.steps", &steps, self.steps)?;
        Error::unless(is_not_negative(self.lr_factor), "muon.lr_factor", NOT_NEGATIVE, self.lr_factor)?;
        self.check_at(0.0, 0.0)
    }

    /// Checks what depends on the schedule's learning rate, too.
    pub(crate) fn check_at(&self, lr: f64, max_grad_norm: f64) -> Result<()> {
        check_muon([lr * self.lr_factor, self.momentum, self.weight_decay, max_grad_norm])
    }

    /// The values that kernels read in a step, given the schedule's learning rate `lr`.
    pub(super) fn values(&self, lr: f64, max_grad_norm: f64) -> Result<[f32; 4]> {
        self.check_at(lr, max_grad_norm)?;
        Ok([lr * self.lr_factor, self.momentum, self.weight_decay, max_grad_norm].map(|x| x as f32))
    }

    /// The settings that the plan of a step for matrices `[inputs, outputs]` is made with.
    pub(super) fn step(&self, inputs: usize, outputs: usize) -> MuonStep {
        MuonStep { nesterov: self.nesterov, steps: self.steps, rate: self.scale.of(inputs, outputs) }
    }
}

/// Matrices of one shape, next to each other in a part of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub part: usize,
    /// Number of elements before the first.
    pub offset: usize,
    pub count: usize,
    pub rows: usize,
    pub cols: usize,
}

/// Larger matrices are not batched with others. They keep a device busy by themselves, and a step needs memory for two
/// copies of a batch.
const BATCH_BYTES: usize = 8 << 20;

impl Batch {
    /// All of Muon's matrices, in as few batches as possible.
    pub fn all(layout: &ArenaLayout) -> Vec<Batch> {
        let mut tensors: Vec<_> = layout.places.iter().zip(&layout.tensors).collect();
        tensors.retain(|(place, _)| layout.parts[place.part].muon);
        tensors.sort_by_key(|(place, _)| (place.part, place.offset));
        let mut batches: Vec<Batch> = vec![];
        for (place, (_, shape)) in tensors {
            let (rows, cols, len) = (shape.rows(), shape.cols(), shape.len());
            // With a gap between them they would not form a tensor.
            let joins = |b: &Batch| {
                (b.part, b.rows, b.cols) == (place.part, rows, cols)
                    && len.is_multiple_of(layout.align)
                    && 4 * (b.count + 1) * len <= BATCH_BYTES
            };
            match batches.last_mut().filter(|b| joins(b)) {
                Some(batch) => batch.count += 1,
                None => batches.push(Batch { part: place.part, offset: place.offset, count: 1, rows, cols }),
            }
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_of_one_shape_and_have_no_gaps() {
        let shapes: [[usize; 2]; 6] = [[8, 16], [16, 16], [3, 5], [8, 16], [3, 5], [16, 16]];
        let tensors = shapes.iter().enumerate().map(|(i, s)| (format!("t{i}"), (*s).into())).collect();
        let layout = ArenaLayout::with_muon(tensors, u64::MAX, |_, _| true).unwrap();
        let batch = |offset, count, rows, cols| Batch { part: 0, offset, count, rows, cols };
        let (odd, wide, square) =
            ([batch(0, 1, 3, 5), batch(64, 1, 3, 5)], batch(128, 2, 8, 16), batch(384, 2, 16, 16));
        assert_eq!(Batch::all(&layout), [odd[0], odd[1], wide, square]);
    }

    #[test]
    fn a_batch_takes_no_more_memory_than_it_may() {
        let tensors = (0..7).map(|i| (format!("t{i}"), [512, 1024].into())).collect(); // 2 MiB each
        let layout = ArenaLayout::with_muon(tensors, u64::MAX, |_, _| true).unwrap();
        assert_eq!(Batch::all(&layout).iter().map(|b| b.count).collect::<Vec<_>>(), [4, 3]);
    }
}
