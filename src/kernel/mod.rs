//! Kernels: WGSL with knobs, and the dispatches that an op makes of them. No device is needed here.
//!
//! You need this module only to write an [op](crate::ops) of your own, or to see the WGSL that a plan runs
//! ([`Kernel::wgsl`]).

mod elementwise;
mod knobs;
pub(crate) mod merge;
mod program;
mod unroll;
pub(crate) mod wgsl;

pub use elementwise::Elementwise;
pub use knobs::{Kernel, KnobValue};
pub use merge::Bound;
pub use program::{Bind, Dispatch, Launch, Program};
