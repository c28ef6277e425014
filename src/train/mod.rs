//! Training of transformers. A step is one submit with forward, backward, clipping and the update, and nothing is read
//! back.
//!
//! - [`TrainConfig`] describes a run: model, batch, schedule, optimiser, seed.
//! - [`Trainer`] runs it on a device, a step at a time, or [in slices](Trainer::start_sliced) over several frames.
//! - [`TrainPlan`] knows memory and limits before there is a device; [`TrainConfig::fitted`] finds a configuration that
//!   fits.
//! - [`data`] turns text into batches, and [`checkpoint`] saves and resumes a run, bit for bit.
//!
//! `examples/train.rs` in the repository is a complete training program. To train a graph that is not a transformer,
//! combine [`Graph::gradients`](crate::Graph::gradients) with an [`Optimizer`](crate::optim::Optimizer).

pub mod checkpoint;
mod config;
pub mod data;
mod fit;
mod graph;
mod plan;
mod trainer;

pub use config::{TrainConfig, TrainOptions};
pub use graph::{
    Feed, Feeds, GraphCheckpoint, GraphTrainConfig, GraphTrainOptions, GraphTrainPlan, GraphTrainer, SlicedStep,
    StepLoss, StepSlices,
};
pub use plan::TrainPlan;
pub use trainer::Trainer;
