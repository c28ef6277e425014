//! How kernels split their work, and which ways suit a device and a shape.

use super::heads::{Dims, Keys};
use super::matrices::{Matrices, Pass};
use crate::kernel::Launch;
use crate::profile::AdapterClass;
use crate::quirks::LOOP_ITERATIONS;

/// How a kernel splits its work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cut {
    /// Each invocation keeps this many whole rows.
    Rows(usize),
    /// Each invocation has this many rows, too wide to keep, which meet so many of the other side at a time.
    Wide(usize, usize),
    /// So many invocations share four rows, and make so many units of their sums.
    Tiled { lanes: usize, part: usize },
    /// A workgroup works on one row, and this many invocations share its keys.
    Decode(usize),
    /// A workgroup works on rows that share a key head, and on a slice of their keys.
    Split(Split),
    /// The subgroups of a workgroup share a tile of rows, on cooperative matrices.
    Matrices(Matrices),
}

/// How few queries of many heads meet their keys on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Split {
    /// Rows of a workgroup.
    pub rows: usize,
    /// Invocations that share a key.
    pub lanes: usize,
    /// Neighbours whose sums shuffles can add.
    pub reach: usize,
    /// Workgroups that share the keys of a row.
    pub slices: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    pub cut: Cut,
    pub group: usize,
    pub subgroups: bool,
    /// Whether queries see keys from a first one on.
    pub from: bool,
}

/// The most units of a row that an invocation on a software adapter can keep: the quirk `no-long-unrolling`.
const UNROLLED: usize = 32;

/// Quads of workgroup memory that any device has: `wgpu::Limits::downlevel_defaults`.
pub(super) const WORKGROUP_QUADS: usize = 16_352 / 16;

/// The most rows of a workgroup on a software adapter, which with [`Keys::From`] looks for the first key of them all.
const OWN_ROWS: usize = 128;

/// Up to this many queries, one workgroup for each wastes less than the unused part of a tile.
const FEW: usize = 4;

/// Keys that few queries meet in one dispatch: to read so many takes a workgroup about as long as it takes to start the
/// dispatch that combines slices.
const UNSPLIT: usize = 1024;

/// The fewest keys of a full cache that are worth a slice.
const SLICE: usize = 32;

/// Units of a row that a workgroup of combine.wgsl makes.
pub(super) const COMBINED: usize = 16;

/// Workgroups that keep a large GPU busy when all they do is read.
const BUSY: usize = 160;

impl Tile {
    /// The ways to split a forward pass.
    pub(super) fn forward(cx: &Launch<'_>, d: &Dims, keys: Keys) -> Vec<Tile> {
        let few = d.tq <= FEW && keys != Keys::From;
        if few && cx.profile.class == AdapterClass::Gpu {
            // The tuner, whose caches are empty, could not tell what is best.
            return vec![Tile::split(cx, d)];
        }
        let rows = if d.dh <= 64 && !few { [2, 1] } else { [1, 2] };
        let mut tiles = Tile::all(cx, d, &rows, d.tk, keys);
        if let (AdapterClass::Cpu, true, (group, false)) = (cx.profile.class, few, cx.profile.vector_lanes()) {
            // Passing rows around would cost no additional loads, and loads are what takes time: so only without
            // subgroups. Its invocations keep sums, too. They go over units, and over the keys of their team.
            let dim = units(d.dh).2;
            let iterations = (dim + group + 2) * d.tk.div_ceil(4 * group);
            if dim <= UNROLLED * group && iterations < LOOP_ITERATIONS {
                tiles.truncate(1);
                tiles.insert(0, Tile { cut: Cut::Decode(group), group, subgroups: false, from: false });
            }
        }
        if few { tiles } else { Tile::with_matrices(tiles, cx, d, (keys, Pass::Forward)) }
    }

    /// The ways to split a backward pass.
    pub(super) fn backward(cx: &Launch<'_>, d: &Dims, keys: Keys) -> Vec<Tile> {
        let rows: &[usize] = match d.dh {
            0..=32 => &[2, 1],
            33..=64 => &[1, 2],
            _ => &[1],
        };
        let tiles = Tile::all(cx, d, rows, d.tk.max(d.tq * d.sharing), keys);
        if d.tq <= FEW && keys != Keys::From {
            return tiles; // as forward: what it rounds, the gradient must
        }
        Tile::with_matrices(tiles, cx, d, (keys, Pass::Backward))
    }

    /// Adds tiles on cooperative matrices. They come first on GPUs, where they multiply four times as fast or more, if
    /// there is a quarter of a tile of rows on both sides: what is past their end costs as much as what is there.
    fn with_matrices(mut tiles: Vec<Tile>, cx: &Launch<'_>, d: &Dims, (keys, pass): (Keys, Pass)) -> Vec<Tile> {
        let matrices = Matrices::all(cx.profile, d, pass);
        let pays = |m: &Matrices| cx.profile.class == AdapterClass::Gpu && 4 * d.tq.min(d.tk) >= m.rows();
        let at = if matrices.first().is_some_and(pays) { 0 } else { tiles.len() };
        let from = keys == Keys::From;
        let tile = |m: Matrices| Tile { cut: Cut::Matrices(m), group: m.group(), subgroups: false, from };
        tiles.splice(at..at, matrices.into_iter().map(tile));
        tiles
    }

    /// On software adapters a row of the other side is expensive to load and registers spill cheaply, so an invocation
    /// keeps one of these numbers of `rows`, unless they are too wide, or meet so many `others` that it would run into
    /// the quirk `loops-end-early`. On GPUs workgroup memory is cheap and occupancy counts, so more invocations share
    /// wide heads: no more than eight elements each of a row's sum, or what Apple's M1 can keep in registers.
    fn all(cx: &Launch<'_>, d: &Dims, rows: &[usize], others: usize, keys: Keys) -> Vec<Tile> {
        let from = keys == Keys::From;
        if cx.profile.class == AdapterClass::Cpu {
            let (group, subgroups) = cx.profile.vector_lanes();
            let looking = if from { OWN_ROWS } else { 0 };
            let fits = units(d.dh).2 <= UNROLLED && others + 2 * UNROLLED + looking < LOOP_ITERATIONS;
            let cuts = match fits {
                true => rows.iter().map(|&n| Cut::Rows(n)).collect(),
                false => vec![Tile::wide(d, subgroups)],
            };
            return cuts.into_iter().map(|cut| Tile { cut, group, subgroups, from }).collect();
        }
        let shapes: &[(usize, usize)] = match d.dh {
            0..=16 => &[(64, 4), (64, 8)],
            17..=64 => &[(128, 8), (128, 16), (64, 8)],
            65..=128 => &[(128, 16), (64, 16)],
            129..=256 => &[(128, 32), (64, 32)],
            _ => &[(128, 64), (64, 64)],
        };
        shapes.iter().map(|&shape| Tile { from, ..Tile::tiled(cx, d.dh, shape, 8) }).collect()
    }

    /// Wide heads on a software adapter. More rows need fewer loads for each product, as many as registers allow.
    fn wide(d: &Dims, subgroups: bool) -> Cut {
        match (subgroups, d.tq <= FEW) {
            (true, few) => Cut::Wide(if few { 1 } else { 2 }, 32),
            (false, few) => Cut::Wide(if few { 1 } else { 4 }, 8),
        }
    }

    /// Few queries on a GPU. Where the keys are not split, each row has a workgroup of its own unless there are plenty:
    /// they start together, and what one reads again is in the cache.
    fn split(cx: &Launch<'_>, d: &Dims) -> Tile {
        let shuffles = cx.profile.subgroup_lanes().map_or(0, |n| n as usize);
        // Elements of a row that an invocation has, and the most rows: what Apple's M1 can keep in registers.
        let (own, most) = match d.dh {
            0..=64 => (4, 8),
            65..=128 => (4, 7),
            129..=256 if shuffles < 32 => (4, 4),
            _ => (8, 2),
        };
        let lanes = d.dh.div_ceil(own).next_power_of_two().max(4);
        let all = d.sharing * d.tq;
        let most = all.min(most).min(lanes);
        let groups = |rows: usize| d.batch * d.kv_heads * all.div_ceil(rows);
        let (rows, slices) = if d.tk <= UNSPLIT || groups(most) >= BUSY {
            ((1..=most).rev().find(|&rows| groups(rows) >= BUSY).unwrap_or(1), 1)
        } else {
            (most, BUSY.div_ceil(groups(most)).next_power_of_two().min(d.tk.div_ceil(SLICE)))
        };
        let rows = all.div_ceil(all.div_ceil(rows)); // evenly
        // As many invocations as meet all keys at once, within limits.
        let allowed = 1 << cx.profile.max_invocations.clamp(128, 256).ilog2();
        let group = (d.tk.div_ceil(slices) * lanes / 4).next_power_of_two().clamp(lanes.max(64), allowed);
        let subgroups = shuffles >= lanes;
        let reach = if subgroups { shuffles.min(group) } else { lanes };
        let split = Split { rows, lanes, reach, slices };
        Tile { cut: Cut::Split(split), group, subgroups, from: false }
    }

    /// `own` is how many elements of each row's sum an invocation can keep. If the lanes cannot keep all, it takes
    /// several workgroups, unless no small number of them can share a row evenly. Subgroups help if each of them contains
    /// all invocations that share a row.
    fn tiled(cx: &Launch<'_>, dh: usize, (group, lanes): (usize, usize), own: usize) -> Tile {
        let (_, width, dim) = units(dh);
        let least = dh.div_ceil(lanes * own);
        let parts = (least..=4 * least).find(|parts| dim.is_multiple_of(*parts) && dim / parts * width <= lanes * own);
        let subgroups = cx.profile.subgroup_lanes().is_some_and(|n| n as usize >= lanes);
        Tile { cut: Cut::Tiled { lanes, part: dim / parts.unwrap_or(1) }, group, subgroups, from: false }
    }

    /// The one for the second half of a backward pass. On GPUs it has two sums for each row, so an invocation keeps less
    /// of them.
    pub(super) fn for_keys(self, cx: &Launch<'_>, dh: usize) -> Tile {
        let Cut::Tiled { lanes, .. } = self.cut else { return self };
        let lanes = if dh > 4 * lanes { (2 * lanes).min(64) } else { lanes };
        Tile { from: self.from, ..Tile::tiled(cx, dh, (self.group, lanes), 4) }
    }

    /// The one that a launch selects.
    pub(super) fn pick(tiles: &[Tile], variant: usize) -> Result<Tile, String> {
        tiles.get(variant).copied().ok_or_else(|| format!("there are {} variants, not {variant}", tiles.len()))
    }

    pub(super) fn names(tiles: &[Tile]) -> Vec<String> {
        let name = |t: &Tile| match t.cut {
            Cut::Rows(n) => format!("{n} rows a lane"),
            Cut::Wide(rows, others) => format!("{rows} rows a lane, {others} at a time"),
            Cut::Tiled { lanes, .. } => format!("{} rows x {}", t.rows_of_group(), 4 * lanes),
            Cut::Decode(lanes) => format!("a row by {} of {lanes}", t.group),
            Cut::Split(s) => format!("{} rows by {} of {}, {} slices", s.rows, t.group, s.lanes, s.slices),
            Cut::Matrices(m) => m.name(),
        };
        tiles.iter().map(name).collect()
    }

    /// Workgroups that share a tile of rows with `dh` elements.
    pub(super) fn parts(&self, dh: usize) -> usize {
        let Cut::Tiled { part, .. } = self.cut else { return 1 };
        units(dh).2 / part
    }

    pub(super) fn rows_of_group(&self) -> usize {
        match self.cut {
            Cut::Rows(n) | Cut::Wide(n, _) => self.group * n,
            Cut::Tiled { lanes, .. } => 4 * self.group / lanes,
            Cut::Decode(_) => 1,
            Cut::Split(split) => split.rows,
            Cut::Matrices(m) => m.rows(),
        }
    }

    /// The most rows of the other side that one dispatch may meet, in `loops` loops over the columns of each set that
    /// an invocation meets at a time. `None` if any number will do.
    pub(super) fn others_of_dispatch(&self, dh: usize, loops: usize) -> Option<usize> {
        let Cut::Wide(_, others) = self.cut else { return None };
        // One more for each loop, and one for the loop over sets: the quirk `loops-end-early`.
        let iterations = (units(dh).2 + 2) * loops;
        let looking = if self.from { OWN_ROWS } else { 0 };
        Some(((LOOP_ITERATIONS - looking) / iterations).max(1) * others)
    }
}

/// What kernels load at a time: its type, its number of elements, and the number of loads in a head of `dh` elements.
pub(super) fn units(dh: usize) -> (&'static str, usize, usize) {
    let (elem, width) = if dh.is_multiple_of(4) { ("vec4<f32>", 4) } else { ("f32", 1) };
    (elem, width, dh / width)
}
