//! Kernels: WGSL with knobs, and the dispatches that an op makes of them. No device is needed here.

mod knobs;
pub(crate) mod merge;
mod program;
pub(crate) mod wgsl;

pub use knobs::{Kernel, KnobValue};
pub use merge::Bound;
pub use program::{Bind, Dispatch, Launch, Program};
