//! The kernels of each tile, and their dispatches.

use std::ops::Range;

use super::heads::{Attention, Dims, Keys};
use super::texts;
use super::tiles::{COMBINED, Cut, Split, Tile, WORKGROUP_QUADS, units};
use crate::graph::Op;
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::ops::source::{LaneSource, table_kernel};
use crate::tensor::TensorType;

impl Attention {
    /// Adds the dispatches of one kernel for `times` rows of `heads` heads, which meet `others` of the other side in
    /// `loops` loops over columns.
    pub(super) fn dispatch(
        &self,
        program: &mut Program,
        cx: &Launch<'_>,
        (kernel, binds): (Kernel, &[Bind]),
        (times, heads): (usize, usize),
        (others, loops): (usize, usize),
        tile: Tile,
    ) -> Result<(), String> {
        let d = self.dims(&cx.inputs[..3])?;
        let blocks = times.div_ceil(tile.rows_of_group());
        let groups = blocks * heads * d.batch * tile.parts(d.dh);
        let kernel = kernel.knob("CAUSAL", self.causal);
        let step = tile.others_of_dispatch(d.dh, loops).unwrap_or(others);
        for since in (0..others).step_by(step) {
            let words = self.words(&d, blocks, groups, since..others.min(since + step));
            program.dispatch(kernel.clone(), binds, &words, cx.profile.grid(groups));
        }
        Ok(())
    }

    /// The forward pass.
    pub(super) fn launch_forward<O: Op>(&self, cx: &Launch<'_>, keys: Keys) -> Result<Program, String> {
        let d = self.dims(&cx.inputs[..3])?;
        let of_keys = if keys == Keys::All { Bind::Null } else { Bind::In(3) };
        let binds = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::Out(0), Bind::Out(1), of_keys];
        let tile = Tile::pick(&Tile::forward(cx, &d, keys), cx.variant)?;
        let kernel = tile.kernel::<O>("forward", d.dh);
        let kernel = if keys == Keys::Cached { kernel.knob("CACHED", true) } else { kernel };
        let mut program = Program::default();
        if let Cut::Split(split) = tile.cut {
            self.launch_split::<O>(&mut program, cx, (kernel, &binds), split)?;
            return Ok(program);
        }
        self.dispatch(&mut program, cx, (kernel, &binds), (d.tq, self.heads), (d.tk, 2), tile)?;
        Ok(program)
    }

    /// Few queries on a GPU: the slices of their keys, and then the dispatch that combines them, if they are several.
    fn launch_split<O: Op>(
        &self,
        program: &mut Program,
        cx: &Launch<'_>,
        (kernel, binds): (Kernel, &[Bind; 6]),
        Split { rows, slices, .. }: Split,
    ) -> Result<(), String> {
        let d = self.dims(&cx.inputs[..3])?;
        let blocks = (d.tq * d.sharing).div_ceil(rows);
        let groups = d.batch * d.kv_heads * blocks * slices;
        let kernel = kernel.knob("CAUSAL", self.causal);
        let words = self.words(&d, blocks, groups, 0..d.tk);
        let &[q, k, v, o, lse, start] = binds;
        if slices == 1 {
            program.dispatch(kernel, binds, &words, cx.profile.grid(groups));
            return Ok(());
        }
        let all = d.batch * d.tq * self.heads;
        let parts = program.scratch(TensorType::f32([all, slices, d.dh]));
        let stats = program.scratch(TensorType::f32([all, slices, 2]));
        let binds = [q, k, v, Bind::Scratch(parts), Bind::Scratch(stats), start];
        program.dispatch(kernel, &binds, &words, cx.profile.grid(groups));
        let blocks = units(d.dh).2.div_ceil(COMBINED);
        let kernel = shared_kernel::<O>(texts::COMBINE, "combine", d.dh)
            .knob("SLICES", slices as u32)
            .knob("SETS", slices.next_power_of_two().min(16) as u32);
        let binds = [Bind::ScratchIn(parts), Bind::ScratchIn(stats), o, lse];
        let words = self.words(&d, blocks, all * blocks, 0..d.tk);
        program.dispatch(kernel, &binds, &words, cx.profile.grid(all * blocks));
        Ok(())
    }

    pub(super) fn words(&self, d: &Dims, blocks: usize, groups: usize, others: Range<usize>) -> [u32; 10] {
        let [h, kv, tq, tk, blocks, groups] = [self.heads, self.kv_heads, d.tq, d.tk, blocks, groups].map(|x| x as u32);
        let [since, until, tokens] = [others.start, others.end, d.batch * d.tq].map(|x| x as u32);
        [h, kv, tq, tk, self.scale(d.dh).to_bits(), blocks, groups, since, until, tokens]
    }

    /// The variants of the forward pass.
    pub(super) fn forward_variants(&self, cx: &Launch<'_>, keys: Keys) -> Vec<String> {
        self.dims(&cx.inputs[..3]).map(|d| Tile::names(&Tile::forward(cx, &d, keys))).unwrap_or_default()
    }
}

impl Tile {
    /// The text and the entry point; `plain` is the name of the latter in `lanes.wgsl`.
    fn family(&self, plain: &'static str, dh: usize) -> (&'static str, &'static str) {
        let lanes = |all: LaneSource, from: LaneSource| if self.from { from } else { all }.text(self.subgroups);
        match (self.cut, plain) {
            (Cut::Rows(_), _) => (lanes(texts::LANES, texts::LANES_FROM), plain),
            (Cut::Wide(..), _) => {
                let entry = of_pass(plain, ["wide_forward", "wide_backward_q", "wide_backward_kv"]);
                (lanes(texts::WIDE, texts::WIDE_FROM), entry)
            }
            (Cut::Tiled { .. }, _) => {
                let entry = of_pass(plain, ["tiled_forward", "tiled_backward_q", "tiled_backward_kv"]);
                (lanes(texts::TILED, texts::TILED_FROM), entry)
            }
            (Cut::Matrices(m), _) => {
                let entry =
                    of_pass(plain, ["cooperative_forward", "cooperative_backward_q", "cooperative_backward_kv"]);
                (texts::cooperative(m.kind.is_f16(), self.from, dh.is_multiple_of(4)), entry)
            }
            (Cut::Decode(_), _) => (texts::DECODE.text(self.subgroups), "decode"),
            (Cut::Split(_), _) => (texts::SPLIT.text(self.subgroups), "split"),
        }
    }

    pub(super) fn kernel<O: Op>(&self, plain: &'static str, dh: usize) -> Kernel {
        let (elem, width, dim) = units(dh);
        let divisor = |most: usize| (1..=most.min(dim)).rev().find(|n| dim.is_multiple_of(*n)).unwrap_or(1);
        let (source, entry) = self.family(plain, dh);
        let kernel = shared_kernel::<O>(source, entry, dh);
        if let Cut::Matrices(matrices) = self.cut {
            return matrices.set(kernel);
        }
        let kernel = kernel.knob("Moved", elem).knob("GROUP", self.group as u32);
        match self.cut {
            Cut::Rows(rows) => {
                // As much of a row as the lanes can hold, and as many rows as fit next to each other.
                let lanes = if self.subgroups { self.group } else { 8 };
                let span = divisor(lanes);
                let step = if self.subgroups { lanes / span } else { 1 };
                kernel
                    .knob("ROWS", rows as u32)
                    .knob("SPAN", span as u32)
                    .knob("PIECE", divisor(2) as u32)
                    .knob("STEP", step as u32)
            }
            Cut::Wide(rows, others) => {
                let loads = if self.subgroups { others / self.group } else { others };
                kernel.knob("ROWS", rows as u32).knob("OTHERS", others as u32).knob("LOADS", loads as u32)
            }
            Cut::Tiled { lanes, part } => {
                // 64 bytes of a row at a time, or what fits beside the weights; then as many whole rows as fit the same
                // memory.
                let (rows, others) = (self.rows_of_group(), 4 * lanes);
                let stride = (WORKGROUP_QUADS - 4 * self.group) * 4 / width / (rows + others);
                let chunk = divisor((16 / width).min((stride - 1) | 1));
                let memory = (rows + others) * (chunk | 1);
                let slab = (memory / part.next_multiple_of(lanes)).clamp(1, others);
                kernel
                    .knob("LANES", lanes as u32)
                    .knob("PART", part as u32)
                    .knob("CHUNK", chunk as u32)
                    .knob("SLAB", 1 << slab.ilog2())
            }
            Cut::Decode(lanes) => kernel.knob("LANES", lanes as u32),
            Cut::Split(Split { rows, lanes, reach, slices }) => kernel
                .knob("LANES", lanes as u32)
                .knob("ROWS", rows as u32)
                .knob("REACH", reach as u32)
                .knob("SLICES", slices as u32),
            Cut::Matrices(_) => kernel,
        }
    }
}

/// The entry point of a pass, of those for forward, backward_q and backward_kv.
fn of_pass(plain: &str, [forward, backward_q, backward_kv]: [&'static str; 3]) -> &'static str {
    match plain {
        "backward_q" => backward_q,
        "backward_kv" => backward_kv,
        _ => forward,
    }
}

/// A kernel with the knobs of `shared.wgsl` that depend on the width of a head.
pub(super) fn shared_kernel<O: Op>(source: &'static str, entry: &'static str, dh: usize) -> Kernel {
    let (elem, width, dim) = units(dh);
    table_kernel::<O>("attention", source, entry).knob("E", elem).knob("WIDTH", width as u32).knob("DIM", dim as u32)
}
