#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! Build a [`Graph`] (by hand, or with [`nn`]), differentiate it ([`Graph::gradients`]), turn it into
//! a [`Plan`] and run that as an [`Executable`] on a [`Gpu`]. [`train`] and [`optim`] are what training needs
//! around it; [`probe`] and [`views`] show what a model does. [`mod@format`] reads model files, [`model`] and
//! [`decode`] run them. [`ops`] holds the op table, [`mod@reference`] the f64 oracle.
#![deny(unsafe_code)] // but in device/gpu.rs
#![warn(missing_docs, missing_debug_implementations, rust_2018_idioms)]

mod array;
mod autodiff;
pub mod decode;
pub mod device;
pub mod embed;
pub mod error;
mod files;
pub mod format;
pub mod graph;
mod hash;
pub mod kernel;
pub mod model;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod probe;
mod profile;
pub mod quirks;
pub mod reference;
pub mod rng;
pub mod tensor;
#[cfg(feature = "tokenizers")]
pub mod tokenize;
pub mod train;
pub mod views;

pub use device::{ExecOptions, Executable, Gpu, Pace, Readback, Slice, Tensor, Timeline, Tuner};
pub use error::{Error, Result};
pub use graph::{Graph, Value};
pub use plan::Plan;
pub use plan::requirements::Requirements;
pub use profile::{AdapterClass, Choices, Cooperative, Profile};
pub use tensor::{DType, Element, Shape, TensorType};
