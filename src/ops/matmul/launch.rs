//! The kernels of each tile, and their dispatches.

use super::product::{Dims, Matmul};
use super::tiles::{TILE_K, Tile, Way};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::ops::cooperative::{Sources, cooperative_sources};
use crate::ops::source::{LaneSource, lane_source, table_kernel};
use crate::ops::sum::sum_rows;
use crate::profile::{AdapterClass, Profile};
use crate::tensor::TensorType;

// The texts of each family of kernels; `shaders/matmul/shared.wgsl` says what each is for.
const LANES: LaneSource =
    lane_source!("matmul/quads.wgsl", "matmul/shared.wgsl", "matmul/columns.wgsl", "matmul/lanes.wgsl");
const FEW_ROWS: LaneSource = lane_source!(
    "matmul/quads.wgsl",
    "matmul/shared.wgsl",
    "matmul/columns.wgsl",
    "matmul/reduce.wgsl",
    "matmul/few.wgsl"
);

const TILED: &str = concat!(
    include_str!("../../../shaders/matmul/quads.wgsl"),
    include_str!("../../../shaders/matmul/shared.wgsl"),
    include_str!("../../../shaders/matmul/strips.wgsl"),
    include_str!("../../../shaders/matmul/tiled.wgsl"),
);
const COOPERATIVE: Sources = cooperative_sources!(
    "matmul/quads.wgsl",
    "matmul/shared.wgsl",
    "matmul/strips.wgsl",
    "common/matrices.wgsl",
    "matmul/cooperative.wgsl"
);

const SLICES: &str = include_str!("../../../shaders/matmul/slices.wgsl");

pub(super) const SOURCES: &[&str] = &[LANES.plain, FEW_ROWS.plain, TILED, COOPERATIVE.f32, SLICES];

/// The part of the workgroups of a product that a dispatch runs.
struct Groups {
    /// Along n, and of a matrix.
    across: usize,
    tiles: usize,
    first: usize,
    count: usize,
}

impl Matmul {
    pub(super) fn program(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (d, profile) = (self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape)?, cx.profile);
        let ways = self.ways(&d, profile);
        let way = *ways.get(cx.variant).ok_or_else(|| format!("no variant {} of {}", cx.variant, ways.len()))?;
        profile.quirks.check_loops("the inner dimension", d.k, way.tile.iterations(&d))?;
        let mut program = Program::default();
        let b = match way.tile {
            Tile::Lanes { quads, packed: true, .. } => Bind::ScratchIn(self.pack(&mut program, quads, &d, profile)),
            _ => Bind::In(1),
        };
        let bias = if self.bias && way.slices == 1 { Bind::In(2) } else { Bind::Null };
        // With slices, y and the column sums are parts of them at first.
        let mut out = |output: usize, dims: [usize; 3]| match way.slices {
            1 => Bind::Out(output),
            slices => Bind::Scratch(program.scratch(TensorType::f32([d.batch * slices, dims[1], dims[2]]))),
        };
        let mut binds = vec![Bind::In(0), b, bias, out(0, [d.batch, d.m, d.n])];
        let in_tile = self.column_sums && matches!(way.tile, Tile::Tiled { .. } | Tile::Cooperative(_));
        if in_tile {
            binds.push(out(1, [1, 1, d.n]));
        }
        let kernel = self.kernel(way.tile, &d, profile);
        match way.tile {
            Tile::Lanes { .. } | Tile::Few { .. } => {
                let [down, across] = way.tile.count(&d, profile);
                let groups = Groups { across, tiles: down * across, first: 0, count: down * across };
                let [x, y, _] = profile.grid(groups.count);
                let planes = (d.batch * way.slices) as u32;
                program.dispatch(kernel, &binds, &self.words(&d, way, &groups), [x, y, planes]);
            }
            Tile::Tiled { .. } | Tile::Cooperative(_) => {
                for groups in dispatches(&d, way, profile) {
                    let words = self.words(&d, way, &groups);
                    program.dispatch(kernel.clone(), &binds, &words, profile.grid(groups.count));
                }
            }
        }
        if way.slices > 1 {
            self.sum_slices(&mut program, &d, way, &binds[3..], profile);
        }
        if self.column_sums && !in_tile {
            let ends = [(Bind::In(1), Bind::Out(1))];
            sum_rows::<Self>(&mut program, profile, &ends, (d.k, d.n), self.accumulate_sums);
        }
        Ok(program)
    }

    /// The uniform of a dispatch: `Params` in the WGSL.
    fn words(&self, d: &Dims, way: Way, groups: &Groups) -> [u32; 12] {
        let whole = way.slices == 1;
        let sizes = [d.m, d.n, d.k, groups.across, groups.count].map(|x| x as u32);
        let [bias, add, add_sums] = [self.bias, self.accumulate, self.accumulate_sums].map(|x| u32::from(x && whole));
        let slices = [way.slices, way.depth(d), groups.tiles, groups.first].map(|x| x as u32);
        let [m, n, k, across, count] = sizes;
        let [slices, depth, tiles, first] = slices;
        [m, n, k, across, count, bias, add, slices, depth, tiles, first, add_sums]
    }

    /// Adds the dispatch that adds up slices, of y and of the column sums if there are any.
    fn sum_slices(&self, program: &mut Program, d: &Dims, way: Way, parts: &[Bind], profile: &Profile) {
        let (elem, width) = if d.n.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) };
        let read = |bind: &Bind| match *bind {
            Bind::Scratch(i) => Bind::ScratchIn(i),
            bind => bind,
        };
        let bias = if self.bias { Bind::In(2) } else { Bind::Null };
        let mut binds = vec![read(&parts[0]), bias, Bind::Out(0)];
        let (mut entry, mut len) = ("sum_slices", d.batch * d.m * d.n);
        if let Some(columns) = parts.get(1) {
            binds.extend([read(columns), Bind::Out(1)]);
            (entry, len) = ("sum_slices_and_columns", len + d.n);
        }
        let [matrix, n, y] = [d.m * d.n, d.n, d.batch * d.m * d.n].map(|x| (x / width) as u32);
        let flags = [self.bias, self.accumulate, self.accumulate_sums].map(u32::from);
        let words = [&[matrix, n, y, way.slices as u32], &flags[..]].concat();
        let kernel = table_kernel::<Self>("matmul", SLICES, entry).knob("E", elem);
        program.dispatch(kernel, &binds, &words, profile.grid((len / width).div_ceil(64)));
    }

    /// Adds the dispatch that packs b for lanes of `quads`, and returns the scratch that it fills.
    fn pack(&self, program: &mut Program, quads: usize, d: &Dims, profile: &Profile) -> usize {
        let lanes = profile.vector_lanes().0;
        let strips = d.n.div_ceil(4 * lanes * quads);
        let [strip, depth] = [lanes * quads, d.k.div_ceil(4)];
        let scratch = program.scratch(TensorType::f32([d.batch * strips, 4 * depth, 4 * strip]));
        let kernel = table_kernel::<Self>("matmul", LANES.plain, "pack")
            .knob("A_TRANSPOSED", !self.transpose_b)
            .knob("A_ALIGNED", self.b_axis(d).is_multiple_of(4))
            .knob("K_TAIL", !d.k.is_multiple_of(4))
            .knob("LANES", lanes as u32)
            .knob("QUADS", quads as u32);
        let [x, y, _] = profile.grid((strips * strip * depth).div_ceil(64));
        let mut words = [0; 12];
        [words[0], words[2], words[3]] = [d.n, d.k, strips].map(|x| x as u32);
        program.dispatch(kernel, &[Bind::In(1), Bind::Scratch(scratch)], &words, [x, y, d.batch as u32]);
        scratch
    }

    /// The kernel of a tile.
    fn kernel(&self, tile: Tile, d: &Dims, profile: &Profile) -> Kernel {
        let software = profile.class == AdapterClass::Cpu;
        let (vector, shuffles) = profile.vector_lanes();
        let subgroup = profile.subgroup_lanes().unwrap_or(1);
        let subgroups = match tile {
            Tile::Lanes { .. } => shuffles,
            Tile::Few { slices, .. } => slices > 1 && if software { shuffles } else { subgroup > 1 },
            Tile::Tiled { .. } | Tile::Cooperative(_) => false,
        };
        let (source, entry, step) = match (tile, d.n % 4) {
            (Tile::Lanes { .. }, 0) => (LANES.text(subgroups), "forward_lanes_quads", 4),
            (Tile::Lanes { .. }, _) => (LANES.text(subgroups), "forward_lanes", 4),
            (Tile::Few { .. }, _) => (FEW_ROWS.text(subgroups), "forward_few", 4),
            (Tile::Tiled { .. }, 0) if self.column_sums => (TILED, "forward_tiled_sums_quads", TILE_K),
            (Tile::Tiled { .. }, _) if self.column_sums => (TILED, "forward_tiled_sums", TILE_K),
            (Tile::Tiled { .. }, 0) => (TILED, "forward_tiled_quads", TILE_K),
            (Tile::Tiled { .. }, _) => (TILED, "forward_tiled", TILE_K),
            (Tile::Cooperative(tile), n) => {
                let entry = match (self.column_sums, n) {
                    (true, 0) => "forward_cooperative_sums_quads",
                    (true, _) => "forward_cooperative_sums",
                    (false, 0) => "forward_cooperative_quads",
                    (false, _) => "forward_cooperative",
                };
                (tile.text(&COOPERATIVE), entry, TILE_K)
            }
        };
        // With one row, a column is as good as a row. Quads run along the contiguous axis.
        let transpose_a = self.transpose_a && d.m > 1;
        let a_axis = if transpose_a { d.m } else { d.k };
        let kernel = table_kernel::<Self>("matmul", source, entry)
            .knob("A_TRANSPOSED", transpose_a)
            .knob("B_TRANSPOSED", self.transpose_b)
            .knob("A_ALIGNED", a_axis.is_multiple_of(4))
            .knob("B_ALIGNED", self.b_axis(d).is_multiple_of(4))
            .knob("K_TAIL", !d.k.is_multiple_of(step));
        match tile {
            Tile::Lanes { rows, quads, packed } => {
                let kernel = match packed {
                    true => kernel.knob("B_PACKED", true),
                    false => kernel,
                };
                kernel.knob("LANES", vector as u32).knob("ROWS", rows as u32).knob("QUADS", quads as u32)
            }
            Tile::Few { lanes, slices, cols } => kernel
                .knob("LANES", lanes as u32)
                .knob("SLICES", slices as u32)
                .knob("ROWS", d.m as u32)
                .knob("QUADS", cols.div_ceil(4) as u32)
                .knob("WIDTH", cols as u32)
                .knob("SUBGROUP", if subgroups { subgroup.min((lanes * slices) as u32) } else { 1 }),
            Tile::Tiled { m, n, rows, quads } => kernel
                .knob("COLUMN_SUMS", self.column_sums)
                .knob("TILE_M", m as u32)
                .knob("TILE_N", n as u32)
                .knob("TILE_ROWS", rows as u32)
                .knob("TILE_QUADS", quads as u32),
            Tile::Cooperative(tile) => tile.knobs(kernel.knob("COLUMN_SUMS", self.column_sums), profile),
        }
    }
}

/// The dispatches of a product on a GPU: one, or several that are cut between workgroups, so that none is long.
fn dispatches(d: &Dims, way: Way, profile: &Profile) -> Vec<Groups> {
    let [down, across] = way.tile.count(d, profile);
    let tiles = down * across;
    let (total, parts) = (way.groups(d), way.parts(d, profile.units.max(1) as usize));
    let part = |i: usize| Groups {
        across,
        tiles,
        first: total * i / parts,
        count: total * (i + 1) / parts - total * i / parts,
    };
    (0..parts).map(part).collect()
}
