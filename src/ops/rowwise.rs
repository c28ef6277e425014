//! Host side of the kernels that work row by row: how a row is split over invocations.

use super::source::{LaneSource, table_kernel};
use crate::graph::Op;
use crate::kernel::{Kernel, Launch};
use crate::profile::AdapterClass;
use crate::quirks::LOOP_ITERATIONS;

/// How `rows` rows of `cols` elements map to workgroups. A kernel receives the mapping as knobs.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowLayout {
    /// Invocations of a workgroup.
    group: usize,
    /// Invocations that share a row, or several rows.
    pub lanes: usize,
    /// Neighbouring lanes between which subgroup operations move values: 1 without subgroup operations.
    reach: usize,
    /// Elements per load: 4, or 1 where the row length is not a multiple of 4.
    pub width: usize,
    /// Workgroups.
    pub groups: usize,
}

/// Invocations of a workgroup on GPUs.
const GPU_GROUP: usize = 256;

impl RowLayout {
    /// Lanes for rows of `cols` elements; the lanes work on `each` rows at a time, in so many passes over each.
    pub fn new(cx: &Launch<'_>, rows: usize, cols: usize, each: usize, passes: usize) -> Self {
        let width = if cols.is_multiple_of(4) { 4 } else { 1 };
        let reach = reach(cx);
        let (group, lanes) = match cx.profile.class {
            // One vector, if its lanes can reduce among themselves. Otherwise one lane per row, since a barrier costs a
            // context switch; but one lane alone would meet the quirk `loops-end-early` in a very long row.
            AdapterClass::Cpu if reach > 1 => (reach, reach),
            AdapterClass::Cpu if passes * (cols / width + 1) < LOOP_ITERATIONS => (8, 1),
            AdapterClass::Cpu => (8, 8),
            // A subgroup, or up to the whole workgroup where lanes would need more than 8 loads.
            AdapterClass::Gpu if reach > 1 => {
                (GPU_GROUP, (cols / width).div_ceil(8).next_power_of_two().clamp(reach, GPU_GROUP))
            }
            AdapterClass::Gpu => (GPU_GROUP, (cols / width).next_power_of_two().clamp(16, GPU_GROUP)),
        };
        RowLayout { group, lanes, reach, width, groups: rows.div_ceil(group / lanes * each) }
    }

    /// Like [`new`](Self::new), for kernels that share nothing between rows. On software adapters these run best with
    /// one lane per row, if there are enough rows: no reduction, and no idle lanes in short rows. In so many passes over
    /// very long rows it would meet the quirk `loops-end-early`.
    pub fn independent(cx: &Launch<'_>, rows: usize, cols: usize, passes: usize) -> Self {
        let layout = Self::new(cx, rows, cols, 1, passes);
        let short = passes * (cols / layout.width + 1) < LOOP_ITERATIONS;
        if cx.profile.class == AdapterClass::Cpu && rows >= 8 * layout.group && short {
            return RowLayout { lanes: 1, groups: rows.div_ceil(layout.group), ..layout };
        }
        layout
    }

    /// Checks that no row is too long for so many passes: the quirk `loops-end-early`.
    pub fn check(&self, cx: &Launch<'_>, cols: usize, passes: usize) -> Result<(), String> {
        // Lanes without subgroups loop when they reduce, too: for up to four rows, two values of each.
        let iterations = passes * (cols / self.width / self.lanes + 64);
        cx.profile.quirks.check_loops("the length of a row", cols, iterations)
    }

    /// One row, split over a single workgroup.
    pub fn whole(cx: &Launch<'_>) -> Self {
        let group = match cx.profile.class {
            AdapterClass::Cpu => cx.profile.vector_lanes().0,
            AdapterClass::Gpu => GPU_GROUP,
        };
        RowLayout { group, lanes: group, reach: reach(cx), width: 4, groups: 1 }
    }

    /// A kernel with these knobs.
    pub fn kernel<O: Op>(&self, label: &'static str, source: LaneSource, entry: &'static str) -> Kernel {
        let elem = if self.width == 4 { "vec4<f32>" } else { "f32" };
        table_kernel::<O>(label, source.text(self.reach > 1), entry)
            .knob("GROUP", self.group as u32)
            .knob("LANES", self.lanes as u32)
            .knob("REACH", self.reach as u32)
            .knob("E", elem)
            .knob("WIDTH", self.width as u32)
    }
}

/// Subgroup size that the kernels rely on; see [`RowLayout::reach`].
fn reach(cx: &Launch<'_>) -> usize {
    match (cx.profile.class, cx.profile.vector_lanes()) {
        (AdapterClass::Cpu, (lanes, true)) => lanes,
        (AdapterClass::Cpu, _) => 1,
        (AdapterClass::Gpu, _) => cx.profile.subgroup_lanes().map_or(1, |lanes| (lanes as usize).min(GPU_GROUP)),
    }
}
