//! The device, and everything that runs on it.
//!
//! - [`Gpu`] is the entry point: your application's wgpu device, or a headless one.
//! - [`Executable`] runs a [plan](crate::Plan), as a whole or in slices.
//! - [`Tensor`] is a range of a buffer; [`Readback`] brings one to the host.
//! - [`Pace`] keeps recorded work within a frame's budget.
//! - [`Timeline`] shows where a step spends its time, and a [`Tuner`] makes it faster.
//! - [`texture`] reads textures into tensors, and writes tensors into textures.
//!
//! What is `async` here resolves when the device has been polled, which every submit does: in an app that renders, there
//! is nothing to do. An executor such as `pollster` polls the future alone and would wait for ever. Outside of frames,
//! use the function's `_blocking` form, or [`Gpu::run_blocking`] for any of them.
//!
//! This is the only part of the crate that records commands or reads back.

mod exec;
mod fate;
mod findings;
mod gpu;
mod pace;
pub(crate) mod pool;
mod readback;
mod self_test;
mod stream;
mod submits;
mod tensor;
pub mod texture;
mod ticks;
pub mod timeline;
pub mod tune;
mod wait;

pub(crate) use exec::Memory;
#[cfg(feature = "check")]
pub(crate) use exec::SENTINEL;
pub use exec::{ExecOptions, Executable, Slice};
pub(crate) use fate::{Fate, Tally};
pub use findings::{Capability, Dropped, SelfTest};
pub use gpu::Gpu;
pub(crate) use gpu::now;
pub use pace::Pace;
pub use readback::Readback;
pub(crate) use stream::{PIECE, PIECE_BYTES, Uploads, pieces, read_part};
pub(crate) use submits::Submits;
pub use tensor::Tensor;
pub use timeline::Timeline;
pub use tune::Tuner;
