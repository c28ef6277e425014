//! What kernels that work row by row share on the host: how a row is split over invocations.

use super::{LaneSource, Launch, table_kernel};
use crate::gpu::AdapterClass;
use crate::kernel::Kernel;

/// Rows that one invocation sums, in kernels that sum over rows.
pub(super) const CHUNK: usize = 32;

/// How `rows` rows of `cols` elements map to workgroups, with the knobs `GROUP`, `LANES`, `E` and
/// `WIDTH` that say so to a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowLayout {
    /// Invocations of a workgroup.
    group: usize,
    /// Invocations that share a row, or several.
    lanes: usize,
    /// Whether these hand values round through subgroup operations.
    subgroups: bool,
    /// Elements of a load: 4, or 1 where rows are no multiple of 4.
    pub width: usize,
    /// Workgroups.
    pub groups: usize,
}

impl RowLayout {
    /// The lanes of one subgroup, where the device has these. Without, one lane on software
    /// adapters, and up to a workgroup on GPUs. The lanes work on `each` rows at a time.
    pub fn new(cx: &Launch<'_>, rows: usize, cols: usize, each: usize) -> Self {
        let width = if cols.is_multiple_of(4) { 4 } else { 1 };
        let ((vector, shuffles), subgroups) = (cx.profile.vector_lanes(), cx.profile.subgroups);
        let (group, lanes, subgroups) = match (cx.profile.class, subgroups) {
            (AdapterClass::Cpu, _) if shuffles => (vector, vector, true),
            (AdapterClass::Cpu, _) => (8, 1, false),
            // As many as every subgroup has, of whatever size it is.
            (AdapterClass::Gpu, Some([min, _])) if min >= 4 && min.is_power_of_two() => {
                (256, min.min(256) as usize, true)
            }
            (AdapterClass::Gpu, _) => (256, (cols / width).next_power_of_two().clamp(16, 256), false),
        };
        RowLayout { group, lanes, subgroups, width, groups: rows.div_ceil(group / lanes * each) }
    }

    /// A kernel with these knobs.
    pub fn kernel(&self, label: &'static str, source: LaneSource, entry: &'static str) -> Kernel {
        let elem = if self.width == 4 { "vec4<f32>" } else { "f32" };
        table_kernel(label, source.text(self.subgroups), entry)
            .knob("GROUP", self.group as u32)
            .knob("LANES", self.lanes as u32)
            .knob("E", elem)
            .knob("WIDTH", self.width as u32)
    }
}
