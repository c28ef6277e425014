//! Tiles on cooperative matrices.

use super::heads::Dims;
use crate::kernel::Kernel;
use crate::profile::{Cooperative, Profile};

/// How the subgroups of a workgroup share a tile of rows, and so much of the other side at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Matrices {
    /// Of what.
    pub kind: Cooperative,
    /// Invocations of a subgroup.
    lanes: usize,
    /// Subgroups that share the rows of a tile, and its columns.
    down: usize,
    across: usize,
    /// Matrices that a subgroup has along the rows.
    blocks: usize,
    /// Rows of the other side that the workgroup meets at a time.
    others: usize,
    /// Whether a subgroup holds its rows in registers, or has them in workgroup memory, too.
    held: bool,
    /// Of how many tensors a workgroup has its rows.
    sides: usize,
}

/// A pass, for what its kernels hold in registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Of how many tensors a workgroup has its rows: of q, or of q and do, or of k and v.
    fn sides(self) -> usize {
        match self {
            Pass::Forward => 1,
            Pass::Backward => 2,
        }
    }
}

/// Workgroups of a unit that keep it busy: one multiplies while another loads.
const WAITING: usize = 2;

impl Matrices {
    /// Those that suit a device and a shape: first the largest tile of which there are enough to fill the device, or else
    /// the smallest.
    ///
    /// On GPUs a subgroup holds its rows in registers. With 16 x 16 matrices and several subgroups, heads of 128 take up
    /// to 168 of NVIDIA's 255 registers, and with one on AMD's cards all 256 without a spill. Wider heads than these
    /// would spill. Small subgroups, which software adapters have, would take seconds to compile for each such matrix:
    /// there many subgroups have a column of the sums each, and all rows are in workgroup memory.
    pub(super) fn all(profile: &Profile, d: &Dims, pass: Pass) -> Vec<Matrices> {
        let Some(kind) = profile.cooperative else { return vec![] };
        let (lanes, several) = profile.cooperating();
        let (lanes, size) = (lanes as usize, kind.size() as usize);
        let held = lanes >= 32;
        let (shapes, most_others): (&[_], usize) = match (several, held) {
            (false, _) => (&[(1, 1)], 16),
            (true, true) => (&[(4, 2), (2, 2), (2, 1), (1, 1)], 32),
            (true, false) => (&[(1, 8), (1, 4), (1, 2), (1, 1)], 64),
        };
        let widest = match (pass, several, held) {
            (Pass::Forward, true, _) | (_, _, false) => 256,
            (Pass::Backward, false, _) => 128,
            _ => 192,
        };
        if d.dh > widest {
            return vec![];
        }
        let blocks = (lanes.min(32) / if d.dh <= 64 { 1 } else { 2 } / size).max(1);
        let fit = |&(down, across): &(usize, usize)| {
            let sides = pass.sides();
            let of = |n: u32| Matrices { kind, lanes, down, across, blocks, others: size << n, held, sides };
            (0..=(most_others / size).ilog2()).rev().map(of).find(|m| m.fits(profile, d.dh))
        };
        let mut all: Vec<Matrices> = shapes.iter().filter_map(fit).collect();
        all.dedup_by_key(|m| m.rows());
        all.truncate(if held { 2 } else { 1 });
        let groups = |m: &Matrices| d.batch * d.kv_heads * d.sharing * d.tq.div_ceil(m.rows());
        let fills = |m: &Matrices| groups(m) >= WAITING * profile.units as usize;
        let first = all.iter().position(fills).unwrap_or(all.len().saturating_sub(1));
        if first < all.len() {
            all[..=first].rotate_right(1);
        }
        all
    }

    /// Whether cooperative.wgsl has a place for all it stages, and the device for its workgroup.
    fn fits(&self, profile: &Profile, dh: usize) -> bool {
        let size = self.kind.size() as usize;
        let staged =
            (!self.held || self.down * size <= 2 * self.others) && self.others.is_multiple_of(self.across * size);
        let shared = self.group() <= self.rows() * self.others;
        let group = self.group() <= profile.max_invocations as usize;
        staged && shared && group && self.workgroup_bytes(dh) <= profile.max_workgroup_bytes as usize
    }

    fn workgroup_bytes(&self, dh: usize) -> usize {
        let factor = self.factor();
        let (rows, others, pad) = (self.rows(), self.others, 16 / factor);
        let wide = dh.next_multiple_of(self.across * self.kind.size() as usize);
        let team = (self.group() / rows).max(1);
        let staged = 2 * others + if self.held { 0 } else { self.sides * rows };
        let arrays = [
            staged * (wide + pad) * factor,
            rows * (others + 4) * 4,
            rows * (others + pad) * factor,
            rows * team * 4,
            rows * 4,
            4,
            others * 8,
            others * 8,
        ];
        arrays.iter().map(|bytes| bytes.next_multiple_of(16)).sum()
    }

    /// Bytes of an element of what is multiplied.
    fn factor(&self) -> usize {
        if self.kind.is_f16() { 2 } else { 4 }
    }

    /// Invocations of a workgroup.
    pub(super) fn group(&self) -> usize {
        self.down * self.across * self.lanes
    }

    /// Rows of a workgroup.
    pub(super) fn rows(&self) -> usize {
        self.down * self.blocks * self.kind.size() as usize
    }

    pub(super) fn name(&self) -> String {
        format!("matrices {:?} {} rows x {}", self.kind, self.rows(), self.others)
    }

    /// A kernel of cooperative.wgsl with its knobs.
    pub(super) fn set(&self, kernel: Kernel) -> Kernel {
        let names =
            self.kind.knobs().into_iter().map(|(name, value)| (if name == "E" { "Factor" } else { name }, value));
        names
            .fold(kernel, |kernel, (name, value)| kernel.knob(name, value.as_str()))
            .knob("PAD", (16 / self.factor()) as u32)
            .knob("COOPERATING", self.lanes as u32)
            .knob("DOWN", self.down as u32)
            .knob("ACROSS", self.across as u32)
            .knob("BLOCKS", self.blocks as u32)
            .knob("OTHERS", self.others as u32)
            .knob("HELD", u32::from(self.held))
            .knob("SIDES", self.sides as u32)
    }
}
