//! Train, fine-tune and run small transformers on any GPU, in plain Rust.
//!
//! throughline turns a graph of tensor operations into WGSL compute shaders and runs it forward and backward through
//! [wgpu](https://wgpu.rs): on Vulkan, Metal and DX12, and on a software adapter where there is no GPU. It runs on a
//! device of its own or on that of your application, between your own passes and within a time budget per frame. Every
//! gradient is tested against an f64 reference, and the same run gives the same bits.
//!
//! # A guided map
//!
//! * **Build** a [`Graph`] of named nodes with checked shapes. Its methods add the operations, and
//!   [`gradients`](Graph::gradients) adds the backward pass. [`nn::Builder`] adds layers with their
//!   parameters, and [`nn`] assembles whole transformers, from a [`TransformerConfig`](nn::TransformerConfig) or from
//!   blocks of your own. [`ops`] lists the operations. Write one yourself as an [`ops::map::Map`] or an
//!   [`ops::Custom`]; [`kernel`] holds shaders, and [`check`] tests ops. [`tensor`] has shapes and types, and [`graph`]
//!   the rest.
//! * **Plan** what a step will do. A [`Plan`] is data: print it to see kernels, buffers and bytes, and derive from it
//!   the [`Requirements`] that a device must meet. It is made for a [`Profile`], so no device is needed yet. See
//!   [`plan`].
//! * **Run** it. [`Gpu`] is your application's device or a headless one, and an [`Executable`] is a plan with memory
//!   and pipelines on it. A [`Tensor`] is a range of a buffer, yours if you like, and a [`Readback`] brings one to the
//!   host without waiting. [`device`] also reads and writes [textures](device::texture), keeps frames within a budget
//!   ([`Pace`]) and finds the fastest kernels ([`Tuner`]).
//! * **Train** any graph with [`train::GraphTrainer`], or a language model with [`train::Trainer`]. A step is one
//!   submit, or slices over several frames. [`optim`] has AdamW, Muon, SGD and learning rate schedules, [`train::data`]
//!   batches of text. Checkpoints resume bit for bit: all randomness comes from [`rng`], as a function of seed and step.
//! * **Decode.** [`model::Model`] opens GGUF files and Hugging Face folders ([`mod@format`] has their raw tensors).
//!   [`decode::Decoder`] generates text, `decode::Chat` holds a conversation, and [`decode::FrameDecoder`] speaks in the
//!   frames of an application. [`sentence::SentenceEncoder`] turns sentences into vectors, and [`tokenize`] text into
//!   tokens.
//! * **Look inside.** [`probe`] reads and changes values of a running model, [`views`] has a logit lens, ablations and
//!   attention maps, a [`Timeline`] shows where the time goes, and [`mod@reference`] computes what is right, in f64.
//!
//! Everything fallible returns the one [`Error`], whose kinds say what to do. Functions that wait for the GPU end in
//! `_blocking`.
//!
//! # A first graph
//!
//! ```
//! use std::sync::Arc;
//! use throughline::{ExecOptions, Executable, Gpu, Graph, Plan, TensorType};
//!
//! # fn main() -> throughline::Result<()> {
//! let mut g = Graph::new();
//! let x = g.input("x", TensorType::f32([4, 8]))?;
//! let w = g.param("w", [8, 8])?;
//! let branch = g.matmul("branch", x, w)?;
//! let y = g.residual_add("y", x, branch)?;
//! let loss = g.sum("loss", y)?;
//! let dw = g.gradients(loss, &[w])?[0];
//!
//! let gpu = Gpu::headless_blocking()?;
//! let plan = Plan::new(&g, &[loss, dw], gpu.profile())?;
//! println!("{plan}"); // nodes, kernels, buffers, bytes: before anything is allocated
//! let exec = Executable::new_blocking(&gpu, Arc::new(plan), ExecOptions::default())?;
//! exec.write(x, &[1.0f32; 32])?;
//! exec.write(w, &[0.5f32; 64])?;
//! exec.submit()?;
//! assert_eq!(exec.read_blocking::<f32>(loss)?, [4.0 * 8.0 * 5.0]);
//! assert_eq!(exec.read_blocking::<f32>(dw)?, [4.0; 64]);
//! # Ok(())
//! # }
//! ```
//!
//! [`train::Trainer`] and [`decode::Decoder`] open with examples of training and of generating text. The repository
//! has complete programs, and `examples/in_your_app` puts a network into the frames of an application.
//!
//! # Should I use this crate?
//!
//! **Yes**, if you want transformers without CUDA; if your application owns a wgpu device and wants a network in its
//! frames; or if you want to change an architecture and watch what it does to the residual stream.
//!
//! **No**, if you train large models on NVIDIA cards and speed is all that counts: use PyTorch.
//!
//! **Not yet**, if you need mixtures of experts, a context longer than a model's sliding window, or models that see or
//! hear. Browsers are not supported yet either.
//!
//! # Cargo features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `vulkan` | yes | wgpu's Vulkan back end: Linux, Windows, Android |
//! | `metal` | yes | wgpu's Metal back end: macOS, iOS |
//! | `dx12` | yes | wgpu's Direct3D 12 back end: Windows |
//! | `static-dxc` | no | links Microsoft's DXC shader compiler, which Direct3D 12 needs for subgroup operations |
//! | `tokenizers` | no | [`tokenize`]: the tokenizers and chat templates of model files |
//! | `check` | no | [`check`]: the tests that every op of this crate passes, for ops of your own |
//!
//! A back end does nothing on systems that lack it.
//!
#![cfg_attr(feature = "check", doc = "[`check`]: mod@check")]
#![cfg_attr(not(feature = "check"), doc = "[`check`]: https://docs.rs/throughline/latest/throughline/check/")]
#![cfg_attr(feature = "tokenizers", doc = "[`tokenize`]: mod@tokenize")]
#![cfg_attr(
    not(feature = "tokenizers"),
    doc = "[`tokenize`]: https://docs.rs/throughline/latest/throughline/tokenize/"
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)] // except in device/gpu.rs
#![warn(missing_docs, missing_debug_implementations, rust_2018_idioms)]

mod array;
mod autodiff;
#[cfg(feature = "check")]
pub mod check;
pub mod decode;
pub mod device;
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
mod precision;
pub mod probe;
mod profile;
pub mod quirks;
pub mod reference;
pub mod rng;
pub mod sentence;
pub mod tensor;
#[cfg(feature = "tokenizers")]
pub mod tokenize;
pub mod train;
pub mod views;

#[doc(inline)]
pub use device::{ExecOptions, Executable, Gpu, Pace, Readback, Slice, Tensor, Timeline, Tuner};
#[doc(inline)]
pub use error::{Error, Result};
#[doc(inline)]
pub use graph::{Graph, Value};
#[doc(inline)]
pub use plan::Plan;
#[doc(inline)]
pub use plan::requirements::Requirements;
pub use precision::Precision;
pub use profile::{AdapterClass, Choices, Cooperative, Profile};
#[doc(inline)]
pub use tensor::{DType, Element, Shape, TensorType};
/// The wgpu that this crate uses, so that an application need not name its version a second time.
pub use wgpu;

// The examples of README.md and of the guides, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/in_your_app.md")]
struct InYourApp;

#[cfg(all(doctest, feature = "tokenizers"))]
#[doc = include_str!("../docs/models.md")]
struct Models;

#[cfg(all(doctest, feature = "tokenizers"))]
#[doc = include_str!("../docs/fine_tuning.md")]
struct FineTuning;

#[cfg(all(doctest, feature = "check"))]
#[doc = include_str!("../docs/your_own_network.md")]
struct YourOwnNetwork;
