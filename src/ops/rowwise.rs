//! What kernels that work row by row share on the host: how a row is split over invocations.

use super::Launch;
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
    /// Invocations that share a row.
    lanes: usize,
    /// Elements of a load: 4, or 1 where rows are no multiple of 4.
    pub width: usize,
    /// Workgroups.
    pub groups: usize,
}

impl RowLayout {
    /// One lane a row on software adapters, a quarter to a whole workgroup of 256 on GPUs.
    pub fn new(cx: &Launch<'_>, rows: usize, cols: usize) -> Self {
        let width = if cols.is_multiple_of(4) { 4 } else { 1 };
        let (group, lanes) = match cx.profile.class {
            AdapterClass::Cpu => (8, 1),
            AdapterClass::Gpu => (256, (cols / width).next_power_of_two().clamp(16, 256)),
        };
        RowLayout { group, lanes, width, groups: rows.div_ceil(group / lanes) }
    }

    /// Sets the knobs.
    pub fn knobs(&self, kernel: Kernel) -> Kernel {
        self.element(kernel.knob("GROUP", self.group as u32).knob("LANES", self.lanes as u32))
    }

    /// Sets the element knobs alone, for entry points that do not reduce along rows.
    pub fn element(&self, kernel: Kernel) -> Kernel {
        let elem = if self.width == 4 { "vec4<f32>" } else { "f32" };
        kernel.knob("E", elem).knob("WIDTH", self.width as u32)
    }
}
