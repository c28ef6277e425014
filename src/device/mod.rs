//! The device that everything runs on, and what runs on it: the only place that encodes and reads back.

mod exec;
mod gpu;
mod pace;
pub(crate) mod pool;
mod readback;
mod tensor;
pub mod texture;
pub mod timeline;
pub mod tune;

pub use exec::{ExecOptions, Executable, Slice};
pub use gpu::Gpu;
pub(crate) use gpu::now;
pub use pace::Pace;
pub use readback::Readback;
pub use tensor::Tensor;
pub use timeline::Timeline;
pub use tune::Tuner;
