//! throughline: a GPU transformer runtime on wgpu.
#![warn(missing_docs, missing_debug_implementations, rust_2018_idioms)]

pub mod autodiff;
//NN pub mod checkpoint;
pub mod data;
pub mod error;
pub mod exec;
mod fuse;
pub mod gpu;
pub mod graph;
pub mod kernel;
//NN pub mod nn;
pub mod ops;
//NN pub mod optim;
pub mod plan;
pub mod reference;
pub mod rng;
//NN pub mod sample;
pub mod tensor;
//NN pub mod train;

pub use error::{Error, Result};
pub use exec::{ExecOptions, Executable};
pub use gpu::{AdapterClass, Gpu, Profile, Readback};
pub use graph::{Graph, Value};
pub use plan::Plan;
pub use tensor::{DType, Element, Shape, Tensor, TensorType};
