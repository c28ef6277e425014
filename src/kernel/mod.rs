//! Kernels: WGSL with knobs, and the dispatches that an op makes of them. No device is needed here.
//!
//! You need this module only to write an [op](crate::ops) of your own, or to see the WGSL that a plan runs
//! ([`Kernel::wgsl`]).

mod elementwise;
mod gemv;
mod halves;
mod knobs;
pub(crate) mod merge;
mod numbered;
mod program;
mod text;
mod together;
mod unroll;
pub(crate) mod wgsl;

pub use elementwise::Elementwise;
pub(crate) use gemv::FEW_ROWS;
pub use gemv::{Gemv, OnRead};
pub(crate) use halves::Halves;
pub use knobs::{Kernel, KnobValue};
pub use merge::Bound;
pub(crate) use numbered::suffixed;
pub use program::{Bind, Dispatch, Launch, Program};
pub(crate) use text::{filled, line};
pub(crate) use together::{SKELETON, together};
