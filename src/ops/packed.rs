//! Products with weights in their stored format: f16, bf16, or ggml's blocks of a few bits, decoded inside the kernels.
//!
//! Use these to run a model in the memory that its file takes. A weight is a `u32` tensor holding the file's bytes of a
//! matrix `[n, k]`, row after row. It is frozen: gradients pass through to `x`, but asking for the gradient of the
//! weight is an error.
//!
//! Decoded elements equal those of [`quant::dequantize`](crate::format::quant::dequantize), bit for bit: products of
//! scales and integers fit the 24 bits of an f32, and a minimum adds one rounding, so fused or reordered arithmetic
//! changes nothing. `tests/packed.rs` checks this on the adapter at hand. It also lists what WGSL would allow another
//! adapter to do, such as flushing subnormal scales to zero.

use std::any::TypeId;
use std::sync::Arc;

use super::cases::{Case, Row};
use super::checks::{expect_ids, expect_shape};
use super::cooperative::{MatrixTile, Sources, cooperative_sources};
use super::embedding::{expect_rows, row_of};
use super::matmul::Matmul;
use super::source::{LaneSource, lane_source, table_kernel};
use crate::array::Array;
use crate::error::Result;
use crate::format::{Packed, Stored, UNIT};
use crate::graph::{Graph, Op, Value, Vjp};
use crate::kernel::{Bind, Dispatch, FEW_ROWS, Gemv, Kernel, Launch, Program};
use crate::profile::{AdapterClass, Profile};
use crate::quirks::LOOP_ITERATIONS;
use crate::tensor::{DType, TensorType};

// The texts of each family of kernels; `shaders/packed/shared.wgsl` says what each is for.
const GEMV: &str =
    concat!(include_str!("../../shaders/packed/decode.wgsl"), include_str!("../../shaders/products/packed.wgsl"),);
const LANES: LaneSource =
    lane_source!("packed/decode.wgsl", "packed/shared.wgsl", "packed/store.wgsl", "packed/lanes.wgsl");
const FEW_SOURCE: LaneSource = lane_source!(
    "packed/decode.wgsl",
    "packed/shared.wgsl",
    "packed/store.wgsl",
    "packed/teams.wgsl",
    "packed/dots.wgsl",
    "packed/few.wgsl"
);

macro_rules! source {
    ($($file:literal),+) => {
        concat!(
            include_str!("../../shaders/packed/decode.wgsl"),
            include_str!("../../shaders/packed/shared.wgsl"),
            $(include_str!(concat!("../../shaders/packed/", $file)),)+
        )
    };
}
const TILED: &str = source!("store.wgsl", "tiles.wgsl", "tiled.wgsl");
const ROWS: &str = source!("rows.wgsl");
const UNPACK: &str = source!("unpack.wgsl");
const BACKWARD: &str = source!("backward.wgsl");
const BACKWARD_TILED: &str = source!("tiles.wgsl", "tiled_backward.wgsl");
const COOPERATIVE: Sources = cooperative_sources!(
    "packed/decode.wgsl",
    "packed/shared.wgsl",
    "packed/store.wgsl",
    "common/matrices.wgsl",
    "packed/cooperative.wgsl"
);
const BACKWARD_COOPERATIVE: Sources = cooperative_sources!(
    "packed/decode.wgsl",
    "packed/shared.wgsl",
    "common/matrices.wgsl",
    "packed/cooperative_backward.wgsl"
);

pub(super) const ROW: Row = Row {
    name: "packed",
    summary: "y = x w^T + bias, and rows of w by id, with w as f16, bf16 or in ggml's blocks",
    sources: &[
        LANES.plain,
        FEW_SOURCE.plain,
        TILED,
        COOPERATIVE.f32,
        ROWS,
        UNPACK,
        BACKWARD,
        BACKWARD_TILED,
        BACKWARD_COOPERATIVE.f32,
    ],
    cases,
    bench: || {
        let case = |m, n, k, stored| linear(m, Packed { stored, n, k }, false);
        vec![
            case(1, 1536, 576, Stored::Q4_1),
            case(1, 49_152, 576, Stored::Q8_0),
            case(128, 1536, 576, Stored::Q4_1),
            case(512, 1536, 576, Stored::Q8_0),
            case(1, 4096, 4096, Stored::Q4_K),
            case(1, 4096, 4096, Stored::F16),
        ]
    },
};

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for stored in Stored::ALL.into_iter().filter(|s| *s != Stored::F32) {
        let k = if stored.block_len() == 256 { 512 } else { 96 };
        cases.push(linear(3, Packed { stored, n: 5, k }, true));
        let matrix = Packed { stored, n: 7, k };
        // The first row has id 2, so that ids fall before the rows, among them and after them.
        let rows = PackedRows { matrix, first: if stored.is_quantized() { 2 } else { 0 } };
        cases.push(Case::new(format!("rows {stored} {k}"), rows, &[]).packed(matrix).ids(&[3, 5], 11));
    }
    // The gradient takes two dispatches.
    cases.push(linear(1, Packed { stored: Stored::F16, n: 65_600, k: 32 }, false));
    let plain = Packed { stored: Stored::Q4_1, n: 37, k: 96 };
    cases.extend([linear(1, plain, false), linear(17, Packed { n: 8, ..plain }, false)]);
    // So many rows that software adapters decode the whole matrix first.
    cases.push(linear(150, Packed { stored: Stored::Q4_K, n: 33, k: 256 }, true));
    // Larger than the largest tiles, and blocks of 256 in tiles.
    cases.push(linear(130, Packed { stored: Stored::Q4_0, n: 131, k: 160 }, true));
    cases.push(linear(35, Packed { stored: Stored::Q5_K, n: 66, k: 256 }, false));
    cases.push(linear(35, Packed { stored: Stored::Q6_K, n: 19, k: 256 }, true));
    let wide = Packed { stored: Stored::Q4_1, n: 70, k: 1120 };
    let op = PackedLinear { matrix: wide, bias: true, accumulate: true };
    let case = Case::new("bias, accumulate", op, &[&[2, 5, 1120]]).packed(wide).also(&[70]).also(&[2, 5, 70]);
    cases.push(case);
    cases
}

fn linear(m: usize, matrix: Packed, bias: bool) -> Case {
    let Packed { stored, n, k } = matrix;
    let op = PackedLinear { matrix, bias, accumulate: false };
    let case = Case::new(format!("{m}x{n}x{k} {stored}"), op, &[&[m, k]]).packed(matrix);
    if bias { case.also(&[n]) } else { case }
}

impl Packed {
    fn kernel<O: Op>(&self, source: &'static str, entry: &'static str, group: usize) -> Kernel {
        decoding(table_kernel::<O>("packed", source, entry), self.stored).knob("GROUP", group as u32)
    }

    /// `m, n, units, groups_n, groups, has_bias, accumulate, first, since, until`.
    pub(super) fn words(&self, m: usize, groups: [usize; 2], [bias, accumulate]: [bool; 2], first: usize) -> [u32; 10] {
        let [bias, accumulate] = [bias, accumulate].map(usize::from);
        let n = self.n;
        [m, n, self.k / UNIT, groups[0], groups[1], bias, accumulate, first, 0, n].map(|x| x as u32)
    }
}

/// `(x, w [, bias] [, base]) -> x w^T [+ bias] [+ base]`: `[.., k], words [, [n]] [, [.., n]] -> [.., n]`. Usually
/// added by [`Graph::packed_linear`].
#[derive(Clone, Copy, Debug)]
pub struct PackedLinear {
    /// Format and shape of the weight.
    pub matrix: Packed,
    /// Whether there is a bias.
    pub bias: bool,
    accumulate: bool,
}

/// `(dy, w [, base]) -> dy w [+ base]`: `[.., n], words [, [.., k]] -> [.., k]`. The gradient of [`PackedLinear`].
#[derive(Clone, Copy, Debug)]
pub struct PackedLinearBackward {
    matrix: Packed,
    accumulate: bool,
}

/// The dispatches of a product with many rows on software adapters: one decodes the whole matrix into scratch, and the
/// kernels of the plain product, whose input 1 it is, do the rest.
fn launch_unpacked<O: Op>(matrix: Packed, product: Matmul, cx: &Launch<'_>) -> Result<Program, String> {
    let plain = TensorType::f32([matrix.n, matrix.k]);
    let mut inputs = cx.inputs.to_vec();
    inputs[1] = plain.clone();
    let inner = product.launch(&Launch { inputs: &inputs, variant: 0, ..*cx })?;
    let mut program = Program::default();
    let w = program.scratch(plain);
    let group = cx.profile.vector_lanes().0;
    let groups = (matrix.n * matrix.k / UNIT).div_ceil(group);
    let words = matrix.words(0, [0, groups], [false; 2], 0);
    let binds = [Bind::In(1), Bind::Scratch(w)];
    program.dispatch(matrix.kernel::<O>(UNPACK, "unpack", group), &binds, &words, cx.profile.grid(groups));
    let first = program.scratch.len();
    program.scratch.extend(inner.scratch);
    for dispatch in inner.dispatches {
        let binds = dispatch.binds.into_iter().map(|bind| match bind {
            Bind::In(1) => Bind::ScratchIn(w),
            Bind::Scratch(i) => Bind::Scratch(first + i),
            Bind::ScratchIn(i) => Bind::ScratchIn(first + i),
            bind => bind,
        });
        let kernel = dispatch.kernel.made_by(TypeId::of::<O>());
        program.dispatches.push(Dispatch { kernel, binds: binds.collect(), ..dispatch });
    }
    Ok(program)
}

impl PackedLinearBackward {
    /// The ways worth trying. The first is used if nothing was measured.
    fn ways(&self, cx: &Launch<'_>) -> Vec<Way> {
        let m = cx.inputs[0].shape.rows();
        match cx.profile.class {
            AdapterClass::Cpu => Way::on_software(self.matrix, m, cx.profile),
            AdapterClass::Gpu => tiled(m, self.matrix.k, cx.profile).into_iter().map(Way::Tiles).collect(),
        }
    }

    /// The dispatches for software adapters: an invocation makes whole units.
    fn launch_lanes(&self, m: usize, profile: &Profile) -> Program {
        let group = profile.vector_lanes().0;
        // Eight quads of sums per row, in registers.
        let rows = m.next_power_of_two().min(4);
        let groups_k = (self.matrix.k / UNIT).div_ceil(group);
        let groups = groups_k * m.div_ceil(rows);
        let kernel = self.matrix.kernel::<Self>(BACKWARD, "backward", group).knob("ROWS", rows as u32);
        let binds = [Bind::In(1), Bind::In(0), Bind::Out(0)];
        // A vocabulary may have more rows than a dispatch can sum over: the quirk `loops-end-early`.
        let most = LOOP_ITERATIONS - 1;
        let mut program = Program::default();
        for since in (0..self.matrix.n).step_by(most) {
            let mut words = self.matrix.words(m, [groups_k, groups], [false, self.accumulate || since > 0], 0);
            words[8..].copy_from_slice(&[since, self.matrix.n.min(since + most)].map(|x| x as u32));
            program.dispatch(kernel.clone(), &binds, &words, profile.grid(groups));
        }
        program
    }
}

/// `(w, ids) -> w[ids - first]`: `words, u32 [..] -> [.., k]`. Zeros for ids without a row. Usually added by
/// [`Graph::packed_rows`].
#[derive(Clone, Copy, Debug)]
pub struct PackedRows {
    /// Format and shape of the matrix.
    pub matrix: Packed,
    /// Id of its first row: 0 unless the matrix is a part of a larger one.
    pub first: usize,
}

impl Graph {
    /// `x w^T + bias` with a packed weight: `x` `[.., k]`, `w` the words of a matrix `[n, k]`, `bias` `[n]`, result
    /// `[.., n]`.
    ///
    /// Use it for linear layers of a loaded model that are not trained. For trained weights use
    /// [`matmul_nt`](Self::matmul_nt) in f32.
    pub fn packed_linear(
        &mut self,
        name: &str,
        x: Value,
        w: Value,
        matrix: Packed,
        bias: Option<Value>,
    ) -> Result<Value> {
        let op = PackedLinear { matrix, bias: bias.is_some(), accumulate: false };
        let inputs: Vec<Value> = [x, w].into_iter().chain(bias).collect();
        self.op1(name, op, &inputs)
    }

    /// Looks up rows of a packed matrix by id: `u32 [..] -> [.., k]`. Ids of `n` or more give zeros.
    pub fn packed_rows(&mut self, name: &str, w: Value, matrix: Packed, ids: Value) -> Result<Value> {
        self.op1(name, PackedRows { matrix, first: 0 }, &[w, ids])
    }
}

impl PackedLinear {
    /// A product with this matrix that adds to nothing.
    pub(super) fn of(matrix: Packed, bias: bool) -> Self {
        PackedLinear { matrix, bias, accumulate: false }
    }
}

/// Ways to split a product into workgroups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tile {
    /// For software adapters: rows and columns that each invocation sums by itself. Those of a workgroup are a vector.
    Lanes { group: usize, rows: usize, cols: usize, shuffles: bool },
    /// For few rows on GPUs: invocations of a workgroup, how many of them share columns and split k, and how many
    /// rows and columns those share.
    Few { group: usize, team: usize, rows: usize, cols: usize },
    /// For many rows on GPUs: rows and columns of a workgroup, and of an invocation.
    Tiled { m: usize, n: usize, rows: usize, cols: usize },
    /// For many rows on GPUs with cooperative matrices.
    Cooperative(MatrixTile),
}

/// Ways to compute a product or its gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// For many rows on software adapters: the whole matrix is decoded first, and plain products do the rest.
    Unpacked,
    /// The kernels decode what they need.
    Tiles(Tile),
}

impl Way {
    /// The ways worth trying for a product. The first is used if nothing was measured.
    fn of(matrix: Packed, m: usize, profile: &Profile) -> Vec<Way> {
        if profile.class == AdapterClass::Cpu {
            return Self::on_software(matrix, m, profile);
        }
        let (few, tiled) = (few(matrix, m, profile), tiled(m, matrix.n, profile));
        let enough = tiled.first().is_some_and(|tile| tile.enough([m, matrix.n]));
        let tiles = match m {
            0..=FEW => few,
            _ if m > 32 => tiled,
            _ if enough => [tiled, few].concat(),
            _ => [few, tiled].concat(),
        };
        tiles.into_iter().map(Way::Tiles).collect()
    }

    /// The ways on software adapters, also for the gradient.
    fn on_software(matrix: Packed, m: usize, profile: &Profile) -> Vec<Way> {
        let (group, shuffles) = profile.vector_lanes();
        let rows = m.next_power_of_two().min(4);
        let cols = if rows > 2 { 2 } else { 1 };
        let lanes = Way::Tiles(Tile::Lanes { group, rows, cols, shuffles: shuffles && group >= 8 });
        match m >= UNPACKED_ROWS && 4 * matrix.n * matrix.k <= UNPACKED_BYTES {
            true => vec![Way::Unpacked, lanes],
            false => vec![lanes],
        }
    }

    fn name(self) -> String {
        match self {
            Way::Unpacked => "unpacked".into(),
            Way::Tiles(tile) => tile.name(),
        }
    }
}

/// The fewest rows for which software adapters decode the whole matrix first.
const UNPACKED_ROWS: usize = 64;

/// The most bytes that the decoded matrix may take.
const UNPACKED_BYTES: usize = 32 << 20;

/// The most rows that take few-row tiles even where there are enough larger ones.
pub(super) const FEW: usize = 8;

/// Teams of few-row tiles, the largest first: invocations of a workgroup and of a team, and columns of a team.
const TEAMS: [(usize, usize, usize); 8] =
    [(128, 32, 4), (64, 32, 4), (128, 32, 2), (64, 32, 2), (64, 64, 2), (64, 32, 1), (64, 64, 1), (128, 128, 1)];

/// Where there are few columns: one to a workgroup of two subgroups.
const NARROW: (usize, usize, usize) = (64, 64, 1);

/// Workgroups of few rows that keep a large GPU busy. Such a product waits for memory, so it takes several for each of
/// a hundred units.
const ENOUGH_TEAMS: usize = 640;

/// The tiles of many rows, the largest first: rows and columns of a workgroup, and of an invocation.
const TILES: [(usize, usize, usize, usize); 6] =
    [(128, 128, 8, 8), (128, 64, 8, 8), (64, 64, 8, 8), (64, 32, 8, 4), (32, 32, 4, 4), (16, 64, 4, 4)];

/// Length of a strip in workgroup memory, as in the WGSL.
const STRIP: usize = 16;

/// Workgroups of many rows that keep a large GPU busy.
const ENOUGH_TILES: usize = 160;

impl Tile {
    /// The name, for measurements and messages.
    pub(super) fn name(self) -> String {
        match self {
            Tile::Lanes { rows, cols, .. } => format!("{rows}x{cols}"),
            Tile::Few { group, team, rows, cols } => format!("few {team}x{} {rows}x{cols}", group / team),
            Tile::Tiled { m, n, .. } => format!("{m}x{n}"),
            Tile::Cooperative(tile) => tile.name(),
        }
    }

    /// Rows and columns of y that a workgroup computes.
    pub(super) fn size(self) -> [usize; 2] {
        match self {
            Tile::Lanes { group, rows, cols, .. } => [rows, group * cols],
            Tile::Few { group, team, rows, cols } => [rows, group / team * cols],
            Tile::Tiled { m, n, .. } | Tile::Cooperative(MatrixTile { m, n, .. }) => [m, n],
        }
    }

    /// Number of workgroups for an output of this size.
    pub(super) fn groups(self, [m, n]: [usize; 2]) -> usize {
        let [rows, cols] = self.size();
        m.div_ceil(rows) * n.div_ceil(cols)
    }

    /// Whether an output of this size has enough of these tiles to keep a large GPU busy.
    fn enough(self, size: [usize; 2]) -> bool {
        let subgroups = match self {
            Tile::Cooperative(tile) => tile.subgroups(),
            _ => 1,
        };
        self.groups(size) * subgroups >= ENOUGH_TILES
    }

    fn workgroup_bytes(self) -> usize {
        match self {
            Tile::Lanes { .. } => 0,
            Tile::Few { group, rows, cols, .. } => 4 * group * rows * cols,
            Tile::Tiled { m, n, .. } => 4 * (m + n) * STRIP,
            Tile::Cooperative(tile) => tile.workgroup_bytes(),
        }
    }

    pub(super) fn invocations(self) -> usize {
        match self {
            Tile::Lanes { group, .. } | Tile::Few { group, .. } => group,
            Tile::Tiled { m, n, rows, cols } => m / rows * (n / cols),
            Tile::Cooperative(tile) => tile.invocations(),
        }
    }

    fn suits(self, profile: &Profile) -> bool {
        self.workgroup_bytes() <= profile.max_workgroup_bytes as usize
            && self.invocations() <= profile.max_invocations as usize
    }

    /// Iterations of an invocation's loops on a software adapter: along k, and to store its sums.
    pub(super) fn iterations(self, k: usize) -> usize {
        match self {
            Tile::Lanes { .. } => k / UNIT + 12,
            Tile::Few { team, .. } => (k / 8).div_ceil(team) + 12,
            Tile::Tiled { .. } | Tile::Cooperative(_) => k / STRIP + 12,
        }
    }

    fn kernel(self, matrix: Packed, profile: &Profile) -> Kernel {
        let group = self.invocations();
        match self {
            Tile::Lanes { rows, cols, shuffles, .. } => matrix
                .kernel::<PackedLinear>(LANES.text(shuffles), "forward_lanes", group)
                .knob("ROWS", rows as u32)
                .knob("COLS", cols as u32),
            Tile::Few { .. } => self.few(
                matrix.kernel::<PackedLinear>(FEW_SOURCE.text(self.shuffles(profile)), "forward_few", group),
                profile,
            ),
            Tile::Tiled { .. } => {
                self.tiled(matrix.kernel::<PackedLinear>(TILED, "forward_tiled", group), matrix.stored, profile)
            }
            Tile::Cooperative(tile) => {
                let kernel = matrix.kernel::<PackedLinear>(tile.text(&COOPERATIVE), "forward_cooperative", group);
                self.tiled(kernel, matrix.stored, profile)
            }
        }
    }

    /// How many invocations of a team can shuffle.
    fn subgroup(self, profile: &Profile) -> u32 {
        match self {
            Tile::Few { team, .. } => profile.subgroup_lanes().map_or(1, |lanes| lanes.min(team as u32)),
            Tile::Lanes { .. } | Tile::Tiled { .. } | Tile::Cooperative(_) => 1,
        }
    }

    /// Whether its teams shuffle.
    pub(super) fn shuffles(self, profile: &Profile) -> bool {
        self.subgroup(profile) > 1
    }

    /// Sets the knobs of tiles of few rows.
    pub(super) fn few(self, kernel: Kernel, profile: &Profile) -> Kernel {
        let Tile::Few { team, rows, cols, .. } = self else { return kernel };
        kernel
            .knob("TEAM", team as u32)
            .knob("SUBGROUP", self.subgroup(profile))
            .knob("ROWS", rows as u32)
            .knob("COLS", cols as u32)
    }

    /// Sets the knobs of tiles of many rows.
    fn tiled(self, kernel: Kernel, stored: Stored, profile: &Profile) -> Kernel {
        // A strip is four quads.
        let kernel = kernel.knob("PIECE", piece(stored).min(4));
        match self {
            Tile::Tiled { m, n, rows, cols } => {
                let knobs = [("TILE_M", m), ("TILE_N", n), ("TILE_ROWS", rows), ("TILE_COLS", cols)];
                knobs.into_iter().fold(kernel, |kernel, (name, value)| kernel.knob(name, value as u32))
            }
            Tile::Cooperative(tile) => tile.knobs(kernel, profile),
            Tile::Lanes { .. } | Tile::Few { .. } => kernel,
        }
    }
}

/// Quads that an invocation decodes at a time: of blocks of 256, which have long heads, more.
fn piece(stored: Stored) -> u32 {
    if stored.block_len() > UNIT { 8 } else { 2 }
}

/// A kernel that decodes weights in this format: with the knobs of packed/decode.wgsl.
pub(super) fn decoding(kernel: Kernel, stored: Stored) -> Kernel {
    kernel.knob("FORMAT", stored.name()).knob("PIECE", piece(stored))
}

/// The tiles for few rows on GPUs: first the largest that still gives enough workgroups.
pub(super) fn few(matrix: Packed, m: usize, profile: &Profile) -> Vec<Tile> {
    // Rows are shared out evenly.
    let rows = m.div_ceil(m.div_ceil(FEW));
    // Quads that an invocation decodes at a time. More than 16 leave too few registers, and so do more than 16 sums.
    let piece = piece(matrix.stored) as usize;
    let tile = |(group, team, cols)| Tile::Few { group, team, rows, cols };
    let fits = |&(_, _, cols): &(usize, usize, usize)| cols * piece <= 16 && cols * rows <= 16;
    let mut tiles: Vec<Tile> = TEAMS.into_iter().filter(fits).map(tile).filter(|tile| tile.suits(profile)).collect();
    let enough = |tile: &Tile| tile.groups([m, matrix.n]) >= ENOUGH_TEAMS;
    let narrow = |of: &Tile| *of == tile(NARROW);
    let best = tiles.iter().position(enough).or_else(|| tiles.iter().position(narrow));
    first(&mut tiles, best);
    tiles
}

/// The tiles for many rows on GPUs, of an output of `m` rows and `n` columns: first the largest that still gives enough
/// workgroups and wastes little on edges, or else the one that gives most.
fn tiled(m: usize, n: usize, profile: &Profile) -> Vec<Tile> {
    let wastes_little = |tile: &Tile| {
        let [rows, cols] = tile.size();
        4 * m.next_multiple_of(rows) * n.next_multiple_of(cols) <= 5 * m * n
    };
    let suits = |tile: &Tile| match tile.size() {
        [16, _] => m <= 16,
        [32, _] => true,
        [rows, cols] => m > rows / 2 && n > cols / 2,
    };
    let cooperative = MatrixTile::all(profile).into_iter().map(Tile::Cooperative);
    let tiles = TILES.into_iter().map(|(m, n, rows, cols)| Tile::Tiled { m, n, rows, cols });
    let mut tiles: Vec<Tile> = cooperative.chain(tiles).filter(|tile| tile.suits(profile) && suits(tile)).collect();
    let good = |tile: &Tile| tile.enough([m, n]) && wastes_little(tile);
    let most = || (0..tiles.len()).max_by_key(|&i| (tiles[i].groups([m, n]), matches!(tiles[i], Tile::Cooperative(_))));
    let best = tiles.iter().position(good).or_else(most);
    first(&mut tiles, best);
    tiles
}

/// Moves an element to the front.
fn first(tiles: &mut [Tile], index: Option<usize>) {
    if let Some(tiles) = index.and_then(|i| tiles.get_mut(..=i)) {
        tiles.rotate_right(1);
    }
}

/// The variant that a tuner has chosen, or the default one.
pub(super) fn chosen<T: Copy>(variants: &[T], variant: usize) -> Result<T, String> {
    variants.get(variant).copied().ok_or_else(|| format!("no variant {variant} of {}", variants.len()))
}

fn expect_f32(what: &str, ty: &TensorType, cols: usize) -> Result<(), String> {
    match ty.dtype == DType::F32 && ty.shape.cols() == cols {
        true => Ok(()),
        false => Err(format!("{what} must be f32 [.., {cols}], got {ty}")),
    }
}

/// The output of a product of inputs `(x, w [, bias] [, base])`.
pub(super) fn infer(
    matrix: Packed,
    [bias, accumulate]: [bool; 2],
    inputs: &[TensorType],
) -> Result<Vec<TensorType>, String> {
    let expected = 2 + usize::from(bias) + usize::from(accumulate);
    if inputs.len() != expected {
        return Err(format!("takes {expected} inputs, got {}", inputs.len()));
    }
    expect_f32("x", &inputs[0], matrix.k)?;
    matrix.check(&inputs[1])?;
    if bias {
        expect_shape("the bias", &inputs[2], &[matrix.n])?;
    }
    let y = TensorType::f32(inputs[0].shape.with_cols(matrix.n));
    if accumulate {
        expect_shape("the tensor to add to", &inputs[expected - 1], y.shape.dims())?;
    }
    Ok(vec![y])
}

/// Such a product in f64, of rows `x`, which may be other than those of the first input.
pub(super) fn product(
    matrix: Packed,
    [bias, accumulate]: [bool; 2],
    x: &[f64],
    inputs: &[&Array],
    outputs: &[TensorType],
) -> Array {
    let (k, w) = (matrix.k, matrix.decode(inputs[1]));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let y = x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect();
    let mut y = Array::new(outputs[0].shape.clone(), y);
    if bias {
        y = y.zip(inputs[2], |y, b| y + b);
    }
    if accumulate {
        y = y.zip(inputs[inputs.len() - 1], |y, x| y + x);
    }
    y
}

impl Op for PackedLinear {
    fn name(&self) -> &'static str {
        "packed_linear"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        infer(self.matrix, [self.bias, self.accumulate], inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        let dy = cx.dy0()?;
        if cx.needs(1) {
            return Err(cx.no_gradient("packed weights are frozen; decode them to f32 to train them"));
        }
        if cx.needs(0) {
            let op = PackedLinearBackward { matrix: self.matrix, accumulate: false };
            let dx = cx.graph.op1(&format!("{}.x", cx.name), op, &[dy, cx.inputs[1]])?;
            cx.set(0, dx);
        }
        if self.bias && cx.needs(2) {
            let dbias = cx.graph.sum_to(&format!("{}.bias", cx.name), dy, [self.matrix.n])?;
            cx.set(2, dbias);
        }
        if self.accumulate {
            cx.set(2 + usize::from(self.bias), dy);
        }
        Ok(())
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        Way::of(self.matrix, cx.inputs[0].shape.rows(), cx.profile).into_iter().map(Way::name).collect()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let Packed { n, k, .. } = self.matrix;
        let m = cx.inputs[0].shape.rows();
        let tile = match chosen(&Way::of(self.matrix, m, cx.profile), cx.variant)? {
            Way::Unpacked => {
                let PackedLinear { bias, accumulate, .. } = *self;
                let product = Matmul { transpose_b: true, bias, accumulate, ..Matmul::default() };
                return launch_unpacked::<Self>(self.matrix, product, cx);
            }
            Way::Tiles(tile) => tile,
        };
        let groups = tile.groups([m, n]);
        cx.profile.quirks.check_loops("the inner dimension", k, tile.iterations(k))?;
        let bias = if self.bias { Bind::In(2) } else { Bind::Null };
        let binds = [Bind::In(1), Bind::In(0), bias, Bind::Out(0)];
        let words = self.matrix.words(m, [n.div_ceil(tile.size()[1]), groups], [self.bias, self.accumulate], 0);
        Ok(Program::one(tile.kernel(self.matrix, cx.profile), &binds, &words, cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        vec![product(self.matrix, [self.bias, self.accumulate], &inputs[0].data, inputs, outputs)]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * (inputs[0].len() * self.matrix.n) as u64
    }

    fn gemv(&self, inputs: &[TensorType]) -> Option<Gemv> {
        let Packed { stored, n, k } = self.matrix;
        let m = inputs[0].shape.rows();
        let gemv = || Gemv::new::<Self>(GEMV, "u32", [m, n, k]).with(|text| decoding(text, stored));
        (m <= FEW_ROWS && !self.accumulate).then(|| Gemv { bias: self.bias, ..gemv() })
    }

    fn by_rows(&self, _: &[TensorType]) -> Option<Vec<usize>> {
        Some([0].into_iter().chain(self.starts_as(0)).collect())
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2 + usize::from(self.bias))
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(PackedLinear { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

impl Op for PackedLinearBackward {
    fn name(&self) -> &'static str {
        "packed_linear_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let expected = 2 + usize::from(self.accumulate);
        if inputs.len() != expected {
            return Err(format!("takes {expected} inputs, got {}", inputs.len()));
        }
        expect_f32("dy", &inputs[0], self.matrix.n)?;
        self.matrix.check(&inputs[1])?;
        let dx = TensorType::f32(inputs[0].shape.with_cols(self.matrix.k));
        if self.accumulate {
            expect_shape("the tensor to add to", &inputs[2], dx.shape.dims())?;
        }
        Ok(vec![dx])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of packed products are not implemented"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.ways(cx).into_iter().map(Way::name).collect()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let Packed { n, k, .. } = self.matrix;
        let m = cx.inputs[0].shape.rows();
        let tile = match chosen(&self.ways(cx), cx.variant)? {
            Way::Unpacked => {
                let product = Matmul { accumulate: self.accumulate, ..Matmul::default() };
                return launch_unpacked::<Self>(self.matrix, product, cx);
            }
            Way::Tiles(Tile::Lanes { .. }) => return Ok(self.launch_lanes(m, cx.profile)),
            Way::Tiles(tile) => tile,
        };
        cx.profile.quirks.check_loops("the outer dimension", n, n / STRIP + 12)?;
        let groups = tile.groups([m, k]);
        let words = self.matrix.words(m, [k.div_ceil(tile.size()[1]), groups], [false, self.accumulate], 0);
        let kernel = |text, entry| self.matrix.kernel::<Self>(text, entry, tile.invocations());
        let kernel = match tile {
            Tile::Cooperative(t) => {
                kernel(t.text(&BACKWARD_COOPERATIVE), "backward_cooperative").knob("B_ALONG_N", true)
            }
            _ => kernel(BACKWARD_TILED, "backward_tiled"),
        };
        let binds = [Bind::In(1), Bind::In(0), Bind::Out(0)];
        let kernel = tile.tiled(kernel, self.matrix.stored, cx.profile);
        Ok(Program::one(kernel, &binds, &words, cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let Packed { n, k, .. } = self.matrix;
        let w = self.matrix.decode(inputs[1]);
        let mut dx = Array::zeros(outputs[0].shape.clone());
        for (dx, dy) in dx.data.chunks_mut(k).zip(inputs[0].data.chunks(n)) {
            for (dy, w) in dy.iter().zip(w.chunks(k)) {
                dx.iter_mut().zip(w).for_each(|(dx, w)| *dx += dy * w);
            }
        }
        if self.accumulate {
            dx = dx.zip(inputs[2], |dx, base| dx + base);
        }
        vec![dx]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        2 * (inputs[0].len() * self.matrix.k) as u64
    }

    fn starts_as(&self, _output: usize) -> Option<usize> {
        self.accumulate.then_some(2)
    }

    fn with_addend(&self, _output: usize) -> Option<Arc<dyn Op>> {
        (!self.accumulate).then(|| Arc::new(PackedLinearBackward { accumulate: true, ..*self }) as Arc<dyn Op>)
    }
}

impl Op for PackedRows {
    fn name(&self) -> &'static str {
        "packed_rows"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [w, ids] = inputs else { return Err(format!("takes 2 inputs, got {}", inputs.len())) };
        self.matrix.check(w)?;
        expect_rows(self.first, self.matrix.n)?;
        expect_ids(ids)?;
        Ok(vec![TensorType::f32([ids.shape.dims(), &[self.matrix.k]].concat())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        match cx.needs(0) {
            true => Err(cx.no_gradient("packed weights are frozen; decode them to f32 to train them")),
            false => Ok(()),
        }
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let tokens = cx.inputs[1].len();
        let group = if cx.profile.class == AdapterClass::Cpu { cx.profile.vector_lanes().0 } else { 64 };
        let groups = (tokens * self.matrix.k / UNIT).div_ceil(group);
        let words = self.matrix.words(tokens, [0, groups], [false; 2], self.first);
        let binds = [Bind::In(0), Bind::In(1), Bind::Out(0)];
        let kernel = self.matrix.kernel::<Self>(ROWS, "rows", group);
        Ok(Program::one(kernel, &binds, &words, cx.profile.grid(groups)))
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let w = self.matrix.decode(inputs[0]);
        let rows: Vec<&[f64]> = w.chunks(self.matrix.k).collect();
        let zeros = vec![0.0; self.matrix.k];
        let row = |&id: &f64| rows.get(row_of(id, self.first)).unwrap_or(&&zeros[..]).to_vec();
        vec![Array::new(outputs[0].shape.clone(), inputs[1].data.iter().flat_map(row).collect())]
    }

    fn flops(&self, _: &[TensorType], _: &[TensorType]) -> u64 {
        0
    }

    fn bytes(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        let tokens = inputs[1].len();
        (tokens * self.matrix.bytes() / self.matrix.n + inputs[1].bytes() + outputs[0].bytes()) as u64
    }
}
