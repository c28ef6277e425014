//! Tiles of products on cooperative matrices: `shaders/common/matrices.wgsl`, which ops complete.

use crate::kernel::Kernel;
use crate::profile::{Cooperative, Profile};

/// The text of a kernel on cooperative matrices: `enable` lines, and the files after them.
macro_rules! cooperative_source {
    ([$($extension:literal),+], $($file:literal),+) => {
        concat!(
            $("enable ", $extension, ";\n",)+
            $(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $file)),)+
        )
    };
}

/// The same text for matrices of f32 and for those of f16.
macro_rules! cooperative_sources {
    ($($file:literal),+) => {
        $crate::ops::cooperative::Sources {
            f32: $crate::ops::cooperative::cooperative_source!(["wgpu_cooperative_matrix"], $($file),+),
            f16: $crate::ops::cooperative::cooperative_source!(["wgpu_cooperative_matrix", "f16"], $($file),+),
        }
    };
}

pub(super) use {cooperative_source, cooperative_sources};

/// A text that [`cooperative_sources`] has put together.
#[derive(Clone, Copy)]
pub(super) struct Sources {
    pub f32: &'static str,
    pub f16: &'static str,
}

/// What a workgroup computes, and how many subgroups do it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct MatrixTile {
    kind: Cooperative,
    /// Rows and columns.
    pub m: usize,
    pub n: usize,
    /// Subgroups along m and along n.
    subgroups: [usize; 2],
    /// Invocations of a subgroup.
    lanes: usize,
    /// How fast it is on a card that it fills, as a multiple of the fastest tile without matrices.
    pub speed: f64,
}

/// Length along k of a strip in workgroup memory, as in the WGSL.
const TILE_K: usize = 16;

/// Rows and columns, subgroups along both, and [`MatrixTile::speed`]. Matrices of 16 x 16 multiply 4 to 16 times as fast
/// as the rest of their cards, but wait for memory; those of 8 x 8 are little faster.
type Size = ([usize; 2], [usize; 2], f64);

const SIZES_16: [Size; 6] = [
    ([128, 128], [2, 4], 4.0),
    // In less memory, with sums that take most registers.
    ([128, 128], [2, 2], 3.9),
    ([128, 64], [2, 2], 3.2),
    ([64, 64], [2, 2], 2.6),
    ([64, 32], [2, 1], 1.8),
    ([32, 32], [1, 1], 1.3),
];
const SIZES_8: [Size; 3] = [([64, 64], [2, 2], 1.3), ([64, 32], [2, 1], 1.05), ([32, 32], [1, 1], 0.8)];

/// The same for workgroups of one subgroup. The first has too many sums for less than 64 invocations.
const SINGLE_16: [Size; 3] = [([64, 64], [1, 1], 2.6), ([32, 64], [1, 1], 1.8), ([32, 32], [1, 1], 1.3)];
const SINGLE_8: [Size; 1] = [([32, 32], [1, 1], 0.8)];

impl MatrixTile {
    /// The tiles for a device, the largest first. None without cooperative matrices.
    pub fn all(profile: &Profile) -> Vec<MatrixTile> {
        let Some(kind) = profile.cooperative else { return vec![] };
        let (lanes, several) = profile.cooperating();
        let sizes: &[Size] = match (kind.size(), several) {
            (16, true) => &SIZES_16,
            (16, false) => &SINGLE_16[usize::from(lanes < 64)..],
            (_, true) => &SIZES_8,
            (_, false) => &SINGLE_8,
        };
        let tile =
            |&([m, n], subgroups, speed): &Size| MatrixTile { kind, m, n, subgroups, lanes: lanes as usize, speed };
        sizes.iter().map(tile).filter(|tile| tile.invocations() <= profile.max_invocations as usize).collect()
    }

    /// Subgroups of a workgroup.
    pub fn subgroups(self) -> usize {
        self.subgroups.iter().product()
    }

    /// Invocations of a workgroup.
    pub fn invocations(self) -> usize {
        self.lanes * self.subgroups()
    }

    /// The text of a kernel that its matrices are to multiply in.
    pub fn text(self, sources: &Sources) -> &'static str {
        if self.kind.is_f16() { sources.f16 } else { sources.f32 }
    }

    /// As how many invocations it counts in estimates: a small subgroup of a software adapter does what a card's does.
    pub fn busy(self) -> usize {
        self.lanes.max(32) * self.subgroups()
    }

    /// Bytes of workgroup memory, at least.
    pub fn workgroup_bytes(self) -> usize {
        self.bytes_with(1)
    }

    /// With so many buffers for strips.
    fn bytes_with(self, buffers: usize) -> usize {
        let MatrixTile { kind, m, n, subgroups: [down, across], .. } = self;
        let (bytes, size) = (if kind.is_f16() { 2 } else { 4 }, kind.size() as usize);
        // A strip of b that goes along n takes no more.
        let strips = (m + n) * (bytes * TILE_K + ROW_GAP);
        let out = 4 * size * (256 / size).min(n / across);
        buffers * strips + down * across * out
    }

    /// Sets the knobs of shaders/common/matrices.wgsl.
    pub fn knobs(self, kernel: Kernel, profile: &Profile) -> Kernel {
        let MatrixTile { kind, m, n, subgroups: [down, across], lanes, .. } = self;
        // A second buffer saves every other barrier, which costs a workgroup of one subgroup nothing. In f32, it would
        // leave too little memory for other workgroups.
        let two = down * across > 1 && kind.is_f16() && self.bytes_with(2) <= profile.max_workgroup_bytes as usize;
        let kernel = kernel
            .knob("TILE_M", m as u32)
            .knob("TILE_N", n as u32)
            .knob("SUBGROUPS_M", down as u32)
            .knob("SUBGROUPS_N", across as u32)
            .knob("COOPERATING", lanes as u32)
            .knob("PAD", if kind.is_f16() { 8u32 } else { 4 })
            .knob("BUFFERS", if two { 2u32 } else { 1 });
        kind.knobs().into_iter().fold(kernel, |kernel, (name, value)| kernel.knob(name, value.as_str()))
    }

    /// The name, for measurements and messages.
    pub fn name(self) -> String {
        let MatrixTile { kind, m, n, .. } = self;
        format!("cooperative {kind:?} {m}x{n} by {}", self.subgroups())
    }
}

/// Bytes between rows of a strip: `PAD` in the WGSL.
const ROW_GAP: usize = 16;
