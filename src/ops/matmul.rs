//! Matrix products with optional transposes, batch, bias, and addition to what the output holds.
//!
//! `y = op(a) op(b) + bias`, where `op` may transpose. Backward takes two more matmuls and a sum.

use std::sync::Arc;

use super::cases::{Case, Row};
use super::checks::{expect_f32, expect_shape};
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Kernel, Launch, Program};
use crate::profile::{AdapterClass, Cooperative, Profile};
use crate::tensor::{Shape, TensorType};

// The texts of each family of kernels; `shaders/matmul/shared.wgsl` says what each is for.
const LANES: LaneSource = lane_source!("matmul/shared.wgsl", "matmul/columns.wgsl", "matmul/lanes.wgsl");
const FEW_ROWS: LaneSource = lane_source!("matmul/shared.wgsl", "matmul/columns.wgsl", "matmul/few.wgsl");

macro_rules! strip_source {
    ($file:literal $(, $extension:literal)*) => {
        concat!(
            $("enable ", $extension, ";\n",)*
            include_str!("../../shaders/matmul/shared.wgsl"),
            include_str!("../../shaders/matmul/strips.wgsl"),
            include_str!(concat!("../../shaders/matmul/", $file)),
        )
    };
}
const TILED: &str = strip_source!("tiled.wgsl");
const COOPERATIVE_F32: &str = strip_source!("cooperative.wgsl", "wgpu_cooperative_matrix");
const COOPERATIVE_F16: &str = strip_source!("cooperative.wgsl", "wgpu_cooperative_matrix", "f16");

/// Ways to split a product into workgroups. Others that were tried are in docs/rejected.md.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tile {
    /// For software adapters: rows and quads of columns that each lane of a vector keeps. With `packed`, `b` is first
    /// copied into the order in which the lanes read it.
    Lanes { rows: usize, quads: usize, packed: bool },
    /// For few rows: invocations along n and along k, and quads of columns of each.
    Few { lanes: usize, slices: usize, quads: usize },
    /// For GPUs: rows and columns of a workgroup, quads of rows and of columns of an invocation.
    Tiled { m: usize, n: usize, rows: usize, quads: usize },
    /// For GPUs with cooperative matrices: rows and columns of a subgroup.
    Cooperative { kind: Cooperative, m: usize, n: usize },
}

impl Tile {
    /// The name, for measurements and messages.
    fn name(self) -> String {
        match self {
            Tile::Lanes { rows, quads, packed: false } => format!("{rows}x{quads}"),
            Tile::Lanes { rows, quads, packed: true } => format!("{rows}x{quads} packed"),
            Tile::Few { lanes, slices, quads } => format!("few {lanes}x{slices}x{quads}"),
            Tile::Tiled { m, n, .. } => format!("{m}x{n}"),
            Tile::Cooperative { kind, m, n } => format!("cooperative {kind:?} {m}x{n}"),
        }
    }

    /// Bytes of workgroup memory, for tiles where they differ.
    fn workgroup_bytes(self, d: &Dims) -> usize {
        match self {
            Tile::Few { lanes, slices, quads } => 16 * lanes * slices * d.m * quads,
            Tile::Tiled { m, n, .. } => 4 * (m + n) * TILE_K,
            Tile::Lanes { .. } | Tile::Cooperative { .. } => 0,
        }
    }

    /// The most iterations of loops that an invocation on a software adapter takes: along k, and to store its sums.
    fn iterations(self, d: &Dims) -> usize {
        let stores = |rows: usize, quads: usize| rows * (1 + 4 * quads) + 2;
        match self {
            Tile::Lanes { rows, quads, .. } => d.k.div_ceil(4) + stores(rows, quads),
            Tile::Few { slices, quads, .. } => d.k.div_ceil(4 * slices) + stores(d.m, quads),
            Tile::Tiled { .. } | Tile::Cooperative { .. } => 0, // for GPUs
        }
    }

    /// Rows and columns of y that a workgroup computes.
    fn size(self, d: &Dims, lanes: usize) -> (usize, usize) {
        match self {
            Tile::Lanes { rows, quads, .. } => (rows, lanes * quads * 4),
            Tile::Few { lanes, quads, .. } => (d.m, lanes * quads * 4),
            Tile::Tiled { m, n, .. } | Tile::Cooperative { m, n, .. } => (m, n),
        }
    }
}

/// The most rows that count as few. With more, elements of b are reused often enough for the tiles.
const FEW: usize = 4;

/// Length along k of a strip in workgroup memory, as in the WGSL.
const TILE_K: usize = 16;

/// The tiles for GPUs, the largest first.
const TILES: [Tile; 6] = [
    Tile::Tiled { m: 128, n: 128, rows: 2, quads: 2 },
    Tile::Tiled { m: 128, n: 64, rows: 2, quads: 2 },
    Tile::Tiled { m: 64, n: 64, rows: 2, quads: 2 },
    Tile::Tiled { m: 64, n: 32, rows: 2, quads: 1 },
    Tile::Tiled { m: 16, n: 64, rows: 1, quads: 1 },
    Tile::Tiled { m: 32, n: 32, rows: 1, quads: 1 },
];

/// Enough workgroups to keep a GPU busy, for choosing tiles without measurements.
const ENOUGH_GROUPS: usize = 48;

pub(super) const ROW: Row = Row {
    name: "matmul",
    summary: "y = op(a) op(b) + bias, where op may transpose; batched; can add to the stream in its epilogue",
    sources: &[LANES.plain, FEW_ROWS.plain, TILED, COOPERATIVE_F32],
    cases,
    bench: || {
        let square = |n: usize| Case::new(format!("{n}"), Matmul::default(), &[&[n, n], &[n, n]]);
        let op = |ta: bool, tb: bool| Matmul { transpose_a: ta, transpose_b: tb, ..Matmul::default() };
        let form =
            |name: &str, ta: bool, tb: bool| Case::new(format!("512 {name}"), op(ta, tb), &[&[512, 512], &[512, 512]]);
        vec![
            square(256),
            square(512),
            square(1024),
            square(2048),
            form("nt", false, true),
            form("tn", true, false),
            form("tt", true, true),
            Case::new("509x1021x383", op(false, false), &[&[509, 383], &[383, 1021]]),
            // Decoding: one row, with weights laid out as in a linear layer and as in a tied output projection.
            Case::new("1x1536x576", op(false, false), &[&[1, 576], &[576, 1536]]),
            Case::new("1x576x1536 nt", op(false, true), &[&[1, 1536], &[576, 1536]]),
            Case::new("1x32768x768 nt", op(false, true), &[&[1, 768], &[32768, 768]]),
        ]
    },
};

fn cases() -> Vec<Case> {
    let plain = Matmul::default();
    let mut cases = Vec::new();
    // (m, n, k): every combination of transposes on shapes that fit no tile, and one that fits.
    for (m, n, k) in
        [(1, 1, 1), (127, 1, 5), (1, 130, 127), (17, 67, 33), (64, 64, 32), (20, 36, 1757), (4, 68, 13), (7, 5, 8)]
    {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let a = if ta { [k, m] } else { [m, k] };
            let b = if tb { [n, k] } else { [k, n] };
            let form = format!("{m}x{n}x{k} {}{}", if ta { 't' } else { 'n' }, if tb { 't' } else { 'n' });
            let op = Matmul { transpose_a: ta, transpose_b: tb, ..plain };
            cases.push(Case::new(form, op, &[&a, &b]));
        }
    }
    // Larger than the largest tile, in forms that together load and store in all ways.
    for (m, n, k, ta, tb) in [(130, 132, 20, false, false), (132, 129, 36, true, true), (131, 150, 18, false, true)] {
        let op = Matmul { transpose_a: ta, transpose_b: tb, ..plain };
        let (a, b) = (if ta { [k, m] } else { [m, k] }, if tb { [n, k] } else { [k, n] });
        cases.push(Case::new(format!("{m}x{n}x{k}"), op, &[&a, &b]));
    }
    let bias = Matmul { bias: true, ..plain };
    cases.push(Case::new("bias", bias, &[&[3, 5, 24], &[24, 20], &[20]]));
    let add = Matmul { accumulate: true, ..plain };
    cases.push(Case::new("accumulate", add, &[&[3, 5, 24], &[24, 20], &[3, 5, 20]]));
    let both = Matmul { bias: true, accumulate: true, ..plain };
    cases.push(Case::new("bias, accumulate", both, &[&[65, 24], &[24, 33], &[33], &[65, 33]]));
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let op = Matmul { batch: true, transpose_a: ta, transpose_b: tb, ..plain };
        let a: &[usize] = if ta { &[2, 3, 12, 9] } else { &[2, 3, 9, 12] };
        let b: &[usize] = if tb { &[2, 3, 17, 12] } else { &[2, 3, 12, 17] };
        cases.push(Case::new(format!("batch {ta} {tb}"), op, &[a, b]));
    }
    // Enough rows for packing.
    cases.push(Case::new("tall batch", Matmul { batch: true, ..plain }, &[&[2, 129, 9], &[2, 9, 17]]));
    cases
}

/// `(a, b [, bias] [, base]) -> op(a) op(b) [+ bias] [+ base]`.
///
/// Without `batch`, leading dimensions are collapsed into rows: `a` `[batch, time, k]` and `b` `[k, n]` give
/// `[batch, time, n]`. With `batch`, all dimensions but the last two must be equal, and each pair of matrices is
/// multiplied.
///
/// [`Graph::matmul`], [`Graph::matmul_nt`] and [`Graph::linear`] cover the common cases. Add this op with
/// [`Graph::op1`] for the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matmul {
    /// Whether `a` is `[k, m]` in memory.
    pub transpose_a: bool,
    /// Whether `b` is `[n, k]` in memory.
    pub transpose_b: bool,
    /// Whether to multiply matrix by matrix over leading dimensions.
    pub batch: bool,
    /// Whether a bias `[n]` follows `b`.
    pub bias: bool,
    /// Whether a last input, of the output's shape, is added to the result.
    pub accumulate: bool,
}

impl Graph {
    /// `a b`: `[.., k] x [k, n] -> [.., n]`, or matrix by matrix if `b` has more than two dimensions.
    pub fn matmul(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        let batch = self.type_of(name, b)?.shape.rank() > 2;
        self.op1(name, Matmul { batch, ..Matmul::default() }, &[a, b])
    }

    /// `x w + bias`: `[.., d_in] x [d_in, d_out] -> [.., d_out]`. The layout of the weight is that of GPT-2's files; if
    /// yours is `[d_out, d_in]`, as in PyTorch's `Linear`, use [`matmul_nt`](Self::matmul_nt).
    pub fn linear(&mut self, name: &str, x: Value, w: Value, bias: Option<Value>) -> Result<Value> {
        let op = Matmul { bias: bias.is_some(), ..Matmul::default() };
        let inputs: Vec<Value> = [x, w].into_iter().chain(bias).collect();
        self.op1(name, op, &inputs)
    }

    /// `a b^T`: `[.., k] x [n, k] -> [.., n]`: linear layers with PyTorch's layout, and output projections tied to an
    /// embedding.
    pub fn matmul_nt(&mut self, name: &str, a: Value, b: Value) -> Result<Value> {
        self.op1(name, Matmul { transpose_b: true, ..Matmul::default() }, &[a, b])
    }
}

/// Sizes of one product.
struct Dims {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
}

impl Matmul {
    fn dims(&self, a: &Shape, b: &Shape) -> Result<Dims, String> {
        let matrix = |s: &Shape, name: &str| match (self.batch, s.dims()) {
            (true, [.., r, c]) => Ok((*r, *c)),
            (false, [_, ..]) => Ok((s.rows(), s.cols())),
            _ => Err(format!("{name} must have at least two dimensions, got {s}")),
        };
        let (ar, ac) = matrix(a, "a")?;
        let (br, bc) = matrix(b, "b")?;
        let (m, ka) = if self.transpose_a { (ac, ar) } else { (ar, ac) };
        let (kb, n) = if self.transpose_b { (bc, br) } else { (br, bc) };
        if ka != kb {
            return Err(format!("inner dimensions differ: {ka} of a {a} against {kb} of b {b}"));
        }
        let lead = |s: &Shape| s.dims()[..s.rank().saturating_sub(2)].to_vec();
        if self.batch && lead(a) != lead(b) {
            return Err(format!("batch dimensions differ: a {a} against b {b}"));
        }
        let batch = if self.batch { lead(a).iter().product() } else { 1 };
        Ok(Dims { batch, m, n, k: ka })
    }

    /// This product without its epilogue, and with other transposes.
    fn form(&self, transpose_a: bool, transpose_b: bool) -> Matmul {
        Matmul { transpose_a, transpose_b, batch: self.batch, bias: false, accumulate: false }
    }

    /// The tiles worth trying for a product. The first is used if nothing was measured.
    fn tiles(&self, d: &Dims, profile: &Profile) -> Vec<Tile> {
        let few = d.m <= FEW && (!self.transpose_a || d.m == 1);
        let mut tiles = match profile.class {
            AdapterClass::Cpu => self.lanes(d, profile, few),
            AdapterClass::Gpu if few && self.transpose_b => {
                [(1, 64), (1, 32), (4, 16)].map(|(lanes, slices)| Tile::Few { lanes, slices, quads: 1 }).to_vec()
            }
            AdapterClass::Gpu if few => {
                [(8, 16), (16, 16), (16, 4)].map(|(lanes, slices)| Tile::Few { lanes, slices, quads: 1 }).to_vec()
            }
            AdapterClass::Gpu => {
                let mut tiles = tiled(d);
                match profile.cooperative {
                    Some(kind @ (Cooperative::F32 | Cooperative::F16x8)) => {
                        tiles.insert(0, Tile::Cooperative { kind, m: 32, n: 32 });
                    }
                    Some(kind @ Cooperative::F16) => tiles.insert(0, Tile::Cooperative { kind, m: 32, n: 64 }),
                    None => {}
                }
                tiles
            }
        };
        tiles.retain(|tile| tile.workgroup_bytes(d) <= profile.max_workgroup_bytes as usize);
        let in_time = |tile: &Tile| profile.quirks.ends_loops(tile.iterations(d));
        if tiles.iter().any(in_time) {
            tiles.retain(in_time);
        }
        tiles
    }

    /// The tiles for software adapters.
    fn lanes(&self, d: &Dims, profile: &Profile, few: bool) -> Vec<Tile> {
        let lanes = profile.vector_lanes().0;
        let mut tiles: Vec<Tile> = [(16, 2), (24, 1), (16, 1), (8, 2), (4, 2)]
            .into_iter()
            .filter(|&(rows, _)| rows == 4 || rows < 2 * d.m)
            .filter(|&(rows, _)| rows < lanes || rows % lanes == 0)
            .map(|(rows, quads)| Tile::Lanes { rows, quads, packed: false })
            .collect();
        // Half of the last tiles of two quads would be wasted.
        let narrow = (1..=4 * lanes).contains(&(d.n % (8 * lanes)));
        if narrow {
            tiles.sort_by_key(|&tile| tile != Tile::Lanes { rows: 24, quads: 1, packed: false });
        }
        // Packing pays if many rows share its cost: for a misaligned b, and for a b so large that strips of it are far
        // apart in memory.
        let bytes = 4 * d.batch * d.k.next_multiple_of(4) * d.n.next_multiple_of(8 * lanes);
        let misaligned = !b_axis(self, d).is_multiple_of(4);
        // The quirk `slow-strides`: without packing, and without subgroups, it costs far more.
        let strided = self.transpose_a && profile.subgroups.is_none() && !misaligned;
        let slow = strided && profile.quirks.slow_strides;
        if (d.m >= 128 || slow) && bytes as u64 <= profile.max_binding_bytes {
            let large = |size: usize| !narrow && d.k * d.n >= size;
            let pays = slow || (misaligned && large(1 << 16)) || (!self.transpose_b && large(1 << 20));
            tiles.insert(if pays { 0 } else { tiles.len() }, Tile::Lanes { rows: 16, quads: 2, packed: true });
        }
        if few {
            let (lanes, slices) = if self.transpose_b { (1, lanes) } else { (lanes, 1) };
            // With more than two rows, loading all of a in every lane costs too much.
            let at = if d.m <= 2 { 0 } else { tiles.len() };
            tiles.insert(at, Tile::Few { lanes, slices, quads: 2 });
        }
        tiles
    }

    /// Adds the dispatch that packs b for lanes of `quads`, and returns the scratch that it fills.
    fn pack(&self, program: &mut Program, quads: usize, d: &Dims, profile: &Profile) -> usize {
        let lanes = profile.vector_lanes().0;
        let strips = d.n.div_ceil(4 * lanes * quads);
        let [strip, depth] = [lanes * quads, d.k.div_ceil(4)];
        let scratch = program.scratch(TensorType::f32([d.batch * strips, 4 * depth, 4 * strip]));
        let kernel = table_kernel::<Self>("matmul", LANES.plain, "pack")
            .knob("A_TRANSPOSED", !self.transpose_b)
            .knob("A_ALIGNED", b_axis(self, d).is_multiple_of(4))
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
            .knob("B_ALIGNED", b_axis(self, d).is_multiple_of(4))
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

    fn extra_inputs(&self) -> usize {
        usize::from(self.bias) + usize::from(self.accumulate)
    }
}

/// The dimension along which b is contiguous.
fn b_axis(op: &Matmul, d: &Dims) -> usize {
    if op.transpose_b { d.k } else { d.n }
}

/// The tiles that suit a product on GPUs. First the largest that still gives enough workgroups and wastes little on
/// edges; if there is none, the smallest of those that waste least.
fn tiled(d: &Dims) -> Vec<Tile> {
    let suits = |tile: &Tile| match tile.size(d, 0) {
        (16, _) => d.m <= 16,
        (32, _) => true,
        (m, n) => d.m > m / 2 && d.n > n / 2,
    };
    let padded = |tile: &Tile| {
        let (m, n) = tile.size(d, 0);
        d.m.next_multiple_of(m) * d.n.next_multiple_of(n)
    };
    let good = |tile: &Tile| {
        let (m, n) = tile.size(d, 0);
        d.batch * padded(tile) / (m * n) >= ENOUGH_GROUPS && padded(tile) <= d.m * d.n * 5 / 4
    };
    let mut tiles: Vec<Tile> = TILES.into_iter().filter(suits).collect();
    let least = || (0..tiles.len()).rev().min_by_key(|&i| padded(&tiles[i]));
    let best = tiles.iter().position(good).or_else(least).unwrap_or(0);
    tiles[..=best].rotate_right(1);
    tiles
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 2 + self.extra_inputs())?;
        let (a, b) = (&inputs[0].shape, &inputs[1].shape);
        let d = self.dims(a, b)?;
        let mut dims = match (self.batch, self.transpose_a) {
            (true, _) => a.dims()[..a.rank() - 2].iter().copied().chain([d.m]).collect(),
            (false, true) => vec![d.m],
            (false, false) => a.lead().to_vec(),
        };
        dims.push(d.n);
        if self.bias {
            expect_shape("the bias", &inputs[2], &[d.n])?;
        }
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[inputs.len() - 1], &dims)?;
        }
        Ok(vec![TensorType::f32(dims)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        let (a, b) = (cx.inputs[0], cx.inputs[1]);
        let (ta, tb) = (self.transpose_a, self.transpose_b);
        if cx.needs(0) {
            let (op, inputs) = if ta { (self.form(tb, true), [b, dy]) } else { (self.form(false, !tb), [dy, b]) };
            let da = cx.graph.op1(&format!("{}.a", cx.name), op, &inputs)?;
            let da = cx.graph.reshape_like(da, a)?;
            cx.set(0, da);
        }
        if cx.needs(1) {
            let (op, inputs) = if tb { (self.form(true, ta), [dy, a]) } else { (self.form(!ta, false), [a, dy]) };
            let db = cx.graph.op1(&format!("{}.b", cx.name), op, &inputs)?;
            let db = cx.graph.reshape_like(db, b)?;
            cx.set(1, db);
        }
        if self.bias && cx.needs(2) {
            let n = cx.graph.ty(cx.inputs[2]).shape.clone();
            let dbias = cx.graph.sum_to(&format!("{}.bias", cx.name), dy, n)?;
            cx.set(2, dbias);
        }
        if self.accumulate {
            cx.set(2 + usize::from(self.bias), dy);
        }
        Ok(())
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        let dims = self.dims(&cx.inputs[0].shape, &cx.inputs[1].shape);
        dims.map_or(vec![], |d| self.tiles(&d, cx.profile).into_iter().map(Tile::name).collect())
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
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

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let (a, b) = (inputs[0], inputs[1]);
        // `infer` accepted these shapes, so there are dimensions.
        let Ok(d) = self.dims(&a.shape, &b.shape) else { return vec![] };
        // Both by rows of k, so that each element is a product of two slices.
        let a_rows = if self.transpose_a { transposed(&a.data, d.k, d.m) } else { a.data.clone() };
        let b_cols = if self.transpose_b { b.data.clone() } else { transposed(&b.data, d.k, d.n) };
        let mut y = Array::zeros(outputs[0].shape.clone());
        for (i, out) in y.data.iter_mut().enumerate() {
            let (row, col) = (i / d.n, i / (d.m * d.n) * d.n + i % d.n);
            *out = dot(&a_rows[row * d.k..][..d.k], &b_cols[col * d.k..][..d.k]);
        }
        if self.bias {
            y = y.zip(inputs[2], |y, b| y + b);
        }
        if self.accumulate {
            y = y.zip(inputs[inputs.len() - 1], |y, x| y + x);
        }
        vec![y]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let dims = self.dims(&inputs[0].shape, &inputs[1].shape);
        dims.map_or(0, |d| 2 * (d.batch * d.m * d.n * d.k) as u64)
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(Matmul { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

/// Each `[rows, cols]` matrix of `data`, transposed to `[cols, rows]`.
fn transposed(data: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let matrices = data.chunks_exact(rows * cols);
    matrices.flat_map(|x| (0..cols).flat_map(move |c| (0..rows).map(move |r| x[r * cols + c]))).collect()
}

/// In eight sums, so that the compiler can use vectors.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks(8), b.chunks(8));
    let mut sums = [0.0; 8];
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}
