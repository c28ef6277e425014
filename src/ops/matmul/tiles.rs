//! Tiles: the ways to split a product into workgroups, and the choice among them.

use super::product::{Dims, Matmul};
use crate::kernel::FEW_ROWS;
use crate::profile::{AdapterClass, Cooperative, Profile};

/// Ways to split a product into workgroups. Others that were tried are in docs/rejected.md.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tile {
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
    pub(super) fn name(self) -> String {
        match self {
            Tile::Lanes { rows, quads, packed: false } => format!("{rows}x{quads}"),
            Tile::Lanes { rows, quads, packed: true } => format!("{rows}x{quads} packed"),
            Tile::Few { lanes, slices, quads } => format!("few {lanes}x{slices}x{quads}"),
            Tile::Tiled { m, n, .. } => format!("{m}x{n}"),
            Tile::Cooperative { kind, m, n } => format!("cooperative {kind:?} {m}x{n}"),
        }
    }

    /// Bytes of workgroup memory, for tiles where they differ.
    pub(super) fn workgroup_bytes(self, d: &Dims) -> usize {
        match self {
            Tile::Few { lanes, slices, quads } => 16 * lanes * slices * d.m * quads,
            Tile::Tiled { m, n, .. } => 4 * (m + n) * TILE_K,
            Tile::Lanes { .. } | Tile::Cooperative { .. } => 0,
        }
    }

    /// The most iterations of loops that an invocation on a software adapter takes: along k, and to store its sums.
    pub(super) fn iterations(self, d: &Dims) -> usize {
        let stores = |rows: usize, quads: usize| rows * (1 + 4 * quads) + 2;
        match self {
            Tile::Lanes { rows, quads, .. } => d.k.div_ceil(4) + stores(rows, quads),
            Tile::Few { slices, quads, .. } => d.k.div_ceil(4 * slices) + stores(d.m, quads),
            Tile::Tiled { .. } | Tile::Cooperative { .. } => 0, // for GPUs
        }
    }

    /// Rows and columns of y that a workgroup computes.
    pub(super) fn size(self, d: &Dims, lanes: usize) -> (usize, usize) {
        match self {
            Tile::Lanes { rows, quads, .. } => (rows, lanes * quads * 4),
            Tile::Few { lanes, quads, .. } => (d.m, lanes * quads * 4),
            Tile::Tiled { m, n, .. } | Tile::Cooperative { m, n, .. } => (m, n),
        }
    }
}

/// The most rows that count as few. With more, elements of b are reused often enough for the tiles.
const FEW: usize = FEW_ROWS;

/// Length along k of a strip in workgroup memory, as in the WGSL.
pub(super) const TILE_K: usize = 16;

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

impl Matmul {
    /// The tiles worth trying for a product. The first is used if nothing was measured.
    pub(super) fn tiles(&self, d: &Dims, profile: &Profile) -> Vec<Tile> {
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
            tiles.insert(at, Tile::Few { lanes, slices, quads: 2 });
        }
        tiles
    }
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
