//! The kernels of each tile, and their dispatches.

use super::product::{Dims, Matmul};
use super::tiles::{TILE_K, Tile};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::ops::source::{LaneSource, lane_source, table_kernel};
use crate::profile::{AdapterClass, Cooperative, Profile};
use crate::tensor::TensorType;

// The texts of each family of kernels; `shaders/matmul/shared.wgsl` says what each is for.
const LANES: LaneSource = lane_source!("matmul/shared.wgsl", "matmul/columns.wgsl", "matmul/lanes.wgsl");
const FEW_ROWS: LaneSource = lane_source!("matmul/shared.wgsl", "matmul/columns.wgsl", "matmul/few.wgsl");

macro_rules! strip_source {
    ($file:literal $(, $extension:literal)*) => {
        concat!(
            $("enable ", $extension, ";\n",)*
            include_str!("../../../shaders/matmul/shared.wgsl"),
            include_str!("../../../shaders/matmul/strips.wgsl"),
            include_str!(concat!("../../../shaders/matmul/", $file)),
        )
    };
}
const TILED: &str = strip_source!("tiled.wgsl");
const COOPERATIVE_F32: &str = strip_source!("cooperative.wgsl", "wgpu_cooperative_matrix");
const COOPERATIVE_F16: &str = strip_source!("cooperative.wgsl", "wgpu_cooperative_matrix", "f16");

pub(super) const SOURCES: &[&str] = &[LANES.plain, FEW_ROWS.plain, TILED, COOPERATIVE_F32];

impl Matmul {
    pub(super) fn program(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let d = self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape)?;
        let tiles = self.tiles(&d, cx.profile);
        let tile = *tiles.get(cx.variant).ok_or_else(|| format!("no variant {} of {}", cx.variant, tiles.len()))?;
        cx.profile.quirks.check_loops("the inner dimension", d.k, tile.iterations(&d))?;
        let (tile_m, tile_n) = tile.size(&d, cx.profile.vector_lanes().0);
        let groups_n = d.n.div_ceil(tile_n);
        let groups = groups_n * d.m.div_ceil(tile_m);
        let [x, y, _] = cx.profile.grid(groups);
        let bias = if self.bias { Bind::In(2) } else { Bind::Null };
        let [m, n, k, groups_n, groups] = [d.m, d.n, d.k, groups_n, groups].map(|x| x as u32);
        let words = [m, n, k, groups_n, groups, u32::from(self.bias), u32::from(self.accumulate)];
        let mut program = Program::default();
        let b = match tile {
            Tile::Lanes { quads, packed: true, .. } => Bind::ScratchIn(self.pack(&mut program, quads, &d, cx.profile)),
            _ => Bind::In(1),
        };
        let binds = [Bind::In(0), b, bias, Bind::Out(0)];
        program.dispatch(self.kernel(tile, &d, cx.profile), &binds, &words, [x, y, d.batch as u32]);
        Ok(program)
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
        let words = [d.n as u32, 0, d.k as u32, strips as u32, 0, 0, 0];
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
            Tile::Tiled { .. } | Tile::Cooperative { .. } => false,
        };
        let (source, entry, step) = match (tile, d.n % 4) {
            (Tile::Lanes { .. }, 0) => (LANES.text(subgroups), "forward_lanes_quads", 4),
            (Tile::Lanes { .. }, _) => (LANES.text(subgroups), "forward_lanes", 4),
            (Tile::Few { .. }, _) => (FEW_ROWS.text(subgroups), "forward_few", 4),
            (Tile::Tiled { .. }, 0) => (TILED, "forward_tiled_quads", TILE_K),
            (Tile::Tiled { .. }, _) => (TILED, "forward_tiled", TILE_K),
            (Tile::Cooperative { kind: Cooperative::F32, .. }, _) => (COOPERATIVE_F32, "forward_cooperative", TILE_K),
            (Tile::Cooperative { .. }, _) => (COOPERATIVE_F16, "forward_cooperative", TILE_K),
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
            Tile::Few { lanes, slices, quads } => kernel
                .knob("LANES", lanes as u32)
                .knob("SLICES", slices as u32)
                .knob("ROWS", d.m as u32)
                .knob("QUADS", quads as u32)
                .knob("SUBGROUP", if subgroups { subgroup.min((lanes * slices) as u32) } else { 1 }),
            Tile::Tiled { m, n, rows, quads } => kernel
                .knob("TILE_M", m as u32)
                .knob("TILE_N", n as u32)
                .knob("TILE_ROWS", rows as u32)
                .knob("TILE_QUADS", quads as u32),
            Tile::Cooperative { kind, m, n } => {
                let kernel = kernel
                    .knob("TILE_M", m as u32)
                    .knob("TILE_N", n as u32)
                    .knob("COOPERATING", profile.subgroups.map_or(32, |[_, max]| max));
                kind.knobs().into_iter().fold(kernel, |kernel, (name, value)| kernel.knob(name, value.as_str()))
            }
        }
    }
}
