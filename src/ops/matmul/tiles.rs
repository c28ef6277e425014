//! Tiles: the ways to split a product into workgroups, and the choice among them.

use super::product::{Dims, Matmul};
use crate::kernel::FEW_ROWS;
use crate::ops::cooperative::MatrixTile;
use crate::profile::{AdapterClass, Profile};

/// What a workgroup computes. Others that were tried are in docs/rejected.md.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tile {
    /// For software adapters: rows and quads of columns that each lane of a vector keeps. With `packed`, `b` is first
    /// copied into the order in which the lanes read it.
    Lanes { rows: usize, quads: usize, packed: bool },
    /// For few rows: invocations along n and along k, and columns of each.
    Few { lanes: usize, slices: usize, cols: usize },
    /// For GPUs: rows and columns of a workgroup, quads of rows and of columns of an invocation.
    Tiled { m: usize, n: usize, rows: usize, quads: usize },
    /// For GPUs with cooperative matrices.
    Cooperative(MatrixTile),
}

impl Tile {
    /// Bytes of workgroup memory, for tiles where they differ.
    fn workgroup_bytes(self, d: &Dims) -> usize {
        match self {
            Tile::Few { lanes, slices, cols } => 16 * lanes * slices * d.m * cols.div_ceil(4),
            Tile::Tiled { m, n, .. } => 4 * (m + n) * TILE_K,
            Tile::Cooperative(tile) => tile.workgroup_bytes(),
            Tile::Lanes { .. } => 0,
        }
    }

    /// The most iterations of loops that an invocation on a software adapter takes: along k, and to store its sums.
    pub(super) fn iterations(self, d: &Dims) -> usize {
        let stores = |rows: usize, cols: usize| rows * (1 + cols) + 2;
        match self {
            Tile::Lanes { rows, quads, .. } => d.k.div_ceil(4) + stores(rows, 4 * quads),
            Tile::Few { slices, cols, .. } => d.k.div_ceil(4 * slices) + stores(d.m, cols),
            Tile::Tiled { .. } | Tile::Cooperative(_) => 0, // for GPUs
        }
    }

    /// Rows and columns of y that a workgroup computes.
    fn size(self, d: &Dims, lanes: usize) -> (usize, usize) {
        match self {
            Tile::Lanes { rows, quads, .. } => (rows, lanes * quads * 4),
            Tile::Few { lanes, cols, .. } => (d.m, lanes * cols),
            Tile::Tiled { m, n, .. } | Tile::Cooperative(MatrixTile { m, n, .. }) => (m, n),
        }
    }

    /// Along m and along n, how many of them a matrix of y has.
    pub(super) fn count(self, d: &Dims, profile: &Profile) -> [usize; 2] {
        let (m, n) = self.size(d, profile.vector_lanes().0);
        [d.m.div_ceil(m), d.n.div_ceil(n)]
    }
}

/// A way to compute a product: a tile, and into how many slices k is split, whose sums another pass adds up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Way {
    pub tile: Tile,
    pub slices: usize,
}

impl Way {
    fn whole(tile: Tile) -> Way {
        Way { tile, slices: 1 }
    }

    /// The name, for measurements and messages. The number of slices is not in it: it depends on sizes, and shapes that
    /// are alike share what a tuner has measured.
    pub(super) fn name(self) -> String {
        let tile = match self.tile {
            Tile::Lanes { rows, quads, packed: false } => format!("{rows}x{quads}"),
            Tile::Lanes { rows, quads, packed: true } => format!("{rows}x{quads} packed"),
            Tile::Few { lanes, slices, cols } => format!("few {lanes}x{slices}x{cols}"),
            Tile::Tiled { m, n, .. } => format!("{m}x{n}"),
            Tile::Cooperative(tile) => tile.name(),
        };
        if self.slices == 1 { tile } else { format!("{tile} split") }
    }

    /// Length of a slice along k: whole strips.
    pub(super) fn depth(self, d: &Dims) -> usize {
        d.k.div_ceil(self.slices).next_multiple_of(TILE_K)
    }

    /// Workgroups on a GPU.
    pub(super) fn groups(self, d: &Dims) -> usize {
        let (m, n) = self.tile.size(d, 1);
        d.batch * self.slices * d.m.div_ceil(m) * d.n.div_ceil(n)
    }

    /// Whether a GPU of so many units has enough workgroups to work on: one that waits for memory needs another beside
    /// it. The subgroups of a cooperative tile each multiply as much as a workgroup of the smaller tiles.
    fn fills(self, d: &Dims, units: usize) -> bool {
        let subgroups = match self.tile {
            Tile::Cooperative(tile) => tile.subgroups(),
            _ => 1,
        };
        self.groups(d) / self.parts(d, units) * subgroups >= 2 * units
    }

    /// How many dispatches it takes on a GPU so that none is long.
    pub(super) fn parts(self, d: &Dims, units: usize) -> usize {
        let work = 2 * (d.batch * d.m).saturating_mul(d.n * d.k);
        work.div_ceil(units * LONGEST).clamp(1, self.groups(d))
    }

    /// An estimate of the time that it takes a GPU, in multiply-adds of one of its units.
    fn cost(self, d: &Dims, units: usize) -> f64 {
        let (invocations, fast) = match self.tile {
            Tile::Tiled { m, n, rows, quads } => (
                m * n / (16 * rows * quads),
                FAST.iter().find(|(size, _)| *size == [m, n]).map_or(1.0, |(_, fast)| *fast),
            ),
            Tile::Cooperative(tile) => (tile.busy(), tile.speed),
            Tile::Lanes { .. } | Tile::Few { .. } => return f64::INFINITY,
        };
        let (m, n) = self.tile.size(d, 1);
        let parts = self.parts(d, units);
        let turns = (self.groups(d).div_ceil(parts).div_ceil(units) as f64).max(BUSY / invocations as f64);
        // What is faster than plain multiply-adds starts no sooner.
        let depth = self.depth(d) as f64 / fast + START as f64 / fast.min(1.0);
        let product = parts as f64 * turns * (m * n) as f64 * depth;
        let sums = match self.slices {
            1 => 0.0,
            slices => PASS + PER_SUM * (d.batch * slices * d.m * d.n) as f64 / units as f64,
        };
        product + sums
    }

    /// The tile with as many slices as suit it best, if there are any with enough workgroups and space for their sums.
    fn split(tile: Tile, d: &Dims, profile: &Profile) -> Option<Way> {
        let units = profile.units.max(1) as usize;
        let slices = (2..=MOST_SLICES.min(d.k / MIN_DEPTH)).map(|slices| Way { tile, slices });
        // Those that are left when slices are whole strips.
        let ways = slices.filter(|way| d.k.div_ceil(way.depth(d)) == way.slices && way.fills(d, units));
        let bytes = |way: &Way| 4 * (d.batch * way.slices * d.m * d.n) as u64;
        let ways = ways.filter(|way| bytes(way) <= profile.max_tensor_bytes());
        ways.min_by(|a, b| a.cost(d, units).total_cmp(&b.cost(d, units)))
    }
}

/// The most rows that count as few. With more, elements of b are reused often enough for the tiles.
const FEW: usize = FEW_ROWS;

/// Length along k of a strip in workgroup memory, as in the WGSL.
pub(super) const TILE_K: usize = 16;

/// The tiles for GPUs, the largest first.
const TILES: [Tile; 7] = [
    Tile::Tiled { m: 128, n: 128, rows: 2, quads: 2 },
    Tile::Tiled { m: 128, n: 64, rows: 2, quads: 2 },
    Tile::Tiled { m: 64, n: 64, rows: 2, quads: 2 },
    Tile::Tiled { m: 64, n: 32, rows: 2, quads: 1 },
    Tile::Tiled { m: 16, n: 64, rows: 1, quads: 1 },
    Tile::Tiled { m: 32, n: 32, rows: 1, quads: 1 },
    Tile::Tiled { m: 16, n: 32, rows: 1, quads: 1 },
];

/// The most floating-point operations of a dispatch, for each unit of a GPU. Longer ones are cut: systems reset a card
/// that has been at one for a second or two, and a page or a desktop waits for it. At 5% of what a unit can do (some 20
/// GFLOP/s), this is a tenth of a second.
const LONGEST: usize = 2_000_000_000;

// What `Way::cost` takes GPUs to be like. Multiply-adds of all instructions, and traffic for each, make the large tiles
// faster; the figures are meant to be right within a quarter, for any card.

/// How fast tiles are on a card that they fill, by size, relative to the fastest.
const FAST: [([usize; 2], f64); 7] = [
    ([128, 128], 1.0),
    ([128, 64], 0.97),
    ([64, 64], 0.9),
    ([64, 32], 0.72),
    ([16, 64], 0.5),
    ([32, 32], 0.55),
    ([16, 32], 0.45),
];

/// Invocations that keep a unit busy.
const BUSY: f64 = 256.0;

/// What the start and the end of a tile take, as a length along k.
const START: usize = 32;

/// Another dispatch: some five microseconds.
const PASS: f64 = 1e6;

/// Writing an element of a slice's sums and reading it again.
const PER_SUM: f64 = 170.0;

/// Slices are worth another dispatch if the time shrinks to this share.
const WORTH_A_PASS: f64 = 0.75;

/// The least length of a slice along k, and the most slices.
const MIN_DEPTH: usize = 64;
const MOST_SLICES: usize = 64;

impl Matmul {
    /// The ways worth trying for a product. The first is used if nothing was measured.
    pub(super) fn ways(&self, d: &Dims, profile: &Profile) -> Vec<Way> {
        let few = d.m <= FEW && (!self.transpose_a || d.m == 1);
        let mut ways = match profile.class {
            AdapterClass::Cpu => self.lanes(d, profile, few).into_iter().map(Way::whole).collect(),
            AdapterClass::Gpu if few => self.few(d, profile),
            AdapterClass::Gpu => tiled(d, profile),
        };
        ways.retain(|way| way.tile.workgroup_bytes(d) <= profile.max_workgroup_bytes as usize);
        let in_time = |way: &Way| profile.quirks.ends_loops(way.tile.iterations(d));
        if ways.iter().any(in_time) {
            ways.retain(in_time);
        }
        ways
    }

    /// The ways for few rows on GPUs, where reading b is all that counts. The wider a workgroup is, the more of a cache
    /// line is its own; first come the widest that fill the card.
    fn few(&self, d: &Dims, profile: &Profile) -> Vec<Way> {
        let units = profile.units.max(1) as usize;
        let sizes = match self.transpose_b {
            true => &[(1, 64, 4), (1, 64, 2), (1, 64, 1), (1, 32, 4), (4, 16, 4)][..],
            false => &[(16, 16, 4), (8, 16, 4), (4, 32, 4), (2, 64, 4), (1, 64, 4), (1, 64, 2), (1, 64, 1)],
        };
        let tile = |&(lanes, slices, cols)| Tile::Few { lanes, slices, cols };
        let mut ways: Vec<Way> = sizes.iter().map(|size| Way::whole(tile(size))).collect();
        let best = ways.iter().position(|way| way.fills(d, units));
        let narrowest = ways.iter().position(|way| way.groups(d) == d.batch * d.n).unwrap_or(0);
        ways[..=best.unwrap_or(narrowest)].rotate_right(1);
        // Few columns of many elements.
        let slices = (2 * units).div_ceil(ways[0].groups(d)).min(d.k / (16 * MIN_DEPTH));
        if best.is_none() && slices > 1 {
            let way = Way { slices, ..ways[0] };
            let slices = d.k.div_ceil(way.depth(d));
            ways.insert(0, Way { slices, ..way });
        }
        ways
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
        let misaligned = !self.b_axis(d).is_multiple_of(4);
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
            tiles.insert(at, Tile::Few { lanes, slices, cols: 8 });
        }
        tiles
    }
}

/// The ways for GPUs. First the one that should take least time: without slices, unless they save enough of it.
fn tiled(d: &Dims, profile: &Profile) -> Vec<Way> {
    let units = profile.units.max(1) as usize;
    let suits = |tile: &Tile| match tile.size(d, 0) {
        (16, _) => d.m <= 16 || d.batch * d.m * d.n < 2 * units * 32 * 32,
        (32, _) => true,
        (m, n) => d.m > m / 2 && d.n > n / 2,
    };
    let cost = |way: &Way| way.cost(d, units);
    let cooperative = MatrixTile::all(profile).into_iter().map(Tile::Cooperative);
    let tiles: Vec<Tile> = cooperative.chain(TILES).filter(suits).collect();
    let mut whole: Vec<Way> = tiles.iter().copied().map(Way::whole).collect();
    let best = (0..whole.len()).min_by(|&i, &j| {
        let [(empty, slow), (other_empty, other)] = [i, j].map(|i| (!whole[i].fills(d, units), cost(&whole[i])));
        empty.cmp(&other_empty).then(slow.total_cmp(&other))
    });
    whole[..=best.unwrap_or(0)].rotate_right(1);
    let mut split: Vec<Way> = tiles.iter().filter_map(|&tile| Way::split(tile, d, profile)).collect();
    split.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    let worth = WORTH_A_PASS * cost(&whole[0]);
    let at = if split.first().is_some_and(|way| cost(way) < worth) { 0 } else { whole.len() };
    split.truncate(2);
    whole.splice(at..at, split);
    whole
}
