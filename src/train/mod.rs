//! Training of transformers: a step is one submit with forward, backward, clipping and AdamW, and nothing read back.

pub mod checkpoint;
mod config;
pub mod data;
mod fit;
mod plan;
mod slices;
mod trainer;

pub use config::{TrainConfig, TrainOptions};
pub use plan::TrainPlan;
pub use slices::{SlicedStep, StepSlices};
pub use trainer::{StepLoss, Trainer};
