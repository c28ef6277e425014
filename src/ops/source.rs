//! WGSL text of the table's kernels.

use std::any::TypeId;

use crate::graph::Op;
use crate::kernel::Kernel;

/// A WGSL file preceded by `shaders/common/subgroups.wgsl`, or by its stand-in for devices without subgroups.
#[derive(Clone, Copy)]
pub(crate) struct LaneSource {
    /// For devices without subgroup operations.
    pub plain: &'static str,
    /// For devices with them.
    pub subgroups: &'static str,
}

impl LaneSource {
    /// The text for devices with subgroup operations, or for those without.
    pub fn text(&self, subgroups: bool) -> &'static str {
        if subgroups { self.subgroups } else { self.plain }
    }
}

macro_rules! lane_source {
    ($($file:literal),+) => {
        $crate::ops::source::LaneSource {
            plain: concat!(
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/common/no_subgroups.wgsl")),
                $(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $file))),+
            ),
            subgroups: concat!(
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/common/subgroups.wgsl")),
                $(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $file))),+
            ),
        }
    };
}

pub(crate) use lane_source;

/// A kernel of the table's op `O`, which alone may run it without injected bounds checks; see [`Kernel::is_trusted`].
pub(crate) fn table_kernel<O: Op>(label: &'static str, source: &'static str, entry: &'static str) -> Kernel {
    Kernel::new(label, source, entry).made_by(TypeId::of::<O>())
}
