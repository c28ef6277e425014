//! Training: of any graph, and of language models. A step is forward, backward, clipping and the update, submitted
//! without waiting for anything, and nothing is read back.
//!
//! # A network of your own
//!
//! Build a graph with a loss, and give both to a [`GraphTrainer`]. This one learns a sine:
//!
//! ```
//! use throughline::nn::Builder;
//! use throughline::train::{GraphTrainConfig, GraphTrainer};
//! use throughline::{Gpu, TensorType};
//!
//! let gpu = Gpu::headless_blocking()?;
//! let mut g = gpu.graph();
//! let x = g.input("x", TensorType::f32([256, 1]))?;
//! let y = g.input("y", TensorType::f32([256, 1]))?;
//! let out = Builder::new(&mut g).mlp("net", x, &[64, 64, 1], |g, h| g.tanh("tanh", h))?;
//! let loss = g.mse("loss", out, y)?;
//!
//! let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, GraphTrainConfig::adamw(0.01))?;
//! let xs: Vec<f32> = (0..256).map(|i| i as f32 / 40.0 - 3.2).collect();
//! let ys: Vec<f32> = xs.iter().map(|x| x.sin()).collect();
//! for _ in 0..300 {
//!     trainer.step(&[x.with(&xs), y.with(&ys)])?;
//! }
//! assert!(trainer.loss_blocking()? < 0.01);
//!
//! # let dir = tempfile::tempdir().unwrap();
//! # let path = dir.path().join("sine.safetensors");
//! // The weights go to a file and come back.
//! trainer.save_blocking(&path)?;
//! trainer.load_blocking(&path)?;
//! # Ok::<(), throughline::Error>(())
//! ```
//!
//! - [`GraphTrainConfig`] has optimiser, learning rates, micro-batches and seed; [`GraphTrainOptions`] has outputs to
//!   read, frozen parameters, probes and tensors of your own.
//! - [`executable`](GraphTrainer::executable) is a second graph on the same parameters: for evaluation, or to use what
//!   was learnt.
//! - [`record`](GraphTrainer::record) puts a step into your encoder, and [slices](GraphTrainer::start_sliced) spread one
//!   over several frames.
//! - [`save_checkpoint`](GraphTrainer::save_checkpoint) and [`resume`](GraphTrainer::resume) continue a run bit for bit.
//! - [`GraphTrainPlan`] knows memory and limits before there is a device.
//!
//! # Language models
//!
//! [`Trainer`] is a `GraphTrainer` that builds the model itself and takes batches of tokens.
//!
//! - [`TrainConfig`] describes a run: model, batch, schedule, optimiser, seed.
//! - [`Trainer`] runs it on a device, a step at a time, or [in slices](Trainer::start_sliced) over several frames.
//! - [`TrainPlan`] knows memory and limits before there is a device; [`TrainConfig::fitted`] finds a configuration that
//!   fits.
//! - [`data`] turns chats, prompts with completions and texts into batches, and [`checkpoint`] saves and resumes a run,
//!   bit for bit.
//! - [`Progress`] and [`EarlyStop`] say how far a run is and when to end it.
//!
//! `examples/train.rs` in the repository is a complete training program.

mod adapter;
mod base;
pub mod checkpoint;
mod config;
pub mod data;
mod fit;
mod graph;
mod plan;
mod progress;
mod trainer;

pub use config::{TrainConfig, TrainOptions};
pub use graph::{
    Feed, Feeds, GraphCheckpoint, GraphTrainConfig, GraphTrainOptions, GraphTrainPlan, GraphTrainer, SlicedStep,
    StepLoss, StepReport, StepSlices,
};
pub use plan::TrainPlan;
pub use progress::{EarlyStop, Progress};
pub use trainer::Trainer;
