//! throughline: a GPU transformer runtime on wgpu.
#![warn(missing_docs, missing_debug_implementations, rust_2018_idioms)]

pub mod autodiff;
pub mod checkpoint;
pub mod data;
pub mod error;
pub mod exec;
mod fuse;
pub mod gpu;
pub mod graph;
pub mod kernel;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod reference;
pub mod rng;
pub mod sample;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
pub use exec::{ExecOptions, Executable};
pub use gpu::{AdapterClass, Gpu, Profile, Readback};
pub use graph::{Graph, Value};
pub use plan::Plan;
pub use tensor::{DType, Element, Shape, Tensor, TensorType};
