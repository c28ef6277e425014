//! WGSL texts.

use crate::ops::source::{LaneSource, lane_source};

macro_rules! source {
    ($($file:literal),+) => {
        concat!(
            include_str!("../../../shaders/attention/shared.wgsl"),
            $(include_str!(concat!("../../../shaders/attention/", $file)),)+
        )
    };
}

// The texts of each family of kernels; `shaders/attention/shared.wgsl` says what each is for.
pub(super) const LANES: LaneSource =
    lane_source!("attention/shared.wgsl", "attention/all_keys.wgsl", "attention/own_rows.wgsl", "attention/lanes.wgsl");
pub(super) const LANES_FROM: LaneSource =
    lane_source!("attention/shared.wgsl", "attention/from.wgsl", "attention/own_rows.wgsl", "attention/lanes.wgsl");
pub(super) const WIDE: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/own_rows.wgsl",
    "attention/wide.wgsl"
);
pub(super) const WIDE_FROM: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/from.wgsl",
    "attention/dots.wgsl",
    "attention/own_rows.wgsl",
    "attention/wide.wgsl"
);
pub(super) const TILED: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/tiles.wgsl",
    "attention/teams.wgsl",
    "attention/make_deltas.wgsl",
    "attention/tiled.wgsl"
);
pub(super) const TILED_FROM: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/from.wgsl",
    "attention/dots.wgsl",
    "attention/tiles.wgsl",
    "attention/teams.wgsl",
    "attention/read_deltas.wgsl",
    "attention/tiled.wgsl"
);
pub(super) const DECODE: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/decode.wgsl"
);
pub(super) const SPLIT: LaneSource = lane_source!(
    "attention/shared.wgsl",
    "attention/all_keys.wgsl",
    "attention/dots.wgsl",
    "attention/teams.wgsl",
    "attention/split.wgsl"
);
pub(super) const COMBINE: &str = source!("combine.wgsl");
pub(super) const ROW_DOTS: &str = source!("row_dots.wgsl");

macro_rules! cooperative {
    ($keys:literal, $units:literal $(, $extension:literal)*) => {
        concat!(
            "enable wgpu_cooperative_matrix;\n",
            $("enable ", $extension, ";\n",)*
            source!($keys, "dots.wgsl", "tiles.wgsl", $units, "cooperative.wgsl"),
        )
    };
}
const COOPERATIVE: &str = cooperative!("all_keys.wgsl", "quads.wgsl");
const COOPERATIVE_FROM: &str = cooperative!("from.wgsl", "quads.wgsl");

/// On cooperative matrices: of f16 or f32, for queries that see keys from a first one on or all, and for heads whose
/// width is a multiple of 4 or not.
pub(super) fn cooperative(f16: bool, from: bool, quads: bool) -> &'static str {
    match (f16, from, quads) {
        (false, false, true) => COOPERATIVE,
        (false, false, false) => cooperative!("all_keys.wgsl", "elements.wgsl"),
        (false, true, true) => COOPERATIVE_FROM,
        (false, true, false) => cooperative!("from.wgsl", "elements.wgsl"),
        (true, false, true) => cooperative!("all_keys.wgsl", "quads.wgsl", "f16"),
        (true, false, false) => cooperative!("all_keys.wgsl", "elements.wgsl", "f16"),
        (true, true, true) => cooperative!("from.wgsl", "quads.wgsl", "f16"),
        (true, true, false) => cooperative!("from.wgsl", "elements.wgsl", "f16"),
    }
}

pub(super) const SOURCES: &[&str] = &[
    LANES.plain,
    LANES_FROM.plain,
    WIDE.plain,
    WIDE_FROM.plain,
    TILED.plain,
    TILED_FROM.plain,
    DECODE.plain,
    SPLIT.plain,
    COMBINE,
    ROW_DOTS,
    COOPERATIVE,
    COOPERATIVE_FROM,
];
