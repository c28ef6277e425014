#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! Build a [`Graph`] (by hand, or with [`nn`]), differentiate it ([`Graph::gradients`]), turn it into
//! a [`Plan`] and run that as an [`Executable`] on a [`Gpu`]. [`train`], [`optim`], [`data`],
//! [`sample`] and [`checkpoint`] are what training needs around it; [`probe`] and [`views`] show what a
//! model does. [`mod@format`] reads model files. [`ops`] holds the op table, [`mod@reference`] the f64 oracle.
#![warn(missing_docs, missing_debug_implementations, rust_2018_idioms)]

pub mod autodiff;
#[cfg(feature = "check")]
pub mod check;
pub mod checkpoint;
pub mod data;
mod declared;
pub mod decode;
pub mod embed;
pub mod error;
pub mod exec;
pub mod format;
mod fuse;
pub mod gpu;
pub mod graph;
pub mod kernel;
mod merge;
pub mod model;
pub mod nn;
pub mod ops;
pub mod optim;
mod pace;
pub mod plan;
mod planner;
pub mod probe;
mod profile;
pub mod reference;
mod requirements;
pub mod rng;
pub mod sample;
mod staging;
pub mod tensor;
pub mod texture;
pub mod timeline;
#[cfg(feature = "tokenizers")]
pub mod tokenize;
pub mod train;
pub mod tune;
pub mod views;
mod wgsl;

pub use error::{Error, Result};
pub use exec::{ExecOptions, Executable, Slice};
pub use gpu::Gpu;
pub use graph::{Graph, Value};
pub use pace::Pace;
pub use plan::Plan;
pub use profile::{AdapterClass, Cooperative, Profile};
pub use requirements::Requirements;
pub use staging::Readback;
pub use tensor::{DType, Element, Shape, Tensor, TensorType};
pub use timeline::Timeline;
pub use tune::Tuner;
